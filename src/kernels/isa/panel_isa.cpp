// Products with packed weights for one instruction set. Written once, in GCC's and Clang's vector
// extensions: a vector of 16 floats is one register with AVX-512, two with AVX2, four with NEON.
// Built per set in namespace cleave::CLEAVE_ISA (cmake/isa.cmake).

#include "kernels/isa/panel_isa.h"

#include <cmath>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace cleave::CLEAVE_ISA {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::int8_t Bytes __attribute__((vector_size(16)));
typedef std::uint8_t UnsignedBytes __attribute__((vector_size(16)));
typedef std::uint16_t Halves __attribute__((vector_size(32)));

#define CLEAVE_INLINE inline __attribute__((always_inline))

// Accumulators that fit the register file: 2 vectors of 16 floats per row of x, beside two weights.
#if defined(__AVX512F__)
constexpr int kRegisterRows = 12;
#else
constexpr int kRegisterRows = 3;
#endif

template <typename Vector>
CLEAVE_INLINE Vector load(const void* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

CLEAVE_INLINE void store(const Floats& v, float* to) { std::memcpy(to, &v, sizeof v); }
CLEAVE_INLINE Floats splat(float v) {
  return Floats{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
}
CLEAVE_INLINE Floats as_floats(const Words& w) {
  Floats f;
  std::memcpy(&f, &w, sizeof f);
  return f;
}
CLEAVE_INLINE Words as_words(const Floats& f) {
  Words w;
  std::memcpy(&w, &f, sizeof w);
  return w;
}

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
#else
  const Halves halves = load<Halves>(from);
  Floats out;
  for (int i = 0; i < 16; ++i) out[i] = half_to_float(halves[i]);
  return out;
#endif
}

CLEAVE_INLINE Floats from_bytes(const void* from) {
#if defined(__AVX512F__)
  const __m512 wide = _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
  return load<Floats>(&wide);
#else
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
}

CLEAVE_INLINE Ints from_unsigned_bytes(const void* from) {
#if defined(__AVX512F__)
  const __m512i wide =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from)));
  return load<Ints>(&wide);
#else
  return __builtin_convertvector(load<UnsignedBytes>(from), Ints);
#endif
}

// ---- formats: step(s) of a block to two vectors of weights ------------------------------------
//
// kSteps: steps that one load of kBytes serves. kBlockSteps: steps between two block headers (0: none).
// A format object is made per block, and reads the header.

struct F32 {
  static constexpr std::int64_t kSteps = 1, kBlockSteps = 0, kBytes = 128;
  static constexpr bool kScaledLanes = false;
  static CLEAVE_INLINE const char* at(const char* panel, std::int64_t step) {
    return panel + step * 128;
  }
  CLEAVE_INLINE explicit F32(const char*) {}
  CLEAVE_INLINE void weights(const char* p, Floats (&w)[1][2]) const {
    w[0][0] = load<Floats>(p);
    w[0][1] = load<Floats>(p + 64);
  }
};

// Pairs of steps side by side in one 32-bit lane, the layout of the bfloat16 dot-product
// instructions.
struct BF16 {
  static constexpr std::int64_t kSteps = 2, kBlockSteps = 0, kBytes = 128;
  static constexpr bool kScaledLanes = false;
  static CLEAVE_INLINE const char* at(const char* panel, std::int64_t step) {
    return panel + step * 64;
  }
  CLEAVE_INLINE explicit BF16(const char*) {}
  CLEAVE_INLINE void weights(const char* p, Floats (&w)[2][2]) const {
    const Words a = load<Words>(p), b = load<Words>(p + 64);
    w[0][0] = as_floats(a << 16);
    w[0][1] = as_floats(b << 16);
    w[1][0] = as_floats(a & 0xffff0000u);
    w[1][1] = as_floats(b & 0xffff0000u);
  }
};

struct F16 {
  static constexpr std::int64_t kSteps = 1, kBlockSteps = 0, kBytes = 64;
  static constexpr bool kScaledLanes = false;
  static CLEAVE_INLINE const char* at(const char* panel, std::int64_t step) {
    return panel + step * 64;
  }
  CLEAVE_INLINE explicit F16(const char*) {}
  CLEAVE_INLINE void weights(const char* p, Floats (&w)[1][2]) const {
    w[0][0] = from_halves(p);
    w[0][1] = from_halves(p + 32);
  }
};

struct Int8Steps {
  static constexpr std::int64_t kSteps = 1, kBlockSteps = 0, kBytes = 32;
  static constexpr bool kScaledLanes = false;
  static CLEAVE_INLINE const char* at(const char* panel, std::int64_t step) {
    return panel + step * 32;
  }
  CLEAVE_INLINE explicit Int8Steps(const char*) {}
  CLEAVE_INLINE void weights(const char* p, Floats (&w)[1][2]) const {
    w[0][0] = from_bytes(p);
    w[0][1] = from_bytes(p + 16);
  }
};

// [32 scales, float] [steps][32 bytes]
struct Int8 : Int8Steps {
  static constexpr bool kScaledLanes = true;
  static CLEAVE_INLINE const char* at(const char* panel, std::int64_t step) {
    return panel + 128 + step * 32;
  }
  using Int8Steps::Int8Steps;
};

// Per block of 32 steps: [32 scales, half] [32 minima, half] [32 steps][16 bytes]; the low half of
// a byte is lane i, the high half lane 16 + i.
struct Int4 {
  static constexpr std::int64_t kSteps = 1, kBlockSteps = 32, kBytes = 16;
  static constexpr bool kScaledLanes = false;
  static constexpr std::int64_t kHeader = 128, kBlockBytes = kHeader + 32 * 16;
  static CLEAVE_INLINE const char* at(const char* panel, std::int64_t step) {
    return panel + step / 32 * kBlockBytes + kHeader + step % 32 * 16;
  }
  CLEAVE_INLINE explicit Int4(const char* block) {
    scale_[0] = from_halves(block - kHeader);
    scale_[1] = from_halves(block - kHeader + 32);
    minimum_[0] = from_halves(block - kHeader + 64);
    minimum_[1] = from_halves(block - kHeader + 96);
  }
  CLEAVE_INLINE void weights(const char* p, Floats (&w)[1][2]) const {
    const Ints both = from_unsigned_bytes(p);
    w[0][0] = __builtin_convertvector(both & 15, Floats) * scale_[0] + minimum_[0];
    w[0][1] = __builtin_convertvector(both >> 4, Floats) * scale_[1] + minimum_[1];
  }
  Floats scale_[2], minimum_[2];
};

// Per step: [scale, float] [minimum, float] ... kept together for 16 steps, so that every part is
// aligned: [16 scales][16 minima] [16 steps][16 bytes].
struct Int4Steps {
  static constexpr std::int64_t kSteps = 1, kBlockSteps = 16, kBytes = 16;
  static constexpr bool kScaledLanes = false;
  static constexpr std::int64_t kHeader = 64, kBlockBytes = kHeader + 16 * 16;
  static CLEAVE_INLINE const char* at(const char* panel, std::int64_t step) {
    return panel + step / 16 * kBlockBytes + kHeader + step % 16 * 16;
  }
  CLEAVE_INLINE explicit Int4Steps(const char* block) : first_(block) {
    store(from_halves(block - kHeader), scale_);
    store(from_halves(block - kHeader + 32), minimum_);
  }
  CLEAVE_INLINE void weights(const char* p, Floats (&w)[1][2]) const {
    const std::int64_t step = (p - first_) / 16;
    const Ints both = from_unsigned_bytes(p);
    w[0][0] = __builtin_convertvector(both & 15, Floats) * scale_[step] + minimum_[step];
    w[0][1] = __builtin_convertvector(both >> 4, Floats) * scale_[step] + minimum_[step];
  }
  const char* first_;
  float scale_[16], minimum_[16];
};

// ---- the product ------------------------------------------------------------------------------

template <typename Format, int kRows>
CLEAVE_INLINE void accumulate(const char* p, const Format& format, const float* const* x,
                              std::int64_t step, std::int64_t use, Floats (&sum)[kRows][2]) {
  Floats w[Format::kSteps][2];
  format.weights(p, w);
  for (std::int64_t s = 0; s < use; ++s)
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Floats value = splat(x[r][step + s]);
      sum[r][0] += value * w[s][0];
      sum[r][1] += value * w[s][1];
    }
}

template <typename Format, int kRows>
void multiply_rows(const PanelProduct& product, int first_row) {
  const float* x[kRows];
  for (int r = 0; r < kRows; ++r) x[r] = product.x[first_row + r];
  // A sum that waits for its predecessor's addition takes 4 cycles; few rows take turns between
  // several sums.
  constexpr int kChains = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  constexpr std::int64_t kStride = Format::kSteps * kChains;
  const std::int64_t steps = product.steps;
  const std::int64_t block = Format::kBlockSteps > 0 ? Format::kBlockSteps : steps;
  // Without a target the same line is asked for again and again, which costs next to nothing.
  const auto* panel = static_cast<const char*>(product.panel);
  const char* prefetch = product.prefetch != nullptr ? product.prefetch : panel;
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 64 * kStride : 0;
  for (std::int64_t i = 0; i < product.panels; ++i, panel += product.panel_bytes) {
    Floats sums[kChains][kRows][2] = {};
    Floats(&sum)[kRows][2] = sums[0];
    for (std::int64_t begin = 0; begin < steps; begin += block) {
      const std::int64_t end = begin + block < steps ? begin + block : steps;
      const char* p = Format::at(panel, begin);
      const Format format(p);
      const std::int64_t whole = begin + (end - begin) / kStride * kStride;
      std::int64_t step = begin;
      for (; step < whole; step += kStride) {
        __builtin_prefetch(prefetch, 0, 2);
        prefetch += prefetch_stride;
#pragma GCC unroll 4
        for (int c = 0; c < kChains; ++c) {
          accumulate<Format, kRows>(p, format, x, step + c * Format::kSteps, Format::kSteps,
                                    sums[c]);
          p += Format::kBytes;
        }
      }
      for (; step < end; step += Format::kSteps) {
        const std::int64_t use = end - step < Format::kSteps ? end - step : Format::kSteps;
        accumulate<Format, kRows>(p, format, x, step, use, sum);
        p += Format::kBytes;
      }
    }
    for (int c = 1; c < kChains; ++c)
      for (int r = 0; r < kRows; ++r) {
        sum[r][0] += sums[c][r][0];
        sum[r][1] += sums[c][r][1];
      }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      float* y = product.y[first_row + r] + i * kPanelWidth;
      if constexpr (Format::kScaledLanes) {
        sum[r][0] *= load<Floats>(panel);
        sum[r][1] *= load<Floats>(panel + 64);
      }
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
    multiply_rows<Format, kRows>(product, 0);
  } else {
    constexpr int kPart = kRows % kRegisterRows == 0 ? kRegisterRows : 2;
    static_assert(kRows % kPart == 0);
    for (int r = 0; r < kRows; r += kPart) multiply_rows<Format, kPart>(product, r);
  }
}

template <typename Format>
void unpack(const void* panel_in, std::int64_t steps, float* out) {
  const auto* panel = static_cast<const char*>(panel_in);
  const std::int64_t block = Format::kBlockSteps > 0 ? Format::kBlockSteps : steps;
  Floats lane_scale[2] = {splat(1.0f), splat(1.0f)};
  if constexpr (Format::kScaledLanes) {
    lane_scale[0] = load<Floats>(panel);
    lane_scale[1] = load<Floats>(panel + 64);
  }
  for (std::int64_t begin = 0; begin < steps; begin += block) {
    const std::int64_t end = begin + block < steps ? begin + block : steps;
    const char* p = Format::at(panel, begin);
    const Format format(p);
    for (std::int64_t step = begin; step < end; step += Format::kSteps) {
      Floats w[Format::kSteps][2];
      format.weights(p, w);
      p += Format::kBytes;
      for (std::int64_t s = 0; s < Format::kSteps && step + s < end; ++s)
        for (int half = 0; half < 2; ++half) {
          if constexpr (Format::kScaledLanes) w[s][half] *= lane_scale[half];
          store(w[s][half], out + (step + s) * kPanelWidth + half * 16);
        }
    }
  }
}

// ---- activations ------------------------------------------------------------------------------

CLEAVE_INLINE Floats select(const Ints& mask, const Floats& yes, const Floats& no) {
  const Words m = reinterpret_cast<const Words&>(mask);
  return as_floats((as_words(yes) & m) | (as_words(no) & ~m));
}
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
      Floats y;
      for (int i = 0; i < 16; ++i) y[i] = 0.5f * x[i] * (1.0f + ::erff(x[i] * 0.70710678f));
      return y;
    }
    case Activation::kGeluTanh:  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
      return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu:
      return select(x > 0.0f, x, Floats{});
    case Activation::kRelu2: {
      const Floats positive = select(x > 0.0f, x, Floats{});
      return positive * positive;
    }
    case Activation::kIdentity:
      break;
  }
  return x;
}

void activate(Activation activation, bool gated, std::int64_t rows, const float* const* in,
              const float* weight, const float* step_scale, float* const* h) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const Floats first = load<Floats>(in[r]), second = load<Floats>(in[r] + 16);
    const Floats scale = splat(weight[r]);
    Floats out[2] = {act(activation, first) * scale, {}};
    if (gated)
      out[0] *= second;
    else
      out[1] = act(activation, second) * scale;
    for (int half = 0; half < (gated ? 1 : 2); ++half) {
      if (step_scale != nullptr) out[half] *= load<Floats>(step_scale + half * 16);
      store(out[half], h[r] + half * 16);
    }
  }
}

constexpr PanelKernels kPanels = {
    {
        {multiply<F32, 1>, multiply<F32, 2>, multiply<F32, 4>, multiply<F32, 6>, multiply<F32, 8>,
         multiply<F32, 12>},
        {multiply<BF16, 1>, multiply<BF16, 2>, multiply<BF16, 4>, multiply<BF16, 6>,
         multiply<BF16, 8>, multiply<BF16, 12>},
        {multiply<F16, 1>, multiply<F16, 2>, multiply<F16, 4>, multiply<F16, 6>, multiply<F16, 8>,
         multiply<F16, 12>},
        {multiply<Int8, 1>, multiply<Int8, 2>, multiply<Int8, 4>},
        {multiply<Int4, 1>, multiply<Int4, 2>, multiply<Int4, 4>},
        {multiply<Int8Steps, 1>, multiply<Int8Steps, 2>, multiply<Int8Steps, 4>},
        {multiply<Int4Steps, 1>, multiply<Int4Steps, 2>, multiply<Int4Steps, 4>},
    },
    {unpack<F32>, unpack<BF16>, unpack<F16>, unpack<Int8>, unpack<Int4>, unpack<Int8Steps>,
     unpack<Int4Steps>},
    activate,
};

}  // namespace

const PanelKernels& panel_kernels() { return kPanels; }

}  // namespace cleave::CLEAVE_ISA
