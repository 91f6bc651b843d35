#include <fmt/format.h>
#include <sys/resource.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <chrono>
#include <iostream>

#include "cli/cli.h"
#include "cli/interrupt.h"

namespace cleave::cli {
namespace {

struct RunOptions {
  CommonOptions common;
  ModelOptions loading;
  std::string model;
  std::string prompt;
  GenerateSpec generate;
};

/// Peak resident memory of this process: what the system had to give it, mapped weights included.
std::int64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<std::int64_t>(usage.ru_maxrss) * 1024;
}

struct RunResult {
  std::string text;
  std::vector<std::int32_t> prompt, ids;
  double prompt_rate = 0.0, rate = 0.0;  ///< tokens/s
};

/// Streams to stdout but with --json. Ends early at Ctrl-C or when stdout takes no more.
RunResult stream_text(const RunOptions& options, const Tokenizer& tokenizer, Model& model) {
  RunResult result;
  result.prompt = tokenizer.encode(options.prompt, true);
  GenerateSpec spec = options.generate;
  spec.sampling.seed = options.common.seed;
  TextStream stream(tokenizer, result.prompt);
  const auto emit = [&](const std::string& piece) {
    result.text += piece;
    if (!options.common.json) std::cout << piece << std::flush;
  };
  if (!options.common.json) std::cout << options.prompt << std::flush;

  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  auto first = begin;
  result.ids = generate(model, result.prompt, spec, [&](std::int32_t id) {
    if (first == begin) first = Clock::now();
    emit(stream.push(id));
    return !InterruptGuard::requested() && std::cout.good();
  });
  const auto end = Clock::now();
  if (first == begin) first = end;
  emit(stream.flush());
  const auto rate = [](std::size_t tokens, Clock::duration time) {
    const double seconds = std::chrono::duration<double>(time).count();
    return seconds > 0 ? static_cast<double>(tokens) / seconds : 0.0;
  };
  result.prompt_rate = rate(result.prompt.size(), first - begin);
  // The first token belongs to the prompt: it needed no step of its own.
  if (result.ids.size() > 1) result.rate = rate(result.ids.size() - 1, end - first);
  return result;
}

void print_summary(const RunResult& result, const Model& model, WeightType weights) {
  fmt::print(stderr,
             "\n"
             "prompt      {:6} tokens  {:9.1f} tokens/s\n"
             "generation  {:6} tokens  {:9.1f} tokens/s\n"
             "{} threads, {}; weights {}, {} {}; {} resident at most\n",
             result.prompt.size(), result.prompt_rate, result.ids.size(), result.rate,
             model.threads(), isa_name(), weight_type_name(weights),
             human_bytes(static_cast<double>(model.weight_bytes())),
             model.cached() ? "mapped from the cache file" : "in memory",
             human_bytes(static_cast<double>(peak_resident_bytes())));
}

Json to_json(const RunOptions& options, const RunResult& result, const Model& model,
             WeightType weights) {
  return {{"model", options.model},
          {"prompt", options.prompt},
          {"text", result.text},
          {"ids", result.ids},
          {"prompt_tokens", result.prompt.size()},
          {"tokens", result.ids.size()},
          {"prompt_tokens_per_s", result.prompt_rate},
          {"tokens_per_s", result.rate},
          {"threads", model.threads()},
          {"instruction_set", isa_name()},
          {"weights", weight_type_name(weights)},
          {"weight_bytes", model.weight_bytes()},
          {"cached", model.cached()},
          {"peak_resident_bytes", peak_resident_bytes()},
          {"seed", options.common.seed},
          {"interrupted", InterruptGuard::requested()}};
}

struct Loaded {
  Tokenizer tokenizer;
  Model model;
  WeightType weights;
};

/// Gives the system back what was freed: after a document or a layer in float32, as much as the KV
/// cache of some hundred tokens.
void trim_memory() {
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}

/// One heap for all threads: in the one that each would have of its own, what packing needed for a
/// moment stays.
void share_heap() {
#ifdef __GLIBC__
  mallopt(M_ARENA_MAX, 1);
#endif
}

/// The checkpoint is closed again: what it maps and knows is not needed to run.
Loaded load(const RunOptions& options) {
  const Checkpoint checkpoint = Checkpoint::open(options.model);
  require_text_writer("run", checkpoint);
  Tokenizer tokenizer = Tokenizer::from_checkpoint(checkpoint);
  trim_memory();
  const ModelSpec spec = model_spec(options.loading, options.common, checkpoint);
  Model model = Model::load(checkpoint, spec);
  return {std::move(tokenizer), std::move(model), spec.weights};
}

void run_model(const RunOptions& options) {
  if (options.prompt.empty())
    throw InvalidArgument("--prompt: empty; give it at least one character");
  share_heap();
  auto [tokenizer, model, weights] = load(options);
  trim_memory();
  const InterruptGuard guard;
  const RunResult result = stream_text(options, tokenizer, model);
  const bool json = options.common.json;
  print_result(options.common, json ? to_json(options, result, model, weights) : Json(), "\n");
  if (!options.common.quiet) print_summary(result, model, weights);
  if (InterruptGuard::requested()) {
    fmt::print(stderr, "cleave: interrupted\n");
    throw CLI::RuntimeError(kInterruptedExit);
  }
}

}  // namespace

void add_run_command(CLI::App& app) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* command = app.add_subcommand("run", "Continue a text, as a stream");
  command->alias("generate");
  command->add_option("MODEL", options->model, "Model directory or GGUF file")->required();
  command->add_option("-p,--prompt", options->prompt, "The text to continue")->required();
  command->add_option("-n,--max-tokens", options->generate.max_tokens, "Tokens to generate at most")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command
      ->add_option("--temperature", options->generate.sampling.temperature,
                   "0: always the most likely token; higher: more random")
      ->capture_default_str();
  command
      ->add_option("--top-p", options->generate.sampling.top_p,
                   "Draw from the smallest set of tokens with this much probability, (0, 1]")
      ->capture_default_str();
  command->add_flag("--ignore-eos", options->generate.ignore_eos,
                    "Go on after an end-of-sequence token");
  add_seed_option(*command, options->common, "the sampling");
  add_model_options(*command, options->loading);
  add_common_options(*command, options->common);
  command->callback([options] { run_model(*options); });
}

}  // namespace cleave::cli
