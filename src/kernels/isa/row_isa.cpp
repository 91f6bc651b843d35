// Softmax by blocks and the search for the largest logit, in GCC's and Clang's vector extensions;
// see panel_isa.cpp.

#include "kernels/isa/row_isa.h"

#include <cstring>

namespace cleave::CLEAVE_ISA {
namespace {

typedef float Row16 __attribute__((vector_size(64)));
typedef std::int32_t Mask16 __attribute__((vector_size(64)));
typedef std::uint32_t Bits16 __attribute__((vector_size(64)));
typedef float Row8 __attribute__((vector_size(32)));
typedef std::int32_t Mask8 __attribute__((vector_size(32)));
typedef float Row4 __attribute__((vector_size(16)));
typedef std::int32_t Mask4 __attribute__((vector_size(16)));

#define CLEAVE_ROW_INLINE inline __attribute__((always_inline))

constexpr std::int64_t kLanes = 16;
constexpr float kInfinity = __builtin_inff();

template <typename To, typename From>
CLEAVE_ROW_INLINE To bits_of(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
CLEAVE_ROW_INLINE Row16 load16(const float* from) {
  Row16 v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
CLEAVE_ROW_INLINE void store16(const Row16& v, float* to) { std::memcpy(to, &v, sizeof v); }
CLEAVE_ROW_INLINE Row16 all16(float v) {
  return Row16{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
}
CLEAVE_ROW_INLINE Row16 choose(const Mask16& mask, const Row16& yes, const Row16& no) {
  const auto m = bits_of<Bits16>(mask);
  return bits_of<Row16>((bits_of<Bits16>(yes) & m) | (bits_of<Bits16>(no) & ~m));
}

/// The lanes from n on become `rest`.
CLEAVE_ROW_INLINE Row16 first_lanes(const Row16& v, std::int64_t n, float rest) {
  constexpr Mask16 kIndex = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return choose(kIndex < static_cast<std::int32_t>(n), v, all16(rest));
}

// Lanes are joined in halves: three operations of narrower vectors, not fifteen of floats.
CLEAVE_ROW_INLINE float sum_of_lanes(const Row16& v) {
  Row8 a[2];
  std::memcpy(a, &v, sizeof a);
  a[0] += a[1];
  Row4 b[2];
  std::memcpy(b, a, sizeof b);
  b[0] += b[1];
  return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}
CLEAVE_ROW_INLINE float largest_of_lanes(const Row16& v) {
  Row8 a[2];
  std::memcpy(a, &v, sizeof a);
  const Row8 eight = a[0] > a[1] ? a[0] : a[1];
  Row4 b[2];
  std::memcpy(b, &eight, sizeof b);
  const Row4 four = b[0] > b[1] ? b[0] : b[1];
  const float left = four[0] > four[1] ? four[0] : four[1];
  const float right = four[2] > four[3] ? four[2] : four[3];
  return left > right ? left : right;
}

/// exp(x) for x <= 0; relative error below 2e-7. Below -87 it is 0, NaN stays NaN. The polynomial
/// is Cephes'.
CLEAVE_ROW_INLINE Row16 exp_of_negative(const Row16& in) {
  constexpr float kSmallest = -87.0f;
  const Row16 x = choose(in < kSmallest, all16(kSmallest), in);
  const Row16 biased = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Row16 n = biased - 12582912.0f;
  const Row16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Row16 p = all16(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const auto power = bits_of<Row16>((bits_of<Bits16>(biased) + 127u) << 23);
  return choose(in < kSmallest, Row16{}, p * power);
}

float softmax_block(float* scores, std::int64_t n, SoftmaxState* state) {
  const std::int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  if (padded > n)
    store16(first_lanes(load16(scores + padded - kLanes), n + kLanes - padded, -kInfinity),
            scores + padded - kLanes);
  Row16 most = all16(state->largest);
  for (std::int64_t i = 0; i < padded; i += kLanes) {
    const Row16 v = load16(scores + i);
    most = choose(v > most, v, most);
  }
  const float largest = largest_of_lanes(most);
  if (largest == -kInfinity) {  // nothing was seen yet: the differences below would be NaN
    for (std::int64_t i = 0; i < padded; i += kLanes) {
      const Row16 v = load16(scores + i);
      store16(choose(v == -kInfinity, Row16{}, v), scores + i);  // NaN is passed on
    }
    return 1.0f;
  }
  Row16 sum = {};
  for (std::int64_t i = 0; i < padded; i += kLanes) {
    const Row16 e = exp_of_negative(load16(scores + i) - largest);
    sum += e;
    store16(e, scores + i);
  }
  const float factor = exp_of_negative(all16(state->largest - largest))[0];
  state->sum = state->sum * factor + sum_of_lanes(sum);
  state->largest = largest;
  return factor;
}

void add_scaled(float a, const float* x, float* y, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store16(load16(y + i) + load16(x + i) * a, y + i);
  for (; i < n; ++i) y[i] += a * x[i];
}

std::int64_t largest(const float* row, std::int64_t n) {
  constexpr std::int64_t kChains = 4;
  Row16 most[kChains];
  for (Row16& m : most) m = all16(-kInfinity);
  Mask16 bad = {};
  std::int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (std::int64_t c = 0; c < kChains; ++c) {
      const Row16 v = load16(row + i + c * kLanes);
      bad |= ~(v < kInfinity);
      most[c] = choose(v > most[c], v, most[c]);
    }
  for (std::int64_t c = 1; c < kChains; ++c) most[0] = choose(most[c] > most[0], most[c], most[0]);
  float best = largest_of_lanes(most[0]);
  for (std::int64_t lane = 0; lane < kLanes; ++lane)
    if (bad[lane] != 0) return -1;
  for (; i < n; ++i) {
    if (!(row[i] < kInfinity)) return -1;
    if (row[i] > best) best = row[i];
  }
  for (std::int64_t at = 0; at < n; ++at)
    if (row[at] == best) return at;
  return -1;
}

constexpr RowKernels kRowKernels = {softmax_block, add_scaled, largest};

}  // namespace

const RowKernels& row_kernels() { return kRowKernels; }

}  // namespace cleave::CLEAVE_ISA
