#pragma once

#include <cstdint>
#include <vector>

#include "budget_layer.h"
#include "cleave/convert.h"

// Allocation::kKl: how the shared neurons are divided among the layers.
namespace cleave {

/// What a layer's conversion costs at the uniform width of its shared slice, and how fast that
/// falls with more: cost(w) = kl * exp(-slope * (w - uniform) / I).
struct LayerCost {
  double kl = 0.0;     ///< of the model with only this layer converted
  double slope = 0.0;  ///< not negative
};

/// Widths of shared slices, in experts (I neurons).
struct WidthRange {
  std::int64_t uniform = 0, least = 0, most = 0;
};

/// Moves experts' widths from the layer that loses least by one less to the layer that gains most
/// by one more, as long as that lowers the sum of the costs. The costs are convex, so this ends at
/// the least sum (Fox 1966, marginal analysis).
/// @return  the widths [L], in experts, after every move; every one sums to L * uniform
std::vector<std::vector<std::int64_t>> exchange_widths(const std::vector<LayerCost>& costs,
                                                       const WidthRange& range);

/// Windows `which` of `from`, at most as long. Shorter ones lose the end of their text, not the
/// special tokens behind it.
TokenWindows pick_windows(const TokenWindows& from, const std::vector<std::int64_t>& which,
                          std::int64_t context);

/// @throws InvalidArgument  nothing to divide, or too few windows to hold some apart
void check_allocation(const BudgetShares& shares, const TokenWindows& calibration);

/// Converts with the division of the shared neurons that is best end to end on windows held apart:
/// with the uniform one unless another is better on every one of them. @param model  the dense one,
/// of `source`
Conversion convert_allocated(Model& model, const Checkpoint& source, const BudgetSpec& spec,
                             const TokenWindows& calibration, const BudgetProgress& progress);

}  // namespace cleave
