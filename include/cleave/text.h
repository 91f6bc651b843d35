#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace cleave {

/// Reads a text file whole.
/// @throws FileError  missing, empty (or white space only), or binary (holds a NUL byte, or more
///                    than one byte in ten is not UTF-8)
std::string read_text(const std::filesystem::path& file);

/// Tokens cut into disjoint windows of `context`; a shorter rest at the end is left out.
/// Window w is tokens [w * context, (w + 1) * context).
struct TokenWindows {
  std::vector<std::int32_t> tokens;
  std::int64_t context = 0;
  std::int64_t count() const { return static_cast<std::int64_t>(tokens.size()) / context; }
  std::span<const std::int32_t> window(std::int64_t w) const {
    return {tokens.data() + w * context, static_cast<std::size_t>(context)};
  }
};

/// @param limit_tokens  use only the first so many tokens; 0: all
/// @param origin        names the text in messages
/// @throws InvalidArgument  context < 2, or limit_tokens < 0 or less than one window
/// @throws FileError        fewer tokens than one window (says how many there are)
TokenWindows make_windows(std::vector<std::int32_t> tokens, std::int64_t context,
                          std::int64_t limit_tokens, const std::string& origin);

}  // namespace cleave
