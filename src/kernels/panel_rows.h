#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/isa/panel_isa.h"

namespace cleave {

/// Rows up to which a format is multiplied as it is stored; with more it is unpacked first.
inline std::int64_t direct_panel_rows(const PanelKernels& kernels, PanelFormat format) {
  std::int64_t most = 0;
  for (int i = 0; i < kNumPanelRows; ++i)
    if (kernels.multiply[static_cast<int>(format)][i] != nullptr) most = kPanelRows[i];
  return most;
}

/// Cuts m rows into tiles: tile(first row, rows, index of the kernel); the kernel may take more rows
/// than the tile has.
template <typename Tile>
void for_row_tiles(const PanelKernels& kernels, PanelFormat format, std::int64_t m, Tile&& tile) {
  const std::int64_t most = direct_panel_rows(kernels, format);
  for (std::int64_t row = 0; row < m; row += most) {
    const std::int64_t rows = std::min(most, m - row);
    int kernel = 0;
    while (kPanelRows[kernel] < rows) ++kernel;
    tile(row, rows, kernel);
  }
}

}  // namespace cleave
