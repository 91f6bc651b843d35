#pragma once

#include <cstddef>
#include <optional>
#include <string_view>
#include <vector>

#include "cleave/checkpoint.h"

namespace cleave {

/// Position of `name` in a list sorted by name.
std::optional<std::size_t> find_tensor(const std::vector<TensorInfo>& sorted,
                                       std::string_view name);

}  // namespace cleave
