#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <memory>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

struct BenchOptions {
  CommonOptions common;
  ModelOptions loading;
  std::string model;
  std::int64_t prompt_tokens = 512;
  std::int64_t generate_tokens = 64;
  std::int64_t repeats = 5;
};

double seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void run_bench(const BenchOptions& options) {
  const Checkpoint checkpoint = Checkpoint::open(options.model);
  require_text_writer("bench", checkpoint);
  const ModelSpec spec = model_spec(options.loading, options.common, checkpoint);
  const WeightType weights = spec.weights;
  Model model = Model::load(checkpoint, spec);
  const ModelConfig& config = model.config();
  const std::int64_t D = config.hidden_size;

  // What the tokens are does not matter for the speed, but for which experts run.
  std::vector<std::int32_t> prompt(options.prompt_tokens);
  std::mt19937_64 rng(options.common.seed);
  for (std::int32_t& id : prompt) id = static_cast<std::int32_t>(rng() % config.vocab_size);
  KvCache cache(config, options.prompt_tokens + options.generate_tokens);
  std::vector<float> hidden(prompt.size() * D), logits(config.vocab_size);
  Sampler greedy({});
  const auto step = [&](std::int32_t id) {
    model.forward({&id, 1}, cache, {hidden.data(), 1, D});
    model.logits({hidden.data(), 1, D}, {logits.data(), 1, config.vocab_size});
    return greedy(logits);
  };

  std::vector<double> prompt_s, generate_s;
  for (std::int64_t round = 0; round <= options.repeats; ++round) {
    cache.clear();
    const double p = seconds([&] {
      model.forward(prompt, cache, {hidden.data(), options.prompt_tokens, D});
    });
    std::int32_t id = prompt.back();
    const double g = seconds([&] {
      for (std::int64_t i = 0; i < options.generate_tokens; ++i) id = step(id);
    });
    if (round == 0) continue;  // the first one warms up
    prompt_s.push_back(p);
    generate_s.push_back(g);
  }
  const double prompt_rate = static_cast<double>(options.prompt_tokens) / median(prompt_s);
  const double rate = static_cast<double>(options.generate_tokens) / median(generate_s);
  const auto bytes = static_cast<double>(model.weight_bytes());
  print_result(options.common,
               {{"model", options.model},
                {"weights", weight_type_name(weights)},
                {"weight_bytes", model.weight_bytes()},
                {"prompt_tokens", options.prompt_tokens},
                {"prompt_tokens_per_s", prompt_rate},
                {"generated_tokens", options.generate_tokens},
                {"generated_tokens_per_s", rate},
                {"repeats", options.repeats},
                {"threads", model.threads()},
                {"instruction_set", isa_name()}},
               fmt::format("{}: {} weights, {}\n"
                           "prompt      {:6} tokens  {:9.1f} tokens/s\n"
                           "generation  {:6} tokens  {:9.1f} tokens/s\n"
                           "median of {}, {} threads, {}\n",
                           options.model, weight_type_name(weights), human_bytes(bytes),
                           options.prompt_tokens, prompt_rate, options.generate_tokens, rate,
                           options.repeats, model.threads(), isa_name()));
}

}  // namespace

void add_bench_command(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command = app.add_subcommand("bench", "Speed of a model: prompt and generation");
  command->add_option("MODEL", options->model, "Model directory or GGUF file")->required();
  command->add_option("--prompt-tokens", options->prompt_tokens, "Random tokens to begin with")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--generate", options->generate_tokens, "Tokens to generate, one by one")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  command->add_option("--repeats", options->repeats, "Rounds; their median is shown")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  add_model_options(*command, options->loading);
  add_seed_option(*command, options->common, "the tokens");
  add_common_options(*command, options->common);
  command->callback([options] { run_bench(*options); });
}

}  // namespace cleave::cli
