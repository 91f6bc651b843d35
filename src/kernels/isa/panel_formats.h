#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(CLEAVE_NEON)
#include <arm_neon.h>
#endif

#include "kernels/isa/panel_isa.h"
#include "kernels/isa/wide.h"

// The formats of packed weights: step s of a group of steps, to two vectors of weights. kGroup
// steps lie together in kGroupBytes (at least a whole number of cache lines per two steps, so that
// a step's index within a group is a constant after unrolling).
namespace cleave::CLEAVE_ISA {
namespace {

// Accumulators that fit the register file: 2 vectors of 16 floats per row of x, beside two weights.
#if defined(__AVX512F__)
constexpr int kRegisterRows = 12;
#else
constexpr int kRegisterRows = 3;
#endif
// Sums that a single row takes turns between: half of the registers.
constexpr int kMostChains = kRegisters / 2 / (2 * kParts);

CLEAVE_INLINE float half_to_float(std::uint16_t half) {
  // Shift the exponent into place and correct its bias by a multiplication, which also makes
  // subnormals right; infinities and NaN do not occur in weights.
  const std::uint32_t bits = static_cast<std::uint32_t>(half & 0x7fff) << 13;
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof magnitude);
  magnitude *= 0x1p112f;
  return (half & 0x8000) != 0 ? -magnitude : magnitude;
}

CLEAVE_INLINE Floats from_halves(const void* from) {
#if defined(__AVX512F__)
  const __m512 wide = _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
  return load<Floats>(&wide);
#elif defined(__F16C__)
  const auto* p = static_cast<const __m128i*>(from);
  const __m256 parts[2] = {_mm256_cvtph_ps(_mm_loadu_si128(p)),
                           _mm256_cvtph_ps(_mm_loadu_si128(p + 1))};
  return load<Floats>(parts);
#elif defined(CLEAVE_NEON)
  const auto* p = static_cast<const __fp16*>(from);
  const float32x4_t parts[4] = {vcvt_f32_f16(vld1_f16(p)), vcvt_f32_f16(vld1_f16(p + 4)),
                                vcvt_f32_f16(vld1_f16(p + 8)), vcvt_f32_f16(vld1_f16(p + 12))};
  return load<Floats>(parts);
#else
  std::uint16_t halves[16];
  std::memcpy(halves, from, sizeof halves);
  float out[16];
  for (int i = 0; i < 16; ++i) out[i] = half_to_float(halves[i]);
  return load<Floats>(out);
#endif
}

CLEAVE_INLINE Ints from_signed_bytes(const void* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  return load<Ints>(&wide);
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
  const __m256i parts[2] = {_mm256_cvtepi8_epi32(bytes),
                            _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
  return load<Ints>(parts);
#elif defined(CLEAVE_NEON)
  const int8x16_t bytes = vld1q_s8(static_cast<const std::int8_t*>(from));
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
  const int32x4_t parts[4] = {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low),
                              vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)};
  return load<Ints>(parts);
#else
  std::int8_t bytes[16];
  std::memcpy(bytes, from, sizeof bytes);
  std::int32_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = bytes[i];
  return load<Ints>(out);
#endif
}

CLEAVE_INLINE Floats from_bytes(const void* from) { return to_floats(from_signed_bytes(from)); }

CLEAVE_INLINE Ints from_unsigned_bytes(const void* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  return load<Ints>(&wide);
#else  // two bytes of each block and lane: not worth intrinsics
  std::uint8_t bytes[16];
  std::memcpy(bytes, from, sizeof bytes);
  std::int32_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = bytes[i];
  return load<Ints>(out);
#endif
}

struct F32 {
  static constexpr std::int64_t kGroup = 1, kGroupBytes = 128;
  static CLEAVE_INLINE void step(const char* p, std::int64_t, Floats& w0, Floats& w1) {
    w0 = load<Floats>(p);
    w1 = load<Floats>(p + 64);
  }
};

// Pairs of steps side by side in one 32-bit lane, the layout of the bfloat16 dot-product
// instructions.
struct BF16 {
  static constexpr std::int64_t kGroup = 2, kGroupBytes = 128;
  static CLEAVE_INLINE void step(const char* p, std::int64_t s, Floats& w0, Floats& w1) {
    const Words a = load<Words>(p), b = load<Words>(p + 64);
    w0 = as_floats(s == 0 ? a << 16 : a & 0xffff0000u);
    w1 = as_floats(s == 0 ? b << 16 : b & 0xffff0000u);
  }
};

struct F16 {
  static constexpr std::int64_t kGroup = 1, kGroupBytes = 64;
  static CLEAVE_INLINE void step(const char* p, std::int64_t, Floats& w0, Floats& w1) {
    w0 = from_halves(p);
    w1 = from_halves(p + 32);
  }
};

struct Int8 {
  static constexpr std::int64_t kGroup = 2, kGroupBytes = 64;
  static CLEAVE_INLINE void step(const char* p, std::int64_t s, Floats& w0, Floats& w1) {
    w0 = from_bytes(p + s * 32);
    w1 = from_bytes(p + s * 32 + 16);
  }
};

// A lane's nibbles of 8 steps in one 32-bit word. A nibble becomes the upper four bits of a
// mantissa, that is 1 + q / 16: one shift and one three-way logic operation, no conversion. The
// block's scale, and the 1, are put right once per block (fold).
struct Int4 {
  static constexpr std::int64_t kGroup = 8, kGroupBytes = 128;
  static CLEAVE_INLINE void step(const char* p, std::int64_t s, Floats& w0, Floats& w1) {
    w0 = mantissa(load<Words>(p), s);
    w1 = mantissa(load<Words>(p + 64), s);
  }
  static CLEAVE_INLINE Floats mantissa(const Words& nibbles, std::int64_t s) {
    const int shift = 19 - 4 * static_cast<int>(s);  // bits 4 s .. 4 s + 3 to 19 .. 22
    const Words at = shift >= 0 ? nibbles << (shift & 31) : nibbles >> (-shift & 31);
#if defined(__AVX512F__)
    __m512i v =
        _mm512_ternarylogic_epi32(reinterpret_cast<const __m512i&>(at), _mm512_set1_epi32(0x780000),
                                  _mm512_set1_epi32(0x3f800000), 0xea);  // (a & b) | c
    return load<Floats>(&v);
#else
    return as_floats((at & 0x780000u) | 0x3f800000u);
#endif
  }
};

/// Scales and minima of 32 lanes for a block of int4: w = scale * (v - 1) + minimum, where v is
/// what step() gives.
struct Int4Block {
  static constexpr std::int64_t kSteps = kInt4Block, kHeader = 64;
  CLEAVE_INLINE Int4Block(const char* header, const float* unit) {
    for (int half = 0; half < 2; ++half) {
      scale[half] = to_floats(from_unsigned_bytes(header + 16 * half)) * splat(16.0f * unit[0]);
      offset[half] =
          to_floats(from_unsigned_bytes(header + 32 + 16 * half)) * splat(unit[1]) - scale[half];
    }
  }
  Floats scale[2], offset[2];  ///< w = scale * v + offset
};

}  // namespace
}  // namespace cleave::CLEAVE_ISA
