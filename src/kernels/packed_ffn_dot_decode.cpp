// A few tokens each, and bfloat16 weights where the machine multiplies pairs of them: one phase as
// in packed_ffn_decode.cpp, but rows of x and hidden values are rounded to bfloat16 as for prompts.
// As floats, rows can cost more time than the weights take from memory, and two phases would wait
// for each other.

#include <algorithm>

#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"
#include "kernels/prefill_blocks.h"
#include "kernels/prefill_pass.h"

namespace cleave {
namespace {

using Value = DotBlocks::Value;
constexpr std::int64_t kDotPass = 64;     // of an expert that go through both products together
constexpr std::int64_t kDotStretch = 64;  // and as many of its panels, at most

/// What one part writes. Lives in the workspace.
struct DotScratch {
  PairGroups groups;
  std::int32_t* counts;  // [E]
  float* weight;         // [PairGroups::size()]
  Value* x;              // [tokens, skewed D] rounded
  float* products;       // [kDotPass, 32] gate|up of a panel
  Value* hidden;         // [kDotPass, skewed neurons of a stretch]
};

DotScratch carve_dot_decode(Carver& from, const PackedExperts& experts, std::int64_t tokens,
                            std::int64_t k) {
  const std::int64_t E = experts.num_experts(), pairs = tokens * k;
  DotScratch s;
  s.groups = carve_groups(from, E, pairs);
  s.counts = from.take<std::int32_t>(E);
  s.weight = from.take<float>(PairGroups::size(E, pairs));
  s.x = from.take<Value>(tokens * prefill::skewed_stride<Value>(experts.d_model() + 1));
  s.products = from.take<float>(kDotPass * kPanelWidth);
  s.hidden = from.take<Value>(kDotPass *
                              prefill::skewed_stride<Value>(kDotStretch * experts.panel_neurons()));
  return s;
}

/// Runs tokens through ranges of expert panels. One object per part.
class DotDecodePart {
 public:
  DotDecodePart(const FfnCall& call, const DotScratch& scratch, MatrixView<float> sum)
      : call_(call),
        s_(scratch),
        sum_(sum),
        layout_(call.experts.type(), call.experts.gated(), call.experts.d_model()),
        x_stride_(prefill::skewed_stride<Value>(call.x.cols + 1)),
        ahead_(is_narrow(call.experts) ? kPrefetchBytes : kPrefetchBytesOfRows),
        blocks_(layout_.format, nullptr) {
    const std::int64_t T = call.x.rows;
    const PairSorter sorter(call, 0, T, s_.groups, s_.counts, 1, s_.weight);
    sorter.count(0);
    sorter.sum_up();
    sorter.place(0);
    for (std::int64_t t = 0; t < T; ++t)
      DotBlocks::set_row(call.x.row(t), call.x.cols, s_.x + t * x_stride_);
  }
  std::int64_t rows(std::int64_t e) const { return s_.groups.rows(e); }

  /// Panels [begin, end), which are of expert e.
  void run(std::int64_t e, std::int64_t begin, std::int64_t end) const {
    const PackedExperts& experts = call_.experts;
    const std::int64_t first = experts.panel_begin(e);
    const Expert expert{experts.expert(e), first, experts.panel_begin(e + 1) - first};
    for (std::int64_t r = 0; r < rows(e); r += kDotPass) {
      const Rows some{s_.groups.begin[e] + r, std::min(kDotPass, rows(e) - r)};
      for (std::int64_t p = begin - first; p < end - first; p += kDotStretch)
        run(expert, p, std::min(kDotStretch, end - first - p), some);
    }
  }

 private:
  /// The expert that runs; its panels are counted from its first.
  struct Expert {
    const std::byte* weights;
    std::int64_t first_panel, panels;
  };
  /// Pairs [begin, begin + count), which are of that expert.
  struct Rows {
    std::int64_t begin, count;
  };

  /// Panels [begin, begin + panels).
  void run(const Expert& expert, std::int64_t begin, std::int64_t panels, const Rows& rows) const {
    const std::int64_t steps = panels * layout_.neurons;
    const std::int64_t stride = prefill::skewed_stride<Value>(steps);
    const std::int32_t* token = s_.groups.token + rows.begin;
    for (std::int64_t i = 0; i < panels; ++i)
      hidden(expert, begin + i, rows, s_.hidden + i * layout_.neurons, stride);
    const std::int64_t piece = panels * layout_.down_panel_bytes;
    // Of a whole expert the pieces follow each other.
    const std::int64_t ahead =
        panels == expert.panels ? ahead_ : layout_.down_stride(expert.panels);
    for (std::int64_t d = 0; d < layout_.down_panels; ++d) {
      const std::byte* down = expert.weights + layout_.down_at(expert.panels, begin, d);
      float* sum = sum_.data + d * kPanelWidth;
      if (panels == 1)
        blocks_.multiply_short(down, down + kPrefetchBytes, steps, s_.hidden, rows.count, token,
                               sum, sum_.row_stride);
      else
        blocks_.multiply({{down, down}, {}, 1, steps, 1, 0, 0}, {down + ahead, piece, 1, 0},
                         rows.count, true, 0, {s_.hidden, stride, nullptr},
                         {sum, sum_.row_stride, token});
    }
  }

  /// A panel's hidden values.
  void hidden(const Expert& expert, std::int64_t panel, const Rows& rows, Value* h,
              std::int64_t stride) const {
    const std::byte* gate_up = expert.weights + layout_.gate_up_at(expert.panels, panel);
    blocks_.multiply({{gate_up, gate_up}, {}, 1, call_.x.cols, 1, 0, 0},
                     {gate_up + ahead_, layout_.gate_up_bytes, 1, 0}, rows.count, false, 0,
                     {s_.x, x_stride_, s_.groups.token + rows.begin},
                     {s_.products, kPanelWidth, nullptr});
    const PackedExperts& experts = call_.experts;
    if (const std::span<const float> biases = experts.lane_bias(); !biases.empty())
      row_kernels().add_rows(biases.data() + (expert.first_panel + panel) * kPanelWidth, 0,
                             s_.products, kPanelWidth, rows.count, kPanelWidth);
    blocks_.activate(experts.activation(), experts.gated(), rows.count, s_.products,
                     s_.weight + rows.begin, nullptr, h, stride);
  }

  const FfnCall& call_;
  DotScratch s_;
  MatrixView<float> sum_;
  ExpertLayout layout_;
  std::int64_t x_stride_;
  /// Bytes from what is multiplied to what is fetched. Of narrow experts, what lies further off may
  /// not be wanted.
  std::int64_t ahead_;
  DotBlocks blocks_;
};

}  // namespace

std::size_t dot_decode_scratch(const PackedExperts& experts, std::int64_t tokens, std::int64_t k) {
  Carver sizes(nullptr);
  carve_dot_decode(sizes, experts, tokens, k);
  return sizes.used();
}

void dot_decode_share(const FfnCall& call, std::byte* scratch, MatrixView<float> sum,
                      std::int64_t part, std::int64_t parts) {
  Carver room(scratch);
  const DotDecodePart runner(call, carve_dot_decode(room, call.experts, call.x.rows, call.k), sum);
  // Memory is the limit: a panel costs its reading, but for many rows.
  const auto cost = [&](std::int64_t e) {
    return runner.rows(e) == 0 ? 0 : DotBlocks::panel_cost(runner.rows(e));
  };
  for_share_of_panels(
      call.experts, part, parts, cost,
      [&](std::int64_t e, std::int64_t begin, std::int64_t end) { runner.run(e, begin, end); });
}

}  // namespace cleave
