#include <fmt/format.h>

#include <chrono>
#include <iostream>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

struct GenerateOptions {
  CommonOptions common;
  std::string weights = "auto";
  std::string model;
  std::string prompt;
  GenerateSpec generate;
};

/// Turns a growing list of ids into text piece by piece. A character whose bytes span several
/// tokens is held back until it is complete.
class TextStream {
 public:
  TextStream(const Tokenizer& tokenizer, std::vector<std::int32_t> prompt)
      : tokenizer_(tokenizer), ids_(std::move(prompt)), shown_(tokenizer_.decode(ids_).size()) {}

  std::string push(std::int32_t id) {
    ids_.push_back(id);
    const std::string text = tokenizer_.decode(ids_);
    const std::string_view replacement = "\xEF\xBF\xBD";  // U+FFFD: an incomplete character
    if (text.size() <= shown_ || text.ends_with(replacement)) return {};
    return take(text);
  }
  std::string flush() {
    const std::string text = tokenizer_.decode(ids_);
    return text.size() > shown_ ? take(text) : std::string();
  }

 private:
  std::string take(const std::string& text) {
    std::string piece = text.substr(shown_);
    shown_ = text.size();
    return piece;
  }
  const Tokenizer& tokenizer_;
  std::vector<std::int32_t> ids_;
  std::size_t shown_;
};

void run_generate(const GenerateOptions& options) {
  if (options.prompt.empty())
    throw InvalidArgument("--prompt: empty; give it at least one character");
  const Checkpoint checkpoint = Checkpoint::open(options.model);
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(checkpoint);
  Model model = Model::load(checkpoint, {.threads = options.common.threads,
                                         .weights = resolve_weights(options.weights, checkpoint)});

  const std::vector<std::int32_t> prompt = tokenizer.encode(options.prompt, true);
  GenerateSpec spec = options.generate;
  spec.sampling.seed = options.common.seed;
  TextStream stream(tokenizer, prompt);
  std::string text;
  const auto emit = [&](const std::string& piece) {
    text += piece;
    if (!options.common.json) std::cout << piece << std::flush;
  };
  if (!options.common.json) std::cout << options.prompt << std::flush;

  using Clock = std::chrono::steady_clock;
  const auto begin = Clock::now();
  auto first = begin;
  const std::vector<std::int32_t> ids = generate(model, prompt, spec, [&](std::int32_t id) {
    if (first == begin) first = Clock::now();
    emit(stream.push(id));
    return true;
  });
  emit(stream.flush());

  const double prompt_s = std::chrono::duration<double>(first - begin).count();
  const double decode_s = std::chrono::duration<double>(Clock::now() - first).count();
  const double prompt_rate = prompt_s > 0 ? static_cast<double>(prompt.size()) / prompt_s : 0.0;
  const double rate =
      ids.size() > 1 && decode_s > 0 ? static_cast<double>(ids.size() - 1) / decode_s : 0.0;
  if (!options.common.quiet) {
    fmt::print(stderr,
               "{}{} prompt tokens at {:.1f}/s, {} generated at {:.1f}/s ({} threads, {})\n",
               options.common.json ? "" : "\n", prompt.size(), prompt_rate, ids.size(), rate,
               model.threads(), isa_name());
  }
  if (options.common.json) {
    print_result(options.common,
                 {{"model", options.model},
                  {"prompt", options.prompt},
                  {"text", text},
                  {"ids", ids},
                  {"prompt_tokens", prompt.size()},
                  {"tokens", ids.size()},
                  {"prompt_tokens_per_s", prompt_rate},
                  {"tokens_per_s", rate},
                  {"threads", model.threads()},
                  {"seed", options.common.seed}},
                 "");
  } else {
    std::cout << '\n';
  }
}

}  // namespace

void add_generate_command(CLI::App& app) {
  auto options = std::make_shared<GenerateOptions>();
  CLI::App* command = app.add_subcommand("generate", "Continue a text");
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
  add_weights_option(*command, options->weights);
  add_common_options(*command, options->common);
  command->callback([options] { run_generate(*options); });
}

}  // namespace cleave::cli
