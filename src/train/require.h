#pragma once

#include <fmt/format.h>

#include <utility>

#include "cleave/error.h"

namespace cleave::train {

/// Throws InvalidArgument with a formatted message unless `holds`.
template <typename... Args>
void require(bool holds, fmt::format_string<Args...> format, Args&&... args) {
  if (!holds) throw InvalidArgument(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace cleave::train
