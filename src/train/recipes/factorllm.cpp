// FactorLLM, arXiv:2408.11855, as choices; the losses are in losses.h, the loop in trainer.h.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <string_view>
#include <utility>

#include "cleave/error.h"
#include "cleave/train/recipes.h"
#include "train/recipes/common.h"
#include "train/require.h"

namespace cleave::train {
namespace {

/// The stored `down` of a converted layer is the dense one times this. The converter fits it layer
/// by layer and lists it in the settings of cleave.json.
double folded_scale(const Transformer& student, std::size_t layer, const MoeFfn& moe) {
  const auto& provenance = student->provenance();
  if (!provenance) return static_cast<double>(moe->spec.num_experts);
  const auto settings = nlohmann::json::parse(provenance->spec_json, nullptr, false);
  if (settings.is_object() && settings.contains("layer_folded_scale")) {
    const auto& scales = settings["layer_folded_scale"];
    require(scales.is_array() && layer < scales.size() && scales[layer].is_number(),
            "factorllm: layer_folded_scale in cleave.json has no number for layer {}; "
            "convert the dense model again",
            layer);
    return scales[layer].get<double>();
  }
  return provenance->folded_scale;
}

/// What the layer multiplies an expert's output with when its K weights are even.
double even_weight(const MoeFfn& moe) {
  const double k = static_cast<double>(moe->spec.experts_per_token);
  return moe->spec.gate.mode == GateMode::kSoftmax ? moe->spec.scale / k : moe->spec.scale;
}

/// Times this, the outputs of all untrained experts of `moe` sum to the dense FFN's. 1 when the
/// layer keeps its scale apart from its weights, 1 / E when the scale is folded into `down`.
double dense_share(const Transformer& student, std::size_t layer, const MoeFfn& moe) {
  return even_weight(moe) * static_cast<double>(moe->spec.experts_per_token) /
         folded_scale(student, layer, moe);
}

/// Changes the gate but not what the layer returns when its K weights are even.
void set_gate(MoeFfn moe, GateMode mode, bool straight_through) {
  const double k = static_cast<double>(moe->spec.experts_per_token);
  const double even = even_weight(moe);
  moe->spec.gate = {mode, straight_through};
  moe->spec.scale = mode == GateMode::kSoftmax ? even * k : even;
}

bool is_router(const Parameter& parameter) { return parameter.name.ends_with(".router"); }

std::string router_hint(const MoeFfn& moe) {
  const auto& gate = moe->spec.gate;
  if (gate.mode == GateMode::kHard && !gate.straight_through)
    return "a hard gate passes no gradient to its router; use a PA weight above 0 or "
           "straight-through";
  if (moe->spec.experts_per_token == 1 && gate.mode == GateMode::kSoftmax)
    return "with K = 1 the softmax over the selected logits is always 1, so the model's own loss "
           "does not reach the router; use a PA weight above 0";
  return "no loss reaches the router; use a PA or language-model weight above 0";
}

std::vector<Parameter> collect_parameters(Transformer student) {
  const std::string expert_hint =
      "only the language-model and distillation losses reach the experts; give one of them a "
      "weight above 0";
  std::vector<Parameter> parameters;
  const auto& layers = student->layers();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const MoeFfn& moe = layers[l].moe;
    if (moe.is_empty()) continue;
    const std::string prefix = fmt::format("layers.{}.", l);
    // No decay on routers: it would pull every weight towards an even softmax, a balance loss that
    // nobody asked for.
    parameters.push_back({prefix + "router", moe->w_router, false, router_hint(moe)});
    if (moe->w_gate.defined())
      parameters.push_back({prefix + "experts.gate", moe->w_gate, true, expert_hint});
    parameters.push_back({prefix + "experts.up", moe->w_up, true, expert_hint});
    parameters.push_back({prefix + "experts.down", moe->w_down, true, expert_hint});
  }
  return parameters;
}

void check_spec(const FactorLlmSpec& spec) {
  require(!spec.phases.empty(), "factorllm: no phase; give one, e.g. joint");
  for (const auto& phase : spec.phases)
    require(phase.steps > 0, "factorllm: phase '{}' has {} steps, expected at least 1",
            trainable_name(phase.trainable), phase.steps);
  const std::pair<const char*, double> weights[] = {{"lm_weight", spec.lm_weight},
                                                    {"pa_weight", spec.pa_weight},
                                                    {"balance_weight", spec.balance_weight},
                                                    {"distill_weight", spec.distill_weight}};
  for (const auto& [name, value] : weights)
    require(value >= 0.0 && std::isfinite(value), "factorllm: {} is {}, expected 0 or more", name,
            value);
  require(spec.pa_tokens >= 0, "factorllm: pa_tokens is {}, expected 0 or more", spec.pa_tokens);
}

/// Which tokens get labels: all, or `wanted` evenly spread ones that move on with every step.
at::Tensor labelled_tokens(std::int64_t tokens, std::int64_t wanted, std::int64_t step,
                           at::Device device) {
  const std::int64_t count = wanted > 0 ? std::min(wanted, tokens) : tokens;
  const at::Tensor even =
      (at::arange(count, at::TensorOptions(at::kLong)).mul_(tokens)).floor_divide(count);
  return even.add_(step).remainder_(tokens).to(device);
}

/// One layer's side of the prior-approximate loss: who it is, who teaches it, in which units.
struct PaLayer {
  MoeFfn moe{nullptr};
  DenseFfn teacher{nullptr};
  double dense_share = 1.0;
  double alpha = 1.0;
};

/// Label the tokens with the experts the dense FFN would choose, and compare the router with them.
/// `agreement` receives the share of labels that the router selected itself.
at::Tensor pa_of_layer(const PaLayer& layer, const MoeOutputs& out, const at::Tensor& chosen,
                       const FactorLlmSpec& spec, double& agreement) {
  at::Tensor labels;
  {
    const at::NoGradGuard no_grad;
    MoeFfn moe = layer.moe;
    DenseFfn teacher = layer.teacher;
    // The student's own input, not the teacher's stream: see docs/methods/factorllm.md.
    const at::Tensor x = out.input.index_select(0, chosen);
    // Teacher divided instead of [T, E, D] outputs multiplied: the same comparison, in other units.
    const at::Tensor wanted = teacher->forward(x).div_(layer.dense_share);
    labels = prior_labels(moe->expert_outputs(x), wanted, moe->spec.experts_per_token, spec.labels,
                          layer.alpha);
    agreement =
        labels.gather(1, out.ids.index_select(0, chosen)).to(at::kFloat).mean().item<double>();
  }
  return prior_approximate_loss(out.logits.index_select(0, chosen), prior_allocation(labels),
                                spec.pa_form);
}

LossTerm prior_approximate_term(Transformer student, Transformer teacher,
                                const FactorLlmSpec& spec) {
  std::vector<PaLayer> layers;
  for (std::size_t l = 0; l < student->layers().size(); ++l) {
    const MoeFfn& moe = student->layers()[l].moe;
    if (moe.is_empty()) continue;
    const DenseFfn& dense = teacher->layers()[l].dense;
    require(!dense.is_empty(), "factorllm: the teacher's layer {} is not dense", l);
    const double k = static_cast<double>(moe->spec.experts_per_token);
    layers.push_back({moe, dense, dense_share(student, l, moe), folded_scale(student, l, moe) / k});
  }
  return {
      "pa", spec.pa_weight, [layers, spec](const StepOutputs& out, Metrics& metrics) {
        const at::Tensor chosen =
            labelled_tokens(out.tokens.numel(), spec.pa_tokens, out.step, out.logits.device());
        at::Tensor sum;
        double agreement_sum = 0.0;
        for (std::size_t l = 0; l < layers.size(); ++l) {
          double agreement = 0.0;
          const at::Tensor value = pa_of_layer(layers[l], out.layers[l], chosen, spec, agreement);
          sum = sum.defined() ? sum + value : value;
          agreement_sum += agreement;
        }
        metrics.emplace_back("label_agreement", agreement_sum / static_cast<double>(layers.size()));
        return sum;
      }};
}

LossTerm balance_term(const FactorLlmSpec& spec) {
  return {"balance", spec.balance_weight, [kind = spec.balance](const StepOutputs& out, Metrics&) {
            at::Tensor sum;
            for (const auto& layer : out.layers) {
              const at::Tensor value = balance_loss(layer.logits, layer.ids, kind);
              sum = sum.defined() ? sum + value : value;
            }
            return sum;
          }};
}

std::vector<LossTerm> losses_of(const FactorLlmPhase& phase, const Transformer& student,
                                const Transformer& teacher, const FactorLlmSpec& spec) {
  std::vector<LossTerm> losses;
  if (spec.lm_weight > 0.0) losses.push_back(language_model_term(spec.lm_weight));
  if (phase.trainable != Trainable::kExperts) {
    if (spec.pa_weight > 0.0) losses.push_back(prior_approximate_term(student, teacher, spec));
    if (spec.balance_weight > 0.0) losses.push_back(balance_term(spec));
  }
  if (spec.distill_weight > 0.0) losses.push_back(distill_term(spec.distill_weight, teacher));
  require(!losses.empty(), "factorllm: phase '{}' has no loss; give one a weight above 0",
          trainable_name(phase.trainable));
  return losses;
}

/// [E, D, I] -> [D, E * I], times `factor`; a copy.
at::Tensor side_by_side(const at::Tensor& w_down, double factor) {
  return w_down.detach().permute({1, 0, 2}).flatten(1).mul(factor);
}

}  // namespace

const char* trainable_name(Trainable trainable) {
  switch (trainable) {
    case Trainable::kRouter:
      return "router";
    case Trainable::kExperts:
      return "experts";
    case Trainable::kJoint:
      return "joint";
  }
  return "";
}

const char* pa_form_name(PaForm form) {
  switch (form) {
    case PaForm::kRouterFirst:
      return "router-first";
    case PaForm::kTargetFirst:
      return "target-first";
    case PaForm::kCrossEntropy:
      return "ce";
  }
  return "";
}

const char* label_kind_name(LabelKind kind) {
  return kind == LabelKind::kPerExpert ? "per-expert" : "exhaustive";
}

const char* balance_kind_name(BalanceKind kind) {
  return kind == BalanceKind::kSwitch ? "switch" : "paper";
}

std::vector<FactorLlmPhase> parse_phases(const std::string& text, std::int64_t steps) {
  std::vector<FactorLlmPhase> phases;
  std::string_view rest = text;
  while (true) {
    const std::string_view item = rest.substr(0, rest.find(','));
    const std::string_view word = item.substr(0, item.find(':'));
    FactorLlmPhase phase{Trainable::kJoint, steps};
    if (word == "router")
      phase.trainable = Trainable::kRouter;
    else if (word == "experts")
      phase.trainable = Trainable::kExperts;
    else
      require(word == "joint", "phase: '{}' is none of router, experts, joint", word);
    if (word.size() < item.size()) {
      const std::string_view count = item.substr(word.size() + 1);
      const char* end = count.data() + count.size();
      const auto parsed = std::from_chars(count.data(), end, phase.steps);
      require(parsed.ec == std::errc() && parsed.ptr == end && phase.steps > 0,
              "phase: '{}' in '{}' is not a number of steps above 0", count, text);
    } else {
      require(item.size() == text.size(),
              "phase: '{}' in '{}' lacks its steps, as in router:50,joint:150", item, text);
    }
    phases.push_back(phase);
    if (item.size() == rest.size()) return phases;
    rest.remove_prefix(item.size() + 1);
  }
}

std::string to_json(const FactorLlmSpec& spec) {
  nlohmann::ordered_json phases = nlohmann::ordered_json::array();
  for (const auto& phase : spec.phases)
    phases.push_back({{"trainable", trainable_name(phase.trainable)}, {"steps", phase.steps}});
  nlohmann::ordered_json object = {{"phases", std::move(phases)},
                                   {"lm_weight", spec.lm_weight},
                                   {"pa_weight", spec.pa_weight},
                                   {"balance_weight", spec.balance_weight},
                                   {"distill_weight", spec.distill_weight},
                                   {"pa_form", pa_form_name(spec.pa_form)},
                                   {"labels", label_kind_name(spec.labels)},
                                   {"balance", balance_kind_name(spec.balance)},
                                   {"pa_tokens", spec.pa_tokens},
                                   {"straight_through", spec.straight_through}};
  if (spec.gate) object["gate"] = gate_mode_name(*spec.gate);
  return object.dump();
}

Transformer dense_teacher(Transformer student) {
  const auto& provenance = student->provenance();
  require(provenance.has_value(),
          "dense_teacher: the student has no cleave.json, so how its experts were cut is unknown; "
          "pass the dense checkpoint as teacher");
  const auto settings = nlohmann::json::parse(provenance->spec_json, nullptr, false);
  const bool refitted =
      settings.is_object() && settings.contains("refit") && settings["refit"] == "on";
  require(
      !refitted,
      "dense_teacher: the conversion has refitted the experts' `down`, so together they are not "
      "the dense FFN; pass the dense checkpoint as teacher");
  for (const MoeFfn& moe : student->moe_layers())
    require(moe->shared.is_empty(),
            "dense_teacher: the student has a shared slice; pass the dense checkpoint as teacher");
  require(provenance->router != "trained",
          "dense_teacher: the student was trained already, so its experts are no longer the dense "
          "FFN; pass the dense checkpoint as teacher");
  auto dense = std::make_shared<TransformerImpl>(*student);
  for (std::size_t l = 0; l < dense->layers().size(); ++l) {
    DecoderLayer& layer = dense->layers()[l];
    if (layer.moe.is_empty()) continue;
    const MoeFfn moe = layer.moe;
    const at::Tensor gate =
        moe->w_gate.defined() ? moe->w_gate.detach().flatten(0, 1).clone() : at::Tensor();
    layer.dense =
        DenseFfn(gate, moe->w_up.detach().flatten(0, 1).clone(),
                 side_by_side(moe->w_down, dense_share(student, l, moe)), moe->spec.activation);
    layer.moe = nullptr;
  }
  return Transformer(dense);
}

Recipe factorllm(Transformer student, Transformer teacher, const FactorLlmSpec& spec) {
  check_spec(spec);
  require(!student->moe_layers().empty(),
          "factorllm: the student has no experts; convert the dense model first");
  for (const MoeFfn& moe : student->moe_layers())
    require(moe->shared.is_empty(),
            "factorllm: the student has a shared slice, which this method does not know; use the "
            "recipe distill");
  const bool needs_teacher = spec.pa_weight > 0.0 || spec.distill_weight > 0.0;
  require(!needs_teacher || !teacher.is_empty(),
          "factorllm: the PA and distillation losses need a teacher; pass one or set their weights "
          "to 0");
  if (!teacher.is_empty()) check_teacher("factorllm", student, teacher);
  for (auto& moe : student->moe_layers())
    set_gate(moe, spec.gate.value_or(moe->spec.gate.mode), spec.straight_through);

  Recipe recipe;
  recipe.name = "factorllm";
  recipe.parameters = collect_parameters(student);
  recipe.reference = teacher;
  recipe.spec_json = to_json(spec);
  for (const auto& phase : spec.phases)
    recipe.phases.push_back({trainable_name(phase.trainable), phase.steps,
                             [trainable = phase.trainable](const Parameter& parameter) {
                               return trainable == Trainable::kJoint ||
                                      is_router(parameter) == (trainable == Trainable::kRouter);
                             },
                             losses_of(phase, student, teacher, spec)});
  return recipe;
}

TrainResult train_factorllm(const Checkpoint& student, const Checkpoint* teacher,
                            const TokenWindows& data, const TokenWindows* held_out,
                            const FactorLlmSpec& method, const TrainSpec& spec, const TrainIo& io) {
  check(spec);
  check_spec(method);
  Transformer model(TransformerImpl::load(student, spec.dtype, spec.device));
  Transformer dense{nullptr};
  if (teacher != nullptr) {
    dense = Transformer(TransformerImpl::load(*teacher, spec.dtype, spec.device));
  } else if (method.pa_weight > 0.0 || method.distill_weight > 0.0 ||
             (model->provenance() && model->provenance()->router != "trained")) {
    dense = dense_teacher(model);  // also without those losses: held-out KL is measured against it
  }
  const Recipe recipe = factorllm(model, dense, method);
  TrainResult result = train(model, recipe, data, held_out, spec, io);
  record_settings(result, "factorllm", to_json(method), spec);
  return result;
}

}  // namespace cleave::train
