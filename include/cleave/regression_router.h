#pragma once

#include <cstdint>
#include <vector>

#include "cleave/kernels.h"
#include "cleave/views.h"

namespace cleave {

/// A router of two layers that foresees how much every expert would add:
///   score[t] = | W2 relu(W1 x[t] + b1) + b2 |
/// No stock class holds it, so it is measured beside the linear routers (BaselineRouter) and not
/// written. Source: D2DMoE, arXiv:2310.04361.
struct RegressionRouter {
  std::int64_t num_experts = 0;      ///< E
  std::int64_t d_model = 0;          ///< D
  std::int64_t width = 0;            ///< R, hidden units
  std::vector<float> hidden_weight;  ///< W1 [R, D]
  std::vector<float> hidden_bias;    ///< b1 [R]
  std::vector<float> weight;         ///< W2 [E, R]
  std::vector<float> bias;           ///< b2 [E]

  /// Multiply-adds a token.
  std::int64_t macs() const { return width * (d_model + num_experts); }
};

struct RegressionSpec {
  std::int64_t width = 128;  ///< R; the paper's
  std::int64_t steps = 800;  ///< of Adam
  std::int64_t batch = 128;  ///< tokens a step, drawn with replacement; fewer where T is less
  double rate = 5e-3;        ///< falls to 0 linearly; inputs and targets have a size near 1
  std::uint64_t seed = 0;
};

/// Regresses the size of every expert's output on the layer's input: descends the mean over t and e
/// of (score[t,e] - target[t,e])^2 with hand-written derivatives.
///
/// As in the paper: the targets are the sizes themselves, not shares of a token's. Unlike its code:
/// inputs and targets are divided by one number each (the root mean square, the mean) while it
/// learns, so that one rate suits every layer, and the numbers are folded into the weights
/// afterwards; b2 starts at the mean of its expert; the rate falls. An expert whose target is the
/// same for every token (a dead one, say) gets that constant and moves nothing else.
///
/// The same seed and input give the same result for any number of threads up to rounding.
///
/// @param x       [T, D] the layer's inputs; leave out attention sinks, whose sizes drown all
/// others
/// @param target  [T, E] |expert_e(x[t])|, say: expert_output_norms()
/// @throws InvalidArgument  shapes disagree, no token, no expert, a value that is not finite or a
///                          target below 0 (names the token), a width or batch below 1
/// Source: D2DMoE, arXiv:2310.04361, section 3.2 and its code's routers.
RegressionRouter fit_regression_router(MatrixView<const float> x, MatrixView<const float> target,
                                       const RegressionSpec& spec, const ParallelFor& parallel);

/// What the router foresees.
///   x [T, D]   scores [T, E], written, >= 0
/// @throws InvalidArgument  shapes disagree
void regression_scores(const RegressionRouter& router, MatrixView<const float> x,
                       MatrixView<float> scores, const ParallelFor& parallel);

/// What the choice of the K largest scores is worth beside the oracle's, the K largest outputs.
struct RouterQuality {
  double recall = 1.0;    ///< mean share of the oracle's experts that are chosen
  double captured = 1.0;  ///< energy of the chosen experts over that of the oracle's
};

/// @param scores  [T, E] of any router
/// @param norms   [T, E] |expert_e(x[t])|; squared they are energies
/// @throws InvalidArgument  shapes disagree, no token, or K outside [1, E]
RouterQuality router_quality(MatrixView<const float> scores, MatrixView<const float> norms,
                             std::int64_t experts_per_token);

}  // namespace cleave
