#pragma once

#include <cstdint>

#include "cleave/model.h"
#include "cleave/text.h"

namespace cleave {

/// Text for a model's first FFNs, which read little more than the token at hand and so learn the
/// tokens that a text has: copies of the first `count` windows of `text` (or of all), in which each
/// token but the first and the special ones around a text is, with probability kRareTokens,
/// replaced by one of the vocabulary that the text lacks. All of these come once before one comes
/// again. Left out are tokens whose embedding is larger or smaller than any of the text's: nobody
/// trained them.
///
/// @returns no windows if the text lacks no token
TokenWindows rare_token_windows(Model& model, const TokenWindows& text, std::int64_t count,
                                std::uint64_t seed);
inline constexpr double kRareTokens = 0.4;
/// So many of the layers are meant: the first eighth.
inline std::int64_t rare_token_layers(std::int64_t layers) { return (layers + 7) / 8; }

}  // namespace cleave
