// Experts with few tokens each, of one FFN or of several that add to the same y: each part of the
// threads runs its share of all their panels into a sum of its own, and then the sums are added.

#include <algorithm>

#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"
#include "kernels/panel_rows.h"

namespace cleave {
namespace {

/// What one part writes. Lives in the workspace.
struct FewScratch {
  float* sum;        // [tokens, D in whole panels] its share of y
  std::byte* calls;  // what one call after the other needs
};

FewScratch carve_few(Carver& from, std::int64_t tokens, std::int64_t d_model, std::size_t calls) {
  FewScratch s;
  s.sum = from.take<float>(tokens * num_blocks(d_model) * kPanelWidth);
  s.calls = from.take<std::byte>(static_cast<std::int64_t>(calls));
  return s;
}

std::size_t scratch_of(const ActiveExperts& a, std::int64_t tokens) {
  return uses_dots(a.experts) ? dot_decode_scratch(a.experts, tokens, a.k)
                              : decode_scratch(a.experts, tokens, a.k);
}

}  // namespace

std::size_t few_bytes(std::span<const ActiveExperts> all, std::int64_t tokens, std::int64_t parts) {
  std::size_t calls = 0;
  for (const ActiveExperts& a : all) calls = std::max(calls, scratch_of(a, tokens));
  Carver sizes(nullptr);
  carve_few(sizes, tokens, all.front().experts.d_model(), calls);
  return sizes.used() * static_cast<std::size_t>(parts);
}

void run_few(std::span<const FfnCall> calls, Workspace& workspace, const ParallelFor& parallel) {
  const MatrixView<float> y = calls.front().y;
  const std::int64_t T = y.rows, D = y.cols, parts = std::max(1, parallel.threads);
  std::size_t most = 0;
  bool whole_panels = false;
  SharedStep* routing = nullptr;
  for (const FfnCall& c : calls) {
    if (c.routing != nullptr) routing = c.routing;
    most = std::max(most, scratch_of({c.experts, c.k}, T));
    whole_panels = whole_panels || uses_dots(c.experts);
  }
  Carver sizes(nullptr);
  carve_few(sizes, T, D, most);
  std::byte* memory = workspace.get(sizes.used() * static_cast<std::size_t>(parts));
  const auto scratch = [&](std::int64_t part) {
    Carver room(memory + sizes.used() * static_cast<std::size_t>(part));
    return carve_few(room, T, D, most);
  };
  // The first part writes y itself, where that has room for what is written.
  const std::int64_t stride = num_blocks(D) * kPanelWidth;
  const std::int64_t first_sum = whole_panels && D % kPanelWidth != 0 ? 0 : 1;
  parallel(parts, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
    for (std::int64_t part = part_begin; part < part_end; ++part) {
      const FewScratch s = scratch(part);
      if (part >= first_sum) std::fill_n(s.sum, T * stride, 0.0f);
      const MatrixView<float> sum = part >= first_sum ? MatrixView<float>(s.sum, T, D, stride) : y;
      if (part == 0 && routing != nullptr) routing->begin();
      for (const FfnCall& c : calls) {
        if (c.routing != nullptr && !c.routing->finish()) return;
        uses_dots(c.experts) ? dot_decode_share(c, s.calls, sum, part, parts)
                             : decode_share(c, s.calls, sum, part, parts);
      }
    }
  });
  if (parts == first_sum) return;
  constexpr std::int64_t kRowsPerRange = 4;
  parallel(T, kRowsPerRange, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t part = first_sum; part < parts; ++part)
      row_kernels().add_rows(scratch(part).sum + begin * stride, stride, y.row(begin), y.row_stride,
                             end - begin, D);
  });
}

}  // namespace cleave
