#include "cleave/train/moe_ffn.h"

#include <ATen/ATen.h>

#include <tuple>
#include <utility>

#include "train/masked_hidden.h"
#include "train/require.h"
#include "train/soft_border.h"
#include "train/sparse_experts.h"
#include "train/tensor_activation.h"
#include "train/tensor_text.h"

namespace cleave::train {
namespace {

/// Registers a tensor as it is: trainable if it already asks for a gradient, else frozen. It keeps
/// its identity, so the public member and the module's parameter are one tensor.
void adopt(torch::nn::Module& module, const char* name, const at::Tensor& tensor) {
  if (tensor.defined()) module.register_parameter(name, tensor, tensor.requires_grad());
}

void require_tokens(const char* function, const at::Tensor& x, std::int64_t width) {
  require(x.defined() && x.dim() == 2 && x.size(1) == width, "{}: x is {}; expected [T, {}]",
          function, shape_text(x), width);
}

void require_shape(const char* name, const at::Tensor& t, at::IntArrayRef expected) {
  require(t.defined() && t.sizes() == expected, "MoeFfn: {} is {}; expected {}", name,
          shape_text(t), c10::str(expected));
}

void require_bias(const char* name, const at::Tensor& bias, std::int64_t size) {
  require(!bias.defined() || (bias.dim() == 1 && bias.size(0) == size),
          "DenseFfn: {} bias is {}; expected [{}] or undefined", name, shape_text(bias), size);
}

}  // namespace

DenseFfnImpl::DenseFfnImpl(at::Tensor gate_in, at::Tensor up_in, at::Tensor down_in,
                           Activation activation_in, FfnBiases biases_in)
    : gate(std::move(gate_in)),
      up(std::move(up_in)),
      down(std::move(down_in)),
      biases(std::move(biases_in)),
      activation(activation_in) {
  require(up.defined() && up.dim() == 2 && down.defined() && down.dim() == 2 &&
              up.size(0) == down.size(1) && up.size(1) == down.size(0) &&
              (!gate.defined() || gate.sizes() == up.sizes()),
          "DenseFfn: gate is {}, up {}, down {}; expected [H, D] or undefined, [H, D], [D, H]",
          shape_text(gate), shape_text(up), shape_text(down));
  require_bias("gate", biases.gate, up.size(0));
  require_bias("up", biases.up, up.size(0));
  require_bias("down", biases.down, down.size(0));
  adopt(*this, "gate", gate);
  adopt(*this, "up", up);
  adopt(*this, "down", down);
  adopt(*this, "gate_bias", biases.gate);
  adopt(*this, "up_bias", biases.up);
  adopt(*this, "down_bias", biases.down);
}

at::Tensor DenseFfnImpl::forward(const at::Tensor& x) {
  require_tokens("DenseFfn", x, up.size(1));
  const at::Tensor u = at::linear(x, up, biases.up);
  const at::Tensor h = gate.defined() ? activate(activation, at::linear(x, gate, biases.gate)) * u
                                      : activate(activation, u);
  return at::linear(h, down, biases.down);
}

Execution choose_execution(std::int64_t expert_width) {
  constexpr std::int64_t kWideEnoughAlone = 128;
  return expert_width < kWideEnoughAlone ? Execution::kMaskedHidden : Execution::kSparse;
}

MoeFfnImpl::MoeFfnImpl(Spec spec_in, at::Tensor w_gate_in, at::Tensor w_up_in, at::Tensor w_down_in,
                       at::Tensor w_router_in, DenseFfn shared_in)
    : spec(spec_in),
      w_gate(std::move(w_gate_in)),
      w_up(std::move(w_up_in)),
      w_down(std::move(w_down_in)),
      w_router(std::move(w_router_in)),
      shared(std::move(shared_in)) {
  require(w_up.defined() && w_up.dim() == 3 && w_up.size(0) == spec.num_experts,
          "MoeFfn: w_up is {}; expected [E, I, D] with E = {}", shape_text(w_up), spec.num_experts);
  const std::int64_t num_experts = spec.num_experts, width = w_up.size(1), d = w_up.size(2);
  if (w_gate.defined()) require_shape("w_gate", w_gate, {num_experts, width, d});
  require_shape("w_down", w_down, {num_experts, d, width});
  require_shape("w_router", w_router, {num_experts, d});
  require(spec.experts_per_token >= 1 && spec.experts_per_token <= num_experts,
          "MoeFfn: K = {}; expected 1 to E = {}", spec.experts_per_token, num_experts);
  require(!spec.gate.straight_through || spec.gate.mode == GateMode::kHard,
          "MoeFfn: straight_through is for hard gates; softmax gates have a gradient of their own");
  adopt(*this, "w_gate", w_gate);
  adopt(*this, "w_up", w_up);
  adopt(*this, "w_down", w_down);
  adopt(*this, "w_router", w_router);
  if (shared.is_empty()) return;
  require(shared->up.size(1) == d && shared->activation == spec.activation,
          "MoeFfn: the shared slice has D = {} and activation {}, the experts {} and {}",
          shared->up.size(1), activation_name(shared->activation), d,
          activation_name(spec.activation));
  register_module("shared", shared);
}

void MoeFfnImpl::route(const at::Tensor& x) {
  const std::int64_t k = spec.experts_per_token;
  last_.input = x.detach();
  last_.energy = at::Tensor();
  last_.logits = at::linear(x, w_router);
  // A stable sort, as topk leaves the order of equal logits open; ties go to the lower id.
  last_.ids = std::get<1>(last_.logits.detach().sort(/*stable=*/true, /*dim=*/1,
                                                     /*descending=*/true))
                  .narrow(1, 0, k);
  // Weights are formed in float32 also where the model is bfloat16, as stock MoE classes do.
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor logits = last_.logits.to(type);
  at::Tensor weights;
  if (spec.gate.mode == GateMode::kSoftmax) {
    weights = logits.gather(1, last_.ids).softmax(1);
  } else if (spec.gate.straight_through) {
    const at::Tensor p = logits.softmax(1).gather(1, last_.ids);
    weights = (p - p.detach()) + 1.0;  // in this order: exactly 1
  } else {
    weights = at::ones({x.size(0), k}, logits.options().requires_grad(false));
  }
  last_.weights = weights.to(x.scalar_type());
}

at::Tensor MoeFfnImpl::mask() const {
  const at::Tensor chosen =
      at::zeros(last_.logits.sizes(), last_.weights.options().requires_grad(false))
          .scatter(1, last_.ids, last_.weights);
  if (spec.gate.border_temperature <= 0.0) return chosen;
  const auto type = last_.logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor p =
      soft_choice(last_.logits.to(type), spec.experts_per_token, spec.gate.border_temperature)
          .to(chosen.scalar_type());
  return (p - p.detach()) + chosen;  // in this order: exactly 0 or 1
}

at::Tensor MoeFfnImpl::routed(const at::Tensor& x) {
  const ExpertTensors experts{w_gate, w_up, w_down, spec.activation};
  if (spec.execution == Execution::kMaskedHidden) {
    const at::Tensor factors = spec.scale == 1.0 ? mask() : mask() * spec.scale;
    MaskedHidden out = masked_hidden(x, factors, experts, spec.record_energy);
    last_.energy = std::move(out.energy);
    return std::move(out.y);
  }
  require(spec.gate.border_temperature <= 0.0 && !spec.record_energy,
          "MoeFfn: a border temperature and recorded energies need Execution::kMaskedHidden");
  const PairsByExpert pairs = group_pairs(last_.ids, spec.num_experts);
  const at::Tensor weights = spec.scale == 1.0 ? last_.weights : last_.weights * spec.scale;
  return sparse_experts(x, weights, pairs, experts);
}

at::Tensor MoeFfnImpl::forward(const at::Tensor& x) {
  require_tokens("MoeFfn", x, w_up.size(2));
  require(spec.gate.border_temperature <= 0.0 ||
              (spec.gate.mode == GateMode::kHard && !spec.gate.straight_through),
          "MoeFfn: border_temperature is for hard gates, and excludes straight_through");
  route(x);
  const at::Tensor y = routed(x);
  return shared.is_empty() ? y : y + shared->forward(x);
}

at::Tensor MoeFfnImpl::forward_masked(const at::Tensor& x) {
  require_tokens("MoeFfn", x, w_up.size(2));
  route(x);
  const at::Tensor y = spec.scale * (mask().unsqueeze(2) * all_outputs(x)).sum(1);
  return shared.is_empty() ? y : y + shared->forward(x);
}

at::Tensor MoeFfnImpl::expert_outputs(const at::Tensor& x) {
  require_tokens("MoeFfn", x, w_up.size(2));
  const at::NoGradGuard no_grad;
  return all_outputs(x);
}

at::Tensor MoeFfnImpl::all_outputs(const at::Tensor& x) const {
  const std::int64_t num_experts = w_up.size(0), width = w_up.size(1), d = w_up.size(2);
  const at::Tensor u = at::linear(x, w_up.reshape({num_experts * width, d}));
  const at::Tensor h =
      w_gate.defined()
          ? activate(spec.activation, at::linear(x, w_gate.reshape({num_experts * width, d}))) * u
          : activate(spec.activation, u);
  const at::Tensor by_expert = h.view({x.size(0), num_experts, width}).transpose(0, 1);
  return by_expert.bmm(w_down.transpose(1, 2)).transpose(0, 1);
}

}  // namespace cleave::train
