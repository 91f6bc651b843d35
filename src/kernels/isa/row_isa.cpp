// Softmax by blocks and the search for the largest logit, in GCC's and Clang's vector extensions;
// see wide.h.

#include "kernels/isa/row_isa.h"

#include "kernels/isa/wide.h"

namespace cleave::CLEAVE_ISA {
namespace {

typedef float Quarter __attribute__((vector_size(16)));
constexpr std::int64_t kLanes = 16;
constexpr float kInfinity = __builtin_inff();

constexpr float kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/// The lanes from n on become `rest`.
CLEAVE_INLINE Floats first_lanes(const Floats& v, std::int64_t n, float rest) {
  return select(load<Floats>(kLaneNumbers) < splat(static_cast<float>(n)), v, splat(rest));
}

// Lanes are joined in halves: a few operations of narrower vectors, not fifteen of floats.
CLEAVE_INLINE float sum_of_lanes(const Floats& v) {
  Quarter q[4];
  store(v, q);
  const Quarter four = (q[0] + q[2]) + (q[1] + q[3]);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
CLEAVE_INLINE float largest_of_lanes(const Floats& v) {
  Quarter q[4];
  store(v, q);
  const Quarter a = q[0] > q[2] ? q[0] : q[2], b = q[1] > q[3] ? q[1] : q[3];
  const Quarter four = a > b ? a : b;
  const float left = four[0] > four[1] ? four[0] : four[1];
  const float right = four[2] > four[3] ? four[2] : four[3];
  return left > right ? left : right;
}

/// exp(x) for x <= 0. Below -87 it is 0, NaN stays NaN.
CLEAVE_INLINE Floats exp_of_negative(const Floats& in) {
  constexpr float kSmallest = -87.0f;
  const Floats x = select(in < splat(kSmallest), splat(kSmallest), in);
  return select(in < splat(kSmallest), Floats{}, exp_in_range(x));
}

float softmax_block(float* scores, std::int64_t n, SoftmaxState* state) {
  const std::int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  if (padded > n)
    store(first_lanes(load<Floats>(scores + padded - kLanes), n + kLanes - padded, -kInfinity),
          scores + padded - kLanes);
  Floats most = splat(state->largest);
  for (std::int64_t i = 0; i < padded; i += kLanes) {
    const Floats v = load<Floats>(scores + i);
    most = select(v > most, v, most);
  }
  const float largest = largest_of_lanes(most);
  if (largest == -kInfinity) {  // nothing was seen yet: the differences below would be NaN
    for (std::int64_t i = 0; i < padded; i += kLanes) {
      const Floats v = load<Floats>(scores + i);
      store(select(v == splat(-kInfinity), Floats{}, v), scores + i);  // NaN is passed on
    }
    return 1.0f;
  }
  Floats sum = {};
  for (std::int64_t i = 0; i < padded; i += kLanes) {
    const Floats e = exp_of_negative(load<Floats>(scores + i) - largest);
    sum += e;
    store(e, scores + i);
  }
  const float factor = exp_of_negative(splat(state->largest - largest))[0];
  state->sum = state->sum * factor + sum_of_lanes(sum);
  state->largest = largest;
  return factor;
}

void add_scaled(float a, const float* x, float* y, std::int64_t n) {
  std::int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(load<Floats>(y + i) + load<Floats>(x + i) * a, y + i);
  for (; i < n; ++i) y[i] += a * x[i];
}

void add_rows(const float* x, std::int64_t x_stride, float* y, std::int64_t y_stride,
              std::int64_t rows, std::int64_t n) {
  for (std::int64_t r = 0; r < rows; ++r, x += x_stride, y += y_stride) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(load<Floats>(y + i) + load<Floats>(x + i), y + i);
    for (; i < n; ++i) y[i] += x[i];
  }
}

std::int64_t largest(const float* row, std::int64_t n) {
  constexpr std::int64_t kChains = 4;
  Floats most[kChains];
  for (Floats& m : most) m = splat(-kInfinity);
  Ints bad = {};
  std::int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (std::int64_t c = 0; c < kChains; ++c) {
      const Floats v = load<Floats>(row + i + c * kLanes);
      bad = bad | ~(v < splat(kInfinity));
      most[c] = select(v > most[c], v, most[c]);
    }
  for (std::int64_t c = 1; c < kChains; ++c) most[0] = select(most[c] > most[0], most[c], most[0]);
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

/// Ranks of up to kVectors * 16 numbers, which stay in registers.
template <int kVectors>
bool rank_few(const float* row, std::int64_t n, std::int32_t* rank) {
  float padded[kVectors * kLanes] = {};
  std::memcpy(padded, row, static_cast<std::size_t>(n) * sizeof(float));
  Floats own[kVectors];
  Ints count[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) own[v] = load<Floats>(padded + v * kLanes);
  for (std::int64_t other = 0; other < n; ++other) {
    const Floats value = splat(padded[other]);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) count[v] = add_one_where(value > own[v], count[v]);
  }
  std::int32_t counts[kVectors * kLanes];
  for (int v = 0; v < kVectors; ++v) store(count[v], counts + v * kLanes);
  std::memcpy(rank, counts, static_cast<std::size_t>(n) * sizeof(std::int32_t));
  // Of different numbers the ranks are 0 to n - 1; equal ones make some smaller.
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < n; ++i) sum += counts[i];
  return sum == n * (n - 1) / 2;
}

bool rank(const float* row, std::int64_t n, std::int32_t* out) {
  static_assert(kMostRanked == 8 * kLanes);
  constexpr bool (*kRank[])(const float*, std::int64_t, std::int32_t*) = {
      rank_few<1>, rank_few<2>, rank_few<3>, rank_few<4>,
      rank_few<5>, rank_few<6>, rank_few<7>, rank_few<8>};
  return n == 0 || kRank[(n - 1) / kLanes](row, n, out);
}

constexpr RowKernels kRowKernels = {softmax_block, add_scaled, add_rows, largest, rank};

}  // namespace

const RowKernels& row_kernels() { return kRowKernels; }

}  // namespace cleave::CLEAVE_ISA
