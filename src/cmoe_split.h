#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/views.h"

namespace cleave {

/// On which tokens a neuron is among the most active: its column of CMoE's activation matrix.
struct ActivationColumns {
  std::int64_t num_tokens = 0;
  std::vector<std::vector<std::int32_t>> tokens;  ///< [H] of ascending token numbers
};

/// Marks the 10 (or H, if fewer) largest |h| of every token; ties to the lower neuron.
inline constexpr std::int64_t kCmoeTopNeurons = 10;
void add_activations(MatrixView<const float> h, ActivationColumns& columns);

struct CmoeSplit {
  std::vector<std::int32_t> expert;           ///< of each of `neurons`, equal numbers of each
  std::vector<std::int32_t> representatives;  ///< [E] neurons
};

/// CMoE's split of what is not shared: centroids start as the columns of the E most active neurons,
/// neurons are assigned with equal capacities by the L1 distance of their 0/1 columns, the
/// centroids become means once; an expert's representative is its neuron nearest to that mean.
/// @param neurons  as many as E divides
/// Source: CMoE, arXiv:2502.04416, section 3 (one round, as its code).
CmoeSplit cmoe_split(const ActivationColumns& columns, std::span<const std::int32_t> neurons,
                     std::int64_t num_experts);

/// Rows to columns of equal capacity at small total cost: cheapest pairs first, then the rows of
/// two columns are divided anew as long as that gains (exact for the two).
/// cost [n, E], E divides n   returns [n]
std::vector<std::int32_t> assign_evenly(MatrixView<const float> cost);

}  // namespace cleave
