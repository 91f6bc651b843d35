// Products with packed weights for one instruction set. Written once, in GCC's and Clang's vector
// extensions: a vector of 16 floats is one register with AVX-512, two with AVX2, four with NEON
// (wide.h).
// Built per set in namespace cleave::CLEAVE_ISA (cmake/isa.cmake).

#include "kernels/isa/panel_isa.h"

#include <cmath>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(CLEAVE_NEON)
#include <arm_neon.h>
#endif

#include "kernels/isa/wide.h"

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

// ---- formats: step s of a group of steps, to two vectors of weights ---------------------------
//
// kGroup steps lie together in kGroupBytes (at least a whole number of cache lines per two steps,
// so that a step's index within a group is a constant after unrolling).

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

// ---- the product ------------------------------------------------------------------------------

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
  const char* prefetch = product.prefetch != nullptr ? product.prefetch : panel;
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 1 : 0;
  for (std::int64_t i = 0; i < product.panels; ++i, panel += product.panel_bytes) {
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

// ---- int4 with one row: whole numbers ----------------------------------------------------------

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

constexpr std::int64_t kShortSteps = 32;

template <int kRows>
CLEAVE_INLINE void tile_rows(const TileProduct& product, int first_row) {
  const float* w = product.panel;
  float* const* y = product.y + first_row;
  const char* prefetch =
      product.prefetch != nullptr ? product.prefetch : reinterpret_cast<const char*>(w);
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 64 : 0;
  for (std::int64_t i = 0; i < product.panels; ++i) {
    const float* x = product.x + first_row * kTileStride;
    const std::int64_t column = i * kPanelWidth;
    // A long sum is added to y at its end, which rounds less than going on from y; a short one
    // begins with y, which costs no addition of its own.
    const bool add_first = product.add && product.steps <= kShortSteps;
    const bool add_last = product.add && !add_first;
    Floats sum[kRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half)
        sum[r][half] = add_first ? load<Floats>(y[r] + column + 16 * half) : Floats{};
    const auto step = [&](std::int64_t s) __attribute__((always_inline)) {
      const Floats w0 = load<Floats>(w + s * kPanelWidth);
      const Floats w1 = load<Floats>(w + s * kPanelWidth + 16);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Floats value = splat(x[r * kTileStride + s]);
        sum[r][0] += value * w0;
        sum[r][1] += value * w1;
      }
    };
    // One line at a time: a burst would wait for the few that a core can have on their way.
    std::int64_t left = product.steps;
    for (; left >= 2; left -= 2, w += 2 * kPanelWidth, x += 2) {
      __builtin_prefetch(prefetch, 0, 2);
      prefetch += prefetch_stride;
      step(0);
      step(1);
    }
    if (left > 0) {
      step(0);
      w += kPanelWidth;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half) {
        float* to = y[r] + column + 16 * half;
        if (add_last) sum[r][half] += load<Floats>(to);
        store(sum[r][half], to);
      }
  }
}

// Three rows leave NEON no register for the four of a weight vector.
template <int kRows>
constexpr int kTilePart = kRows % 3 == 0 && kParts < 4 ? 3 : 2;

template <int kRows>
void multiply_tile(const TileProduct& product) {
  if constexpr (kRows <= kRegisterRows)
    tile_rows<kRows>(product, 0);
  else
    for (int r = 0; r < kRows; r += kTilePart<kRows>) tile_rows<kTilePart<kRows>>(product, r);
}

/// sum += a * b. In so many words, because the compiler, free to choose between three forms of the
/// instruction, otherwise moves sums from register to register and into memory.
CLEAVE_INLINE void multiply_add(Floats& sum, const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum += a * b;
#endif
}

/// Vectors [first_vector, first_vector + kVectors) of the 32 or 64 lanes, rows [first_row,
/// first_row + kRows).
template <int kRows, int kVectors>
CLEAVE_INLINE void block_part(const BlockProduct& product, int first_row, int first_vector) {
  // Vectors 0, 1 are of the first panel, 2, 3 of the second.
  const float* w[kVectors];
  for (int v = 0; v < kVectors; ++v)
    w[v] = product.panel + (first_vector + v) / 2 * product.steps * kPanelWidth +
           (first_vector + v) % 2 * 16;
  const float* x[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) x[r] = product.x[first_row + r];
  const char* prefetch =
      product.prefetch != nullptr ? product.prefetch : reinterpret_cast<const char*>(product.panel);
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 64 : 0;
  Floats sum[kRows][kVectors] = {};
  const auto step = [&](std::int64_t s) __attribute__((always_inline)) {
    Floats weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = load<Floats>(w[v] + s * kPanelWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats value = splat(x[r][s]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) multiply_add(sum[r][v], value, weights[v]);
    }
  };
  // One line at a time: a burst would wait for the few that a core can have on their way.
  std::int64_t s = 0;
  for (; s + 2 <= product.steps; s += 2) {
    __builtin_prefetch(prefetch, 0, 2);
    prefetch += prefetch_stride;
    step(s);
    step(s + 1);
  }
  if (s < product.steps) step(s);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = product.y[first_row + r] + (first_vector + v) / 2 * product.panel_offset +
                  (first_vector + v) % 2 * 16;
      if (product.add) sum[r][v] += load<Floats>(to);
      store(sum[r][v], to);
    }
}

template <int kRows, int kPanels>
void multiply_block(const BlockProduct& product) {
#if defined(__AVX512F__)
  block_part<kRows, 2 * kPanels>(product, 0, 0);
#else
  // Registers for one vector of 16 floats and six rows, with NEON five.
  constexpr int kPart = kRows > (kParts < 4 ? 6 : 5) ? 4 : kRows;
  for (int v = 0; v < 2 * kPanels; ++v) {
    block_part<kPart, 1>(product, 0, v);
    if constexpr (kRows > kPart) block_part<kRows - kPart, 1>(product, kPart, v);
  }
#endif
}

#if defined(__AVX512F__)
template <typename Format>
void unpack_and_multiply(const UnpackProduct& product) {
  constexpr int kRows = kPairRows;
  const float* x[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) x[r] = product.x[r];
  const char* prefetch = product.prefetch != nullptr
                             ? product.prefetch
                             : reinterpret_cast<const char*>(product.unpacked);
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 64 : 0;
  const auto* p0 = static_cast<const char*>(product.panel[0]);
  const auto* p1 = static_cast<const char*>(product.panel[1]);
  float* out0 = product.unpacked;
  float* out1 = out0 + product.pieces * product.piece_steps * kPanelWidth;
  Floats sum[kRows][4] = {};
  std::int64_t at = 0;  // step of x
  const auto step = [&](std::int64_t s, std::int64_t k) __attribute__((always_inline)) {
    Floats w[4];
    const std::int64_t group = (s + k) / Format::kGroup * Format::kGroupBytes;
    Format::step(p0 + group, k % Format::kGroup, w[0], w[1]);
    Format::step(p1 + group, k % Format::kGroup, w[2], w[3]);
    store(w[0], out0 + k * kPanelWidth);
    store(w[1], out0 + k * kPanelWidth + 16);
    store(w[2], out1 + k * kPanelWidth);
    store(w[3], out1 + k * kPanelWidth + 16);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats value = splat(x[r][at + k]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) multiply_add(sum[r][v], value, w[v]);
    }
  };
  const auto advance = [&](std::int64_t steps) __attribute__((always_inline)) {
    at += steps;
    out0 += steps * kPanelWidth;
    out1 += steps * kPanelWidth;
  };
  for (std::int64_t i = 0; i < product.pieces; ++i) {
    std::int64_t s = 0;
    for (; s + 2 <= product.piece_steps; s += 2) {
      __builtin_prefetch(prefetch, 0, 2);
      prefetch += prefetch_stride;
      step(s, 0);
      step(s, 1);
      advance(2);
    }
    if (s < product.piece_steps) {
      step(s, 0);
      advance(1);
    }
    p0 += product.piece_stride;
    p1 += product.piece_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      float* to = product.y[r] + v / 2 * product.panel_offset + v % 2 * 16;
      if (product.add) sum[r][v] += load<Floats>(to);
      store(sum[r][v], to);
    }
}
#define CLEAVE_UNPACK_AND_MULTIPLY(format) unpack_and_multiply<format>
#else
// Too few registers for it to pay.
#define CLEAVE_UNPACK_AND_MULTIPLY(format) nullptr
#endif

template <typename Format>
void unpack(const void* panel_in, std::int64_t steps, const float* scales, float* out) {
  const auto* panel = static_cast<const char*>(panel_in);
  constexpr std::int64_t kBlock = std::is_same_v<Format, Int4> ? Int4Block::kSteps : 1 << 30;
  for (std::int64_t begin = 0; begin < steps; begin += kBlock) {
    const std::int64_t end = begin + kBlock < steps ? begin + kBlock : steps;
    Floats scale[2] = {splat(1.0f), splat(1.0f)}, offset[2] = {};
    if constexpr (std::is_same_v<Format, Int4>) {
      const Int4Block block(panel, scales);
      panel += Int4Block::kHeader;
      for (int half = 0; half < 2; ++half) {
        scale[half] = block.scale[half];
        offset[half] = block.offset[half];
      }
    } else if constexpr (std::is_same_v<Format, Int8>) {
      for (int half = 0; half < 2; ++half) scale[half] = load<Floats>(scales + 16 * half);
    }
    for (std::int64_t group = begin; group < end; group += Format::kGroup) {
      __builtin_prefetch(panel + 1024, 0, 3);
#pragma GCC unroll 8
      for (std::int64_t s = 0; s < Format::kGroup; ++s) {
        if (group + s >= end) break;
        Floats w[2];
        Format::step(panel, s, w[0], w[1]);
        for (int half = 0; half < 2; ++half) {
          if constexpr (std::is_same_v<Format, Int4> || std::is_same_v<Format, Int8>)
            w[half] = w[half] * scale[half] + offset[half];
          store(w[half], out + (group + s) * kPanelWidth + 16 * half);
        }
      }
      panel += Format::kGroupBytes;
    }
  }
}

// ---- activations ------------------------------------------------------------------------------

CLEAVE_INLINE Floats clamp(const Floats& x, float low, float high) {
  const Floats l = splat(low), h = splat(high);
  const Floats above = select(x < l, l, x);
  return select(above > h, h, above);
}

/// exp, relative error below 2e-7: x = n ln 2 + r, |r| <= ln 2 / 2, a polynomial in r (Cephes'
/// coefficients), and n into the exponent. NaN stays NaN.
CLEAVE_INLINE Floats exp(const Floats& in) {
  const Floats x = clamp(in, -87.3f, 88.3f);
  const Floats biased = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Floats n = biased - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * as_floats((as_words(biased) + 127u) << 23);
}

CLEAVE_INLINE Floats act(Activation activation, const Floats& x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0f + exp(-x));
    case Activation::kGelu: {
      float y[16];
      store(x, y);
      for (float& v : y) v = 0.5f * v * (1.0f + ::erff(v * 0.70710678f));
      return load<Floats>(y);
    }
    case Activation::kGeluTanh:  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
      return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu:
      return select(x > Floats{}, x, Floats{});
    case Activation::kRelu2: {
      const Floats positive = select(x > Floats{}, x, Floats{});
      return positive * positive;
    }
    case Activation::kIdentity:
      break;
  }
  return x;
}

void activate(Activation activation, bool gated, std::int64_t rows, const float* in,
              const float* weight, const float* step_scale, float* h, std::int64_t stride) {
  for (std::int64_t r = 0; r < rows; ++r, in += kPanelWidth, h += stride) {
    const Floats first = load<Floats>(in), second = load<Floats>(in + 16);
    const Floats scale = splat(weight[r]);
    Floats out[2] = {act(activation, first) * scale, {}};
    if (gated)
      out[0] *= second;
    else
      out[1] = act(activation, second) * scale;
    for (int half = 0; half < (gated ? 1 : 2); ++half) {
      if (step_scale != nullptr) out[half] *= load<Floats>(step_scale + half * 16);
      store(out[half], h + half * 16);
    }
  }
}

template <bool kVnni>
constexpr PanelKernels kPanels = {
    {
        {multiply<F32, 1>, multiply<F32, 2>, multiply<F32, 4>, multiply<F32, 8>},
        {multiply<BF16, 1>, multiply<BF16, 2>, multiply<BF16, 4>, multiply<BF16, 8>},
        {multiply<F16, 1>, multiply<F16, 2>, multiply<F16, 4>, multiply<F16, 8>},
        {multiply<Int8, 1>, multiply<Int8, 2>, multiply<Int8, 4>, nullptr},
        {multiply_int4<kVnni>, multiply<Int4, 2>, multiply<Int4, 4>, nullptr},
    },
    prepare,
    {multiply_tile<4>, multiply_tile<8>, multiply_tile<12>},
    {multiply_block<1, 1>, multiply_block<2, 1>, multiply_block<3, 1>, multiply_block<4, 1>,
     multiply_block<5, 1>, multiply_block<6, 1>, multiply_block<7, 1>, multiply_block<8, 1>},
    {multiply_block<1, 2>, multiply_block<2, 2>, multiply_block<3, 2>, multiply_block<4, 2>,
     multiply_block<5, 2>, multiply_block<6, 2>},
    {nullptr, CLEAVE_UNPACK_AND_MULTIPLY(BF16), CLEAVE_UNPACK_AND_MULTIPLY(F16), nullptr, nullptr},
    {unpack<F32>, unpack<BF16>, unpack<F16>, unpack<Int8>, unpack<Int4>},
    activate,
};

}  // namespace

const PanelKernels& panel_kernels() { return kPanels<false>; }
#if defined(__AVX512BW__)
const PanelKernels& vnni_panel_kernels() { return kPanels<true>; }
#endif

}  // namespace cleave::CLEAVE_ISA
