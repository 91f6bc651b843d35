#pragma once

#include "cleave/routing.h"

namespace cleave {

/// @throws InvalidArgument  ids or weights are not [T, K], or an id is outside
/// [0, num_experts) and not Routing::kUnused
void check_routing(const char* function, const RoutingView& routing, std::int64_t num_experts);
void check_routing(const char* function, const Routing& routing, std::int64_t num_experts);

/// @throws InvalidArgument  ids or weights are not [T, K]
RoutingView checked_view(const char* function, const Routing& routing);

}  // namespace cleave
