#include <algorithm>
#include <cstring>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"

namespace cleave {
namespace {

// Rows of x of one pass: they should stay in a second-level cache while all panels go by.
constexpr std::int64_t kRowBytes = 768 << 10;
constexpr std::int64_t kMinPassRows = 48;
// Below so many multiply-adds a part is not worth waking a thread (a few microseconds).
constexpr std::int64_t kPartMacs = 64 * 1024;

/// What one range of panels needs beside its operands.
struct PanelScratch {
  float* panel;  // [K, 32] an unpacked panel
  float* tile;   // [12, 32] results that are not whole rows of y
};

class PanelLoop {
 public:
  PanelLoop(const PackedLinear& weight, MatrixView<const float> x, std::span<const float> bias,
            MatrixView<float> y, bool add)
      : weight_(weight),
        x_(x),
        bias_(bias),
        y_(y),
        add_(add),
        format_(lane_format(weight.type())),
        kernels_(panel_kernels()) {}

  void run(std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
           std::int64_t row_end, const PanelScratch& scratch) const {
    const bool unpack = row_end - row_begin > direct_panel_rows(kernels_, format_);
    for (std::int64_t p = panel_begin; p < panel_end; ++p) {
      const std::byte* packed = weight_.data() + p * weight_.panel_bytes();
      const void* panel = packed;
      PanelFormat format = format_;
      const char* prefetch = nullptr;
      if (unpack) {
        kernels_.unpack[static_cast<int>(format)](packed, weight_.cols(), scratch.panel);
        panel = scratch.panel;
        format = PanelFormat::kF32;
        prefetch = reinterpret_cast<const char*>(packed + weight_.panel_bytes());
      }
      for_row_tiles(kernels_, format, row_end - row_begin,
                    [&](std::int64_t row, std::int64_t rows, int kernel) {
                      tile(p, panel, format, row_begin + row, rows, kernel, prefetch, scratch);
                      prefetch = nullptr;
                    });
    }
  }

 private:
  void tile(std::int64_t p, const void* panel, PanelFormat format, std::int64_t row,
            std::int64_t rows, int kernel, const char* prefetch, const PanelScratch& scratch) const {
    const std::int64_t column = p * kPanelWidth;
    const std::int64_t columns = std::min(kPanelWidth, y_.cols - column);
    const bool straight = columns == kPanelWidth && bias_.empty();
    const float* x[kMaxPanelRows];
    float* out[kMaxPanelRows];
    for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) {
      x[r] = x_.row(row + std::min(r, rows - 1));
      out[r] = straight && r < rows ? y_.row(row + r) + column : scratch.tile + r * kPanelWidth;
    }
    const bool add = straight && add_;
    kernels_.multiply[static_cast<int>(format)][kernel](
        {panel, weight_.cols(), 1, 0, x, out, add, prefetch});
    if (straight) return;
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = 0; c < columns; ++c) {
        const float value = out[r][c] + (bias_.empty() ? 0.0f : bias_[column + c]);
        float& y = y_(row + r, column + c);
        y = add_ ? y + value : value;
      }
  }

  const PackedLinear& weight_;
  MatrixView<const float> x_;
  std::span<const float> bias_;
  MatrixView<float> y_;
  bool add_;
  PanelFormat format_;
  const PanelKernels& kernels_;
};

}  // namespace

void linear(const PackedLinear& weight, MatrixView<const float> x, std::span<const float> bias,
            MatrixView<float> y, bool add, Workspace& workspace, const ParallelFor& parallel) {
  if (x.cols != weight.cols() || y.cols != weight.rows() || x.rows != y.rows ||
      (!bias.empty() && static_cast<std::int64_t>(bias.size()) != weight.rows()))
    fail_argument("linear: x is [{}, {}], y [{}, {}] and bias [{}]; a weight [{}, {}] takes x [T, "
                  "{}] and y [T, {}]",
                  x.rows, x.cols, y.rows, y.cols, bias.size(), weight.rows(), weight.cols(),
                  weight.cols(), weight.rows());
  const std::int64_t T = x.rows, K = weight.cols();
  if (T == 0 || weight.rows() == 0) return;
  const std::int64_t panels = (weight.rows() + kPanelWidth - 1) / kPanelWidth;
  const std::int64_t parts = std::max(1, parallel.threads);
  const auto room = static_cast<std::size_t>((K + kMaxPanelRows) * kPanelWidth);
  auto* memory = reinterpret_cast<float*>(
      workspace.get(room * sizeof(float) * static_cast<std::size_t>(parts)));
  const std::int64_t pass =
      std::max(kMinPassRows, kRowBytes / (4 * std::max<std::int64_t>(1, K)) / 12 * 12);
  const PanelLoop loop(weight, x, bias, y, add);
  // Equal shares of the panels; of the rows where there are too few panels to share.
  const bool cut_rows = panels < 4 * parts && T >= 12 * parts;
  const std::int64_t n = cut_rows ? (T + 11) / 12 : panels;
  const std::int64_t macs = kPanelWidth * K * (cut_rows ? 12 * panels : T);
  const std::int64_t wanted = std::clamp<std::int64_t>(
      n * macs / kPartMacs, 1, std::min(parts, n));
  parallel(wanted, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
    for (std::int64_t part = part_begin; part < part_end; ++part) {
      float* mine = memory + room * static_cast<std::size_t>(part);
      const PanelScratch scratch{mine, mine + K * kPanelWidth};
      const std::int64_t begin = n * part / wanted, end = n * (part + 1) / wanted;
      const std::int64_t first = cut_rows ? begin * 12 : 0;
      const std::int64_t last = cut_rows ? std::min(T, end * 12) : T;
      for (std::int64_t row = first; row < last; row += pass)
        loop.run(cut_rows ? 0 : begin, cut_rows ? panels : end, row, std::min(last, row + pass),
                 scratch);
    }
  });
}

}  // namespace cleave
