#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/isa/panel_activation.h"
#include "kernels/isa/panel_formats.h"
#include "kernels/isa/panel_isa.h"

// Rows of bfloat16 times packed bfloat16 panels as they are stored, by AVX512-BF16's dot product of
// pairs: two multiply-adds a lane and instruction. Its instructions are named, for a compiler flag
// would let the compiler use them in kernels that other machines run.
namespace cleave::CLEAVE_ISA {
namespace {

#if defined(__AVX512F__)

CLEAVE_INLINE void dot_add(Floats& sum, const Words& x, const Words& w) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
}

/// x[0], x[1] in all lanes.
CLEAVE_INLINE Words splat_pair(const std::uint16_t* x) {
  std::uint32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return Words{} + pair;
}

CLEAVE_INLINE std::int64_t row_at(const std::int32_t* rows, std::int64_t r) {
  return rows != nullptr ? rows[r] : r;
}

/// kPairs: of steps in a piece, where that is known; or 0. Loops that short gain a twentieth by it.
/// One call for all products: the last additions and stores of one go on under the next.
template <int kRows, int kPanels, int kPairs>
CLEAVE_INLINE void multiply_pieces(const DotProduct& product) {
  constexpr int kVectors = 2 * kPanels;
  const std::int64_t pairs = kPairs > 0 ? kPairs : (product.piece_steps + 1) / 2;
  const std::int64_t rate = product.prefetch_rate;
  for (std::int64_t n = 0; n < product.products; ++n) {
    const std::int64_t first = n * kRows;
    const std::uint16_t* x[kRows];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
      x[r] = product.x + row_at(product.x_row, first + r) * product.x_stride;
    const char* piece[kPanels];
#pragma GCC unroll 2
    for (int p = 0; p < kPanels; ++p) piece[p] = static_cast<const char*>(product.panel[p]);
    const char* piece_prefetch = product.prefetch + n * pairs * rate;
    Floats sum[kRows][kVectors] = {};

    std::int64_t at = 0;
    for (std::int64_t i = 0; i < product.pieces; ++i) {
      const char* prefetch = piece_prefetch;
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p)
        for (int l = 0; l < 4; ++l)
          __builtin_prefetch(piece[p] + product.piece_stride + 64 * l, 0, 3);
      for (std::int64_t s = 0; s < pairs; ++s, at += 2) {
        __builtin_prefetch(prefetch, 0, 2);
        // Of one panel always, needed or not: a branch would cost two registers for addresses.
        __builtin_prefetch(prefetch + (kPanels == 2 ? product.prefetch_panel : 64), 0, 2);
        prefetch += rate;
        Words w[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) w[v] = load<Words>(piece[v / 2] + s * 128 + v % 2 * 64);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const Words pair = splat_pair(x[r] + at);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) dot_add(sum[r][v], pair, w[v]);
        }
      }
#pragma GCC unroll 2
      for (int p = 0; p < kPanels; ++p) piece[p] += product.piece_stride;
      piece_prefetch += product.prefetch_stride;
    }
    const auto finish = [&](auto adds) __attribute__((always_inline)) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        float* y = product.y + row_at(product.y_row, first + r) * product.y_stride;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* to = y + v / 2 * product.panel_offset + v % 2 * 16;
          if constexpr (adds) sum[r][v] += load<Floats>(to);
          store(sum[r][v], to);
        }
      }
    };
    if (product.add)
      finish(std::true_type());
    else
      finish(std::false_type());
  }
}

template <int kRows, int kPanels>
void multiply_dots(const DotProduct& product) {
  if (product.piece_steps == kShortSteps)  // down of experts with a gate
    multiply_pieces<kRows, kPanels, kShortSteps / 2>(product);
  else
    multiply_pieces<kRows, kPanels, 0>(product);
}

/// With so few steps a product's last stores go on while the next one's dot products run.
template <int kRows, int kPairs>
CLEAVE_INLINE void multiply_short_products(const ShortDotProduct& product) {
  const auto* panel = static_cast<const char*>(product.panel);
  const std::uint16_t* x = product.x;
  const std::int32_t* token = product.token;
  for (std::int64_t i = 0; i < product.products; ++i, x += kRows * 2 * kPairs, token += kRows) {
    Floats sum[kRows][2] = {};
#pragma GCC unroll 16
    for (int s = 0; s < kPairs; ++s) {
      const Words w0 = load<Words>(panel + s * 128), w1 = load<Words>(panel + s * 128 + 64);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Words pair = splat_pair(x + 2 * (r * kPairs + s));
        dot_add(sum[r][0], pair, w0);
        dot_add(sum[r][1], pair, w1);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* y = product.y + token[r] * product.y_stride;
      store(sum[r][0] + load<Floats>(y), y);
      store(sum[r][1] + load<Floats>(y + 16), y + 16);
    }
  }
}

template <int kRows>
void multiply_short_dots(const ShortDotProduct& product) {
  if (product.steps == kShortSteps)  // experts with a gate
    multiply_short_products<kRows, kShortSteps / 2>(product);
  else
    multiply_short_products<kRows, kShortSteps>(product);
}

CLEAVE_INLINE __m256i to_bfloat16(const Floats& v) {
  __m256i half;
  asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
  return half;
}

inline void round_to_bfloat16(const float* x, std::int64_t n, std::uint16_t* out) {
  std::int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m256i half = to_bfloat16(load<Floats>(x + i));
    std::memcpy(out + i, &half, sizeof half);
  }
  for (; i < n; ++i) {
    const __m256i half = to_bfloat16(splat(x[i]));
    std::memcpy(out + i, &half, sizeof out[i]);
  }
}

inline void activate_to_bfloat16(Activation activation, bool gated, std::int64_t rows,
                                 const float* in, const float* weight, std::uint16_t* h,
                                 std::int64_t stride) {
  activate_rows(
      activation, gated, rows, in, weight, nullptr, h, stride,
      [](const Floats& v, std::uint16_t* to) __attribute__((always_inline)) {
        const __m256i half = to_bfloat16(v);
        std::memcpy(to, &half, sizeof half);
      });
}

constexpr DotKernels kDots = {
    {multiply_dots<1, 1>, multiply_dots<2, 1>, multiply_dots<3, 1>, multiply_dots<4, 1>,
     multiply_dots<5, 1>, multiply_dots<6, 1>, multiply_dots<7, 1>, multiply_dots<8, 1>,
     multiply_dots<9, 1>, multiply_dots<10, 1>, multiply_dots<11, 1>, multiply_dots<12, 1>},
    {multiply_dots<1, 2>, multiply_dots<2, 2>, multiply_dots<3, 2>, multiply_dots<4, 2>,
     multiply_dots<5, 2>, multiply_dots<6, 2>},
    {multiply_short_dots<1>, multiply_short_dots<2>, multiply_short_dots<3>, multiply_short_dots<4>,
     multiply_short_dots<5>, multiply_short_dots<6>, multiply_short_dots<7>, multiply_short_dots<8>,
     multiply_short_dots<9>, multiply_short_dots<10>, multiply_short_dots<11>,
     multiply_short_dots<12>},
    round_to_bfloat16,
    activate_to_bfloat16,
};

#endif

}  // namespace
}  // namespace cleave::CLEAVE_ISA
