#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels/isa/panel_activation.h"
#include "kernels/isa/panel_formats.h"
#include "kernels/isa/panel_isa.h"

// Rows of bfloat16 times packed bfloat16 panels as they are stored, by AVX512-BF16's dot product of
// pairs: two multiply-adds a lane and instruction. Its instructions are named, for a compiler flag
// would let the compiler use them in kernels that other machines run.
namespace cleave::CLEAVE_ISA {
namespace {

#if defined(__AVX512F__)

// dot_products.S, which counts on this:
static_assert(offsetof(DotProduct, x) == 16 && offsetof(DotProduct, panel_offset) == 64 &&
              offsetof(DotProduct, prefetch) == 80 && offsetof(DotProduct, x_rate) == 128);
extern "C" __attribute__((visibility("hidden"))) const DotKernel cleave_dot_kernels_1_1[kDotRows],
    cleave_dot_kernels_1_2[kDotRows], cleave_dot_kernels_2_2[kPairRows];

CLEAVE_INLINE void dot_add(Floats& sum, const Words& x, const Words& w) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
}

/// x[0], x[1] in all lanes.
CLEAVE_INLINE Words splat_pair(const std::uint16_t* x) {
  std::uint32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return Words{} + pair;
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

/// For results that are rounded to bfloat16 next, by up to 2^-8: relative error below 7e-5, 6.1e-5
/// of it the reciprocal's. Half the time of the exact one.
struct RoughSigmoid {
  CLEAVE_INLINE static Floats times(const Floats& x, const Floats& u) {
    // exp(-u) = 2^t = 2^f 2^floor(t). Of an infinite t, f is 0.
    const Floats t = -1.44269504f * u, f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF);
    Floats p = splat(0.0135341678f);
    p = p * f + 0.0520114638f;
    p = p * f + 0.241442755f;
    p = p * f + 0.693003833f;
    p = p * f + 1.00000262f;
    return x * _mm512_rcp14_ps(1.0f + Floats(_mm512_scalef_ps(p, t)));
  }
};

inline void activate_to_bfloat16(Activation activation, bool gated, std::int64_t rows,
                                 const float* in, const float* weight, std::uint16_t* h,
                                 std::int64_t stride) {
  activate_rows<RoughSigmoid>(
      activation, gated, rows, in, weight, nullptr, h, stride,
      [](const Floats& v, std::uint16_t* to) __attribute__((always_inline)) {
        const __m256i half = to_bfloat16(v);
        std::memcpy(to, &half, sizeof half);
      });
}

constexpr DotKernels kDots = {
    cleave_dot_kernels_1_1,
    cleave_dot_kernels_1_2,
    cleave_dot_kernels_2_2,
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
