#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"

// What one part of packed_ffn_cpu.cpp's work does.
namespace cleave {

/// Neurons of a group of panels: the steps of one tile of down.
inline constexpr std::int64_t kGroupNeurons = kTileSteps;

/// Operands of moe_ffn().
struct FfnCall {
  const PackedExperts& experts;
  const std::int32_t* ids;  // [T, K]
  const float* weights;     // [T, K]
  std::int64_t k;           // K
  float scale;
  MatrixView<const float> x;
  MatrixView<float> y;
};

/// Columns that one tile of down may write: 16 neurons at a time leave room for 8 panels.
constexpr std::int64_t tail_stride() { return kTileSteps / 16 * kPanelWidth; }

/// What one part writes beside its sum. Lives in the workspace. `rows`: tokens of a pass, the most
/// that one expert can have, as whole tiles.
struct PartScratch {
  std::int32_t* begin;  // [E + 1] pairs per expert
  std::int32_t* next;   // [E] where its next pair goes
  std::int32_t* pair;   // [tokens * K] t * K + k, by expert
  float* unpacked;      // [kTileSteps, 32] a block of a panel
  float* products;      // [rows, 32] gate|up of a panel
  float* hidden;        // [rows, kTileStride] of a group of panels
  float* x_tiles;       // x of an expert's tokens, see TiledRows
  float* x_sums;        // [tokens, ceil(D / 32)] for kInt4
  float* tail;          // [12, 32 * panels of a batch] outputs of no column or no row
  std::int32_t* token;  // [rows] of the expert, counted from the first of the pass
  float** y;            // [rows]
  float* row_weight;    // [rows]
};

class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(std::int64_t count) {
    auto* here = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return here;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

inline PartScratch carve(Carver& from, const PackedExperts& experts, std::int64_t tokens,
                         std::int64_t k) {
  PartScratch s;
  s.begin = from.take<std::int32_t>(experts.num_experts() + 1);
  s.next = from.take<std::int32_t>(experts.num_experts());
  s.pair = from.take<std::int32_t>(tokens * k);
  const std::int64_t rows = TiledRows::num_tiles(tokens) * kTileRows;
  s.unpacked = from.take<float>(kTileSteps * kPanelWidth);
  s.products = from.take<float>(rows * kPanelWidth);
  s.hidden = from.take<float>(rows * kTileStride);
  s.x_tiles = from.take<float>(TiledRows::size(rows, experts.d_model()));
  s.x_sums = from.take<float>(tokens * num_blocks(experts.d_model()));
  s.tail = from.take<float>(kTileRows * tail_stride());
  s.token = from.take<std::int32_t>(rows);
  s.y = from.take<float*>(rows);
  s.row_weight = from.take<float>(rows);
  return s;
}

/// Runs tokens through ranges of expert panels. One object per part.
class PartRunner {
 public:
  PartRunner(const FfnCall& call, const PartScratch& scratch)
      : call_(call),
        s_(scratch),
        x_tiles_(s_.x_tiles, call.x.cols),
        layout_(call.experts.type(), call.experts.gated(), call.experts.d_model()),
        kernels_(panel_kernels()) {}

  /// Sorts the pairs of tokens [first, first + count) by expert.
  void group(std::int64_t first, std::int64_t count) {
    const std::int64_t E = call_.experts.num_experts();
    std::fill_n(s_.begin, E + 1, 0);
    const auto pairs_begin = static_cast<std::int32_t>(first * call_.k);
    const auto pairs_end = static_cast<std::int32_t>((first + count) * call_.k);
    for (std::int32_t p = pairs_begin; p < pairs_end; ++p)
      if (call_.ids[p] != Routing::kUnused) ++s_.begin[call_.ids[p] + 1];
    for (std::int64_t e = 0; e < E; ++e) s_.begin[e + 1] += s_.begin[e];
    std::copy_n(s_.begin, E, s_.next);
    for (std::int32_t p = pairs_begin; p < pairs_end; ++p)
      if (call_.ids[p] != Routing::kUnused) place(p);
    first_ = first;
    count_ = count;
    if (layout_.format != PanelFormat::kInt4) return;
    for (std::int64_t t = 0; t < count; ++t)
      block_sums(call_.x.row(first + t), call_.x.cols, s_.x_sums + t * num_blocks(call_.x.cols));
  }
  std::int64_t rows(std::int64_t e) const { return s_.begin[e + 1] - s_.begin[e]; }

  /// Panels [begin, end) of expert e, for the tokens that group() found, added to rows of `y`, the
  /// first of which belongs to token `first`.
  void run_expert(std::int64_t e, std::int64_t begin, std::int64_t end, MatrixView<float> y,
                  std::int64_t first) {
    const std::int64_t m = rows(e);
    if (m == 0 || begin >= end) return;
    const bool direct = m <= direct_panel_rows(kernels_, layout_.format);
    if (!direct && continues(e)) {
      set_weights(e);
    } else {
      flush(m_);
      set_rows(e, y, first);
    }
    const std::int64_t base = call_.experts.panel_begin(e);
    for (std::int64_t p = begin; p < end; ++p) {
      if (direct) {
        gate_up_direct(base + p, m);
        activate(base + p, 0, m);
        down_direct(base + p, 0, m);
        continue;
      }
      gate_up_tiles(base + p, m);
      activate(base + p, pending_.size * layout_.neurons, m);
      pending_.panel[pending_.size++] = base + p;
      if (pending_.size * layout_.neurons == kGroupNeurons) flush(m);
    }
  }
  /// Adds what is still to be added. To be called after the last expert of a pass.
  void finish() {
    flush(m_);
    m_ = 0;
  }

 private:
  void place(std::int32_t pair) {
    const std::int32_t e = call_.ids[pair], at = s_.next[e]++;
    // Pairs ascend within an expert, so a second one of the same token would be a neighbour. Both
    // would add to one row of y at once.
    if (at > s_.begin[e] && s_.pair[at - 1] / call_.k == pair / call_.k)
      fail_argument("moe_ffn: token {} has expert {} twice; its ids must be distinct",
                    pair / call_.k, e);
    s_.pair[at] = pair;
  }

  /// Whether expert e has the tokens of the one before it: all of the pass (shared experts). Their
  /// rows then stay where they are, and their neurons share a group.
  bool continues(std::int64_t e) const { return m_ == count_ && rows(e) == count_; }

  void set_weights(std::int64_t e) {
    for (std::int64_t r = 0; r < rows(e); ++r)
      s_.row_weight[r] = call_.scale * call_.weights[s_.pair[s_.begin[e] + r]];
  }
  void set_rows(std::int64_t e, MatrixView<float> y, std::int64_t first) {
    m_ = rows(e);
    const bool direct = m_ <= direct_panel_rows(kernels_, layout_.format);
    for (std::int64_t r = 0; r < m_; ++r) {
      const std::int64_t t = s_.pair[s_.begin[e] + r] / call_.k;
      s_.token[r] = static_cast<std::int32_t>(t - first_);
      s_.y[r] = y.row(t - first);
      if (!direct) x_tiles_.set_row(r, call_.x.row(t), call_.x.cols);
    }
    set_weights(e);
  }
  /// The down projection of the panels whose hidden values are there.
  void flush(std::int64_t m) {
    if (pending_.size > 0) down_tiles(m);
    pending_.size = 0;
  }

  float* product_row(std::int64_t r) const { return s_.products + r * kPanelWidth; }
  float* hidden_row(std::int64_t r) const { return s_.hidden + r * kTileStride; }
  const float* scales(std::int64_t panel) const {
    return reinterpret_cast<const float*>(call_.experts.panel(panel));
  }
  const float* down_scales(std::int64_t panel) const {
    return layout_.format == PanelFormat::kInt8 ? kUnitScales
                                                : scales(panel) + layout_.scale_bytes / 4;
  }
  const std::byte* down_panel(std::int64_t panel, std::int64_t d) const {
    return call_.experts.panel(panel) + layout_.down_offset() + d * layout_.down_panel_bytes;
  }

  void gate_up_direct(std::int64_t panel, std::int64_t m) const {
    const int kernel = panel_rows_index(m);
    const std::int64_t D = call_.x.cols;
    const float *x[kMaxPanelRows], *x_sums[kMaxPanelRows];
    float* out[kMaxPanelRows];
    for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) {
      const std::int64_t token = s_.token[std::min(r, m - 1)];
      x[r] = call_.x.row(first_ + token);
      x_sums[r] = s_.x_sums + token * num_blocks(D);
      out[r] = product_row(r);
    }
    const std::byte* weights = call_.experts.panel(panel) + layout_.gate_up_offset();
    kernels_.multiply[static_cast<int>(layout_.format)][kernel](
        {weights, scales(panel), D, 1, 0, x, x_sums, out, false,
         reinterpret_cast<const char*>(weights) + kPrefetchBytes});
  }

  void gate_up_tiles(std::int64_t panel, std::int64_t m) const {
    const std::byte* weights = call_.experts.panel(panel) + layout_.gate_up_offset();
    const std::int64_t tiles = TiledRows::num_tiles(m);
    // The next panel comes from memory while this one is computed.
    Prefetcher next(call_.experts.panel(panel + 1), layout_.bytes());
    for (std::int64_t b = 0; b < x_tiles_.blocks(); ++b) {
      const std::int64_t steps = std::min(kTileSteps, call_.x.cols - b * kTileSteps);
      kernels_.unpack[static_cast<int>(layout_.format)](
          weights + b * panel_bytes(layout_.format, kTileSteps), steps, scales(panel), s_.unpacked);
      for (std::int64_t t = 0; t < tiles; ++t) {
        float* out[kTileRows];
        for (std::int64_t r = 0; r < kTileRows; ++r) out[r] = product_row(t * kTileRows + r);
        tile_kernel(kernels_, m,
                    t)({s_.unpacked, steps, 1, x_tiles_.block(t, b), out, b > 0, next.next(steps)});
      }
    }
  }

  /// Columns [column, column + neurons) of the hidden rows.
  void activate(std::int64_t panel, std::int64_t column, std::int64_t m) const {
    const std::span<const float> biases = call_.experts.lane_bias();
    const float* bias = biases.empty() ? nullptr : biases.data() + panel * kPanelWidth;
    for (std::int64_t r = 0; r < m && bias != nullptr; ++r)
      isa_kernels().add(bias, product_row(r), kPanelWidth);
    kernels_.activate(
        call_.experts.activation(), call_.experts.gated(), m, s_.products, s_.row_weight,
        layout_.format == PanelFormat::kInt8 ? scales(panel) + layout_.scale_bytes / 4 : nullptr,
        s_.hidden + column);
  }

  void down_direct(std::int64_t panel, std::int64_t column, std::int64_t m) const {
    const int kernel = panel_rows_index(m);
    const std::int64_t D = call_.x.cols, whole = D / kPanelWidth;
    const float *h[kMaxPanelRows], *sums[kMaxPanelRows];
    float h_sums[kMaxPanelRows];  // a panel's neurons are one block at most
    float* y[kMaxPanelRows];
    for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) {
      h[r] = hidden_row(std::min(r, m - 1)) + column;
      sums[r] = &h_sums[r];
      if (layout_.format == PanelFormat::kInt4) block_sums(h[r], layout_.neurons, &h_sums[r]);
    }
    const auto multiply = kernels_.multiply[static_cast<int>(layout_.format)][kernel];
    const auto run = [&](std::int64_t d, std::int64_t panels, bool add) {
      multiply({down_panel(panel, d), down_scales(panel), layout_.neurons, panels,
                layout_.down_panel_bytes, h, sums, y, add,
                reinterpret_cast<const char*>(down_panel(panel, d)) + kPrefetchBytes});
    };
    if (m == kPanelRows[kernel]) {
      std::copy_n(s_.y, m, y);
      run(0, whole, true);
    } else {
      // Rows that only fill the kernel go where nobody looks: panel by panel, to need little room.
      for (std::int64_t d = 0; d < whole; ++d) {
        for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r)
          y[r] = r < m ? s_.y[r] + d * kPanelWidth : s_.tail + r * tail_stride();
        run(d, 1, true);
      }
    }
    if (whole == layout_.down_panels) return;
    for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) y[r] = s_.tail + r * tail_stride();
    run(whole, 1, false);
    for (std::int64_t r = 0; r < m; ++r) add_tail(r, r);
  }

  /// y += hidden times down, of all pending panels. As many columns at once as fit a cache.
  void down_tiles(std::int64_t m) const {
    const std::int64_t steps = pending_.size * layout_.neurons;
    const std::int64_t whole = call_.x.cols / kPanelWidth;
    const std::int64_t batch = kTileSteps / steps;
    for (std::int64_t d = 0; d < whole; d += batch) {
      const std::int64_t panels = std::min(batch, whole - d);
      unpack_down(d, panels);
      for (std::int64_t t = 0; t < TiledRows::num_tiles(m); ++t) {
        float* y[kTileRows];
        for (std::int64_t r = 0; r < kTileRows; ++r)
          y[r] = t * kTileRows + r < m ? s_.y[t * kTileRows + r] + d * kPanelWidth
                                       : s_.tail + r * tail_stride();
        tile_kernel(kernels_, m,
                    t)({s_.unpacked, steps, panels, hidden_row(t * kTileRows), y, true, nullptr});
      }
    }
    if (whole == layout_.down_panels) return;
    unpack_down(whole, 1);
    for (std::int64_t t = 0; t < TiledRows::num_tiles(m); ++t) {
      float* y[kTileRows];
      for (std::int64_t r = 0; r < kTileRows; ++r) y[r] = s_.tail + r * tail_stride();
      tile_kernel(kernels_, m,
                  t)({s_.unpacked, steps, 1, hidden_row(t * kTileRows), y, false, nullptr});
      for (std::int64_t r = t * kTileRows; r < std::min(m, (t + 1) * kTileRows); ++r)
        add_tail(r, r - t * kTileRows);
    }
  }

  /// Down panels [d, d + panels) of the pending panels: [panels, steps, 32].
  void unpack_down(std::int64_t d, std::int64_t panels) const {
    float* to = s_.unpacked;
    for (std::int64_t i = 0; i < panels; ++i)
      for (std::int64_t p = 0; p < pending_.size; ++p, to += layout_.neurons * kPanelWidth)
        kernels_.unpack[static_cast<int>(layout_.format)](down_panel(pending_.panel[p], d + i),
                                                          layout_.neurons,
                                                          down_scales(pending_.panel[p]), to);
  }

  /// y's last columns, where 32 does not divide D, += row `from` of the tail.
  void add_tail(std::int64_t row, std::int64_t from) const {
    const std::int64_t begin = call_.x.cols / kPanelWidth * kPanelWidth;
    for (std::int64_t o = begin; o < call_.x.cols; ++o)
      s_.y[row][o] += s_.tail[from * tail_stride() + o - begin];
  }

  const FfnCall& call_;
  PartScratch s_;
  TiledRows x_tiles_;       // of the expert that runs
  std::int64_t first_ = 0;  // token of the pass
  std::int64_t count_ = 0;  // tokens of the pass
  std::int64_t m_ = 0;      // rows that are set
  struct {
    std::int64_t panel[kGroupNeurons / 16];
    std::int64_t size = 0;
  } pending_;  // hidden values are there, down is not added
  ExpertPanelLayout layout_;
  const PanelKernels& kernels_;
};

}  // namespace cleave
