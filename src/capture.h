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
  FfnView ffn{};                       ///< for partitions and routers that come from weights
  std::int64_t context = 0;            ///< tokens of a window; 0: all are one
};

struct CaptureSpec {
  std::int64_t width = 16;   ///< I, neurons of an expert
  std::int64_t shared = 0;   ///< neurons that are always on
  std::int64_t experts = 0;  ///< E; shared + E * width = H
  std::int64_t active = 0;   ///< K
  BudgetPartition partition = BudgetPartition::kCaptured;
  std::int64_t rounds = 2;                       ///< of router and assignment in turn, kCaptured
  RouterMethod router = RouterMethod::kTrained;  ///< the final one
  std::int64_t router_rank = 0;                  ///< kLowRank; 0: default_router_rank()
  double router_penalty = 0.01;
  double logit_spread = 1.0;  ///< standard deviation of the final router's logits, see below
  RouterTrainSpec training;   ///< of the final router
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
/// shared. With another CaptureSpec::partition the split is that. The last router is made by
/// CaptureSpec::router.
Capture capture_energy(const LayerTokens& tokens, const CaptureSpec& spec,
                       const ParallelFor& parallel);

/// The last step again, for the energies as they are now: once `down` was repaired, say. The split
/// stays; the router and what it catches become new.
void retrain_router(const LayerTokens& tokens, const CaptureSpec& spec, Capture& capture,
                    const ParallelFor& parallel);

/// A split that does not depend on a router: any CaptureSpec::partition but kCaptured.
/// @param shared  the neurons that are always on, where the method has no way of its own
NeuronPartition fixed_partition(const LayerTokens& tokens, const CaptureSpec& spec,
                                std::span<const std::int32_t> shared, const ParallelFor& parallel);

/// The router of CaptureSpec::router, its logits over a token's experts with a standard deviation
/// of CaptureSpec::logit_spread.
/// @param energy  [T, E], see expert_energies()
/// @param ridge   fitted to the amplitudes: what most methods start from
LinearRouter final_router(const LayerTokens& tokens, const CaptureSpec& spec,
                          const NeuronPartition& partition, MatrixView<const float> energy,
                          const LinearRouter& ridge, const ParallelFor& parallel);

/// Rank of a low-rank router where none is given: 32, or half the experts where that is less.
std::int64_t default_router_rank(std::int64_t experts);

/// hidden [n, H] of at most kSampleRows tokens, evenly spaced, each times the root of its weight.
struct HiddenSample {
  static constexpr std::int64_t kSampleRows = 2048;
  explicit HiddenSample(const LayerTokens& tokens);
  NeuronSample view() const;  ///< valid while it lives

  std::int64_t rows = 0, neurons = 0;
  std::vector<float> hidden, down_norm;  // [n, H], [H]
};

/// By what neurons are kept where nothing is routed; d_j: column j of `down`, moments weighted.
enum class StaticScore {
  kEnergy,       ///< E[h_j^2] |d_j|^2
  kFluctuation,  ///< Var(h_j) |d_j|^2: FLAP, arXiv:2312.11983
};

/// The static counterpart: the `kept` neurons of highest score are shared, the others dropped.
Capture keep_highest(const LayerTokens& tokens, std::int64_t kept, StaticScore score,
                     const ParallelFor& parallel);

/// The experts that `router` chooses for each row of x [T, D], and what they weigh.
Routing route_tokens(MatrixView<const float> x, const LinearRouter& router,
                     std::int64_t experts_per_token, GateMode gate, const ParallelFor& parallel);
/// Their ids alone, [T, K].
std::vector<std::int32_t> choose_experts(MatrixView<const float> x, const LinearRouter& router,
                                         std::int64_t experts_per_token,
                                         const ParallelFor& parallel);

}  // namespace cleave
