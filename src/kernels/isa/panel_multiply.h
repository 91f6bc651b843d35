#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/isa/panel_formats.h"

// A few rows of x times packed panels, which are turned into floats on the way: decode.
namespace cleave::CLEAVE_ISA {
namespace {

template <int kChains, int kRows>
using Sums = Floats[kChains][kRows][2];

/// sums += weights of steps [begin, end) times x; `p`: the group of `begin`.
template <typename Format, int kRows, int kChains>
CLEAVE_INLINE void accumulate(const char* p, const float* const* x, std::int64_t begin,
                              std::int64_t end, const char*& prefetch, std::int64_t prefetch_stride,
                              Sums<kChains, kRows>& sums) {
  constexpr std::int64_t kUnroll = Format::kGroup < kChains ? kChains : Format::kGroup;
  constexpr std::int64_t kBytes = Format::kGroupBytes * (kUnroll / Format::kGroup);
  std::int64_t step = begin;
  for (; step + kUnroll <= end; step += kUnroll, p += kBytes) {
#pragma GCC unroll 8
    for (std::int64_t line = 0; line < kBytes; line += 64)
      __builtin_prefetch(prefetch + line, 0, 3);
    prefetch += prefetch_stride * kBytes;
#pragma GCC unroll 8
    for (std::int64_t s = 0; s < kUnroll; ++s) {
      Floats w0, w1;
      Format::step(p + s / Format::kGroup * Format::kGroupBytes, s % Format::kGroup, w0, w1);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Floats value = splat(x[r][step + s]);
        sums[s % kChains][r][0] += value * w0;
        sums[s % kChains][r][1] += value * w1;
      }
    }
  }
  for (std::int64_t s = 0; step < end; ++s, ++step) {
    Floats w0, w1;
    Format::step(p + s / Format::kGroup * Format::kGroupBytes, s % Format::kGroup, w0, w1);
    for (int r = 0; r < kRows; ++r) {
      const Floats value = splat(x[r][step]);
      sums[0][r][0] += value * w0;
      sums[0][r][1] += value * w1;
    }
  }
}

template <int kRows, int kChains>
CLEAVE_INLINE void join(Sums<kChains, kRows>& sums) {
  for (int c = 1; c < kChains; ++c)
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half) sums[0][r][half] += sums[c][r][half];
}

/// All steps of one panel into sum.
template <typename Format, int kRows, int kChains>
CLEAVE_INLINE void panel_sum(const char* panel, const PanelProduct& product, const float* const* x,
                             const InputBlock* const* blocks, const char*& prefetch,
                             std::int64_t prefetch_stride, Floats (&sum)[kRows][2]) {
  Sums<kChains, kRows> sums = {};
  if constexpr (std::is_same_v<Format, Int4>) {
    for (int r = 0; r < kRows; ++r) sum[r][0] = sum[r][1] = Floats{};
    for (std::int64_t begin = 0; begin < product.steps; begin += Int4Block::kSteps) {
      const std::int64_t end =
          begin + Int4Block::kSteps < product.steps ? begin + Int4Block::kSteps : product.steps;
      const Int4Block block(panel, product.scales);
      panel += Int4Block::kHeader;
      __builtin_prefetch(prefetch, 0, 3);
      prefetch += prefetch_stride * Int4Block::kHeader;
      for (int c = 0; c < kChains; ++c)
        for (int r = 0; r < kRows; ++r) sums[c][r][0] = sums[c][r][1] = Floats{};
      accumulate<Format, kRows, kChains>(panel, x, begin, end, prefetch, prefetch_stride, sums);
      panel += Int4Block::kSteps / Format::kGroup * Format::kGroupBytes;
      join<kRows, kChains>(sums);
      for (int r = 0; r < kRows; ++r) {
        const Floats in = splat(blocks[r][begin / Int4Block::kSteps].sum);
        for (int half = 0; half < 2; ++half)
          sum[r][half] += sums[0][r][half] * block.scale[half] + in * block.offset[half];
      }
    }
  } else {
    accumulate<Format, kRows, kChains>(panel, x, 0, product.steps, prefetch, prefetch_stride, sums);
    join<kRows, kChains>(sums);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half) {
        sum[r][half] = sums[0][r][half];
        if constexpr (std::is_same_v<Format, Int8>)
          sum[r][half] *= load<Floats>(product.scales + 16 * half);
      }
  }
}

template <typename Format, int kRows, int kChains>
CLEAVE_INLINE void multiply_rows(const PanelProduct& product, int first_row) {
  const float* x[kRows];
  const InputBlock* blocks[kRows] = {};
  for (int r = 0; r < kRows; ++r) {
    x[r] = product.x[first_row + r];
    if constexpr (std::is_same_v<Format, Int4>) blocks[r] = product.blocks[first_row + r];
  }
  const auto* panel = static_cast<const char*>(product.panel);
  // Without a target the same lines are asked for again and again, which costs next to nothing.
  const char* target = product.prefetch != nullptr ? product.prefetch : panel;
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 1 : 0;
  for (std::int64_t i = 0; i < product.panels; ++i, panel += product.panel_bytes) {
    const char* prefetch = target + i * prefetch_stride * product.panel_bytes;
    Floats sum[kRows][2];
    panel_sum<Format, kRows, kChains>(panel, product, x, blocks, prefetch, prefetch_stride, sum);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* y = product.y[first_row + r] + i * kPanelWidth;
      if (product.add) {
        sum[r][0] += load<Floats>(y);
        sum[r][1] += load<Floats>(y + 16);
      }
      store(sum[r][0], y);
      store(sum[r][1], y + 16);
    }
  }
}

template <typename Format, int kRows>
void multiply(const PanelProduct& product) {
  if constexpr (kRows <= kRegisterRows) {
    // A sum that waits for its predecessor's addition takes 4 cycles; few rows take turns between
    // several sums, as many as there are registers for. Short panels overlap anyway.
    constexpr int kWanted = kRows == 1   ? (!std::is_same_v<Format, Int4> ? 4
                                            : kParts < 4                  ? 2
                                                                          : 1)
                            : kRows == 2 ? 2
                                         : 1;
    constexpr int kRoom = kMostChains > kRows ? kMostChains / kRows : 1;
    constexpr int kChains = kWanted < kRoom ? kWanted : kRoom;
    if (kRows == 1 && product.steps <= 32)
      multiply_rows<Format, kRows, (kChains < 2 ? kChains : 2)>(product, 0);
    else
      multiply_rows<Format, kRows, kChains>(product, 0);
  } else {
    constexpr int kPart = 2;
    static_assert(kRows % kPart == 0);
    for (int r = 0; r < kRows; r += kPart) multiply_rows<Format, kPart, 1>(product, r);
  }
}

}  // namespace
}  // namespace cleave::CLEAVE_ISA
