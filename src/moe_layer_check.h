#pragma once

#include "cleave/moe_layer.h"

namespace cleave {

/// Throws InvalidArgument, in the name of `function`, unless MoeLayer::shared is empty or one slice
/// that fits the experts.
void check_shared(const char* function, const MoeLayer& layer);

}  // namespace cleave
