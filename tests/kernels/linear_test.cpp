#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "cleave/error.h"
#include "kernels/dispatch.h"
#include "kernels/product.h"
#include "random_ffn.h"
#include "support/thread_pool.h"

namespace cleave {
namespace {

using namespace testing;

TEST(Linear, MatchesReferenceOnRandomShapes) {
  ThreadPool pool(3);
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 rng(seed);
    // Around the sizes where the kernel changes its way: vector widths, few rows, both cuts.
    const std::int64_t T = pick(rng, 0, seed % 4 == 0 ? 300 : 12), K = pick(rng, 1, 150);
    const std::int64_t N = pick(rng, 1, seed % 5 == 0 ? 400 : 70);
    SCOPED_TRACE(fmt::format("seed={} T={} K={} N={}", seed, T, K, N));
    const OwnedMatrix x = random_matrix(rng, T, K), w = random_matrix(rng, N, K);
    const std::vector<float> bias = draw_values(rng, seed % 2 == 0 ? N : 0);
    OwnedMatrix actual = random_matrix(rng, T, N), expected = actual, magnitude = actual;
    const OwnedMatrix before = actual;
    linear_reference(x.view(), w.view(), bias, expected.view(), magnitude.view());

    const double bound = static_cast<double>(K + 2) * kEpsilon;
    linear(x.view(), w.view(), bias, actual.view(), pool.parallel_for());
    for (std::size_t i = 0; i < expected.values.size(); ++i)
      ASSERT_NEAR(actual.values[i], expected.values[i], bound * magnitude.values[i])
          << "cell " << i;

    actual = before;
    linear_add(x.view(), w.view(), bias, actual.view(), {});
    for (std::size_t i = 0; i < expected.values.size(); ++i)
      ASSERT_NEAR(actual.values[i], before.values[i] + expected.values[i],
                  bound * (magnitude.values[i] + 2.0))
          << "added, cell " << i;
  }
}

TEST(Linear, ReadsAndWritesRowsThatAreApart) {
  std::mt19937 rng(1);
  const std::int64_t T = 7, K = 5, N = 9;
  const OwnedMatrix x = random_matrix(rng, T, K + 3), w = random_matrix(rng, N, K + 2);
  OwnedMatrix y = random_matrix(rng, T, N + 4);
  const OwnedMatrix before = y;
  const MatrixView<const float> xs(x.values.data() + 1, T, K, K + 3);
  const MatrixView<const float> ws(w.values.data(), N, K, K + 2);
  linear(xs, ws, {}, {y.values.data(), T, N, N + 4}, {});
  OwnedMatrix expected = random_matrix(rng, T, N);
  linear_reference(xs, ws, {}, expected.view());
  for (std::int64_t t = 0; t < T; ++t) {
    for (std::int64_t n = 0; n < N; ++n)
      EXPECT_NEAR(y.view()(t, n), expected.view()(t, n), 1e-5) << t << "," << n;
    for (std::int64_t n = N; n < N + 4; ++n)  // the gap between rows is not touched
      EXPECT_EQ(y.view()(t, n), before.view()(t, n)) << t << "," << n;
  }
}

TEST(Linear, IsReproducibleForAFixedNumberOfThreads) {
  std::mt19937 rng(2);
  const OwnedMatrix x = random_matrix(rng, 65, 130), w = random_matrix(rng, 257, 130);
  OwnedMatrix first = random_matrix(rng, 65, 257), second = first;
  ThreadPool a(2), b(2);
  linear(x.view(), w.view(), {}, first.view(), a.parallel_for());
  linear(x.view(), w.view(), {}, second.view(), b.parallel_for());
  EXPECT_EQ(first.values, second.values);
}

// Every instruction set this machine has, against plain double arithmetic.
class IsaTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    isa_ = find_isa_kernels(GetParam());
    if (isa_ == nullptr) GTEST_SKIP() << "this CPU or build lacks " << GetParam();
  }
  const IsaKernels* isa_ = nullptr;
};

TEST_P(IsaTest, ProductsMatchTheReference) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 rng(seed);
    const std::int64_t M = pick(rng, 1, 20), K = pick(rng, 1, 70), N = pick(rng, 1, 70);
    SCOPED_TRACE(fmt::format("seed={} M={} K={} N={}", seed, M, K, N));
    const OwnedMatrix x = random_matrix(rng, M, K), w = random_matrix(rng, N, K);
    OwnedMatrix w_t = random_matrix(rng, K, N);
    for (std::int64_t n = 0; n < N; ++n)
      for (std::int64_t k = 0; k < K; ++k) w_t.view()(k, n) = w.view()(n, k);
    OwnedMatrix expected = random_matrix(rng, M, N), magnitude = expected, nt = expected,
                nn = expected;
    linear_reference(x.view(), w.view(), {}, expected.view(), magnitude.view());
    isa_->product_nt(plain(x.view()), plain(w.view()), plain(nt.view()), Store::kOverwrite);
    isa_->product_nn(plain(x.view()), plain(MatrixView<const float>(w_t.view())), plain(nn.view()),
                     Store::kOverwrite);
    const double bound = static_cast<double>(K + 1) * kEpsilon;
    for (std::size_t i = 0; i < nt.values.size(); ++i) {
      ASSERT_NEAR(nt.values[i], expected.values[i], bound * magnitude.values[i]) << "nt " << i;
      ASSERT_NEAR(nn.values[i], expected.values[i], bound * magnitude.values[i]) << "nn " << i;
    }
  }
}

TEST_P(IsaTest, ActivationsMatchTheirDefinition) {
  std::mt19937 rng(3);
  std::vector<float> gate, up;
  for (float x = -100.0f; x <= 100.0f; x += 0.0625f) gate.push_back(x);
  up = draw_values(rng, static_cast<std::int64_t>(gate.size()));
  std::vector<float> h(gate.size()), plain_h(gate.size());
  const auto n = static_cast<std::int64_t>(gate.size());
  for (const Activation a : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                             Activation::kRelu, Activation::kRelu2, Activation::kIdentity}) {
    isa_->activate(a, gate.data(), up.data(), h.data(), n);
    isa_->activate(a, nullptr, gate.data(), plain_h.data(), n);
    for (std::size_t i = 0; i < gate.size(); ++i) {
      const double expected = activate(a, gate[i]);
      // 1 + erf(x) and 1 + tanh(x) cancel for negative x: the error is relative to x, not to
      // the result; 8 eps covers the vector exp and tanh.
      const double bound =
          8 * kEpsilon * (a == Activation::kRelu2 ? expected : std::abs(gate[i])) + 1e-37;
      ASSERT_NEAR(plain_h[i], expected, bound) << activation_name(a) << " of " << gate[i];
      ASSERT_NEAR(h[i], expected * up[i], bound) << activation_name(a) << " of " << gate[i];
    }
  }
}

TEST_P(IsaTest, RowOperationsMatchDoubleArithmetic) {
  for (unsigned seed = 0; seed < 40; ++seed) {
    std::mt19937 rng(seed);
    const std::int64_t n = pick(rng, 1, 200);
    SCOPED_TRACE(fmt::format("seed={} n={}", seed, n));
    std::vector<float> row = draw_values(rng, n), other = draw_values(rng, n), y(n);
    for (float& value : row) value *= 20.0f;
    double largest = row[0], sum = 0.0, squares = 0.0;
    for (const float v : row) largest = std::max<double>(largest, v);
    for (const float v : row) sum += std::exp(v - largest), squares += double{v} * v;
    EXPECT_NEAR(isa_->log_sum_exp(row.data(), n), largest + std::log(sum), 1e-13 * 40);

    isa_->rms_norm(row.data(), other.data(), 1e-5f, y.data(), n);
    for (std::int64_t i = 0; i < n; ++i)
      ASSERT_NEAR(y[i], row[i] / std::sqrt(squares / static_cast<double>(n) + 1e-5) * other[i],
                  static_cast<double>(n + 4) * kEpsilon * 20);

    std::vector<float> p = row;
    isa_->softmax(p.data(), n);
    for (std::int64_t i = 0; i < n; ++i)  // exp of up to 40: its argument is off by 40 eps
      ASSERT_NEAR(p[i], std::exp(row[i] - largest) / sum, static_cast<double>(n + 50) * kEpsilon);
  }
}

TEST_P(IsaTest, LayerNormMatchesDoubleArithmetic) {
  for (unsigned seed = 0; seed < 80; ++seed) {
    std::mt19937 rng(seed);
    const std::int64_t n = pick(rng, 1, 200);
    // Far from 0, so that a mean square would cancel; or so small that epsilon is most of the root.
    const bool far = seed % 2 == 0;
    SCOPED_TRACE(fmt::format("seed={} n={} far={}", seed, n, far));
    const std::vector<float> weight = draw_values(rng, n), bias = draw_values(rng, n);
    std::vector<float> row = draw_values(rng, n), y(n);
    for (float& v : row) v = far ? 20.0f * v + 300.0f : 1e-3f * v;
    double mean = 0.0, variance = 0.0, largest = 0.0;
    for (const float v : row) mean += v / static_cast<double>(n);
    for (const float v : row) variance += (v - mean) * (v - mean) / static_cast<double>(n);
    for (const float v : row) largest = std::max<double>(largest, std::abs(v));
    const double deviation = std::sqrt(variance + 1e-5);
    const std::vector<float> plain = row;
    isa_->layer_norm(row.data(), weight.data(), bias.data(), 1e-5f, y.data(), n);
    isa_->layer_norm(row.data(), weight.data(), bias.data(), 1e-5f, row.data(), n);  // in place
    for (std::int64_t i = 0; i < n; ++i) {
      const double expected = (plain[i] - mean) / deviation * weight[i] + bias[i];
      // The mean is off by the rounding of the numbers' sum; it moves what is divided by the
      // deviation, and the deviation itself by at most as much.
      const double moved = largest * static_cast<double>(n + 4) * kEpsilon / deviation;
      ASSERT_NEAR(y[i], expected, 2.0 * moved * (1.0 + std::abs(expected)) + 8 * kEpsilon);
      ASSERT_EQ(row[i], y[i]);
    }
  }
}

TEST_P(IsaTest, ComparesDistributions) {
  const std::vector<float> p = {std::log(0.5f), std::log(0.25f), std::log(0.25f)};
  const std::vector<float> q = {1.0f, 1.0f, 1.0f};
  const Comparison same = isa_->compare(p.data(), p.data(), 3);
  EXPECT_EQ(same.kl, 0.0);
  const Comparison other = isa_->compare(p.data(), q.data(), 3);
  EXPECT_NEAR(other.kl, std::log(3.0) - 1.5 * std::log(2.0), 1e-7);
  EXPECT_EQ(other.best_of_reference, 0);
  EXPECT_EQ(other.best_of_model, 0);  // the lowest of equals
}

INSTANTIATE_TEST_SUITE_P(EverySet, IsaTest, ::testing::Values("scalar", "avx2", "avx512", "neon"),
                         [](const auto& info) { return std::string(info.param); });

TEST(Isa, NamesTheSetInUse) {
  ASSERT_NE(find_isa_kernels(isa_name()), nullptr);
  EXPECT_EQ(find_isa_kernels("sse9"), nullptr);
}

}  // namespace
}  // namespace cleave
