#include "cleave/refit.h"

#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "cleave/error.h"
#include "support/random_ffn.h"
#include "support/thread_pool.h"

namespace cleave {
namespace {

using RefitRows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The same by another road: least squares of the stacked weighted system, by QR in double.
Eigen::MatrixXd refit_by_qr(const Eigen::MatrixXd& x, const Eigen::MatrixXd& y,
                            const Eigen::VectorXd& weight, const Eigen::MatrixXd& prior,
                            double penalty) {
  const Eigen::MatrixXd wx = weight.cwiseSqrt().asDiagonal() * x;
  const Eigen::MatrixXd wy = weight.cwiseSqrt().asDiagonal() * y;
  const Eigen::VectorXd diagonal = wx.colwise().squaredNorm();
  const Eigen::VectorXd root = (penalty * (diagonal.array() + diagonal.mean())).sqrt();
  Eigen::MatrixXd stacked(x.rows() + x.cols(), x.cols()), target(x.rows() + x.cols(), y.cols());
  stacked << wx, Eigen::MatrixXd(root.asDiagonal());
  target << wy, root.asDiagonal() * prior;
  return stacked.colPivHouseholderQr().solve(target);
}

struct RefitProblem {
  int T, F, D;
  std::vector<float> x, y, prior, weight;
  RefitProblem(int tokens, int features, int outputs, int seed)
      : T(tokens),
        F(features),
        D(outputs),
        x(testing::random_values(T * F, seed)),
        y(testing::random_values(T * D, seed + 1)),
        prior(testing::random_values(F * D, seed + 2)),
        weight(testing::random_values(T, seed + 3)) {
    for (float& w : weight) w = w * w + 0.1f;
  }
  MatrixView<const float> features() const { return {x.data(), T, F}; }
  MatrixView<const float> target() const { return {y.data(), T, D}; }
  MatrixView<const float> prior_view() const { return {prior.data(), F, D}; }
};

TEST(RidgeRefit, EqualsWeightedRidgeByQr) {
  ThreadPool pool(2);
  // Around the blocks of 512 tokens and 96 rows.
  for (const auto [T, F, D] : {std::array{700, 12, 5}, std::array{1100, 97, 33},
                               std::array{513, 200, 1}, std::array{40, 1, 3}}) {
    const RefitProblem p(T, F, D, 10 * F);
    RidgeRefit fit(F, D);
    fit.observe(p.features(), p.target(), p.weight, pool.parallel_for());
    const auto solved = fit.solve(p.prior_view(), {.penalty = 0.05}, pool.parallel_for());
    const auto expected =
        refit_by_qr(Eigen::Map<const RefitRows>(p.x.data(), T, F).cast<double>(),
                    Eigen::Map<const RefitRows>(p.y.data(), T, D).cast<double>(),
                    Eigen::Map<const Eigen::VectorXf>(p.weight.data(), T).cast<double>(),
                    Eigen::Map<const RefitRows>(p.prior.data(), F, D).cast<double>(), 0.05);
    for (int j = 0; j < F; ++j)
      for (int d = 0; d < D; ++d)
        EXPECT_NEAR(solved[j * D + d], expected(j, d), 1e-4)
            << T << " " << F << " " << j << "," << d;
  }
}

TEST(RidgeRefit, PiecesOfAnySizeEqualOneCall) {
  const RefitProblem p(900, 40, 7, 3);
  RidgeRefit whole(p.F, p.D), pieces(p.F, p.D);
  whole.observe(p.features(), p.target(), p.weight, {});
  for (int begin = 0, n = 1; begin < p.T; begin += n, n = std::min(p.T - begin, 3 * n))
    pieces.observe(p.features().slice_rows(begin, n), p.target().slice_rows(begin, n),
                   std::span(p.weight).subspan(begin, n), {});
  EXPECT_EQ(pieces.num_tokens(), p.T);
  const auto a = whole.solve(p.prior_view(), {}, {}), b = pieces.solve(p.prior_view(), {}, {});
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_NEAR(a[i], b[i], 1e-5);
}

TEST(RidgeRefit, KeepsThePriorWhereThePriorIsRight) {
  RefitProblem p(300, 20, 4, 8);
  for (int t = 0; t < p.T; ++t)
    for (int d = 0; d < p.D; ++d) {
      double sum = 0.0;
      for (int j = 0; j < p.F; ++j) sum += p.x[t * p.F + j] * p.prior[j * p.D + d];
      p.y[t * p.D + d] = static_cast<float>(sum);
    }
  RidgeRefit fit(p.F, p.D);
  fit.observe(p.features(), p.target(), p.weight, {});
  const auto solved = fit.solve(p.prior_view(), {.penalty = 10.0}, {});
  for (std::size_t i = 0; i < solved.size(); ++i) EXPECT_NEAR(solved[i], p.prior[i], 1e-5);
}

TEST(RidgeRefit, FeaturesThatNeverRunKeepTheirPrior) {
  RefitProblem p(100, 6, 3, 5);
  for (int t = 0; t < p.T; ++t) p.x[t * p.F + 2] = 0.0f;
  RidgeRefit fit(p.F, p.D);
  fit.observe(p.features(), p.target(), {}, {});
  const auto solved = fit.solve(p.prior_view(), {}, {});
  for (int d = 0; d < p.D; ++d) EXPECT_FLOAT_EQ(solved[2 * p.D + d], p.prior[2 * p.D + d]);
  EXPECT_GT(std::abs(solved[0] - p.prior[0]), 1e-3);  // the others do move
}

TEST(RidgeRefit, SingularGramIsSolved) {
  RefitProblem p(50, 8, 2, 6);
  for (int t = 0; t < p.T; ++t) p.x[t * p.F + 1] = p.x[t * p.F];  // two equal features
  RidgeRefit fit(p.F, p.D);
  fit.observe(p.features(), p.target(), {}, {});
  const auto solved = fit.solve({}, {.penalty = 1e-4}, {});
  // The penalty is what tells them apart, and it favours neither; sums in float are the error.
  double largest = 0.0;
  for (const float w : solved) largest = std::max(largest, std::abs(static_cast<double>(w)));
  for (int d = 0; d < p.D; ++d) EXPECT_NEAR(solved[d], solved[p.D + d], 1e-3 * largest);
  // Together they do what one of them would do alone, but for the penalty.
  RidgeRefit alone(p.F - 1, p.D);
  std::vector<float> rest;
  for (int t = 0; t < p.T; ++t)
    rest.insert(rest.end(), p.x.begin() + t * p.F + 1, p.x.begin() + (t + 1) * p.F);
  alone.observe({rest.data(), p.T, p.F - 1}, p.target(), {}, {});
  const auto one = alone.solve({}, {.penalty = 1e-4}, {});
  for (int d = 0; d < p.D; ++d) EXPECT_NEAR(solved[d] + solved[p.D + d], one[d], 1e-2 * largest);
  try {
    fit.solve({}, {.penalty = 0.0}, {});
    ADD_FAILURE() << "a singular matrix without a penalty was solved";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("penalty 0; must be above 0"), std::string::npos)
        << error.what();
  }
}

TEST(RidgeRefit, RefusesBadInput) {
  EXPECT_THROW(RidgeRefit(0, 3), InvalidArgument);
  RidgeRefit fit(4, 3);
  EXPECT_THROW(fit.solve({}, {}, {}), InvalidArgument);  // no token
  RefitProblem p(10, 4, 3, 9);
  EXPECT_THROW(fit.observe(p.features(), {p.y.data(), 9, 3}, {}, {}), InvalidArgument);
  p.x[4 * 4 + 1] = std::numeric_limits<float>::quiet_NaN();
  try {
    fit.observe(p.features(), p.target(), {}, {});
    FAIL();
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("token 4"), std::string::npos) << error.what();
  }
  RefitProblem q(10, 4, 3, 9);
  q.weight[3] = -1.0f;
  EXPECT_THROW(fit.observe(q.features(), q.target(), q.weight, {}), InvalidArgument);
  q.weight[3] = 1.0f;
  fit.observe(q.features(), q.target(), q.weight, {});
  EXPECT_THROW(fit.solve({}, {.penalty = 0.0}, {}), InvalidArgument);
}

}  // namespace
}  // namespace cleave
