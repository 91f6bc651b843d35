#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "budget_layer.h"
#include "cleave/routing.h"

// What a conversion to a budget tells its user.
namespace cleave {

/// How much text the refit of a layer had.
struct FitText {
  std::int64_t layer = 0;
  std::int64_t tokens = 0;   ///< of the calibration text
  double seen = 0.0;         ///< of them by a routed neuron, the mean; all where none is routed
  bool routed = false;       ///< whether any is
  std::int64_t running = 0;  ///< neurons that run for a token, whose weights are told apart
};

/// Of a layer's rows under a routing (no ids: nothing is routed). Padding is no unknown, and
/// experts of nothing else see no text.
FitText fit_text(const BudgetRows& rows, const Routing& routing, std::int64_t tokens,
                 std::int64_t layer);

/// Names the layers with fewer than four tokens per unknown; empty optional where all have more.
std::optional<std::string> text_notice(const std::vector<FitText>& layers);

/// Share [E] of the tokens that chose each expert.
std::vector<double> expert_loads(const Routing& routing, std::int64_t num_experts);
/// Counts the experts that no token chose, but for those of padding; empty optional for none.
std::optional<std::string> unused_notice(const BudgetRows& rows, const std::vector<double>& load,
                                         std::int64_t layer);

}  // namespace cleave
