#pragma once

#include "cleave/routing.h"

namespace cleave {

/// The first pair t * K + k whose id is neither in [0, num_experts) nor Routing::kUnused; -1: none.
std::int64_t find_foreign_id(const RoutingView& routing, std::int64_t num_experts);
/// A pair of a token that has its expert in an earlier slot, too (the first such, of up to 4096
/// experts); -1: none. O(T * K) for each 4096 experts. Ids must be in range.
std::int64_t find_repeated_id(const RoutingView& routing, std::int64_t num_experts);

/// @throws InvalidArgument  ids or weights are not [T, K], or an id is outside
/// [0, num_experts) and not Routing::kUnused
void check_routing(const char* function, const RoutingView& routing, std::int64_t num_experts);
void check_routing(const char* function, const Routing& routing, std::int64_t num_experts);

/// @throws InvalidArgument  ids or weights are not [T, K]
RoutingView checked_view(const char* function, const Routing& routing);

}  // namespace cleave
