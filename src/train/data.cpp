#include "cleave/train/data.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <random>
#include <utility>

#include "cleave/error.h"

namespace cleave::train {
namespace {

/// Uniform in [0, n). The top of the range that would favour small results is thrown away.
std::uint64_t draw_below(std::mt19937_64& rng, std::uint64_t n) {
  const std::uint64_t limit = std::numeric_limits<std::uint64_t>::max() / n * n;
  std::uint64_t value = rng();
  while (value >= limit) value = rng();
  return value % n;
}

TokenWindows slice(const TokenWindows& windows, std::int64_t begin, std::int64_t end) {
  TokenWindows part;
  part.context = windows.context;
  part.before = windows.before;
  part.after = windows.after;
  part.tokens.assign(windows.tokens.begin() + begin * windows.context,
                     windows.tokens.begin() + end * windows.context);
  return part;
}

}  // namespace

std::vector<std::int64_t> epoch_permutation(std::int64_t count, std::uint64_t seed,
                                            std::int64_t epoch) {
  // The odd constant is 2^64 / golden ratio: neighbouring epochs of neighbouring seeds differ.
  std::mt19937_64 rng(seed + static_cast<std::uint64_t>(epoch) * 0x9E3779B97F4A7C15ULL);
  std::vector<std::int64_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw_below(rng, i)]);
  return order;
}

WindowOrder::WindowOrder(std::int64_t count, std::uint64_t seed) : count_(count), seed_(seed) {
  if (count < 1)
    throw InvalidArgument(
        "train: the text holds no whole window; use a longer text or a shorter "
        "context");
  order_ = epoch_permutation(count_, seed_, 0);
}

std::vector<std::int64_t> WindowOrder::next(std::int64_t n) {
  std::vector<std::int64_t> ids;
  ids.reserve(static_cast<std::size_t>(n));
  while (static_cast<std::int64_t>(ids.size()) < n) {
    ids.push_back(order_[static_cast<std::size_t>(cursor_.position)]);
    if (++cursor_.position == count_) seek({cursor_.epoch + 1, 0});
  }
  return ids;
}

void WindowOrder::seek(const DataCursor& cursor) {
  if (cursor.epoch < 0 || cursor.position < 0 || cursor.position >= count_)
    throw InvalidArgument(fmt::format(
        "WindowOrder: position {} of epoch {} is outside an epoch of {} windows; was the state "
        "saved with another text?",
        cursor.position, cursor.epoch, count_));
  cursor_ = cursor;
  order_ = epoch_permutation(count_, seed_, cursor.epoch);
}

at::Tensor batch_tokens(const TokenWindows& windows, std::span<const std::int64_t> ids) {
  at::Tensor batch = at::empty({static_cast<std::int64_t>(ids.size()), windows.context},
                               at::TensorOptions(at::kLong));
  auto* out = batch.data_ptr<std::int64_t>();
  for (const std::int64_t id : ids) {
    const auto window = windows.window(id);
    out = std::copy(window.begin(), window.end(), out);
  }
  return batch;
}

void check_tokens(const TokenWindows& windows, std::int64_t vocab_size) {
  const std::int64_t used = windows.count() * windows.context;
  for (std::int64_t i = 0; i < used; ++i) {
    const std::int32_t id = windows.tokens[static_cast<std::size_t>(i)];
    if (id < 0 || id >= vocab_size)
      throw InvalidArgument(fmt::format(
          "train: token {} in window {} is outside the model's vocabulary of {}; was the text "
          "encoded with another tokenizer?",
          id, i / windows.context, vocab_size));
  }
}

HeldOutSplit hold_out(const TokenWindows& windows, std::int64_t held_out_windows) {
  const std::int64_t count = windows.count();
  if (held_out_windows < 0 || held_out_windows >= count)
    throw InvalidArgument(fmt::format(
        "hold_out: {} of {} windows cannot be held out, nothing would be left to train on; use a "
        "longer text or a shorter context",
        held_out_windows, count));
  const std::int64_t cut = count - held_out_windows;
  return {slice(windows, 0, cut), slice(windows, cut, count)};
}

}  // namespace cleave::train
