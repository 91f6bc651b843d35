// Light tuning of a conversion: distillation, and supervision of the routers on the oracle sets.
// docs/methods/tuning.md has the formulas and what was measured.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "cleave/train/losses.h"
#include "cleave/train/recipes.h"
#include "train/recipes/common.h"
#include "train/require.h"

namespace cleave::train {
namespace {

void check_distill_spec(const DistillSpec& spec) {
  require(spec.steps > 0, "distill: {} steps; expected at least 1", spec.steps);
  const std::pair<const char*, double> weights[] = {{"distill_weight", spec.distill_weight},
                                                    {"lm_weight", spec.lm_weight},
                                                    {"router_weight", spec.router_weight}};
  for (const auto& [name, value] : weights)
    require(value >= 0.0 && std::isfinite(value), "distill: {} is {}; expected 0 or more", name,
            value);
  require(spec.temperature > 0.0 && std::isfinite(spec.temperature),
          "distill: temperature is {}; expected a number above 0", spec.temperature);
  require(spec.distill_weight > 0.0 || spec.lm_weight > 0.0 || spec.router_weight > 0.0,
          "distill: no loss; give one a weight above 0");
  require(!part_names(spec.parts).empty(), "distill: no part is trained; name one, e.g. ffn");
}

/// Share of the K experts of most energy that were chosen.
double oracle_recall(const MoeOutputs& out) {
  const at::NoGradGuard no_grad;
  const at::Tensor best = std::get<1>(out.energy.topk(out.ids.size(1), /*dim=*/1));
  return at::zeros_like(out.energy).scatter_(1, out.ids, 1.0).gather(1, best).mean().item<double>();
}

/// On the router alone: through x the loss would bend the layers below towards inputs whose choice
/// is easy.
LossTerm router_term(const Transformer& student, const DistillSpec& spec) {
  return {"router", spec.router_weight,
          [layers = student->moe_layers(), temperature = spec.temperature](const StepOutputs& out,
                                                                           Metrics& metrics) {
            at::Tensor sum;
            double recall = 0.0;
            for (std::size_t l = 0; l < layers.size(); ++l) {
              const MoeOutputs& layer = out.layers[l];
              const at::Tensor value = router_supervision_loss(
                  at::linear(layer.input, layers[l]->w_router), layer.energy,
                  layers[l]->spec.experts_per_token, temperature);
              sum = sum.defined() ? sum + value : value;
              recall += oracle_recall(layer);
            }
            metrics.emplace_back("router_recall", recall / static_cast<double>(layers.size()));
            return sum;
          }};
}

/// What the layers have to give the losses.
void prepare_layers(Transformer student, const DistillSpec& spec) {
  for (MoeFfn& moe : student->moe_layers()) {
    set_soft_border(*moe, spec.parts.router && spec.soft_border ? spec.temperature : 0.0);
    moe->spec.record_energy = spec.parts.router && spec.router_weight > 0.0;
    if (moe->spec.record_energy) moe->spec.execution = Execution::kMaskedHidden;
  }
}

}  // namespace

std::string to_json(const DistillSpec& spec) {
  const nlohmann::ordered_json object = {{"steps", spec.steps},
                                         {"parts", part_names(spec.parts)},
                                         {"distill_weight", spec.distill_weight},
                                         {"lm_weight", spec.lm_weight},
                                         {"router_weight", spec.router_weight},
                                         {"soft_border", spec.soft_border},
                                         {"temperature", spec.temperature}};
  return object.dump();
}

Recipe distill(Transformer student, Transformer teacher, const DistillSpec& spec) {
  check_distill_spec(spec);
  require(!student->moe_layers().empty(),
          "distill: the student has no experts; convert the dense model first");
  require(!teacher.is_empty() || spec.distill_weight == 0.0,
          "distill: needs the dense model as teacher");
  if (!teacher.is_empty()) check_teacher("distill", student, teacher);
  prepare_layers(student, spec);

  Recipe recipe;
  recipe.name = "distill";
  recipe.reference = teacher;
  recipe.spec_json = to_json(spec);
  for (std::size_t l = 0; l < student->layers().size(); ++l)
    collect_layer_parameters(spec.parts, static_cast<std::int64_t>(l), student->layers()[l],
                             recipe.parameters);
  if (spec.parts.norms)
    recipe.parameters.push_back({"final_norm", student->final_norm(), false, ""});
  require(!recipe.parameters.empty(),
          "distill: the student has nothing of what is to be trained; name other parts");
  Phase phase{"distill", spec.steps, [](const Parameter&) { return true; }, {}};
  if (spec.distill_weight > 0.0) phase.losses.push_back(distill_term(spec.distill_weight, teacher));
  if (spec.lm_weight > 0.0) phase.losses.push_back(language_model_term(spec.lm_weight));
  if (spec.parts.router && spec.router_weight > 0.0)
    phase.losses.push_back(router_term(student, spec));
  require(!phase.losses.empty(),
          "distill: the only loss is the routers', and they are not trained; give distill_weight "
          "above 0");
  recipe.phases.push_back(std::move(phase));
  return recipe;
}

TrainResult train_distill(const Checkpoint& student, const Checkpoint* teacher,
                          const TokenWindows& data, const TokenWindows* held_out,
                          const DistillSpec& method, const TrainSpec& spec, const TrainIo& io) {
  check(spec);
  check_distill_spec(method);
  Transformer model(TransformerImpl::load(student, spec.dtype, spec.device));
  Transformer dense = teacher != nullptr
                          ? Transformer(TransformerImpl::load(*teacher, spec.dtype, spec.device))
                          : dense_teacher(model);
  TrainResult result = train(model, distill(model, dense, method), data, held_out, spec, io);
  record_settings(result, "distill", to_json(method), spec);
  return result;
}

}  // namespace cleave::train
