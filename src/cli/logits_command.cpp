#include <fmt/format.h>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

struct LogitsOptions {
  CommonOptions common;
  std::string model;
  std::vector<std::int32_t> tokens;
};

void run_logits(const LogitsOptions& options) {
  Model model = Model::load(Checkpoint::open(options.model), {.threads = options.common.threads});
  const auto T = static_cast<std::int64_t>(options.tokens.size());
  const std::int64_t D = model.config().hidden_size, V = model.config().vocab_size;
  std::vector<float> hidden(T * D), logits(T * V);
  KvCache cache(model.config(), T);
  model.forward(options.tokens, cache, {hidden.data(), T, D});
  model.logits({hidden.data(), T, D}, {logits.data(), T, V});

  std::string text;
  Json rows = Json::array();
  for (std::int64_t t = 0; t < T; ++t) {
    const float* row = logits.data() + t * V;
    if (options.common.json) {
      rows.push_back(std::vector<float>(row, row + V));
    } else {
      const std::int64_t best = std::max_element(row, row + V) - row;
      text += fmt::format("{:6}  token {:8}  most likely next {:8}  logit {:.6f}\n", t,
                          options.tokens[t], best, row[best]);
    }
  }
  print_result(options.common,
               {{"vocab_size", V}, {"tokens", options.tokens}, {"logits", std::move(rows)}}, text);
}

}  // namespace

void add_logits_command(CLI::App& app) {
  auto options = std::make_shared<LogitsOptions>();
  CLI::App* command = app.add_subcommand(
      "logits", "Raw logits for a sequence of token ids (to compare with others)");
  command->add_option("MODEL", options->model, "Model directory or GGUF file")->required();
  command->add_option("--tokens", options->tokens, "Token ids: 1,2,3")->required()->delimiter(',');
  add_common_options(*command, options->common);
  command->callback([options] { run_logits(*options); });
}

}  // namespace cleave::cli
