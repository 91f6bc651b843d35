#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "kernels/dispatch.h"
#include "kernels/packed_format.h"

// Blocks of packed weights times several rows, for FFNs and linear layers: as floats, or as
// bfloat16 pairs where the machine multiplies them.
namespace cleave {

/// One panel or two of the same steps, packed.
struct WeightBlock {
  const std::byte* panel[2];  ///< the first piece of each
  const float* scales[2];     ///< of the first pieces
  std::int64_t panels;
  std::int64_t piece_steps, pieces;
  std::int64_t piece_stride, scale_stride;  ///< bytes
  bool half = false;  ///< of one panel only lanes 0 to 15 are wanted; the others may get anything

  std::int64_t steps() const { return pieces * piece_steps; }
};

/// Weights that come next, for products to fetch from memory while they run: `count` stretches of
/// `bytes`, `stride` apart.
struct NextBlock {
  const std::byte* begin;
  std::int64_t bytes, count, stride;
};

/// Rows of a matrix, one behind the other or by their numbers.
template <typename T>
struct RowList {
  T* begin;
  std::int64_t stride;        ///< of T
  const std::int32_t* index;  ///< or nullptr

  T* operator()(std::int64_t r) const { return begin + (index != nullptr ? index[r] : r) * stride; }
};

/// Rows that products to come will read, of so many values.
template <typename T>
struct NextRows {
  RowList<T> rows;
  std::int64_t count = 0, values = 0;
};

/// Weights are unpacked to floats, two panels at a time, into a second-level cache; those that are
/// floats in one piece are multiplied where they lie.
class UnpackedBlocks {
 public:
  using Value = float;  ///< of x and hidden
  static constexpr bool kMultipliesShort = false;
  static constexpr std::int64_t kBlockSteps = 512;  ///< of a block at most: 128 kB of weights
  static constexpr std::size_t kScratchBytes = 2 * kBlockSteps * kPanelWidth * sizeof(float);

  UnpackedBlocks(PanelFormat format, std::byte* scratch)
      : kernels_(panel_kernels()),
        unpack_(kernels_.unpack[static_cast<int>(format)]),
        unpack_and_multiply_(kernels_.unpack_and_multiply[static_cast<int>(format)]),
        unpacks_(format != PanelFormat::kF32),
        unpacked_(reinterpret_cast<float*>(scratch)) {}

  /// How many panels are best multiplied at once.
  static std::int64_t panels(std::int64_t) { return 2; }
  static bool reads_once(std::int64_t) { return false; }
  /// What a panel costs, in rows: unpacking it is worth some four.
  static std::int64_t panel_cost(std::int64_t rows) { return 4 + rows; }
  static void set_row(const float* x, std::int64_t n, float* row) { std::copy_n(x, n, row); }

  void activate(Activation activation, bool gated, std::int64_t rows, const float* in,
                const float* weight, const float* step_scale, float* h, std::int64_t stride) const {
    kernels_.activate(activation, gated, rows, in, weight, step_scale, h, stride);
  }

  /// y (+)= x times the block, for m rows.
  void multiply(const WeightBlock& block, const NextBlock& next, std::int64_t m, bool add,
                std::int64_t panel_offset, const RowList<const float>& x_of,
                const RowList<float>& y_of, const NextRows<const float>& = {}) const {
    const bool pair = block.panels == 2;
    const auto* kernels = pair         ? kernels_.multiply_pair
                          : block.half ? kernels_.multiply_half
                                       : kernels_.multiply_block;
    const std::int64_t most = pair ? kPairRows : kBlockRows, steps = block.steps();
    const bool fused = pair && m >= kPairRows && unpack_and_multiply_ != nullptr;
    const bool in_place = !unpacks_ && block.pieces == 1;
    if (!fused && !in_place) unpack(block);
    const float* panel[2];
    for (int i = 0; i < 2; ++i)
      panel[i] = in_place ? reinterpret_cast<const float*>(block.panel[i])
                          : unpacked_ + i * steps * kPanelWidth;
    const float* x[kBlockRows];
    float* y[kBlockRows];
    Fetcher fetcher(next);
    for (std::int64_t first = 0; first < m; first += most) {
      const std::int64_t rows = std::min(most, m - first);
      for (std::int64_t i = 0; i < rows; ++i) {
        x[i] = x_of(first + i);
        y[i] = y_of(first + i);
      }
      const char* fetch = fetcher.next(steps);
      if (first == 0 && fused)
        unpack_and_multiply_({{block.panel[0], block.panel[1]},
                              block.piece_steps,
                              block.pieces,
                              block.piece_stride,
                              unpacked_,
                              x,
                              y,
                              panel_offset,
                              add,
                              fetch});
      else
        kernels[rows - 1]({{panel[0], panel[1]}, steps, x, y, panel_offset, add, fetch});
    }
  }

 private:
  /// Hands the stretches out to products.
  class Fetcher {
   public:
    explicit Fetcher(const NextBlock& block) : block_(block) {}
    const char* next(std::int64_t steps) {
      if (block_.count == 0) return nullptr;
      const auto* now = reinterpret_cast<const char*>(block_.begin) + done_;
      done_ += steps * 32;  // which is what a product fetches
      if (done_ >= block_.bytes) {
        --block_.count;
        block_.begin += block_.stride;
        done_ = 0;
      }
      return now;
    }

   private:
    NextBlock block_;
    std::int64_t done_ = 0;
  };

  void unpack(const WeightBlock& block) const {
    float* to = unpacked_;
    for (std::int64_t i = 0; i < block.panels; ++i)
      for (std::int64_t p = 0; p < block.pieces; ++p, to += block.piece_steps * kPanelWidth)
        unpack_(block.panel[i] + p * block.piece_stride, block.piece_steps,
                reinterpret_cast<const float*>(reinterpret_cast<const std::byte*>(block.scales[i]) +
                                               p * block.scale_stride),
                to);
  }

  const PanelKernels& kernels_;
  void (*unpack_)(const void*, std::int64_t, const float*, float*);
  void (*unpack_and_multiply_)(const UnpackProduct&);
  bool unpacks_;
  float* unpacked_;  // [2, kBlockSteps, 32]
};

/// bfloat16 weights are multiplied as they are stored, with x and hidden rounded to bfloat16.
class DotBlocks {
 public:
  using Value = std::uint16_t;
  static constexpr std::int64_t kBlockSteps = 2048;  ///< 128 kB of a panel
  static constexpr std::size_t kScratchBytes = 0;
  static constexpr bool kMultipliesShort = true;

  DotBlocks(PanelFormat, std::byte*) : kernels_(*panel_kernels().dots) {}

  /// Where rows are few, weights come from memory meanwhile and take the core's fill buffers: 12
  /// rows by one panel fetch half as many weights from the second level as 6 rows by two. Many rows
  /// do better with fewer of them at a time.
  static std::int64_t panels(std::int64_t rows) { return rows <= kFewRows ? 1 : 2; }
  /// Whether one product takes all these rows.
  static bool reads_once(std::int64_t rows) { return rows <= kDotRows; }
  /// Reading a panel from memory takes as long as some 20 rows, which go on meanwhile.
  static std::int64_t panel_cost(std::int64_t rows) { return std::max<std::int64_t>(20, rows); }
  static void set_row(const float* x, std::int64_t n, std::uint16_t* row) {
    panel_kernels().dots->round(x, n, row);
    if (n % 2 != 0) row[n] = 0;
  }

  void activate(Activation activation, bool gated, std::int64_t rows, const float* in,
                const float* weight, const float*, std::uint16_t* h, std::int64_t stride) const {
    kernels_.activate(activation, gated, rows, in, weight, h, stride);
  }

  void multiply(const WeightBlock& block, const NextBlock& next, std::int64_t m, bool add,
                std::int64_t panel_offset, const RowList<const Value>& x, const RowList<float>& y,
                NextRows<const Value> next_x = {}) const {
    const bool pair = block.panels == 2;
    const std::int64_t most = pair ? kPairRows : kDotRows, products = (m + most - 1) / most;
    const std::int64_t pairs = (block.piece_steps + 1) / 2, piece = pairs * 2 * kLine;
    // Every product fetches an equal share of each piece that comes next: two lines of a panel per
    // two steps, for all products. More prefetches than it takes would cost 1 %.
    const std::int64_t rate = (2 * kLine + products - 1) / products, share = pairs * rate;
    const DotKernel* kernels = pair           ? kernels_.multiply_pair
                               : rate > kLine ? kernels_.multiply_alone
                                              : kernels_.multiply_block;
    const std::int64_t second = block.pieces > 1 ? next.bytes / 2 : next.stride;
    const auto* fetch = reinterpret_cast<const char*>(next.begin);
    // The hidden values of all experts need not fit a second-level cache, and their rows are too
    // short for the machine to see them coming: each product fetches the next one's. Of wide
    // experts, whose rows are taken a part at a time, it would fetch the wrong ones.
    const std::int64_t turns = block.pieces * pairs;
    const bool whole_rows = x.index == nullptr && x.stride < 2 * turns + 2 * kLine;
    in_equal_shares(m, products, [&](std::int64_t rows, std::int64_t count, std::int64_t first) {
      const Value* x_row[kListed];
      float* y_row[kListed];
      for (std::int64_t n; count > 0; count -= n, first += n * rows, fetch += n * share) {
        n = std::min(count, kListed / rows);
        for (std::int64_t r = 0; r < n * rows; ++r) x_row[r] = x(first + r);
        for (std::int64_t r = 0; r < n * rows; ++r) y_row[r] = y(first + r);
        const Value* fetch_x = x_row[0];
        std::int64_t bytes_of_x = 0;
        if (whole_rows) {
          fetch_x += rows * x.stride;
          bytes_of_x = n * rows * x.stride * kValueBytes;
        } else if (next_x.count > 0) {
          fetch_x = next_x.rows(--next_x.count);
          bytes_of_x = next_x.values * kValueBytes;
        }
        kernels[rows - 1]({{block.panel[0], block.panel[1]},
                           x_row,
                           y_row,
                           n,
                           turns * 4,
                           piece,
                           block.piece_stride - piece,
                           panel_offset * static_cast<std::int64_t>(sizeof(float)),
                           add,
                           fetch,
                           second,
                           rate,
                           share,
                           next.stride - share,
                           fetch_x,
                           (bytes_of_x + n * turns - 1) / (n * turns)});
      }
    });
  }

  /// y[token[r]] += row r of h times a panel, for m rows of kShortSteps or twice as many; those of
  /// y are `y_stride` apart. `next`: such a panel to come.
  void multiply_short(const std::byte* panel, const std::byte* next, std::int64_t steps,
                      const Value* h, std::int64_t m, const std::int32_t* token, float* y,
                      std::int64_t y_stride) const {
    for (std::int64_t line = 0; line < steps; ++line) __builtin_prefetch(next + line * kLine, 0, 2);
    in_equal_shares(m, (m + kDotRows - 1) / kDotRows,
                    [&](std::int64_t rows, std::int64_t count, std::int64_t first) {
                      kernels_.multiply_short[rows - 1](
                          {panel, steps, h + first * steps, token + first, y, y_stride, count});
                    });
  }

 private:
  static constexpr std::int64_t kLine = 64, kValueBytes = sizeof(Value), kFewRows = 64;
  static constexpr std::int64_t kListed = 2 * kDotRows;  ///< rows that a call takes at most

  /// Cuts m rows into products of equal shares, some of a row more: one of few rows waits for its
  /// own sums. body(rows of a product, how many such follow, the first one's first row)
  template <typename Body>
  static void in_equal_shares(std::int64_t m, std::int64_t products, const Body& body) {
    const std::int64_t rows = m / products, larger = m % products;
    if (larger > 0) body(rows + 1, larger, 0);
    body(rows, products - larger, larger * (rows + 1));
  }

  const DotKernels& kernels_;
};

}  // namespace cleave
