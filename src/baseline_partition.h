#pragma once

#include <cstdint>
#include <vector>

#include "cleave/baselines.h"
#include "cleave/expert.h"
#include "cleave/kernels.h"
#include "partition_cmoe.h"

namespace cleave {

/// What a layer's hidden activations say about its neurons, whoever is routed.
struct LayerMoments {
  std::vector<double> sum, square;  ///< [H], of h
  std::vector<double> down;         ///< [H], |d_j|
  std::int64_t tokens = 0;
  ActivationColumns columns;  ///< of the first tokens of the text, for BaselineScore::kTopRate

  /// h [T, H]
  void add(MatrixView<const float> h, const ParallelFor& parallel);
  double mean(std::int64_t j) const { return sum[j] / static_cast<double>(tokens); }
  double score(BaselineScore score, std::int64_t j) const;
};

/// What decides a partition: rows that agree in it share the work.
struct SplitKey {
  BaselineSplit split;
  BaselineScore score;
  std::int64_t shared, num_experts;
  std::uint64_t seed;
  bool operator==(const SplitKey&) const = default;
};
SplitKey key_of(const BaselineSpec& spec);

struct BaselinePartition {
  SplitKey key;
  std::vector<std::int32_t> expert_of_neuron;  ///< [H], as in BaselineLayer
  std::vector<std::int32_t> representatives;   ///< [E], kCmoe
};

/// The neurons of highest score always on, the others in experts.
BaselinePartition make_partition(const SplitKey& key, const FfnView& ffn,
                                 const LayerMoments& moments, std::int64_t layer);

}  // namespace cleave
