// Experts with few tokens each: memory is the limit. Every part takes a share of the active
// experts' panels, balanced by cost, and runs all their tokens through it into a sum of its own
// (packed_ffn_few.cpp). So each weight is read once, in one stream per thread and product, and
// there is no barrier between the two products.

#include <algorithm>

#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"

namespace cleave {
namespace {

constexpr std::int64_t kStretch = 64;       // panels whose hidden values are kept, at most
constexpr std::int64_t kStretchRows = 64;   // and of how many rows
constexpr std::int64_t kNearBytes = 16384;  // of a piece of down that is a stream by itself

/// Panels of an expert that both products take at once.
std::int64_t stretch_of(const PackedExperts& experts) {
  return joins_down(panel_format(experts.type())) ? kStretch : 1;
}

/// Floats from a row of hidden values to the next: not all in the same sets of a cache.
std::int64_t hidden_stride(const PackedExperts& experts) {
  return stretch_of(experts) * experts.panel_neurons() + 16;
}

/// What one part writes. Lives in the workspace.
struct DecodeScratch {
  PairGroups groups;
  float* products;            // [8, 32] gate|up of a panel
  float* hidden;              // [rows, hidden_stride()]
  InputBlock* blocks;         // [tokens, ceil(D / 32)] x for kInt4
  InputBlock* hidden_blocks;  // [8] hidden for kInt4
  float* padding;             // [D, rounded up] y of rows that only fill a kernel
  float* zeros;               // [hidden_stride()] their hidden values
  float* tail;                // [8, 32] outputs, some of no column
  float* row_weight;          // [tokens]
};

DecodeScratch carve_decode(Carver& from, const PackedExperts& experts, std::int64_t tokens,
                           std::int64_t k) {
  const std::int64_t blocks = num_blocks(experts.d_model());
  DecodeScratch s;
  s.groups = carve_groups(from, experts.num_experts(), tokens * k);
  s.products = from.take<float>(kMaxPanelRows * kPanelWidth);
  const std::int64_t stride = hidden_stride(experts);
  s.hidden = from.take<float>(std::min(tokens, kStretchRows) * stride);
  const bool in_blocks = experts.type() == WeightType::kInt4;
  s.blocks = from.take<InputBlock>(in_blocks ? tokens * blocks : 0);
  s.hidden_blocks = from.take<InputBlock>(in_blocks ? kMaxPanelRows : 0);
  s.padding = from.take<float>(blocks * kPanelWidth);
  s.zeros = from.take<float>(stride);
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
        stretch_(stretch_of(call.experts)),
        stride_(hidden_stride(call.experts)),
        kernels_(panel_kernels()),
        batch_(direct_panel_rows(kernels_, layout_.format)) {
    group_pairs(call_, 0, call_.x.rows, s_.groups);
    std::fill_n(s_.zeros, stride_, 0.0f);
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
    const std::int64_t first = call_.experts.panel_begin(e);
    const Expert expert{call_.experts.expert(e), first, call_.experts.panel_begin(e + 1) - first};
    for (std::int64_t r = 0; r < m; r += kStretchRows)
      for (std::int64_t p = begin - first; p < end - first; p += stretch_)
        run(expert, p, std::min(stretch_, end - first - p), r, std::min(kStretchRows, m - r));
  }

 private:
  /// The expert that runs; its panels are counted from its first.
  struct Expert {
    const std::byte* weights;
    std::int64_t first_panel, panels;
  };

  /// Panels [begin, begin + panels) for rows [first, first + m).
  void run(const Expert& expert, std::int64_t begin, std::int64_t panels, std::int64_t first,
           std::int64_t m) const {
    for (std::int64_t i = 0; i < panels; ++i)
      for (std::int64_t r = 0; r < m; r += batch_) {
        const std::int64_t n = std::min(batch_, m - r);
        float* hidden = s_.hidden + r * stride_ + i * layout_.neurons;
        gate_up(expert, begin + i, first + r, n);
        activate(expert, begin + i, first + r, n, hidden);
      }
    // A column's weights for all rows; those of a single panel stay in a cache anyway.
    const std::int64_t outputs = m <= batch_ || panels == 1 ? layout_.down_panels : 1;
    for (std::int64_t d = 0; d < layout_.down_panels; d += outputs)
      for (std::int64_t r = 0; r < m; r += batch_)
        down(expert, begin, panels, d, outputs, first, r, std::min(batch_, m - r));
  }

  const float* scales(const Expert& expert, std::int64_t panel) const {
    return reinterpret_cast<const float*>(expert.weights + layout_.scales_at(panel));
  }
  const float* down_scales(const Expert& expert, std::int64_t panel) const {
    return reinterpret_cast<const float*>(expert.weights + layout_.down_scales_at(panel));
  }

  void gate_up(const Expert& expert, std::int64_t panel, std::int64_t first, std::int64_t n) const {
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
    const std::byte* weights = expert.weights + layout_.gate_up_at(expert.panels, panel);
    kernels_.multiply[static_cast<int>(layout_.format)][kernel](
        {weights, scales(expert, panel), D, 1, 0, x, blocks, out, false,
         reinterpret_cast<const char*>(weights) + kPrefetchBytes});
  }

  void activate(const Expert& expert, std::int64_t panel, std::int64_t first, std::int64_t n,
                float* hidden) const {
    const std::span<const float> biases = call_.experts.lane_bias();
    if (!biases.empty())
      row_kernels().add_rows(biases.data() + (expert.first_panel + panel) * kPanelWidth, 0,
                             s_.products, kPanelWidth, n, kPanelWidth);
    kernels_.activate(call_.experts.activation(), call_.experts.gated(), n, s_.products,
                      s_.row_weight + first,
                      layout_.format == PanelFormat::kInt8 ? down_scales(expert, panel) : nullptr,
                      hidden, stride_);
  }

  /// Columns' panels [d, d + outputs) of y for the hidden values of a stretch: rows [r, r + n) of
  /// it, which begins with row `first` of the expert.
  void down(const Expert& expert, std::int64_t panel, std::int64_t panels, std::int64_t d,
            std::int64_t outputs, std::int64_t first, std::int64_t r, std::int64_t n) const {
    const int kernel = panel_rows_index(n);
    const std::int64_t D = call_.x.cols, steps = panels * layout_.neurons;
    const float* h[kMaxPanelRows];
    const InputBlock* blocks[kMaxPanelRows];  // a panel's neurons are one block at most
    float *y[kMaxPanelRows], *tail[kMaxPanelRows];
    for (std::int64_t i = 0; i < kPanelRows[kernel]; ++i) {
      h[i] = i < n ? s_.hidden + (r + i) * stride_ : s_.zeros;
      y[i] = i < n ? y_.row(token_[first + r + i]) + d * kPanelWidth : s_.padding;
      tail[i] = s_.tail + i * kPanelWidth;
      blocks[i] = s_.hidden_blocks + i;
      if (layout_.format == PanelFormat::kInt4)
        kernels_.prepare(h[i], layout_.neurons, s_.hidden_blocks + i);
    }
    const std::int64_t piece = panels * layout_.down_panel_bytes;
    const std::int64_t stride = layout_.down_stride(expert.panels);
    // Between small pieces lie other parts' weights, so whole pieces ahead are asked for.
    const std::int64_t ahead = piece == stride || piece >= kNearBytes
                                   ? kPrefetchBytes
                                   : (kPrefetchBytes + piece - 1) / piece * stride;
    const auto multiply = kernels_.multiply[static_cast<int>(layout_.format)][kernel];
    const auto run = [&](std::int64_t begin, std::int64_t count, float* const* out, bool add) {
      const std::byte* weights = expert.weights + layout_.down_at(expert.panels, panel, begin);
      multiply({weights,
                layout_.format == PanelFormat::kInt8 ? kUnitScales : down_scales(expert, panel),
                steps, count, stride, h, blocks, out, add,
                reinterpret_cast<const char*>(weights) + ahead});
    };
    const std::int64_t whole = std::min(d + outputs, D / kPanelWidth);
    if (whole > d) run(d, whole - d, y, true);
    if (whole == d + outputs) return;
    run(whole, 1, tail, false);
    const std::int64_t column = whole * kPanelWidth;
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t c = column; c < D; ++c) y[i][c - d * kPanelWidth] += tail[i][c - column];
  }

  const FfnCall& call_;
  DecodeScratch s_;
  MatrixView<float> y_;
  ExpertLayout layout_;
  std::int64_t stretch_, stride_;
  const PanelKernels& kernels_;
  std::int64_t batch_;
  const std::int32_t* token_ = nullptr;  // of the expert that runs
};

}  // namespace

std::size_t decode_scratch(const PackedExperts& experts, std::int64_t tokens, std::int64_t k) {
  Carver sizes(nullptr);
  carve_decode(sizes, experts, tokens, k);
  return sizes.used();
}

void decode_share(const FfnCall& call, std::byte* scratch, MatrixView<float> sum, std::int64_t part,
                  std::int64_t parts) {
  Carver room(scratch);
  DecodePart runner(call, carve_decode(room, call.experts, call.x.rows, call.k), sum);
  // A panel costs its reading and its rows; the constant is what a row's arithmetic is worth.
  const auto cost = [&](std::int64_t e) { return runner.rows(e) == 0 ? 0 : 12 + runner.rows(e); };
  for_share_of_panels(
      call.experts, part, parts, cost,
      [&](std::int64_t e, std::int64_t begin, std::int64_t end) { runner.run(e, begin, end); });
}

}  // namespace cleave
