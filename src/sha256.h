#pragma once

#include <filesystem>
#include <span>
#include <string>

namespace cleave {

/// SHA-256 over the bytes of `files`, one after another, as 64 hex digits.
/// @throws FileError  a file cannot be read
std::string sha256_of_files(std::span<const std::filesystem::path> files);

}  // namespace cleave
