#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/partition.h"
#include "cleave/views.h"

// CMoE's partitioner on activation columns that were collected a piece of the text at a time.
namespace cleave {

/// Ka of the paper: neurons that a token activates.
inline constexpr std::int64_t kCmoeTopNeurons = 10;

/// On which tokens a neuron is among the most active: its 0/1 column.
struct ActivationColumns {
  std::int64_t num_tokens = 0;
  std::vector<std::vector<std::int32_t>> tokens;  ///< [H] of ascending token numbers
};

/// Marks the `top` largest |h| (times the norm of d where given) of every token; ties to the lower
/// neuron; a neuron that is 0 is not active.
///   h [T, H]   down_norm [H] or empty
void add_activations(MatrixView<const float> h, std::span<const float> down_norm, std::int64_t top,
                     ActivationColumns& columns);

/// partition_cmoe() but for its choice of the shared neurons.
/// @throws InvalidArgument  as routed_width()
CmoePartition cmoe_clusters(const ActivationColumns& columns, const RoutedSpec& spec);

}  // namespace cleave
