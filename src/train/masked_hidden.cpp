// All experts as one wide FFN whose hidden values are masked, as one autograd node.
//
// Notation: H = E I.  g = x G^T   u = x U^T   h = act(g) .* u   y = (m .* h) D^T, with m[t, j] the
// mask of the expert that neuron j belongs to. Backward, with p = dy D [T, H]:
//   dm[t, e] = sum over j in e of p .* h     dD = dy^T (m .* h)     dh = m .* p
// By hand and not by autograd, because every [T, H] that autograd keeps or makes costs as much
// memory traffic as a tenth of a product.

#include "train/masked_hidden.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>

#include "train/tensor_activation.h"

namespace cleave::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// [E, D, I] -> [D, E * I], a copy.
at::Tensor flat_down(const at::Tensor& down) {
  return down.permute({1, 0, 2}).reshape({down.size(1), -1});
}

/// h [T, E * I] *= mask [T, E].
void apply_mask(at::Tensor& h, const at::Tensor& mask) {
  h.view({mask.size(0), mask.size(1), h.size(1) / mask.size(1)}).mul_(mask.unsqueeze(2));
}

/// [T, E * I] -> [T, E].
at::Tensor sum_of_experts(const at::Tensor& values, std::int64_t num_experts) {
  return values.view({values.size(0), num_experts, values.size(1) / num_experts}).sum(2);
}

class MaskedExperts : public torch::autograd::Function<MaskedExperts> {
 public:
  // Places of the inputs and of their gradients; the gate last, as in sparse_experts.cpp.
  enum Input { kX, kMask, kUp, kDown, kGate, kNumTensors, kNumInputs = kNumTensors + 2 };

  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& mask,
                               const at::Tensor& up, const at::Tensor& down,
                               const std::optional<at::Tensor>& optional_gate,
                               Activation activation, bool with_energy) {
    const at::Tensor gate = optional_gate.value_or(at::Tensor());
    const std::int64_t d = up.size(2), num_experts = up.size(0);
    const at::Tensor u = at::mm(x, up.reshape({-1, d}).t());
    const at::Tensor g = gate.defined() ? at::mm(x, gate.reshape({-1, d}).t()) : at::Tensor();
    // relu2's own result may alias nothing, identity's is its argument: never written in place.
    at::Tensor h = gate.defined() ? activate(activation, g) * u : activate(activation, u).clone();
    at::Tensor energy = at::empty({0}, x.options());
    if (with_energy) {
      const at::Tensor size = down.square().sum(1).reshape({1, -1});  // |down_j|^2
      energy = sum_of_experts(h.square().mul_(size), num_experts);
    }
    apply_mask(h, mask);
    const at::Tensor y = at::mm(h, flat_down(down).t());
    ctx->save_for_backward({x, mask, gate, up, down, g, u});
    ctx->saved_data["activation"] = static_cast<std::int64_t>(activation);
    ctx->mark_non_differentiable({energy});
    return {y, energy};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &mask = saved[1], &gate = saved[2], &up = saved[3],
                     &down = saved[4], &g = saved[5], &u = saved[6];
    const auto activation = static_cast<Activation>(ctx->saved_data["activation"].toInt());
    const auto needs = [&](Input input) {
      return (input != kGate || gate.defined()) && ctx->needs_input_grad(input);
    };
    variable_list out(kNumInputs);
    const at::Tensor dy = grads[0].contiguous();
    const std::int64_t num_experts = up.size(0), d = up.size(2);
    const at::Tensor s = activate(activation, gate.defined() ? g : u);
    at::Tensor h = gate.defined() ? s * u : s.clone();
    at::Tensor dh = at::mm(dy, flat_down(down));  // as if the mask were 1
    if (needs(kMask)) out[kMask] = sum_of_experts(dh * h, num_experts);
    if (needs(kDown)) {
      apply_mask(h, mask);
      out[kDown] = at::mm(dy.t(), h).view({d, num_experts, -1}).permute({1, 0, 2}).contiguous();
    }
    if (!needs(kX) && !needs(kGate) && !needs(kUp)) return out;

    apply_mask(dh, mask);
    const at::Tensor du = gate.defined() ? at::mul_out(h, dh, s)  // h has served
                                         : activate_backward(activation, dh, u);
    const at::Tensor dg =
        gate.defined() ? activate_backward(activation, dh.mul_(u), g) : at::Tensor();
    if (needs(kUp)) out[kUp] = at::mm(du.t(), x).view(up.sizes());
    if (needs(kGate)) out[kGate] = at::mm(dg.t(), x).view(gate.sizes());
    if (needs(kX)) {
      at::Tensor dx = at::mm(du, up.reshape({-1, d}));
      if (gate.defined()) dx.addmm_(dg, gate.reshape({-1, d}));
      out[kX] = dx;
    }
    return out;
  }
};

}  // namespace

MaskedHidden masked_hidden(const at::Tensor& x, const at::Tensor& mask,
                           const ExpertTensors& experts, bool with_energy) {
  const auto gate = experts.gate.defined() ? std::make_optional(experts.gate) : std::nullopt;
  const variable_list out = MaskedExperts::apply(x, mask, experts.up, experts.down, gate,
                                                 experts.activation, with_energy);
  return {out[0], with_energy ? out[1] : at::Tensor()};
}

}  // namespace cleave::train
