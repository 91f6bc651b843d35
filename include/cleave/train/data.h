#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/text.h"

namespace cleave::train {

/// Where training stands in its data: all that a checkpoint needs to go on exactly.
struct DataCursor {
  std::int64_t epoch = 0;     ///< full passes behind us
  std::int64_t position = 0;  ///< windows of this epoch already taken, in [0, count)
};

/// The order of one epoch: a permutation of [0, count) that depends on (count, seed, epoch) alone.
/// Own Fisher-Yates over std::mt19937_64 seeded with seed + epoch * 2^64/phi, because std::shuffle
/// differs between standard libraries.
std::vector<std::int64_t> epoch_permutation(std::int64_t count, std::uint64_t seed,
                                            std::int64_t epoch);

/// Hands out window numbers: every window once an epoch, each epoch in an order of its own. A batch
/// may span two epochs.
class WindowOrder {
 public:
  /// @throws InvalidArgument  count < 1
  WindowOrder(std::int64_t count, std::uint64_t seed);
  /// The next n window numbers.
  std::vector<std::int64_t> next(std::int64_t n);
  const DataCursor& cursor() const { return cursor_; }
  /// Goes to where `cursor()` once was. @throws InvalidArgument  outside the epoch
  void seek(const DataCursor& cursor);

 private:
  std::int64_t count_;
  std::uint64_t seed_;
  DataCursor cursor_;
  std::vector<std::int64_t> order_;  ///< of cursor_.epoch
};

/// The windows as one batch: int64 [B, context] on the CPU.
at::Tensor batch_tokens(const TokenWindows& windows, std::span<const std::int64_t> ids);

/// Throws InvalidArgument if a token is outside [0, vocab_size); names the window.
void check_tokens(const TokenWindows& windows, std::int64_t vocab_size);

struct HeldOutSplit {
  TokenWindows train;
  TokenWindows held_out;
};

/// Sets the last `held_out_windows` windows apart. The end of a text, not windows in between: a
/// window whose neighbours were trained on is not quite unseen.
/// @throws InvalidArgument  nothing would be left to train on
HeldOutSplit hold_out(const TokenWindows& windows, std::int64_t held_out_windows);

}  // namespace cleave::train
