#include <fmt/format.h>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

struct LogitsOptions {
  CommonOptions common;
  std::string model;
  std::vector<std::int32_t> tokens;
};

/// Final hidden states [T, D].
std::vector<float> hidden_states(Model& model, const std::vector<std::int32_t>& tokens) {
  const auto T = static_cast<std::int64_t>(tokens.size());
  const std::int64_t D = model.config().hidden_size;
  std::vector<float> hidden(T * D);
  KvCache cache(model.config(), T);
  model.forward(tokens, cache, {hidden.data(), T, D});
  return hidden;
}

Json rows_of(const std::vector<float>& values, std::int64_t columns) {
  Json rows = Json::array();
  for (auto row = values.begin(); row != values.end(); row += columns)
    rows.push_back(std::vector<float>(row, row + columns));
  return rows;
}

void print_hidden(const LogitsOptions& options, Model& model) {
  const std::int64_t D = model.config().hidden_size;
  const std::vector<float> hidden = hidden_states(model, options.tokens);
  std::string text;
  for (std::size_t t = 0; t < options.tokens.size(); ++t) {
    const float* row = hidden.data() + static_cast<std::int64_t>(t) * D;
    text += fmt::format("{:6}  token {:8}  hidden {:.6f} ... {:.6f}\n", t, options.tokens[t],
                        row[0], row[D - 1]);
  }
  Json json;
  if (options.common.json)
    json = {{"hidden_size", D}, {"tokens", options.tokens}, {"hidden", rows_of(hidden, D)}};
  print_result(options.common, json, text);
}

void run_logits(const LogitsOptions& options) {
  Model model = Model::load(Checkpoint::open(options.model), {.threads = options.common.threads});
  if (!model.config().has_head) return print_hidden(options, model);
  const auto T = static_cast<std::int64_t>(options.tokens.size());
  const std::int64_t D = model.config().hidden_size, V = model.config().vocab_size;
  const std::vector<float> hidden = hidden_states(model, options.tokens);
  std::vector<float> logits(T * V);
  model.logits({hidden.data(), T, D}, {logits.data(), T, V});

  std::string text;
  for (std::int64_t t = 0; t < T; ++t) {
    const float* row = logits.data() + t * V;
    const std::int64_t best = std::max_element(row, row + V) - row;
    text += fmt::format("{:6}  token {:8}  most likely next {:8}  logit {:.6f}\n", t,
                        options.tokens[t], best, row[best]);
  }
  Json json;
  if (options.common.json)
    json = {{"vocab_size", V}, {"tokens", options.tokens}, {"logits", rows_of(logits, V)}};
  print_result(options.common, json, text);
}

}  // namespace

void add_logits_command(CLI::App& app) {
  auto options = std::make_shared<LogitsOptions>();
  CLI::App* command = app.add_subcommand(
      "logits",
      "Raw logits for a sequence of token ids (to compare with others); of a model without a head "
      "its final hidden states");
  command->add_option("MODEL", options->model, "Model directory or GGUF file")->required();
  command->add_option("--tokens", options->tokens, "Token ids: 1,2,3")->required()->delimiter(',');
  add_common_options(*command, options->common);
  command->callback([options] { run_logits(*options); });
}

}  // namespace cleave::cli
