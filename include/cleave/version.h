#pragma once

// The one place where the version is written; CMakeLists.txt reads it from here.
#define CLEAVE_VERSION_MAJOR 0
#define CLEAVE_VERSION_MINOR 1
#define CLEAVE_VERSION_PATCH 0

namespace cleave {
inline constexpr const char* kVersion = "0.1.0";
}  // namespace cleave
