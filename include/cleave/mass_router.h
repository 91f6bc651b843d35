#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/expert.h"
#include "cleave/kernels.h"
#include "cleave/views.h"

namespace cleave {

/// A router that computes what gated experts would roughly add, from low-rank copies of their
/// weights, with nothing to train:
///   score[t,e] = |P_e x[t]| |Q_e x[t]|
/// P_e stands for the expert's gate rows, each weighted by how far its gate is open on average, and
/// Q_e for its up rows. Without a gate |P_e x[t] + c_e| alone, P_e and c_e standing for the up rows
/// and their biases as far as the activation lets them through. No stock class holds it, so it is
/// measured beside the linear routers (BaselineRouter) and not written. Source: field notes on
/// CMoE, docs/methods/routers.md.
struct MassRouter {
  std::int64_t num_experts = 0;  ///< E
  std::int64_t d_model = 0;      ///< D
  std::int64_t rank = 0;         ///< R
  std::vector<float> gate;       ///< P [E, R, D]
  std::vector<float> up;         ///< Q [E, R, D]; empty without a gate
  std::vector<float> gate_bias;  ///< [E, R], added to P x; empty with a gate, or without biases

  /// Multiply-adds a token.
  std::int64_t macs() const { return (up.empty() ? 1 : 2) * num_experts * rank * d_model; }
};

/// Rows of all ranks: P_e = V^T diag(sqrt(p)) G_e and Q_e = V^T U_e with the expert's gate rows G_e
/// and up rows U_e [I, D], p_j = E[(act(g_j x) / (g_j x))^2] (E[sigmoid^2] for SiLU), and V [I, R]
/// the first eigenvectors of A C A^T, A being what stands right of V^T and C = E[x x^T]: the
/// truncation that loses least of E|A x|^2 (the SVD of A C^(1/2)). With R = I both products are
/// exact. Biases are left out. Without a gate G_e are the up rows, each with its bias as the weight
/// of one more input, which is 1; and there is no Q. Expectations are over at most 4096 rows of x,
/// evenly spaced.
///
/// @param expert_of_neuron  [H], in [0, E), or negative: in no expert. Experts of one width I
/// @param x                 [T, D] the layer's inputs; leave out attention sinks
/// @param rank              R is that, or I or D where they are less
/// @throws InvalidArgument  shapes disagree, no token, experts of several
///                          widths, a rank below 1, an input that is not finite
MassRouter fit_mass_router(const FfnView& ffn, std::span<const std::int32_t> expert_of_neuron,
                           std::int64_t num_experts, MatrixView<const float> x, std::int64_t rank,
                           const ParallelFor& parallel);

/// x [T, D]   scores [T, E], written, >= 0. @throws InvalidArgument  shapes disagree
void mass_scores(const MassRouter& router, MatrixView<const float> x, MatrixView<float> scores,
                 const ParallelFor& parallel);

}  // namespace cleave
