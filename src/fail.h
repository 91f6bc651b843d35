#pragma once

#include <utility>

#include <fmt/format.h>

#include "cleave/error.h"

namespace cleave {

/// Throws FileError with a formatted message: file, fact, expectation, way out.
template <typename... Args>
[[noreturn]] void fail_file(fmt::format_string<Args...> format, Args&&... args) {
  throw FileError(fmt::format(format, std::forward<Args>(args)...));
}

/// Throws InvalidArgument with a formatted message: function, fact, expectation, way out.
template <typename... Args>
[[noreturn]] void fail_argument(fmt::format_string<Args...> format, Args&&... args) {
  throw InvalidArgument(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace cleave
