#pragma once

#include <cstdint>
#include <vector>

#include "cleave/model.h"
#include "cleave/text.h"
#include "cleave/views.h"

namespace cleave {

// Threshold routing: easy tokens run few experts, hard ones many, and a text as a whole keeps a
// budget. Source: D2DMoE, arXiv:2310.04361 (the rule: RouteSpec::threshold); the budget's
// calibration is a quantile.

/// The threshold at which tokens with these logits use `average` experts each in the mean: with
/// d = logit - largest logit of the token, the quantile of d over the K largest of all tokens that
/// leaves (average - 1) T of them above.
///   logits [T, E]
/// @param most  K, the most that a token may use
/// @throws InvalidArgument  no token, K outside [1, E], an average outside [1, K], a logit that is
///                          not finite
float calibrate_threshold(MatrixView<const float> logits, std::int64_t most, double average);

/// Gives each layer the threshold at which it uses `average` experts in the mean over the text, and
/// returns them [L]; dense layers get 0. What a layer sees depends on what those before it let
/// through, so there are two passes over the text: one with K = average, one with the thresholds
/// that come of it. Holds tokens * E floats a layer, so a few thousand tokens are plenty.
/// @param text     best one that the routers were not fitted on, where they are surer than
/// elsewhere
/// @param average  in [1, config().experts_per_token], which stays the most that a token may use:
///                 Model::set_active_experts() first, to leave room above the average
/// @throws InvalidArgument  as calibrate_threshold(), or a model without experts
std::vector<float> calibrate_thresholds(Model& model, const TokenWindows& text, double average);

}  // namespace cleave
