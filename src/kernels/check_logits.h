#pragma once

#include <cstdint>

#include "cleave/routing.h"

namespace cleave {

/// @throws InvalidArgument  K < 1, K > E, or a threshold outside [0, 1]
void check_route_spec(const char* function, const RouteSpec& spec, std::int64_t num_experts);
/// @throws InvalidArgument  a logit of this token is NaN or infinite
void check_logits(const char* function, const float* logits, std::int64_t num_experts,
                  std::int64_t token);

}  // namespace cleave
