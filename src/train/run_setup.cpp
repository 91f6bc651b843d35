#include "train/run_setup.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <utility>

#include "cleave/error.h"
#include "cleave/train/data.h"
#include "train/freeze_audit.h"

namespace cleave::train {

void check_run_input(Transformer model, const Recipe& recipe, const TokenWindows& data,
                     const TokenWindows* held_out, const TrainSpec& spec) {
  check(spec);
  const std::int64_t vocab = model->config().vocab_size;
  check_tokens(data, vocab);
  if (held_out != nullptr) {
    if (held_out->context < 2 || held_out->count() < 1)
      throw InvalidArgument("train: the held-out text holds no whole window; use a longer text");
    check_tokens(*held_out, vocab);
  }
  for (const auto& parameter : recipe.parameters) {
    const at::Device where = parameter.tensor.device();
    // "cuda" alone means whichever GPU the model is on.
    const bool same_device =
        where.type() == spec.device.type() && (!spec.device.has_index() || where == spec.device);
    if (!same_device || parameter.tensor.scalar_type() != spec.dtype)
      throw InvalidArgument(fmt::format(
          "train: {} is {} on {} but the settings say {} on {}; load the model accordingly",
          parameter.name, c10::toString(parameter.tensor.scalar_type()), where.str(),
          c10::toString(spec.dtype), spec.device.str()));
  }
}

nlohmann::json run_identity(Transformer model, const Recipe& recipe, const TokenWindows& data,
                            const TrainSpec& spec) {
  nlohmann::json settings = nlohmann::json::parse(to_json(spec));
  for (const char* free : {"threads", "eval_every", "eval_tokens", "log_every", "checkpoint_every",
                           "keep_checkpoints"})
    settings.erase(free);
  std::uint64_t weights = FreezeAudit(*model, recipe, recipe.phases.front()).summary();
  for (const auto& parameter : recipe.parameters) {
    const std::uint64_t one = fingerprint(parameter.tensor);
    weights = fingerprint_bytes(&one, sizeof(one), weights);
  }
  return {{"recipe", recipe.name},
          {"method", nlohmann::json::parse(recipe.spec_json)},
          {"train", std::move(settings)},
          {"context", data.context},
          {"text fingerprint",
           fingerprint_bytes(data.tokens.data(), data.tokens.size() * sizeof(std::int32_t))},
          {"model fingerprint", weights}};
}

nlohmann::ordered_json metrics_line(const StepReport& report) {
  nlohmann::ordered_json line;
  line["step"] = report.step;
  line["phase"] = report.phase;
  if (report.step > 0) {
    line["loss"] = report.loss;
    for (const auto& [name, value] : report.parts) line[name] = value;
    for (const auto& [name, value] : report.values) line[name] = value;
    line["lr"] = report.learning_rate;
    line["grad_norm"] = report.grad_norm;
    line["tokens"] = report.tokens;
    line["tokens_per_s"] = report.tokens_per_s;
  }
  if (report.held_out) {
    line["held_out_perplexity"] = report.held_out->perplexity;
    if (report.held_out->has_kl) line["held_out_kl"] = report.held_out->kl;
    line["held_out_tokens"] = report.held_out->predicted_tokens;
  }
  return line;
}

}  // namespace cleave::train
