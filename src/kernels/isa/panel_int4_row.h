#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "kernels/isa/panel_multiply.h"

// One row of x times int4 panels in whole numbers, and x as that needs it.
namespace cleave::CLEAVE_ISA {
namespace {

#if defined(__AVX512BW__)

typedef std::int16_t Shorts __attribute__((vector_size(64)));

/// Sums of two products each: out[i] = a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1], a >= 0.
CLEAVE_INLINE Shorts multiply_bytes(const Words& a, const Words& b) {
  Shorts out;
  const __m512i sums = _mm512_maddubs_epi16(reinterpret_cast<const __m512i&>(a),
                                            reinterpret_cast<const __m512i&>(b));
  std::memcpy(&out, &sums, sizeof out);
  return out;
}

/// out[i] = factor * (a[2 i] + a[2 i + 1])
CLEAVE_INLINE Ints add_pairs(const Shorts& a, std::int16_t factor) {
  Ints out;
  const __m512i sums =
      _mm512_madd_epi16(reinterpret_cast<const __m512i&>(a), _mm512_set1_epi16(factor));
  std::memcpy(&out, &sums, sizeof out);
  return out;
}

CLEAVE_INLINE Words splat_bytes(const std::int8_t* four) {
  const auto w = load<std::uint32_t>(four);
  return Words{w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w};
}

/// sum[i] += a[4 i] b[0] + ... + a[4 i + 3] b[3], a >= 0: AVX512-VNNI, which the rest of this file
/// must do without. Hence no intrinsic.
CLEAVE_INLINE void add_products(Ints& sum, const Words& a, const std::int8_t* four) {
  using Four = std::int8_t[4];
  asm("vpdpbusd %2%{1to16%}, %1, %0"
      : "+v"(sum)
      : "v"(a), "m"(*reinterpret_cast<const Four*>(four)));
}

/// Products of 16 lanes' nibbles, `groups` of eight steps, with x: in units of x.scale. A block's
/// sums fit: 32 steps * 15 * 128 / 2 < 2^15 in a short.
template <bool kVnni, typename Fetch>
CLEAVE_INLINE Floats nibble_products(const char* words, const InputBlock& x, std::int64_t groups,
                                     const Fetch& fetch) {
  if constexpr (kVnni) {
    Ints sums[3] = {};
#pragma GCC unroll 4
    for (std::int64_t g = 0; g < groups; ++g) {
      fetch();
      const Words nibbles = load<Words>(words + g * Int4::kGroupBytes);
      const Words even = nibbles & 0x0f0f0f0fu, odd = (nibbles >> 4) & 0x0f0f0f0fu;
#pragma GCC unroll 3
      for (int d = 0; d < 3; ++d) add_products(sums[d], even, x.digits[d] + g * 8);
#pragma GCC unroll 3
      for (int d = 0; d < 3; ++d) add_products(sums[d], odd, x.digits[d] + g * 8 + 4);
    }
    const Ints low = sums[0] + (sums[1] << 8);
    return __builtin_convertvector(sums[2], Floats) * 65536.0f +
           __builtin_convertvector(low, Floats);
  }
  Shorts sums[3] = {};
#pragma GCC unroll 4
  for (std::int64_t g = 0; g < groups; ++g) {
    fetch();
    const Words nibbles = load<Words>(words + g * Int4::kGroupBytes);
    const Words even = nibbles & 0x0f0f0f0fu, odd = (nibbles >> 4) & 0x0f0f0f0fu;
#pragma GCC unroll 3
    for (int d = 0; d < 3; ++d) {
      sums[d] += multiply_bytes(even, splat_bytes(x.digits[d] + g * 8));
      sums[d] += multiply_bytes(odd, splat_bytes(x.digits[d] + g * 8 + 4));
    }
  }
  // Below 2^24: exact in float.
  const Ints low = add_pairs(sums[0], 1) + add_pairs(sums[1], 256), high = add_pairs(sums[2], 1);
  return __builtin_convertvector(high, Floats) * 65536.0f + __builtin_convertvector(low, Floats);
}

/// One block of 32 lanes: `scaled` += scales * products, `least` += minima * sum of x, in units.
template <bool kVnni, typename Fetch>
CLEAVE_INLINE void add_block(const char* block, const InputBlock& x, std::int64_t groups,
                             Floats (&scaled)[2], Floats (&least)[2], const Fetch& fetch) {
  fetch();
  const Floats unit = splat(x.scale), sum = splat(x.sum);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const Floats scale = __builtin_convertvector(from_unsigned_bytes(block + 16 * half), Floats);
    const Floats minimum =
        __builtin_convertvector(from_unsigned_bytes(block + 32 + 16 * half), Floats);
    const Floats products =
        nibble_products<kVnni>(block + Int4Block::kHeader + 64 * half, x, groups, fetch);
    scaled[half] += products * unit * scale;
    least[half] += sum * minimum;
  }
}

template <bool kVnni>
void multiply_int4(const PanelProduct& product) {
  constexpr std::int64_t kGroups = Int4Block::kSteps / Int4::kGroup;
  constexpr std::int64_t kBytes = Int4Block::kHeader + kGroups * Int4::kGroupBytes;
  const auto* panel = static_cast<const char*>(product.panel);
  const char* prefetch = product.prefetch != nullptr ? product.prefetch : panel;
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 64 : 0;
  const std::int64_t whole = product.steps / Int4Block::kSteps;
  const std::int64_t rest = (product.steps % Int4Block::kSteps + Int4::kGroup - 1) / Int4::kGroup;
  // One line at a time: a burst would wait for the few that a core can have on their way.
  const auto fetch = [&]() __attribute__((always_inline)) {
    __builtin_prefetch(prefetch, 0, 3);
    prefetch += prefetch_stride;
  };
  for (std::int64_t i = 0; i < product.panels; ++i, panel += product.panel_bytes) {
    const InputBlock* x = product.blocks[0];
    const char* block = panel;
    Floats scaled[2] = {}, least[2] = {};
    for (std::int64_t b = 0; b < whole; ++b, ++x, block += kBytes) {
      add_block<kVnni>(block, *x, kGroups, scaled, least, fetch);
    }
    if (rest == 2) {  // 16 neurons
      add_block<kVnni>(block, *x, 2, scaled, least, fetch);
    } else if (rest > 0) {
      add_block<kVnni>(block, *x, rest, scaled, least, fetch);
    }
    float* y = product.y[0] + i * kPanelWidth;
    for (int half = 0; half < 2; ++half) {
      Floats sum = scaled[half] * product.scales[0] + least[half] * product.scales[1];
      if (product.add) sum += load<Floats>(y + 16 * half);
      store(sum, y + 16 * half);
    }
  }
}

CLEAVE_INLINE Ints round_to_ints(const Floats& v) {
  Ints out;
  const __m512i ints = _mm512_cvtps_epi32(reinterpret_cast<const __m512&>(v));
  std::memcpy(&out, &ints, sizeof out);
  return out;
}

/// Digits of 16 values, [-128, 127] each, in the order of the nibbles.
CLEAVE_INLINE void store_digits(const Floats& values, std::int64_t begin, InputBlock& block) {
  Ints rest = round_to_ints(values);
  for (int d = 0; d < 3; ++d) {
    const __m128i digit = _mm512_cvtepi32_epi8(reinterpret_cast<const __m512i&>(rest));  // low bits
    const __m512i wide = _mm512_cvtepi8_epi32(digit);
    rest = (rest - load<Ints>(&wide)) >> 8;
    const __m128i ordered = _mm_shuffle_epi8(
        digit, _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
    std::memcpy(block.digits[d] + begin, &ordered, sizeof ordered);
  }
}

void prepare_block(const float* x, InputBlock& block) {
  const __m512 x0 = _mm512_loadu_ps(x), x1 = _mm512_loadu_ps(x + 16);
  block.sum = _mm512_reduce_add_ps(_mm512_add_ps(x0, x1));
  // The largest of digits that all fit; not so small a scale that its inverse is infinite.
  constexpr float kLargest = 127 * 65536.0f;
  const float most = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(x0), _mm512_abs_ps(x1)));
  const float bound = most > 0x1p-100f ? most : 0x1p-100f;
  block.scale = bound / kLargest;
  const Floats inverse = splat(kLargest / bound);
  store_digits(load<Floats>(x) * inverse, 0, block);
  store_digits(load<Floats>(x + 16) * inverse, 16, block);
}

#else

template <bool kVnni>
void multiply_int4(const PanelProduct& product) {
  multiply<Int4, 1>(product);
}

void prepare_block(const float* x, InputBlock& block) {
  block.sum = 0.0f;
  for (std::int64_t s = 0; s < kInt4Block; ++s) block.sum += x[s];
}

#endif

void prepare(const float* x, std::int64_t steps, InputBlock* blocks) {
  for (; steps >= kInt4Block; steps -= kInt4Block, x += kInt4Block) prepare_block(x, *blocks++);
  if (steps <= 0) return;
  float padded[kInt4Block] = {};
  std::memcpy(padded, x, static_cast<std::size_t>(steps) * sizeof *x);
  prepare_block(padded, *blocks);
}

}  // namespace
}  // namespace cleave::CLEAVE_ISA
