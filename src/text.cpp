#include "cleave/text.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <string_view>

#include "cleave/model_config.h"
#include "cleave/tokenizer.h"
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

WindowFrame window_frame(const ModelConfig& config, const Tokenizer& tokenizer) {
  if (config.causal) return {};
  const auto before = tokenizer.special_before(), after = tokenizer.special_after();
  return {{before.begin(), before.end()}, {after.begin(), after.end()}};
}

TokenWindows make_windows(std::vector<std::int32_t> tokens, std::int64_t context,
                          std::int64_t limit_tokens, const std::string& origin,
                          const WindowFrame& frame) {
  TokenWindows windows{{}, context, std::ssize(frame.before), std::ssize(frame.after)};
  const auto all = std::ssize(tokens), room = context - windows.before - windows.after;
  if (context < 2)
    fail_argument("context is {} tokens; expected at least 2: one to read and one to predict",
                  context);
  if (room < 1)
    fail_argument("context is {} tokens, and {} special ones stand around a text; expected more",
                  context, context - room);
  if (limit_tokens < 0)
    fail_argument("limit of tokens is {}; expected 0 (all) or more", limit_tokens);
  if (all < room && room < context)
    fail_file(
        "{}: has {} tokens, fewer than the {} that one window of {} holds beside {} special ones; "
        "give a longer text or a smaller context",
        origin, all, room, context, context - room);
  if (all < room)
    fail_file(
        "{}: has {} tokens, fewer than one window of {}; give a longer text or a smaller "
        "context",
        origin, all, room);
  if (limit_tokens > 0 && limit_tokens < context)
    fail_argument(
        "limit of {} tokens is less than one window of {}; raise it or take a smaller "
        "context",
        limit_tokens, context);
  const std::int64_t count =
      limit_tokens == 0 ? all / room : std::min(all / room, limit_tokens / context);
  if (room == context) {
    tokens.resize(static_cast<std::size_t>(count * context));
    windows.tokens = std::move(tokens);
    return windows;
  }
  windows.tokens.reserve(static_cast<std::size_t>(count * context));
  const auto append = [&](auto begin, auto end) {
    windows.tokens.insert(windows.tokens.end(), begin, end);
  };
  for (std::int64_t w = 0; w < count; ++w) {
    append(frame.before.begin(), frame.before.end());
    append(tokens.begin() + w * room, tokens.begin() + (w + 1) * room);
    append(frame.after.begin(), frame.after.end());
  }
  return windows;
}

TokenWindows model_windows(const ModelConfig& config, const Tokenizer& tokenizer,
                           std::string_view text, std::int64_t context, std::int64_t limit_tokens,
                           const std::string& origin) {
  if (!config.rotary && context > config.max_position_embeddings)
    fail_argument("context is {} tokens; the model has learned {} positions; give at most that",
                  context, config.max_position_embeddings);
  return make_windows(tokenizer.encode(text), context, limit_tokens, origin,
                      window_frame(config, tokenizer));
}

}  // namespace cleave
