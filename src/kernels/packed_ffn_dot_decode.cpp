// Narrow experts with a few tokens each, of bfloat16 weights where the machine multiplies pairs of
// them: one phase as in packed_ffn_decode.cpp, every part with a sum of its own, but rows of x and
// hidden values rounded to bfloat16 as for prompts. As floats these rows would cost more time than
// the weights take from memory.

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
constexpr std::int64_t kRows = 64;  // of an expert that go through both products together

/// What one part writes. Lives in the workspace.
struct DotScratch {
  PairGroups groups;
  std::int32_t* counts;  // [E]
  float* weight;         // [PairGroups::size()]
  Value* x;              // [tokens, skewed D] rounded
  float* products;       // [kRows, 32] gate|up of a panel
  Value* hidden;         // [kRows, neurons of a panel]
  float* sum;            // [tokens, D in whole panels] its share of y
};

DotScratch carve_dot_decode(Carver& from, const PackedExperts& experts, std::int64_t tokens,
                            std::int64_t k) {
  const std::int64_t E = experts.num_experts(), pairs = tokens * k;
  DotScratch s;
  s.groups = carve_groups(from, E, pairs);
  s.counts = from.take<std::int32_t>(E);
  s.weight = from.take<float>(PairGroups::size(E, pairs));
  s.x = from.take<Value>(tokens * prefill::skewed_stride<Value>(experts.d_model() + 1));
  s.products = from.take<float>(kRows * kPanelWidth);
  s.hidden = from.take<Value>(kRows * experts.panel_neurons());
  s.sum = from.take<float>(tokens * num_blocks(experts.d_model()) * kPanelWidth);
  return s;
}

/// Runs tokens through ranges of expert panels. One object per part.
class DotDecodePart {
 public:
  DotDecodePart(const FfnCall& call, const DotScratch& scratch)
      : call_(call),
        s_(scratch),
        layout_(call.experts.type(), call.experts.gated(), call.experts.d_model()),
        x_stride_(prefill::skewed_stride<Value>(call.x.cols + 1)),
        sum_stride_(layout_.down_panels * kPanelWidth),
        blocks_(layout_.format, nullptr) {
    const std::int64_t T = call.x.rows;
    const PairSorter sorter(call, 0, T, s_.groups, s_.counts, 1, s_.weight);
    sorter.count(0);
    sorter.sum_up();
    sorter.place(0);
    for (std::int64_t t = 0; t < T; ++t)
      DotBlocks::set_row(call.x.row(t), call.x.cols, s_.x + t * x_stride_);
    std::fill_n(s_.sum, T * sum_stride_, 0.0f);
  }
  std::int64_t rows(std::int64_t e) const { return s_.groups.rows(e); }

  /// Panels [begin, end), which are of expert e.
  void run(std::int64_t e, std::int64_t begin, std::int64_t end) const {
    for (std::int64_t p = begin; p < end; ++p)
      for (std::int64_t r = 0; r < rows(e); r += kRows)
        run_rows(e, p, s_.groups.begin[e] + r, std::min(kRows, rows(e) - r));
  }

 private:
  /// Panel p of expert e for m pairs.
  void run_rows(std::int64_t e, std::int64_t p, std::int64_t pair, std::int64_t m) const {
    const PackedExperts& experts = call_.experts;
    const std::int64_t first = experts.panel_begin(e), panels = experts.panel_begin(e + 1) - first;
    const std::byte* weights = experts.expert(e);
    const std::byte* gate_up = weights + layout_.gate_up_at(panels, p - first);
    const std::int32_t* token = s_.groups.token + pair;
    blocks_.multiply({{gate_up, gate_up}, {}, 1, call_.x.cols, 1, 0, 0},
                     {gate_up + kPrefetchBytes, layout_.gate_up_bytes, 1, 0}, m, false, 0,
                     {s_.x, x_stride_, token}, {s_.products, kPanelWidth, nullptr});
    const std::span<const float> biases = experts.lane_bias();
    if (!biases.empty())
      row_kernels().add_rows(biases.data() + p * kPanelWidth, 0, s_.products, kPanelWidth, m,
                             kPanelWidth);
    blocks_.activate(experts.activation(), experts.gated(), m, s_.products, s_.weight + pair,
                     nullptr, s_.hidden, layout_.neurons);
    for (std::int64_t d = 0; d < layout_.down_panels; ++d) {
      const std::byte* down = weights + layout_.down_at(panels, p - first, d);
      blocks_.multiply_short(down, down + kPrefetchBytes, layout_.neurons, s_.hidden, m, token,
                             s_.sum + d * kPanelWidth, sum_stride_);
    }
  }

  const FfnCall& call_;
  DotScratch s_;
  ExpertLayout layout_;
  std::int64_t x_stride_, sum_stride_;
  DotBlocks blocks_;
};

}  // namespace

std::size_t dot_decode_bytes(const PackedExperts& experts, std::int64_t tokens, std::int64_t k,
                             std::int64_t parts) {
  Carver sizes(nullptr);
  carve_dot_decode(sizes, experts, tokens, k);
  return sizes.used() * static_cast<std::size_t>(parts);
}

void run_dot_decode(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  const std::int64_t T = call.x.rows, D = call.x.cols, parts = std::max(1, parallel.threads);
  const std::size_t each = dot_decode_bytes(call.experts, T, call.k, 1);
  std::byte* memory = workspace.get(each * static_cast<std::size_t>(parts));
  const auto scratch_of = [&](std::int64_t part) {
    Carver room(memory + each * static_cast<std::size_t>(part));
    return carve_dot_decode(room, call.experts, T, call.k);
  };
  parallel(parts, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
    for (std::int64_t part = part_begin; part < part_end; ++part) {
      const DotDecodePart runner(call, scratch_of(part));
      // Memory is the limit: a panel costs its reading, but for many rows.
      const auto cost = [&](std::int64_t e) {
        return runner.rows(e) == 0 ? 0 : DotBlocks::panel_cost(runner.rows(e));
      };
      for_share_of_panels(
          call.experts, part, parts, cost,
          [&](std::int64_t e, std::int64_t begin, std::int64_t end) { runner.run(e, begin, end); });
    }
  });
  constexpr std::int64_t kRowsPerRange = 4;
  const std::int64_t stride = num_blocks(D) * kPanelWidth;
  parallel(T, kRowsPerRange, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = 0; part < parts; ++part)
      row_kernels().add_rows(scratch_of(part).sum + begin * stride, stride, call.y.row(begin),
                             call.y.row_stride, end - begin, D);
  });
}

}  // namespace cleave
