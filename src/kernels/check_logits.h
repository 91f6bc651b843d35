#pragma once

#include <cstdint>

namespace cleave {

/// @throws InvalidArgument  K < 1 or K > E
void check_experts_per_token(const char* function, std::int64_t experts_per_token,
                             std::int64_t num_experts);
/// @throws InvalidArgument  a logit of this token is NaN or infinite
void check_logits(const char* function, const float* logits, std::int64_t num_experts,
                  std::int64_t token);

}  // namespace cleave
