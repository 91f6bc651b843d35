#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/fit_router.h"
#include "cleave/kernels.h"
#include "cleave/partition.h"
#include "cleave/routing.h"
#include "cleave/views.h"

namespace cleave {

/// What one FFN did with the tokens of a calibration text. Views only.
struct LayerTokens {
  MatrixView<const float> input;       ///< [T, D]
  MatrixView<const float> hidden;      ///< [T, H] values between the two products
  std::span<const float> weight;       ///< [T] of each token in all sums
  std::span<const float> down_square;  ///< [H] |d_j|^2, squared length of a neuron's output row
};

struct CaptureSpec {
  std::int64_t width = 16;   ///< I, neurons of an expert
  std::int64_t shared = 0;   ///< neurons that are always on
  std::int64_t experts = 0;  ///< E; shared + E * width = H
  std::int64_t active = 0;   ///< K
  std::int64_t rounds = 2;   ///< of router and assignment in turn
  double router_penalty = 0.01;
  RouterTrainSpec training;  ///< of the final router
  std::uint64_t seed = 0;
};

/// Experts and the router that chooses them.
struct Capture {
  NeuronPartition partition;
  LinearRouter router;
  double energy = 0.0;         ///< share of the neurons' energy that shared and chosen experts hold
  double oracle_energy = 0.0;  ///< the same if the K experts of most energy were chosen
  double recall = 0.0;         ///< share of those K that the router chose
};

/// Energy of neuron j for token t: weight_t * h[t,j]^2 * |d_j|^2, the square of what it adds to y.
/// For every expert: energy [T, E], written. Shared neurons are left out.
void expert_energies(const LayerTokens& tokens, const NeuronPartition& partition,
                     MatrixView<float> energy, const ParallelFor& parallel);

/// Splits an FFN so that a linear router catches as much energy as it can. Starts from the neurons
/// of most energy as shared ones and balanced k-means on the activation profiles of the others.
/// Then, in turn: fit a router to the experts' energies; give every neuron to the expert (or to the
/// shared slice) under whose real choices it is on when it has energy, at equal widths: an
/// assignment problem, solved exactly. A neuron whose energy no router can foresee so becomes
/// shared. The last router is trained (train_router).
Capture capture_energy(const LayerTokens& tokens, const CaptureSpec& spec,
                       const ParallelFor& parallel);

/// The static counterpart: the `kept` neurons of most energy are shared, the others dropped.
Capture keep_most_energy(const LayerTokens& tokens, std::int64_t kept, const ParallelFor& parallel);

/// ids [T, K] of the experts that `router` chooses for each row of x.
std::vector<std::int32_t> choose_experts(MatrixView<const float> x, const LinearRouter& router,
                                         std::int64_t experts_per_token,
                                         const ParallelFor& parallel);

}  // namespace cleave
