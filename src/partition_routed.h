#pragma once

#include <cstdint>
#include <vector>

#include "cleave/partition.h"

// What the partitioners with shared neurons have in common.
namespace cleave {

/// The neurons that are not shared, ascending, and the way back to a partition of all.
struct RoutedNeurons {
  std::int64_t hidden = 0;
  std::int64_t width = 0;  ///< of an expert
  std::int32_t num_experts = 0;
  std::vector<std::int32_t> ids;

  /// Calls routed_width().
  RoutedNeurons(std::int64_t hidden_in, const RoutedSpec& spec);
  std::int64_t count() const { return static_cast<std::int64_t>(ids.size()); }
  std::vector<std::int64_t> capacities() const {
    return std::vector<std::int64_t>(static_cast<std::size_t>(num_experts), width);
  }
  /// expert_of[r] is the expert of neuron ids[r].
  NeuronPartition partition(const std::vector<std::int32_t>& expert_of) const;
};

/// @throws InvalidArgument  the sample is empty, its sizes disagree, or a value is NaN or infinite
void check_sample(const char* function, const NeuronSample& sample);

}  // namespace cleave
