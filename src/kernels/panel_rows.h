#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/packed_format.h"

namespace cleave {

/// Bytes between what is used and what is asked of memory, where rows are few and wait for it.
inline constexpr std::int64_t kPrefetchBytes = 4096;
/// The same for products of several rows: the core itself looks only a few lines ahead then, and
/// 4 kB last no longer than memory takes to answer.
inline constexpr std::int64_t kPrefetchBytesOfRows = 8192;

/// Rows up to which a format is multiplied as it is stored; more take blocks (prefill_blocks.h).
inline std::int64_t direct_panel_rows(const PanelKernels& kernels, PanelFormat format) {
  std::int64_t most = 0;
  for (int i = 0; i < kNumPanelRows; ++i)
    if (kernels.multiply[static_cast<int>(format)][i] != nullptr) most = kPanelRows[i];
  return most;
}

/// Index of the kernel for m rows, m at most direct_panel_rows().
inline int panel_rows_index(std::int64_t m) {
  int index = 0;
  while (kPanelRows[index] < m) ++index;
  return index;
}

inline std::int64_t num_blocks(std::int64_t steps) { return (steps + kInt4Block - 1) / kInt4Block; }

/// x in tiles: [tiles][blocks of kTileSteps][kTileRows][kTileStride].
class TiledRows {
 public:
  TiledRows(float* memory, std::int64_t steps)
      : memory_(memory), blocks_((steps + kTileSteps - 1) / kTileSteps) {}
  static std::int64_t size(std::int64_t rows, std::int64_t steps) {
    return num_tiles(rows) * ((steps + kTileSteps - 1) / kTileSteps) * kTileRows * kTileStride;
  }
  static std::int64_t num_tiles(std::int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

  std::int64_t blocks() const { return blocks_; }
  float* block(std::int64_t tile, std::int64_t b) const {
    return memory_ + (tile * blocks_ + b) * kTileRows * kTileStride;
  }
  /// Copies row r. [steps]
  void set_row(std::int64_t r, const float* x, std::int64_t steps) const {
    for (std::int64_t b = 0; b < blocks_; ++b)
      std::copy_n(x + b * kTileSteps, std::min(kTileSteps, steps - b * kTileSteps),
                  block(r / kTileRows, b) + r % kTileRows * kTileStride);
  }

 private:
  float* memory_;
  std::int64_t blocks_;
};

/// The kernel for the rows that tile `tile` of m rows has; it writes a multiple of 4.
inline auto tile_kernel(const PanelKernels& kernels, std::int64_t m, std::int64_t tile) {
  const std::int64_t rows = std::min<std::int64_t>(kTileRows, m - tile * kTileRows);
  return kernels.multiply_tile[(rows + 3) / 4 - 1];
}

}  // namespace cleave
