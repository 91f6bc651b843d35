#pragma once

#include <cstdint>
#include <vector>

#include "cleave/baselines.h"
#include "cleave/expert.h"
#include "cleave/kernels.h"
#include "support/buffer.h"

namespace cleave {

/// A layer's experts as row ranges of `down`, to have their outputs one by one.
struct ExpertSplit {
  std::int64_t num_experts = 0;      ///< E
  std::int64_t width = 0;            ///< I
  std::vector<std::int32_t> order;   ///< [E * I] neurons, grouped by expert
  std::vector<float> down_rows;      ///< [E * I, D]
  std::vector<std::int32_t> expert;  ///< [H], as BaselineLayer::expert_of_neuron

  ExpertSplit(const FfnView& ffn, std::vector<std::int32_t> expert_of_neuron,
              std::int64_t num_experts);
};

/// |expert_e(x[t])|^2, or with `teacher` [T, D] |expert_e(x[t]) - share * teacher[t]|^2.
///   h [T, H]   out [T, E], written
void expert_squares(const ExpertSplit& split, MatrixView<const float> h,
                    MatrixView<const float> teacher, double share, MatrixView<float> out,
                    const ParallelFor& parallel);

/// Which experts a token uses: the K largest scores, ties to the lower id.
///   scores [T, E]   on [T, E], written: 1 or 0
void choose_largest(MatrixView<const float> scores, std::int64_t experts_per_token,
                    std::uint8_t* on, const ParallelFor& parallel);

/// The scores of a router that reads x alone: linear ones, kRegression and kMass.
///   x [T, D]   scores [T, E], written
void router_scores(const BaselineSpec& spec, const BaselineLayer& layer, MatrixView<const float> x,
                   MatrixView<float> scores, const ParallelFor& parallel);

/// One layer of a baseline at work.
class MaskedFfn {
 public:
  /// `ffn`, `spec` and `layer` must outlive it.
  MaskedFfn(const DenseFfn& ffn, const BaselineSpec& spec, const BaselineLayer& layer);

  /// y[t] += the masked FFN of x[t]. x, y [T, D].
  void run(MatrixView<const float> x, MatrixView<float> y, const ParallelFor& parallel) const;

  /// The experts that the router chooses, given x and its h. on [T, E], written.
  void choose(MatrixView<const float> x, MatrixView<const float> h, std::uint8_t* on,
              const ParallelFor& parallel) const;

  /// By which it chooses them. scores [T, E], written.
  void score(MatrixView<const float> x, MatrixView<const float> h, MatrixView<float> scores,
             const ParallelFor& parallel) const;

 private:
  void mask_experts(const std::uint8_t* on, MatrixView<float> h, const ParallelFor& parallel) const;
  void mask_neurons(MatrixView<float> h, const ParallelFor& parallel) const;

  const DenseFfn& ffn_;
  const BaselineSpec& spec_;
  const BaselineLayer& layer_;
  std::vector<ExpertSplit> split_;  // one, where the router needs the experts' outputs
  std::vector<float> norms_;        // [H], kOracleNeuron
};

}  // namespace cleave
