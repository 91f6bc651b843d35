#include "train/recipes/common.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <nlohmann/json.hpp>

#include "cleave/train/losses.h"
#include "train/require.h"

namespace cleave::train {

LossTerm language_model_term(double weight) {
  return {"lm", weight, [](const StepOutputs& out, Metrics&) {
            // -100 marks the last position: cheaper than copying the logits of all others.
            at::Tensor targets = at::full_like(out.tokens, -100);
            const std::int64_t positions = out.tokens.size(1) - 1;
            targets.narrow(1, 0, positions).copy_(out.tokens.narrow(1, 1, positions));
            return language_model_loss(out.logits.flatten(0, 1), targets.flatten());
          }};
}

LossTerm distill_term(double weight, Transformer teacher) {
  return {"distill", weight, [teacher](const StepOutputs& out, Metrics&) {
            at::Tensor wanted;
            {
              const at::NoGradGuard no_grad;
              wanted = Transformer(teacher)->forward(out.tokens);
            }
            return logit_kl(out.logits.flatten(0, 1), wanted.flatten(0, 1));
          }};
}

void check_teacher(const char* recipe, const Transformer& student, const Transformer& teacher) {
  const auto& mine = student->config();
  const auto& other = teacher->config();
  require(teacher->moe_layers().empty(),
          "{}: the teacher is a mixture of experts itself; pass the dense model", recipe);
  require(mine.num_layers == other.num_layers && mine.hidden_size == other.hidden_size &&
              mine.vocab_size == other.vocab_size,
          "{}: the teacher has L = {}, D = {}, V = {} but the student has {}, {}, {}; pass the "
          "dense model it was converted from",
          recipe, other.num_layers, other.hidden_size, other.vocab_size, mine.num_layers,
          mine.hidden_size, mine.vocab_size);
}

void record_settings(TrainResult& result, const char* recipe, const std::string& method,
                     const TrainSpec& spec) {
  if (!result.provenance) return;
  const MoeFfn first = result.model->moe_layers().front();
  result.provenance->gate = first->spec.gate.mode;
  result.provenance->router_epsilon =
      first->spec.gate.mode == GateMode::kHard ? kHardGateEpsilon : 1.0;
  result.provenance->router = "trained";
  auto settings = nlohmann::ordered_json::parse(result.provenance->spec_json, nullptr, false);
  if (!settings.is_object()) settings = nlohmann::ordered_json::object();
  settings[recipe] = nlohmann::ordered_json::parse(method);
  settings["train"] = nlohmann::ordered_json::parse(to_json(spec));
  result.provenance->spec_json = settings.dump();
}

}  // namespace cleave::train
