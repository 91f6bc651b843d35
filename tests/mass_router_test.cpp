#include "cleave/mass_router.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cleave/error.h"
#include "support/random_ffn.h"

namespace cleave {
namespace {

using testing::random_values;

constexpr std::int64_t kD = 12, kH = 40, kExperts = 4, kTokens = 50;

class MassRouters : public ::testing::Test {
 protected:
  MassRouters() {
    ffn_.hidden = kH;
    ffn_.d_model = kD;
    ffn_.gate = random_values(kH * kD, 1, 0.5);
    ffn_.up = random_values(kH * kD, 2, 0.5);
    ffn_.down = random_values(kH * kD, 3, 0.5);
    x_ = random_values(kTokens * kD, 4, 1.0);
    for (std::int32_t j = 0; j < kH; ++j) expert_.push_back(j * 7 % kH / 10);
  }
  MatrixView<const float> x() const { return {x_.data(), kTokens, kD}; }
  MassRouter fit(std::int64_t rank) const {
    return fit_mass_router(ffn_.view(), expert_, kExperts, x(), rank, {});
  }
  static double product(const std::vector<float>& rows, std::int64_t j, const float* x) {
    double sum = 0.0;
    for (std::int64_t d = 0; d < kD; ++d) sum += static_cast<double>(rows[j * kD + d]) * x[d];
    return sum;
  }
  /// E|P_e x|^2 of all experts: what the truncation keeps.
  double kept(const MassRouter& router) const {
    double sum = 0.0;
    for (std::int64_t t = 0; t < kTokens; ++t)
      for (std::int64_t r = 0; r < kExperts * router.rank; ++r)
        sum += std::pow(product(router.gate, r, x().row(t)), 2);
    return sum;
  }

  DenseFfn ffn_;
  std::vector<float> x_;
  std::vector<std::int32_t> expert_;
};

TEST_F(MassRouters, OfFullRankAreTheFormula) {
  std::vector<double> open(kH);
  for (std::int64_t j = 0; j < kH; ++j)
    for (std::int64_t t = 0; t < kTokens; ++t)
      open[j] += std::pow(1.0 / (1.0 + std::exp(-product(ffn_.gate, j, x().row(t)))), 2) / kTokens;
  const MassRouter router = fit(10);
  EXPECT_EQ(router.rank, 10);
  EXPECT_EQ(fit(128).rank, 10);  // an expert has no more
  EXPECT_EQ(router.macs(), 2 * 4 * 10 * 12);
  std::vector<float> scores(kTokens * kExperts);
  mass_scores(router, x(), {scores.data(), kTokens, kExperts}, {});
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t e = 0; e < kExperts; ++e) {
      double gate = 0.0, up = 0.0;
      for (std::int64_t j = 0; j < kH; ++j) {
        if (expert_[j] != e) continue;
        gate += open[j] * std::pow(product(ffn_.gate, j, x().row(t)), 2);
        up += std::pow(product(ffn_.up, j, x().row(t)), 2);
      }
      const double expected = std::sqrt(gate * up);
      // Float products of 12 terms and rotations of 10 rows.
      EXPECT_NEAR(scores[t * kExperts + e], expected, 1e-4 * expected) << t << " " << e;
    }
}

TEST_F(MassRouters, WithoutAGateWeighTheUpRows) {
  ffn_.gate.clear();
  ffn_.activation = Activation::kRelu;
  ffn_.up_bias = random_values(kH, 5, 0.5);
  const MassRouter router = fit(10);
  EXPECT_TRUE(router.up.empty());
  EXPECT_EQ(router.macs(), 4 * 10 * 12);
  std::vector<float> scores(kTokens * kExperts);
  mass_scores(router, x(), {scores.data(), kTokens, kExperts}, {});
  std::vector<double> open(kH);  // of a ReLU: how often it is
  for (std::int64_t j = 0; j < kH; ++j)
    for (std::int64_t t = 0; t < kTokens; ++t)
      open[j] += product(ffn_.up, j, x().row(t)) + ffn_.up_bias[j] > 0.0 ? 1.0 / kTokens : 0.0;
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t e = 0; e < kExperts; ++e) {
      double sum = 0.0;
      for (std::int64_t j = 0; j < kH; ++j)
        if (expert_[j] == e)
          sum += open[j] * std::pow(product(ffn_.up, j, x().row(t)) + ffn_.up_bias[j], 2);
      const double expected = std::sqrt(sum);
      EXPECT_NEAR(scores[t * kExperts + e], expected, 1e-4 * expected) << t << " " << e;
    }
}

TEST_F(MassRouters, TruncationKeepsWhatTheInputsUse) {
  // Inputs of two directions: two rows are enough, whatever the weights.
  for (std::int64_t t = 0; t < kTokens; ++t)
    for (std::int64_t d = 2; d < kD; ++d) x_[t * kD + d] = 0.0f;
  const MassRouter two = fit(2), all = fit(10), one = fit(1);
  EXPECT_NEAR(kept(two), kept(all), 1e-4 * kept(all));
  EXPECT_LT(kept(one), 0.99 * kept(all));
}

TEST_F(MassRouters, NoRowsKeepMoreThanTheFirstEigenvectors) {
  const MassRouter whole = fit(10), three = fit(3);
  double best_of_rows = 0.0;
  MassRouter some = three;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    // Three orthonormal combinations of an expert's ten rows, drawn at random.
    std::vector<float> draw = random_values(3 * 10, seed, 1.0);
    for (int a = 0; a < 3; ++a) {
      float* v = draw.data() + a * 10;
      for (int b = 0; b < a; ++b) {
        const float* u = draw.data() + b * 10;
        const float dot = std::inner_product(v, v + 10, u, 0.0f);
        for (int i = 0; i < 10; ++i) v[i] -= dot * u[i];
      }
      const float norm = std::sqrt(std::inner_product(v, v + 10, v, 0.0f));
      for (int i = 0; i < 10; ++i) v[i] /= norm;
    }
    for (std::int64_t e = 0; e < kExperts; ++e)
      for (int a = 0; a < 3; ++a)
        for (std::int64_t d = 0; d < kD; ++d) {
          float sum = 0.0f;
          for (int i = 0; i < 10; ++i) sum += draw[a * 10 + i] * whole.gate[(e * 10 + i) * kD + d];
          some.gate[(e * 3 + a) * kD + d] = sum;
        }
    best_of_rows = std::max(best_of_rows, kept(some));
  }
  EXPECT_GT(kept(three), best_of_rows);
  EXPECT_LT(kept(three), kept(whole));
}

TEST_F(MassRouters, RefuseWhatMakesNoSense) {
  EXPECT_THROW(fit(0), InvalidArgument);
  expert_[0] = 3;  // experts of two widths
  EXPECT_THROW(fit(2), InvalidArgument);
  expert_[0] = 4;
  EXPECT_THROW(fit(2), InvalidArgument);
  expert_[0] = 0;
  std::vector<float> scores(kTokens * 3);
  EXPECT_THROW(mass_scores(fit(2), x(), {scores.data(), kTokens, 3}, {}), InvalidArgument);
  x_[5] = INFINITY;
  EXPECT_THROW(fit(2), InvalidArgument);
}

}  // namespace
}  // namespace cleave
