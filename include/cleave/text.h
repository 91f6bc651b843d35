#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cleave {

class Tokenizer;
struct ModelConfig;

/// Reads a text file whole.
/// @throws FileError  missing, empty (or white space only), or binary (holds a NUL byte, or more
///                    than one byte in ten is not UTF-8)
std::string read_text(const std::filesystem::path& file);

/// Tokens cut into disjoint windows of `context`; a shorter rest at the end is left out.
/// Window w is tokens [w * context, (w + 1) * context).
struct TokenWindows {
  std::vector<std::int32_t> tokens;
  std::int64_t context = 0;
  std::int64_t before = 0,
               after = 0;  ///< special tokens at either end of each window, of `context`
  std::int64_t count() const { return static_cast<std::int64_t>(tokens.size()) / context; }
  std::span<const std::int32_t> window(std::int64_t w) const {
    return {tokens.data() + w * context, static_cast<std::size_t>(context)};
  }
};

/// What stands around the text of every window.
struct WindowFrame {
  std::vector<std::int32_t> before, after;
};
/// Around a text for a model that sees whole windows (an encoder): what the tokenizer puts around
/// one text, [CLS] and [SEP], or nothing if it puts nothing. For a causal model nothing, no BOS.
WindowFrame window_frame(const ModelConfig& config, const Tokenizer& tokenizer);

/// @param limit_tokens  as many windows as fit so many tokens, frames included; 0: all
/// @param origin        names the text in messages
/// @param frame         part of `context`: pieces of the tokens are as much shorter
/// @throws InvalidArgument  context < 2 or without room for text in the frame, or limit_tokens < 0
///                          or less than one window
/// @throws FileError        fewer tokens than one window takes (says how many there are)
TokenWindows make_windows(std::vector<std::int32_t> tokens, std::int64_t context,
                          std::int64_t limit_tokens, const std::string& origin,
                          const WindowFrame& frame = {});

/// A text as windows of what a model reads: tokenised whole, cut, each piece in its window_frame().
/// @throws InvalidArgument  as above, or context is more than the model has learned positions
TokenWindows model_windows(const ModelConfig& config, const Tokenizer& tokenizer,
                           std::string_view text, std::int64_t context, std::int64_t limit_tokens,
                           const std::string& origin);

}  // namespace cleave
