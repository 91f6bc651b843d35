#include "cleave/text.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string_view>

#include "fail.h"

namespace cleave {
namespace {

// Length of the UTF-8 sequence at `i`, or 0 if there is none (Unicode 15, table 3-7).
std::size_t sequence_length(std::string_view text, std::size_t i) {
  const auto byte = [&](std::size_t k) {
    return k < text.size() ? static_cast<unsigned char>(text[k]) : 0u;
  };
  const unsigned first = byte(i), second = byte(i + 1);
  const auto follows = [&](std::size_t k) { return (byte(k) & 0xC0u) == 0x80u; };
  if (first < 0x80) return 1;
  if (first >= 0xC2 && first <= 0xDF) return follows(i + 1) ? 2 : 0;
  if (first >= 0xE0 && first <= 0xEF) {
    const bool overlong = first == 0xE0 && second < 0xA0;
    const bool surrogate = first == 0xED && second > 0x9F;
    return follows(i + 1) && follows(i + 2) && !overlong && !surrogate ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const bool overlong = first == 0xF0 && second < 0x90;
    const bool beyond = first == 0xF4 && second > 0x8F;
    return follows(i + 1) && follows(i + 2) && follows(i + 3) && !overlong && !beyond ? 4 : 0;
  }
  return 0;
}

std::size_t count_invalid_bytes(std::string_view text) {
  std::size_t invalid = 0;
  for (std::size_t i = 0; i < text.size();) {
    const std::size_t length = sequence_length(text, i);
    invalid += length == 0 ? 1 : 0;
    i += std::max<std::size_t>(1, length);
  }
  return invalid;
}

}  // namespace

std::string read_text(const std::filesystem::path& file) {
  std::error_code error;
  if (!std::filesystem::exists(file, error)) fail_file("{}: no such text file", file.string());
  if (std::filesystem::is_directory(file, error))
    fail_file("{}: is a directory; expected a text file", file.string());
  std::ifstream stream(file, std::ios::binary);
  if (!stream) fail_file("{}: cannot be opened for reading", file.string());
  std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (stream.bad()) fail_file("{}: reading failed", file.string());
  if (text.find_first_not_of(" \t\r\n\f\v") == std::string::npos)
    fail_file("{}: holds no text ({} bytes, all white space); expected UTF-8 text", file.string(),
              text.size());
  if (const std::size_t nul = text.find('\0'); nul != std::string::npos)
    fail_file("{}: is binary (a NUL byte at offset {}); expected UTF-8 text", file.string(), nul);
  if (const std::size_t invalid = count_invalid_bytes(text); invalid * 10 > text.size())
    fail_file("{}: is no UTF-8 text ({} of {} bytes are invalid); convert it to UTF-8 first",
              file.string(), invalid, text.size());
  return text;
}

TokenWindows make_windows(std::vector<std::int32_t> tokens, std::int64_t context,
                          std::int64_t limit_tokens, const std::string& origin) {
  if (context < 2)
    fail_argument("context is {} tokens; expected at least 2: one to read and one to predict",
                  context);
  if (limit_tokens < 0)
    fail_argument("limit of tokens is {}; expected 0 (all) or more", limit_tokens);
  const auto all = static_cast<std::int64_t>(tokens.size());
  const std::int64_t used = limit_tokens == 0 ? all : std::min(all, limit_tokens);
  if (all < context)
    fail_file(
        "{}: has {} tokens, fewer than one window of {}; give a longer text or a smaller "
        "context",
        origin, all, context);
  if (used < context)
    fail_argument(
        "limit of {} tokens is less than one window of {}; raise it or take a smaller "
        "context",
        limit_tokens, context);
  tokens.resize(used / context * context);
  return {std::move(tokens), context};
}

}  // namespace cleave
