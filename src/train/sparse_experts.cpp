// Gather, GEMM, gather back, as one autograd node.
//
// Why not ATen's own operations under autograd: the backward of `stacked[e]` is a zero tensor of
// the whole stack per expert, E times the memory traffic of the gradient itself. Here every
// expert's weight gradient is one GEMM written into its slice.
//
// Notation: P = T*K pairs sorted by expert; row p has token t(p) and gate weight w_p.
//   g = x Wg^T   u = x Wu^T   h = act(g) .* u   y_t = sum_{p: t(p) = t} (w_p h_p) Wd^T
// The weight multiplies h [P, I] and not the output [P, D]: I is smaller than D where E is large,
// and the backward needs no stored output, as dL/dw_p = h_p . (dy_t(p) Wd).
//
// The results return to their tokens by a gather over the K places of each token and a sum, not by
// a scatter-add: the order of summation is fixed, so it is bitwise repeatable, also on a GPU.

#include "train/sparse_experts.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <optional>
#include <utility>

#include "train/tensor_activation.h"

namespace cleave::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Calls body(e, first row, rows) for every expert that has rows.
template <typename Body>
void for_each_expert(const std::vector<std::int64_t>& begin, Body&& body) {
  for (std::size_t e = 0; e + 1 < begin.size(); ++e) {
    const std::int64_t rows = begin[e + 1] - begin[e];
    if (rows > 0) body(static_cast<std::int64_t>(e), begin[e], rows);
  }
}

/// out[rows of e] = in[rows of e] W_e^T, W [E, out, in].
at::Tensor grouped_linear(const at::Tensor& in, const at::Tensor& w,
                          const std::vector<std::int64_t>& begin) {
  at::Tensor out = at::empty({in.size(0), w.size(1)}, in.options());
  for_each_expert(begin, [&](std::int64_t e, std::int64_t first, std::int64_t rows) {
    at::Tensor slice = out.narrow(0, first, rows);
    at::mm_out(slice, in.narrow(0, first, rows), w.select(0, e).t());
  });
  return out;
}

/// out[rows of e] (+)= grad[rows of e] W_e: the gradient of grouped_linear's input.
void grouped_input_grad(const at::Tensor& grad, const at::Tensor& w,
                        const std::vector<std::int64_t>& begin, bool add, at::Tensor& out) {
  for_each_expert(begin, [&](std::int64_t e, std::int64_t first, std::int64_t rows) {
    at::Tensor slice = out.narrow(0, first, rows);
    const at::Tensor part = grad.narrow(0, first, rows);
    if (add) {
      slice.addmm_(part, w.select(0, e));
    } else {
      at::mm_out(slice, part, w.select(0, e));
    }
  });
}

/// dW_e = grad[rows of e]^T in[rows of e]; zero for an expert without rows.
at::Tensor grouped_weight_grad(const at::Tensor& grad, const at::Tensor& in, const at::Tensor& w,
                               const std::vector<std::int64_t>& begin) {
  at::Tensor out = at::empty(w.sizes(), w.options());
  for (std::size_t e = 0; e + 1 < begin.size(); ++e) {
    at::Tensor slice = out.select(0, static_cast<std::int64_t>(e));
    const std::int64_t rows = begin[e + 1] - begin[e];
    if (rows == 0) {
      slice.zero_();
    } else {
      at::mm_out(slice, grad.narrow(0, begin[e], rows).t(), in.narrow(0, begin[e], rows));
    }
  }
  return out;
}

/// Sum over the K places of every token: [P, D] sorted by expert -> [T, D].
at::Tensor sum_per_token(const at::Tensor& sorted, const at::Tensor& place_of,
                         std::int64_t tokens) {
  const std::int64_t k = tokens == 0 ? 1 : place_of.size(0) / tokens;
  return sorted.index_select(0, place_of).view({tokens, k, sorted.size(1)}).sum(1);
}

class SparseExperts : public torch::autograd::Function<SparseExperts> {
 public:
  // Places of the inputs in forward() and of their gradients in backward(). The gate comes last of
  // the tensors: needs_input_grad() counts only those that are there.
  enum Input { kX, kWeights, kUp, kDown, kGate, kNumTensors, kNumInputs = kNumTensors + 2 };

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weights,
                            const at::Tensor& up, const at::Tensor& down,
                            const std::optional<at::Tensor>& optional_gate,
                            const PairsByExpert& pairs, Activation activation) {
    const at::Tensor gate = optional_gate.value_or(at::Tensor());
    const at::Tensor rows = x.index_select(0, pairs.token);
    const at::Tensor u = grouped_linear(rows, up, pairs.begin);
    const at::Tensor g = gate.defined() ? grouped_linear(rows, gate, pairs.begin) : at::Tensor();
    at::Tensor h = gate.defined() ? activate(activation, g) * u : activate(activation, u);
    h = h * weights.reshape({-1, 1}).index_select(0, pairs.pair);
    const at::Tensor y =
        sum_per_token(grouped_linear(h, down, pairs.begin), pairs.place_of, x.size(0));
    ctx->save_for_backward(
        {x, weights, gate, up, down, g, u, pairs.pair, pairs.token, pairs.place_of});
    ctx->saved_data["begin"] = pairs.begin;
    ctx->saved_data["activation"] = static_cast<std::int64_t>(activation);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weights = saved[1], &gate = saved[2], &up = saved[3],
                     &down = saved[4], &g = saved[5], &u = saved[6], &pair = saved[7],
                     &token = saved[8], &place_of = saved[9];
    const auto begin = ctx->saved_data["begin"].toIntVector();
    const auto activation = static_cast<Activation>(ctx->saved_data["activation"].toInt());
    const auto needs = [&](Input input) {
      return (input != kGate || gate.defined()) && ctx->needs_input_grad(input);
    };
    variable_list out(kNumInputs);

    const at::Tensor dy = grads[0].index_select(0, token);
    const at::Tensor w = weights.reshape({-1, 1}).index_select(0, pair);
    const at::Tensor s = activate(activation, gate.defined() ? g : u);
    const at::Tensor h = gate.defined() ? s * u : s;
    if (needs(kDown)) out[kDown] = grouped_weight_grad(dy, h * w, down, begin);
    if (!needs(kX) && !needs(kWeights) && !needs(kGate) && !needs(kUp)) return out;

    at::Tensor dh = at::empty(u.sizes(), u.options());  // of the unweighted h, as if w were 1
    grouped_input_grad(dy, down, begin, /*add=*/false, dh);
    if (needs(kWeights)) {
      out[kWeights] = (dh * h).sum(1).index_select(0, place_of).view(weights.sizes());
    }
    if (!needs(kX) && !needs(kGate) && !needs(kUp)) return out;

    dh = dh * w;
    const at::Tensor dg = gate.defined() ? activate_backward(activation, dh * u, g) : at::Tensor();
    const at::Tensor du = gate.defined() ? dh * s : activate_backward(activation, dh, u);
    if (needs(kGate) || needs(kUp)) {
      const at::Tensor rows = x.index_select(0, token);
      if (needs(kGate)) out[kGate] = grouped_weight_grad(dg, rows, gate, begin);
      if (needs(kUp)) out[kUp] = grouped_weight_grad(du, rows, up, begin);
    }
    if (needs(kX)) {
      at::Tensor dx = at::empty({token.size(0), x.size(1)}, x.options());
      grouped_input_grad(du, up, begin, /*add=*/false, dx);
      if (gate.defined()) grouped_input_grad(dg, gate, begin, /*add=*/true, dx);
      out[kX] = sum_per_token(dx, place_of, x.size(0));
    }
    return out;
  }
};

}  // namespace

PairsByExpert group_pairs(const at::Tensor& ids, std::int64_t num_experts) {
  const at::NoGradGuard no_grad;
  const at::Tensor flat = ids.reshape({-1});
  const at::Tensor order = std::get<1>(flat.sort(/*stable=*/true, /*dim=*/0, /*descending=*/false));
  PairsByExpert pairs;
  pairs.pair = order;
  pairs.token = at::floor_divide(order, ids.size(1));
  pairs.place_of =
      at::empty_like(order).scatter_(0, order, at::arange(order.size(0), order.options()));
  const at::Tensor counts = at::bincount(flat, {}, num_experts).to(at::kCPU);
  const std::int64_t* count = counts.const_data_ptr<std::int64_t>();
  pairs.begin.assign(1, 0);
  for (std::int64_t e = 0; e < num_experts; ++e) pairs.begin.push_back(pairs.begin[e] + count[e]);
  return pairs;
}

at::Tensor sparse_experts(const at::Tensor& x, const at::Tensor& weights,
                          const PairsByExpert& pairs, const ExpertTensors& experts) {
  const auto gate = experts.gate.defined() ? std::make_optional(experts.gate) : std::nullopt;
  return SparseExperts::apply(x, weights, experts.up, experts.down, gate, pairs,
                              experts.activation);
}

}  // namespace cleave::train
