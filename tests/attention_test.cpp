#include "attention.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/random_ffn.h"
#include "support/buffer.h"
#include "support/thread_pool.h"

namespace cleave {
namespace {

using namespace testing;

// The definition, in double, one query head at a time.
void attention_reference(const AttentionShape& s, MatrixView<const float> q,
                         MatrixView<const float> keys, MatrixView<const float> values,
                         MatrixView<float> out) {
  const std::int64_t d = s.head_dim, past = keys.rows - q.rows;
  for (std::int64_t t = 0; t < q.rows; ++t)
    for (std::int64_t h = 0; h < s.num_heads; ++h) {
      const std::int64_t kv = h / (s.num_heads / s.num_kv_heads), position = past + t;
      std::vector<double> sum(d, 0.0);
      double norm = 0.0;
      for (std::int64_t n = 0; n < (s.causal ? position + 1 : keys.rows); ++n) {
        if (s.sliding_window > 0 && position - n >= s.sliding_window) continue;
        double score = 0.0;
        for (std::int64_t i = 0; i < d; ++i) score += double{q(t, h * d + i)} * keys(n, kv * d + i);
        norm += std::exp(score);
        for (std::int64_t i = 0; i < d; ++i) sum[i] += std::exp(score) * values(n, kv * d + i);
      }
      for (std::int64_t i = 0; i < d; ++i) out(t, h * d + i) = static_cast<float>(sum[i] / norm);
    }
}

// Fills a cache in two steps, as a prompt and the tokens after it do, and runs the kernel. What
// lies beyond the tokens must not be used.
void attend(const AttentionShape& s, MatrixView<const float> q, MatrixView<const float> keys,
            MatrixView<const float> values, MatrixView<float> out, const ParallelFor& parallel) {
  const KvLayout layout{s.num_kv_heads, s.head_dim, keys.rows + 3};
  const Buffer cache(layout.size());
  std::fill_n(cache.data(), layout.size(), std::numeric_limits<float>::quiet_NaN());
  const std::int64_t past = keys.rows - q.rows;
  store_keys_and_values(layout, keys.slice_rows(0, past), values.slice_rows(0, past), 0,
                        cache.data());
  store_keys_and_values(layout, keys.slice_rows(past, q.rows), values.slice_rows(past, q.rows),
                        past, cache.data());
  Workspace workspace;
  attention(s, q, layout, cache.data(), keys.rows, out, workspace, parallel);
}

// Random operands; the last T of N tokens are queries.
void expect_definition(const AttentionShape& s, std::int64_t T, std::int64_t N, std::mt19937& rng,
                       const ParallelFor& parallel) {
  const OwnedMatrix q = random_matrix(rng, T, s.num_heads * s.head_dim);
  const OwnedMatrix k = random_matrix(rng, N, s.num_kv_heads * s.head_dim);
  const OwnedMatrix v = random_matrix(rng, N, s.num_kv_heads * s.head_dim);
  OwnedMatrix actual = random_matrix(rng, T, s.num_heads * s.head_dim), expected = actual;
  attention_reference(s, q.view(), k.view(), v.view(), expected.view());
  attend(s, q.view(), k.view(), v.view(), actual.view(), parallel);
  // |q k| <= d, so a score is off by d * d * eps, which is the relative error of its exp; the
  // sums over N add N * eps each; the values are at most 1.
  const double bound =
      (2.0 * s.head_dim * s.head_dim + 2.0 * static_cast<double>(N) + 8.0) * kEpsilon;
  for (std::size_t i = 0; i < actual.values.size(); ++i)
    ASSERT_NEAR(actual.values[i], expected.values[i], bound) << "cell " << i;
}

TEST(Attention, MatchesItsDefinitionOnRandomShapes) {
  ThreadPool pool(3);
  for (unsigned seed = 0; seed < 100; ++seed) {
    std::mt19937 rng(seed);
    AttentionShape s;
    s.num_kv_heads = pick(rng, 1, 3);
    s.num_heads = s.num_kv_heads * pick(rng, 1, 4);
    s.head_dim = 2 * pick(rng, 1, 12);
    s.sliding_window = seed % 3 == 0 ? pick(rng, 1, 20) : 0;
    // Several blocks of queries, and a past of any length.
    const std::int64_t T = pick(rng, 1, seed % 5 == 0 ? 250 : 8);
    const std::int64_t N = T + (seed % 2 == 0 ? pick(rng, 0, 40) : 0);
    SCOPED_TRACE(fmt::format("seed={} T={} N={} heads={}/{} d={} window={}", seed, T, N,
                             s.num_heads, s.num_kv_heads, s.head_dim, s.sliding_window));
    expect_definition(s, T, N, rng, pool.parallel_for());
  }
}

// Few queries before many keys: the keys are cut over the threads, and heads are wider than a tile.
TEST(Attention, MatchesItsDefinitionOverALongCache) {
  for (unsigned seed = 0; seed < 40; ++seed) {
    std::mt19937 rng(seed);
    ThreadPool pool(static_cast<int>(pick(rng, 1, 5)));
    AttentionShape s;
    s.num_kv_heads = pick(rng, 1, 3);
    s.num_heads = s.num_kv_heads * pick(rng, 1, 9);
    s.head_dim = seed % 4 == 0 ? 160 : 64;
    s.sliding_window = seed % 3 == 0 ? pick(rng, 1, 400) : 0;
    const std::int64_t T = seed % 2 == 0 ? 1 : pick(rng, 2, 20), N = T + pick(rng, 100, 700);
    SCOPED_TRACE(fmt::format("seed={} T={} N={} heads={}/{} d={} window={} threads={}", seed, T, N,
                             s.num_heads, s.num_kv_heads, s.head_dim, s.sliding_window,
                             pool.threads()));
    expect_definition(s, T, N, rng, pool.parallel_for());
  }
}

// A whole window, as encoders have it; also the last tokens of one.
TEST(Attention, MatchesItsDefinitionWhereTokensSeeTheWholeWindow) {
  for (unsigned seed = 0; seed < 50; ++seed) {
    std::mt19937 rng(seed);
    ThreadPool pool(static_cast<int>(pick(rng, 1, 5)));
    AttentionShape s;
    s.causal = false;
    s.num_kv_heads = pick(rng, 1, 12);
    s.num_heads = s.num_kv_heads * (seed % 4 == 0 ? pick(rng, 1, 3) : 1);
    s.head_dim = seed % 7 == 0 ? 65 : pick(rng, 1, 40);  // odd ones too: nothing is rotated
    // Below and above a panel of keys, a block of them and a block of queries.
    const std::int64_t T = pick(rng, 1, seed % 5 == 0 ? 450 : seed % 3 == 0 ? 140 : 33);
    const std::int64_t N = T + (seed % 6 == 0 ? pick(rng, 1, 200) : 0);
    SCOPED_TRACE(fmt::format("seed={} T={} N={} heads={}/{} d={} threads={}", seed, T, N,
                             s.num_heads, s.num_kv_heads, s.head_dim, pool.threads()));
    expect_definition(s, T, N, rng, pool.parallel_for());
  }
}

TEST(Rope, TurnsPairsByTheirAngle) {
  const Rope rope({.theta = 100.0}, 4);  // frequencies 1 and 1 / 10
  std::vector<float> cosine(2), sine(2), head = {1.0f, 0.0f, 0.0f, 2.0f};
  rope.angles(3, cosine.data(), sine.data());
  Rope::rotate(cosine.data(), sine.data(), 0.5f, 4, head.data());
  EXPECT_NEAR(head[0], 0.5 * std::cos(3.0), 1e-6);
  EXPECT_NEAR(head[2], 0.5 * std::sin(3.0), 1e-6);
  EXPECT_NEAR(head[1], -std::sin(0.3), 1e-6);
  EXPECT_NEAR(head[3], std::cos(0.3), 1e-6);
}

TEST(Rope, LinearScalingStretchesPositions) {
  const Rope plain({.theta = 500.0}, 16);
  const Rope stretched({.type = RopeConfig::Type::kLinear, .theta = 500.0, .factor = 4.0}, 16);
  std::vector<float> a(8), b(8), c(8), d(8);
  plain.angles(7, a.data(), b.data());
  stretched.angles(28, c.data(), d.data());
  for (int i = 0; i < 8; ++i) EXPECT_NEAR(a[i], c[i], 1e-5) << i;
}

}  // namespace
}  // namespace cleave
