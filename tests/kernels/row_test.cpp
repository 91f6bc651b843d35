#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "kernels/dispatch.h"
#include "kernels/random_ffn.h"

namespace cleave {
namespace {

using namespace testing;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(Dispatch, TheSetInUseHasAName) {
  EXPECT_NE(find_row_kernels(isa_name()), nullptr);
  const char* wanted = std::getenv("CLEAVE_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    EXPECT_STREQ(isa_name(), wanted);
  }
}

class RowKernelsTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    rows_ = find_row_kernels(GetParam());
    if (rows_ == nullptr) GTEST_SKIP() << "this machine or build has no " << GetParam();
  }
  const RowKernels* rows_ = nullptr;
};

INSTANTIATE_TEST_SUITE_P(Isas, RowKernelsTest,
                         ::testing::Values("scalar", "avx2", "avx512", "neon"));

// Blocks of any size, some scores masked, some blocks masked as a whole, the first one too.
TEST_P(RowKernelsTest, SoftmaxByBlocksMatchesItsDefinition) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 rng(seed);
    SCOPED_TRACE(seed);
    std::uniform_real_distribution<float> score(-30.0f, 30.0f);
    std::vector<float> all, weights;
    SoftmaxState state{-kInfinity, 0.0f};
    const int blocks = pick(rng, 1, 6);
    for (int b = 0; b < blocks; ++b) {
      const int n = pick(rng, 1, 70), masked = pick(rng, 0, 4);
      std::vector<float> block((n + 15) / 16 * 16, std::numeric_limits<float>::quiet_NaN());
      for (int i = 0; i < n; ++i)
        block[i] = masked == 0 || (masked == 1 && i % 3 == 0) ? -kInfinity : score(rng);
      all.insert(all.end(), block.begin(), block.begin() + n);
      const float factor = rows_->softmax_block(block.data(), n, &state);
      for (float& weight : weights) weight *= factor;
      weights.insert(weights.end(), block.begin(), block.begin() + n);
      for (std::size_t i = n; i < block.size(); ++i) ASSERT_EQ(block[i], 0.0f) << "cell " << i;
    }
    const float largest = *std::max_element(all.begin(), all.end());
    ASSERT_EQ(state.largest, largest);
    if (largest == -kInfinity) {
      ASSERT_EQ(state.sum, 0.0f);
      continue;
    }
    // exp's own error is 2e-7; its argument is off by eps * 60 for each of the steps in which the
    // largest grew, and each of them rounds once.
    const double relative = 2e-7 + blocks * 61.0 * kEpsilon;
    double sum = 0.0;
    for (std::size_t i = 0; i < all.size(); ++i) {
      const double expected = std::exp(double{all[i]} - largest);
      sum += expected;
      ASSERT_NEAR(weights[i], expected, relative * expected + 1e-37) << "cell " << i;
    }
    ASSERT_NEAR(state.sum, sum, (relative + static_cast<double>(all.size()) * kEpsilon) * sum);
  }
}

TEST_P(RowKernelsTest, SoftmaxPassesNaNOn) {
  std::vector<float> block(16, 1.0f);
  block[3] = std::numeric_limits<float>::quiet_NaN();
  SoftmaxState state{-kInfinity, 0.0f};
  rows_->softmax_block(block.data(), 16, &state);
  EXPECT_TRUE(std::isnan(block[3]));
  EXPECT_TRUE(std::isnan(state.sum));
}

TEST_P(RowKernelsTest, AddScaledMatchesItsDefinition) {
  for (int n = 0; n < 70; ++n) {
    std::mt19937 rng(n);
    const OwnedMatrix x = random_matrix(rng, 1, n + 1), before = random_matrix(rng, 1, n + 1);
    std::vector<float> y = before.values;
    rows_->add_scaled(-0.37f, x.values.data(), y.data(), n);
    for (int i = 0; i < n; ++i) {
      const double product = -0.37f * double{x.values[i]};
      ASSERT_NEAR(y[i], before.values[i] + product,
                  2 * kEpsilon * (std::abs(before.values[i]) + std::abs(product)))
          << n << " " << i;
    }
    ASSERT_EQ(y[n], before.values[n]) << n;
  }
}

TEST_P(RowKernelsTest, AddRowsMatchesItsDefinition) {
  constexpr int kRows = 3;
  for (int n = 0; n < 70; ++n) {
    std::mt19937 rng(n);
    const std::int64_t x_stride = n + 2, y_stride = n + 5;
    const OwnedMatrix x = random_matrix(rng, kRows, x_stride);
    const OwnedMatrix before = random_matrix(rng, kRows, y_stride);
    OwnedMatrix y = before;
    rows_->add_rows(x.values.data(), x_stride, y.values.data(), y_stride, kRows, n);
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < y_stride; ++i)
        ASSERT_EQ(y.view()(r, i), before.view()(r, i) + (i < n ? x.view()(r, i) : 0.0f))
            << n << " " << r << " " << i;
  }
}

TEST_P(RowKernelsTest, LargestIsTheFirstOfEquals) {
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 rng(seed);
    std::vector<float> row(pick(rng, 1, 300));
    for (float& value : row) value = static_cast<float>(pick(rng, -5, 5));
    if (seed % 10 == 0) row.assign(row.size(), -kInfinity);
    const auto expected = std::max_element(row.begin(), row.end()) - row.begin();
    ASSERT_EQ(rows_->largest(row.data(), static_cast<std::int64_t>(row.size())), expected) << seed;
    const float bad = seed % 2 == 0 ? kInfinity : std::numeric_limits<float>::quiet_NaN();
    row[rng() % row.size()] = bad;
    ASSERT_EQ(rows_->largest(row.data(), static_cast<std::int64_t>(row.size())), -1) << seed;
  }
  EXPECT_EQ(rows_->largest(nullptr, 0), -1);
}

TEST_P(RowKernelsTest, RankCountsTheLargerNumbers) {
  for (std::int64_t n = 0; n <= kMostRanked; ++n) {
    std::mt19937 rng(static_cast<unsigned>(n));
    std::vector<float> row = draw_values(rng, n);
    if (n % 2 == 0)  // some equal ones
      for (std::int64_t i = 0; i + 3 < n; i += 7) row[i] = row[i + 3];
    std::vector<std::int32_t> rank(static_cast<std::size_t>(n) + 1, -7);
    const std::set<float> different(row.begin(), row.end());
    const bool distinct = static_cast<std::int64_t>(different.size()) == n;
    ASSERT_EQ(rows_->rank(row.data(), n, rank.data()), distinct) << n;
    for (std::int64_t i = 0; i < n; ++i)
      ASSERT_EQ(rank[i], std::count_if(row.begin(), row.end(), [&](float v) { return v > row[i]; }))
          << i << " of " << n;
    ASSERT_EQ(rank[n], -7);
  }
}

}  // namespace
}  // namespace cleave
