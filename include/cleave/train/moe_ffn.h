#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cleave/moe_layer.h"
#include "cleave/routing.h"

namespace cleave::train {

/// The biases of a dense FFN; each may be undefined.
struct FfnBiases {
  at::Tensor gate;  ///< [H]
  at::Tensor up;    ///< [H]
  at::Tensor down;  ///< [D]
};

/// Weights of a dense FFN as tensors (HuggingFace layout), frozen or trainable (see MoeFfnImpl).
/// y = down (act(gate x + gate_bias) .* (up x + up_bias)) + down_bias; `gate` undefined:
/// y = down act(up x + up_bias) + down_bias.
class DenseFfnImpl : public torch::nn::Module {
 public:
  /// Takes the tensors over (no copy).
  /// @throws InvalidArgument  shapes disagree
  DenseFfnImpl(at::Tensor gate, at::Tensor up, at::Tensor down, Activation activation,
               FfnBiases biases = {});
  /// x [T, D] -> [T, D]
  at::Tensor forward(const at::Tensor& x);
  at::Tensor gate;  ///< [H, D], or undefined
  at::Tensor up;    ///< [H, D]
  at::Tensor down;  ///< [D, H]
  FfnBiases biases;
  Activation activation;
};
TORCH_MODULE(DenseFfn);

/// How a gate turns logits into weights while training.
struct GateSpec {
  GateMode mode = GateMode::kSoftmax;  ///< K = 1: the weight is 1 and the router has no gradient
  bool straight_through = false;  ///< kHard only: forward 0/1, backward the softmax probability
  /// kHard only, instead of straight_through; 0: off. Forward 0/1, backward
  /// sigmoid((z_e - border) / (this * spread of the logits)) for *all* experts, the border halfway
  /// between the K-th and the next logit (constant to the gradient): an expert that was not chosen
  /// learns as well whether it should have been. Runs with Execution::kMaskedHidden.
  double border_temperature = 0.0;
};

/// How the experts of a layer run. The result is the same.
enum class Execution {
  kSparse,        ///< tokens gathered per expert: K / E of the multiply-adds, many small products
  kMaskedHidden,  ///< all hidden values in few large products, masked: faster for fine experts
};
/// kMaskedHidden for experts narrower than 128 neurons: products of their size are mostly overhead.
/// A rule of thumb, not a measured crossing point.
Execution choose_execution(std::int64_t expert_width);

/// What one forward pass of a layer leaves for the losses and the statistics.
struct MoeOutputs {
  at::Tensor input;    ///< [T, D], detached: the layer's own input
  at::Tensor logits;   ///< [T, E], with gradient
  at::Tensor ids;      ///< int64 [T, K]
  at::Tensor weights;  ///< [T, K], with gradient where the gate has one; the border's (see
                       ///< GateSpec) goes another way, through all E
  at::Tensor energy;  ///< [T, E], no gradient: sum over an expert's neurons of h^2 |down_j|^2, what
                      ///< it would add; undefined unless Spec::record_energy
};

/// Experts + router with gradients, and a slice that always runs. y = scale * sum_k w_k
/// expert_{id_k}(x) + shared(x). Softmax weights sum to 1 (scale E makes an even choice of all
/// experts the dense FFN); hard ones are 1 each (scale E / K). Executed sparsely, tokens are
/// gathered per expert, two or three GEMMs run, results are scattered back with their weights;
/// experts without tokens are skipped.
class MoeFfnImpl : public torch::nn::Module {
 public:
  struct Spec {
    std::int64_t num_experts = 0;        ///< E
    std::int64_t experts_per_token = 0;  ///< K
    GateSpec gate;
    double scale = 1.0;
    Activation activation = Activation::kSilu;
    Execution execution = Execution::kSparse;
    bool record_energy = false;  ///< fill MoeOutputs::energy; with kMaskedHidden
  };
  /// Stacked experts; takes the tensors over (no copy). A tensor that requires a gradient is
  /// trainable, any other is frozen: it gets no gradient buffer.
  ///   w_gate [E, I, D] (undefined: two-matrix FFN)   w_up [E, I, D]   w_down [E, D, I]   w_router
  ///   [E, D]
  /// @param shared  the slice that always runs, [S * I] neurons; empty: none
  MoeFfnImpl(Spec spec, at::Tensor w_gate, at::Tensor w_up, at::Tensor w_down, at::Tensor w_router,
             DenseFfn shared = DenseFfn(nullptr));

  /// x [T, D] -> [T, D]; also fills last(). Sparse: T * K rows run through each GEMM.
  at::Tensor forward(const at::Tensor& x);
  /// The definition: every expert on every token, masked. Same result and gradients, E / K times
  /// the work; for tests and for labels.
  at::Tensor forward_masked(const at::Tensor& x);
  /// Every expert's plain output, no gate, no scale, no gradient: [T, E, D]. For prior_labels;
  /// costs E / K times the layer's own forward pass.
  at::Tensor expert_outputs(const at::Tensor& x);

  const MoeOutputs& last() const { return last_; }
  /// Frees what last() holds: its input alone may keep a whole text's tensor alive.
  void forget() { last_ = {}; }
  Spec spec;
  at::Tensor w_gate, w_up, w_down, w_router;
  DenseFfn shared{nullptr};

 private:
  /// Logits, ids and weights of x, into last_.
  void route(const at::Tensor& x);
  /// What every expert's output is multiplied by, scale apart: [T, E], 0 for those not chosen; with
  /// the gate's gradient.
  at::Tensor mask() const;
  at::Tensor routed(const at::Tensor& x);
  /// expert_outputs() with gradients.
  at::Tensor all_outputs(const at::Tensor& x) const;
  MoeOutputs last_;
};
TORCH_MODULE(MoeFfn);

}  // namespace cleave::train
