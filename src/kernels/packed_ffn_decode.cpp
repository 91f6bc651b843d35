// Experts with few tokens each: memory is the limit. Every part takes a share of the active
// experts' panels, balanced by cost, and runs all their tokens through it into a sum of its own;
// the sums are added at the end. So each weight is read once, in one stream per thread, and there
// is no barrier between the two products.

#include <algorithm>

#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"

namespace cleave {
namespace {

/// What one part writes. Lives in the workspace.
struct DecodeScratch {
  float* sum;  // [tokens, D] its share of y; the first part writes y itself
  PairGroups groups;
  float* products;            // [8, 32] gate|up of a panel
  float* hidden;              // [8, 32]
  InputBlock* blocks;         // [tokens, ceil(D / 32)] x for kInt4
  InputBlock* hidden_blocks;  // [8] hidden for kInt4
  float* padding;             // [D, rounded up] y of rows that only fill a kernel
  float* zeros;               // [32] their hidden values
  float* tail;                // [8, 32] outputs, some of no column
  float* row_weight;          // [tokens]
};

DecodeScratch carve_decode(Carver& from, const PackedExperts& experts, std::int64_t tokens,
                           std::int64_t k) {
  const std::int64_t blocks = num_blocks(experts.d_model());
  DecodeScratch s;
  s.sum = from.take<float>(tokens * experts.d_model());
  s.groups = carve_groups(from, experts.num_experts(), tokens * k);
  s.products = from.take<float>(kMaxPanelRows * kPanelWidth);
  s.hidden = from.take<float>(kMaxPanelRows * kPanelWidth);
  const bool in_blocks = experts.type() == WeightType::kInt4;
  s.blocks = from.take<InputBlock>(in_blocks ? tokens * blocks : 0);
  s.hidden_blocks = from.take<InputBlock>(in_blocks ? kMaxPanelRows : 0);
  s.padding = from.take<float>(blocks * kPanelWidth);
  s.zeros = from.take<float>(kPanelWidth);
  s.tail = from.take<float>(kMaxPanelRows * kPanelWidth);
  s.row_weight = from.take<float>(tokens);
  return s;
}

/// Runs tokens through ranges of expert panels. One object per part.
class DecodePart {
 public:
  DecodePart(const FfnCall& call, const DecodeScratch& scratch, MatrixView<float> y)
      : call_(call),
        s_(scratch),
        y_(y),
        layout_(call.experts.type(), call.experts.gated(), call.experts.d_model()),
        kernels_(panel_kernels()),
        batch_(direct_panel_rows(kernels_, layout_.format)) {
    group_pairs(call_, 0, call_.x.rows, s_.groups);
    std::fill_n(s_.zeros, kPanelWidth, 0.0f);
    std::fill_n(s_.padding, num_blocks(call_.x.cols) * kPanelWidth, 0.0f);
    if (layout_.format != PanelFormat::kInt4) return;
    for (std::int64_t t = 0; t < call_.x.rows; ++t)
      kernels_.prepare(call_.x.row(t), call_.x.cols, s_.blocks + t * num_blocks(call_.x.cols));
  }
  std::int64_t rows(std::int64_t e) const { return s_.groups.rows(e); }

  /// Panels [begin, end), which are of expert e.
  void run(std::int64_t e, std::int64_t begin, std::int64_t end) {
    const std::int32_t* pair = s_.groups.pair + s_.groups.begin[e];
    token_ = s_.groups.token + s_.groups.begin[e];
    const std::int64_t m = rows(e);
    for (std::int64_t r = 0; r < m; ++r) s_.row_weight[r] = call_.scale * call_.weights[pair[r]];
    for (std::int64_t p = begin; p < end; ++p)
      for (std::int64_t r = 0; r < m; r += batch_) {
        const std::int64_t n = std::min(batch_, m - r);
        gate_up(p, r, n);
        activate(p, r, n);
        down(p, r, n);
      }
  }

 private:
  const float* scales(std::int64_t panel) const {
    return reinterpret_cast<const float*>(call_.experts.panel(panel));
  }

  void gate_up(std::int64_t panel, std::int64_t first, std::int64_t n) const {
    const int kernel = panel_rows_index(n);
    const std::int64_t D = call_.x.cols;
    const float* x[kMaxPanelRows];
    const InputBlock* blocks[kMaxPanelRows];
    float* out[kMaxPanelRows];
    for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) {
      const std::int64_t t = token_[first + std::min(r, n - 1)];
      x[r] = call_.x.row(t);
      blocks[r] = s_.blocks + t * num_blocks(D);
      out[r] = s_.products + r * kPanelWidth;
    }
    const std::byte* weights = call_.experts.panel(panel) + layout_.gate_up_offset();
    kernels_.multiply[static_cast<int>(layout_.format)][kernel](
        {weights, scales(panel), D, 1, 0, x, blocks, out, false,
         reinterpret_cast<const char*>(weights) + kPrefetchBytes});
  }

  void activate(std::int64_t panel, std::int64_t first, std::int64_t n) const {
    const std::span<const float> biases = call_.experts.lane_bias();
    for (std::int64_t r = 0; r < n && !biases.empty(); ++r)
      isa_kernels().add(biases.data() + panel * kPanelWidth, s_.products + r * kPanelWidth,
                        kPanelWidth);
    kernels_.activate(
        call_.experts.activation(), call_.experts.gated(), n, s_.products, s_.row_weight + first,
        layout_.format == PanelFormat::kInt8 ? scales(panel) + layout_.scale_bytes / 4 : nullptr,
        s_.hidden, kPanelWidth);
  }

  void down(std::int64_t panel, std::int64_t first, std::int64_t n) const {
    const int kernel = panel_rows_index(n);
    const float* h[kMaxPanelRows];
    const InputBlock* blocks[kMaxPanelRows];  // a panel's neurons are one block at most
    float *y[kMaxPanelRows], *tail[kMaxPanelRows];
    for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) {
      h[r] = r < n ? s_.hidden + r * kPanelWidth : s_.zeros;
      y[r] = r < n ? y_.row(token_[first + r]) : s_.padding;
      tail[r] = s_.tail + r * kPanelWidth;
      blocks[r] = s_.hidden_blocks + r;
      if (layout_.format == PanelFormat::kInt4)
        kernels_.prepare(h[r], layout_.neurons, s_.hidden_blocks + r);
    }
    const auto multiply = kernels_.multiply[static_cast<int>(layout_.format)][kernel];
    const float* down_scales = layout_.format == PanelFormat::kInt8
                                   ? kUnitScales
                                   : scales(panel) + layout_.scale_bytes / 4;
    const auto run = [&](std::int64_t d, std::int64_t panels, float* const* out, bool add) {
      const std::byte* weights =
          call_.experts.panel(panel) + layout_.down_offset() + d * layout_.down_panel_bytes;
      multiply({weights, down_scales, layout_.neurons, panels, layout_.down_panel_bytes, h, blocks,
                out, add, reinterpret_cast<const char*>(weights) + kPrefetchBytes});
    };
    const std::int64_t D = call_.x.cols, whole = D / kPanelWidth;
    run(0, whole, y, true);
    if (whole == layout_.down_panels) return;
    run(whole, 1, tail, false);
    for (std::int64_t r = 0; r < n; ++r)
      for (std::int64_t c = whole * kPanelWidth; c < D; ++c)
        y[r][c] += tail[r][c - whole * kPanelWidth];
  }

  const FfnCall& call_;
  DecodeScratch s_;
  MatrixView<float> y_;
  ExpertPanelLayout layout_;
  const PanelKernels& kernels_;
  std::int64_t batch_;
  const std::int32_t* token_ = nullptr;  // of the expert that runs
};

}  // namespace

std::size_t decode_bytes(const PackedExperts& experts, std::int64_t tokens, std::int64_t k,
                         std::int64_t parts) {
  Carver sizes(nullptr);
  carve_decode(sizes, experts, tokens, k);
  return sizes.used() * static_cast<std::size_t>(parts);
}

void run_decode(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  const std::int64_t T = call.x.rows, D = call.x.cols, parts = std::max(1, parallel.threads);
  const std::size_t each = decode_bytes(call.experts, T, call.k, 1);
  std::byte* memory = workspace.get(each * static_cast<std::size_t>(parts));
  const auto scratch_of = [&](std::int64_t part) {
    Carver room(memory + each * static_cast<std::size_t>(part));
    return carve_decode(room, call.experts, T, call.k);
  };
  parallel(parts, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
    for (std::int64_t part = part_begin; part < part_end; ++part) {
      const DecodeScratch scratch = scratch_of(part);
      if (part > 0) std::fill_n(scratch.sum, T * D, 0.0f);
      DecodePart runner(call, scratch, part > 0 ? MatrixView<float>(scratch.sum, T, D) : call.y);
      // A panel costs its reading and its rows; the constant is what a row's arithmetic is worth.
      const auto cost = [&](std::int64_t e) {
        return runner.rows(e) == 0 ? 0 : 12 + runner.rows(e);
      };
      for_share_of_panels(
          call.experts, part, parts, cost,
          [&](std::int64_t e, std::int64_t begin, std::int64_t end) { runner.run(e, begin, end); });
    }
  });
  if (parts == 1) return;
  constexpr std::int64_t kRowsPerRange = 8;
  parallel(T, kRowsPerRange, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = 1; part < parts; ++part)
      for (std::int64_t t = begin; t < end; ++t)
        isa_kernels().add(scratch_of(part).sum + t * D, call.y.row(t), D);
  });
}

}  // namespace cleave
