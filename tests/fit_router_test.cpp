#include "cleave/fit_router.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <cmath>
#include <limits>

#include "cleave/error.h"
#include "cleave/factorize.h"
#include "support/random_ffn.h"

namespace cleave {
namespace {

using testing::ffn_in_double;
using testing::random_ffn;
using testing::random_values;

using RowMajorF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The ridge solution by another road: least squares of the stacked system, by QR.
Eigen::MatrixXd ridge_by_qr(const Eigen::MatrixXd& x, const Eigen::MatrixXd& y, double ridge) {
  const double penalty = ridge * x.squaredNorm() / static_cast<double>(x.cols());
  Eigen::MatrixXd stacked(x.rows() + x.cols(), x.cols()), target(x.rows() + x.cols(), y.cols());
  stacked << x, std::sqrt(penalty) * Eigen::MatrixXd::Identity(x.cols(), x.cols());
  target << y, Eigen::MatrixXd::Zero(x.cols(), y.cols());
  return stacked.colPivHouseholderQr().solve(target).transpose();
}

TEST(RouterFit, EqualsRidgeByQr) {
  for (const double ridge : {0.01, 1.0}) {
    const int T = 700, D = 12, E = 5;
    const auto x = random_values(T * D, 1), y = random_values(T * E, 2);
    RouterFit fit(D, E);
    fit.observe({x.data(), T, D}, {y.data(), T, E});
    const LinearRouter router = fit.solve({.ridge = ridge});
    const auto expected =
        ridge_by_qr(Eigen::Map<const RowMajorF>(x.data(), T, D).cast<double>(),
                    Eigen::Map<const RowMajorF>(y.data(), T, E).cast<double>(), ridge);
    ASSERT_EQ(router.num_experts, E);
    ASSERT_EQ(router.d_model, D);
    for (int e = 0; e < E; ++e)
      for (int d = 0; d < D; ++d)
        EXPECT_NEAR(router.weight[e * D + d], expected(e, d), 1e-5) << e << "," << d;
  }
}

TEST(RouterFit, RecoversALinearRuleAsThePenaltyVanishes) {
  const int T = 300, D = 9, E = 4;
  const auto x = random_values(T * D, 3), w = random_values(E * D, 4);
  std::vector<float> y(T * E);
  for (int t = 0; t < T; ++t)
    for (int e = 0; e < E; ++e)
      for (int d = 0; d < D; ++d) y[t * E + e] += w[e * D + d] * x[t * D + d];
  RouterFit fit(D, E);
  fit.observe({x.data(), T, D}, {y.data(), T, E});
  const LinearRouter router = fit.solve({.ridge = 0.0});
  for (int i = 0; i < E * D; ++i) EXPECT_NEAR(router.weight[i], w[i], 2e-5);
}

TEST(RouterFit, StreamingInPiecesEqualsOneCall) {
  const int T = 1000, D = 6, E = 3;
  const auto x = random_values(T * D, 5), y = random_values(T * E, 6);
  RouterFit whole(D, E), pieces(D, E);
  whole.observe({x.data(), T, D}, {y.data(), T, E});
  for (int begin = 0, n = 1; begin < T; begin += n, n = std::min(T - begin, 2 * n + 1))
    pieces.observe({x.data() + begin * D, n, D}, {y.data() + begin * E, n, E});
  EXPECT_EQ(whole.num_tokens(), T);
  EXPECT_EQ(pieces.num_tokens(), T);
  const auto a = whole.solve().weight, b = pieces.solve().weight;
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-5);
}

TEST(RouterFit, FewerTokensThanWidthStillSolves) {
  const int T = 3, D = 16, E = 2;
  const auto x = random_values(T * D, 5), y = random_values(T * E, 6);
  RouterFit fit(D, E);
  fit.observe({x.data(), T, D}, {y.data(), T, E});
  for (const float w : fit.solve({.ridge = 1e-3}).weight) EXPECT_TRUE(std::isfinite(w));
}

TEST(RouterFit, AllZeroInputsGiveAZeroRouter) {
  const std::vector<float> x(8), y(4, 1.0f);
  RouterFit fit(4, 2);
  fit.observe({x.data(), 2, 4}, {y.data(), 2, 2});
  EXPECT_EQ(fit.solve().weight, std::vector<float>(8));
}

TEST(RouterFit, RefusesBadInput) {
  EXPECT_THROW(RouterFit(0, 2), InvalidArgument);
  RouterFit fit(4, 2);
  EXPECT_THROW(fit.solve(), InvalidArgument);
  std::vector<float> x(8, 1.0f), y(4, 1.0f);
  EXPECT_THROW(fit.observe({x.data(), 2, 4}, {y.data(), 1, 2}), InvalidArgument);
  EXPECT_THROW(fit.observe({x.data(), 2, 3}, {y.data(), 2, 2}), InvalidArgument);
  x[5] = std::numeric_limits<float>::quiet_NaN();
  try {
    fit.observe({x.data(), 2, 4}, {y.data(), 2, 2});
    FAIL() << "NaN was taken";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("token 1"), std::string::npos) << error.what();
  }
  EXPECT_EQ(fit.num_tokens(), 0);
  x[5] = 1.0f;
  fit.observe({x.data(), 2, 4}, {y.data(), 2, 2});
  EXPECT_THROW(fit.solve({.ridge = -1.0}), InvalidArgument);
}

TEST(ExpertOutputNorms, AreTheNormsOfTheExpertsAlone) {
  const std::int64_t H = 12, D = 5, T = 4;
  const DenseFfn ffn = random_ffn({.hidden = H, .d_model = D, .biases = true, .seed = 2});
  const NeuronPartition partition = partition_neurons(ffn.view(), {.num_experts = 3});
  const ExpertBank bank = factorize(ffn.view(), partition);
  const auto x = random_values(T * D, 7);
  std::vector<float> norms(static_cast<std::size_t>(T * 3), -1.0f);
  expert_output_norms(bank, {x.data(), T, D}, {norms.data(), T, 3}, {});
  for (std::int32_t e = 0; e < 3; ++e) {
    DenseFfn alone = ffn;  // the same FFN with everybody else's neurons silenced
    alone.down_bias.clear();
    for (std::int64_t j = 0; j < H; ++j)
      for (std::int64_t d = 0; d < D; ++d)
        if (partition.expert_of_neuron[j] != e) alone.down[d * H + j] = 0.0f;
    for (std::int64_t t = 0; t < T; ++t) {
      double square = 0.0;
      for (const double v : ffn_in_double(alone, x.data() + t * D)) square += v * v;
      EXPECT_NEAR(norms[t * 3 + e], std::sqrt(square), 1e-5) << "expert " << e << " token " << t;
    }
  }
}

TEST(ExpertOutputNorms, RefusesWrongShapes) {
  const DenseFfn ffn = random_ffn({.hidden = 4, .d_model = 2});
  const ExpertBank bank = factorize(ffn.view(), {2, {0, 1, 0, 1}});
  std::vector<float> x(6), norms(6);
  EXPECT_THROW(expert_output_norms(bank, {x.data(), 3, 2}, {norms.data(), 2, 2}, {}),
               InvalidArgument);
  EXPECT_THROW(expert_output_norms(bank, {x.data(), 2, 3}, {norms.data(), 2, 2}, {}),
               InvalidArgument);
}

TEST(RandomRouter, HasTheAskedSpreadAndSeed) {
  const auto router = random_router(32, 256, 1, 0.02);
  double sum = 0.0, square = 0.0;
  for (const float w : router.weight) {
    sum += w;
    square += w * w;
  }
  const double n = 32 * 256;
  // Three standard errors of the mean and of the standard deviation.
  EXPECT_NEAR(sum / n, 0.0, 3 * 0.02 / std::sqrt(n));
  EXPECT_NEAR(std::sqrt(square / n), 0.02, 3 * 0.02 / std::sqrt(2 * n));
  EXPECT_EQ(router.weight, random_router(32, 256, 1, 0.02).weight);
  EXPECT_NE(router.weight, random_router(32, 256, 2, 0.02).weight);
}

TEST(ZeroRouter, IsZero) {
  const auto router = zero_router(3, 4);
  EXPECT_EQ(router.num_experts, 3);
  EXPECT_EQ(router.d_model, 4);
  EXPECT_EQ(router.weight, std::vector<float>(12));
  EXPECT_THROW(zero_router(0, 4), InvalidArgument);
}

TEST(GateMode, Names) {
  EXPECT_STREQ(gate_mode_name(GateMode::kSoftmax), "softmax");
  EXPECT_STREQ(gate_mode_name(GateMode::kHard), "hard");
}

}  // namespace
}  // namespace cleave
