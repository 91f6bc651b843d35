#include "rare_tokens.h"

#include <algorithm>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "fail.h"
#include "support/buffer.h"

namespace cleave {
namespace {

/// |embedding|^2 [V] of all tokens.
std::vector<float> embedding_squares(Model& model) {
  constexpr std::int64_t kBlock = 1024;
  const std::int64_t V = model.config().vocab_size, D = model.config().hidden_size;
  std::vector<float> squares(static_cast<std::size_t>(V), 0.0f);
  Buffer block(kBlock * D);
  std::vector<std::int32_t> ids;
  for (std::int64_t first = 0; first < V; first += kBlock) {
    const std::int64_t n = std::min(kBlock, V - first);
    ids.resize(static_cast<std::size_t>(n));
    for (std::int64_t i = 0; i < n; ++i) ids[i] = static_cast<std::int32_t>(first + i);
    const MatrixView<float> rows(block.data(), n, D);
    model.embedding_rows(ids, rows);
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t d = 0; d < D; ++d) squares[first + i] += rows(i, d) * rows(i, d);
  }
  return squares;
}

/// Tokens of the vocabulary that the text lacks, ascending.
std::vector<std::int32_t> lacking(Model& model, const TokenWindows& text) {
  const std::vector<float> square = embedding_squares(model);
  std::vector<bool> seen(square.size(), false);
  float least = std::numeric_limits<float>::infinity(), most = 0.0f;
  for (const std::int32_t t : text.tokens) {
    if (t < 0 || static_cast<std::size_t>(t) >= square.size())
      fail_argument("convert: token {} of the calibration text; the model has {} of them", t,
                    square.size());
    seen[static_cast<std::size_t>(t)] = true;
    least = std::min(least, square[static_cast<std::size_t>(t)]);
    most = std::max(most, square[static_cast<std::size_t>(t)]);
  }
  std::vector<std::int32_t> tokens;
  for (std::size_t t = 0; t < square.size(); ++t)
    if (!seen[t] && square[t] >= least && square[t] <= most)
      tokens.push_back(static_cast<std::int32_t>(t));
  return tokens;
}

}  // namespace

TokenWindows rare_token_windows(Model& model, const TokenWindows& text, std::int64_t count,
                                std::uint64_t seed) {
  TokenWindows windows;
  windows.context = text.context;
  windows.before = text.before;
  windows.after = text.after;
  std::vector<std::int32_t> rare = lacking(model, text);
  if (rare.empty()) return windows;
  const std::int64_t tokens = std::min(count, text.count()) * text.context;
  windows.tokens.assign(text.tokens.begin(), text.tokens.begin() + tokens);
  // (The distributions and shuffles of <random> differ between standard libraries.)
  std::mt19937_64 random(seed);
  const auto below = [&](std::size_t n) { return ((random() >> 32) * n) >> 32; };
  std::size_t next = 0;
  const std::int64_t first = std::max<std::int64_t>(1, text.before);
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t place = t % text.context;
    if (place < first || place >= text.context - text.after ||
        static_cast<double>(random() >> 11) * 0x1p-53 >= kRareTokens)
      continue;
    if (next == rare.size()) next = 0;
    std::swap(rare[next], rare[next + below(rare.size() - next)]);
    windows.tokens[static_cast<std::size_t>(t)] = rare[next++];
  }
  return windows;
}

}  // namespace cleave
