#include "regression_router.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "cleave/error.h"
#include "cleave/fit_router.h"
#include "descent.h"
#include "support/random_ffn.h"
#include "support/thread_pool.h"

namespace cleave {
namespace {

using testing::random_values;

std::vector<float> magnitudes(std::vector<float> values) {
  for (float& v : values) v = std::abs(v);
  return values;
}

MatrixView<const float> as_rows(const std::vector<float>& values, std::int64_t cols) {
  return {values.data(), static_cast<std::int64_t>(values.size()) / cols, cols};
}

RegressionRouter random_regression(std::int64_t D, std::int64_t R, std::int64_t E) {
  return {E,
          D,
          R,
          random_values(R * D, 1, 0.5),
          random_values(R, 2, 0.5),
          random_values(E * R, 3, 0.5),
          random_values(E, 4, 0.5)};
}

/// The router's definition in double.
std::vector<double> scores_in_double(const RegressionRouter& r, const float* x) {
  std::vector<double> hidden(r.hidden_bias.begin(), r.hidden_bias.end()),
      scores(r.bias.begin(), r.bias.end());
  for (std::int64_t i = 0; i < r.width; ++i) {
    for (std::int64_t d = 0; d < r.d_model; ++d)
      hidden[i] += static_cast<double>(r.hidden_weight[i * r.d_model + d]) * x[d];
    hidden[i] = std::max(hidden[i], 0.0);
  }
  for (std::int64_t e = 0; e < r.num_experts; ++e) {
    for (std::int64_t i = 0; i < r.width; ++i)
      scores[e] += static_cast<double>(r.weight[e * r.width + i]) * hidden[i];
    scores[e] = std::abs(scores[e]);
  }
  return scores;
}

double loss_in_double(const RegressionRouter& r, MatrixView<const float> x,
                      MatrixView<const float> target) {
  double sum = 0.0;
  for (std::int64_t t = 0; t < x.rows; ++t) {
    const std::vector<double> scores = scores_in_double(r, x.row(t));
    for (std::int64_t e = 0; e < target.cols; ++e)
      sum += (scores[e] - target(t, e)) * (scores[e] - target(t, e));
  }
  return sum / static_cast<double>(target.rows * target.cols);
}

std::vector<float> scores_of(const RegressionRouter& router, MatrixView<const float> x) {
  std::vector<float> scores(static_cast<std::size_t>(x.rows * router.num_experts));
  regression_scores(router, x, {scores.data(), x.rows, router.num_experts}, {});
  return scores;
}

TEST(RegressionRouter, ScoresAreItsDefinition) {
  const std::int64_t T = 700, D = 13, R = 9, E = 5;  // more tokens than a block
  const RegressionRouter router = random_regression(D, R, E);
  const auto x = random_values(T * D, 5);
  const std::vector<float> scores = scores_of(router, as_rows(x, D));
  for (std::int64_t t = 0; t < T; ++t) {
    const auto expected = scores_in_double(router, x.data() + t * D);
    for (std::int64_t e = 0; e < E; ++e) EXPECT_NEAR(scores[t * E + e], expected[e], 1e-5);
  }
  EXPECT_EQ(router.macs(), R * (D + E));
}

TEST(RegressionRouter, DerivativesMatchFiniteDifferences) {
  const std::int64_t B = 37, D = 6, R = 7, E = 4;
  RegressionRouter router = random_regression(D, R, E);
  const auto x = random_values(B * D, 6);
  const auto target = magnitudes(random_values(B * E, 7));
  RegressionRouter gradient = router;
  RegressionLoss loss(B, R, E);
  EXPECT_NEAR(loss.differentiate(router, as_rows(x, D), as_rows(target, E), gradient, {}),
              loss_in_double(router, as_rows(x, D), as_rows(target, E)), 1e-6);
  int positive = 0, negative = 0;
  const auto check = [&](std::vector<float>& values, const std::vector<float>& slopes) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      const float kept = values[i];
      values[i] = kept + 1e-4f;
      const double above = loss_in_double(router, as_rows(x, D), as_rows(target, E)),
                   up = values[i];
      values[i] = kept - 1e-4f;
      const double below = loss_in_double(router, as_rows(x, D), as_rows(target, E)),
                   down = values[i];
      values[i] = kept;
      // The loss has corners at 0 of relu and |.|; a step of 1e-4 meets few, each worth little.
      EXPECT_NEAR(slopes[i], (above - below) / (up - down), 2e-4) << i;
      (slopes[i] > 0.0f ? positive : negative) += slopes[i] != 0.0f ? 1 : 0;
    }
  };
  check(router.hidden_weight, gradient.hidden_weight);
  check(router.hidden_bias, gradient.hidden_bias);
  check(router.weight, gradient.weight);
  check(router.bias, gradient.bias);
  EXPECT_GT(positive, 20);
  EXPECT_GT(negative, 20);
}

/// Expert e is large where |x_e| is: nothing that a linear score could foresee, as x and -x weigh
/// the same.
struct EvenEnergies {
  static constexpr std::int64_t T = 3000, D = 8, E = 8, K = 2;
  std::vector<float> x = random_values(T * D, 11), norms;
  EvenEnergies() {
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t e = 0; e < E; ++e) norms.push_back(2.5f * std::abs(x[t * D + e]));
  }
};

TEST(RegressionRouter, ForeseesWhatALinearRouterCannot) {
  const EvenEnergies toy;
  const auto x = as_rows(toy.x, toy.D), norms = as_rows(toy.norms, toy.E);
  const std::int64_t fit = 2000, rest = toy.T - fit;  // it is judged on tokens it has not seen
  const RegressionRouter router =
      fit_regression_router(x.slice_rows(0, fit), norms.slice_rows(0, fit),
                            {.width = 32, .steps = 800, .batch = 128, .rate = 1e-2}, {});
  const std::vector<float> scores = scores_of(router, x.slice_rows(fit, rest));
  const RouterQuality mlp =
      router_quality(as_rows(scores, toy.E), norms.slice_rows(fit, rest), toy.K);

  RouterFit ridge_fit(toy.D, toy.E);
  ridge_fit.observe(x.slice_rows(0, fit), norms.slice_rows(0, fit));
  const LinearRouter ridge = ridge_fit.solve();
  std::vector<float> logits(static_cast<std::size_t>(rest * toy.E));
  linear(x.slice_rows(fit, rest), ridge.view(), {}, {logits.data(), rest, toy.E}, {});
  const RouterQuality linear_one =
      router_quality(as_rows(logits, toy.E), norms.slice_rows(fit, rest), toy.K);
  RecordProperty("mlp", std::to_string(mlp.recall) + " " + std::to_string(mlp.captured));
  RecordProperty("ridge",
                 std::to_string(linear_one.recall) + " " + std::to_string(linear_one.captured));
  EXPECT_LT(linear_one.recall, 0.4);  // chance: K / E
  EXPECT_GT(mlp.recall, 0.85);
  EXPECT_GT(mlp.captured, 0.95);
  EXPECT_LT(linear_one.captured, mlp.captured - 0.3);
}

TEST(RegressionRouter, TheSeedDecidesAndTheUnitsDoNot) {
  const EvenEnergies toy;
  const auto x = as_rows(toy.x, toy.D), norms = as_rows(toy.norms, toy.E);
  const RegressionSpec spec{.width = 16, .steps = 100, .batch = 64, .rate = 1e-2, .seed = 3};
  const RegressionRouter a = fit_regression_router(x, norms, spec, {});
  EXPECT_EQ(a.weight, fit_regression_router(x, norms, spec, {}).weight);
  RegressionSpec other = spec;
  other.seed = 4;
  EXPECT_NE(a.weight, fit_regression_router(x, norms, other, {}).weight);

  ThreadPool pool(3);
  const std::vector<float> scores = scores_of(a, x),
                           threaded = scores_of(
                               fit_regression_router(x, norms, spec, pool.parallel_for()), x);
  // Powers of two: dividing by the scale makes the very same numbers of them.
  std::vector<float> large_x = toy.x, large_norms = toy.norms;
  for (float& v : large_x) v *= 64.0f;
  for (float& v : large_norms) v *= 1024.0f;
  const std::vector<float> large = scores_of(
      fit_regression_router(as_rows(large_x, toy.D), as_rows(large_norms, toy.E), spec, {}),
      as_rows(large_x, toy.D));
  for (std::size_t i = 0; i < scores.size(); ++i) {
    ASSERT_NEAR(threaded[i], scores[i], 0.02) << i;
    ASSERT_NEAR(large[i] / 1024.0f, scores[i], 1e-4) << i;
  }
}

TEST(RegressionRouter, DeadAndConstantExpertsGetTheirConstant) {
  const std::int64_t T = 200, D = 5, E = 4;
  const auto x = random_values(T * D, 12);
  std::vector<float> norms = magnitudes(random_values(T * E, 13));
  for (std::int64_t t = 0; t < T; ++t) {
    norms[t * E + 1] = 0.0f;
    norms[t * E + 2] = 3.25f;
  }
  const RegressionRouter router = fit_regression_router(
      as_rows(x, D), as_rows(norms, E), {.width = 8, .steps = 50, .batch = 32, .rate = 1e-2}, {});
  const std::vector<float> scores = scores_of(router, as_rows(x, D));
  double spread = 0.0;
  for (std::int64_t t = 0; t < T; ++t) {
    EXPECT_EQ(scores[t * E + 1], 0.0f);
    EXPECT_NEAR(scores[t * E + 2], 3.25f, 1e-5);
    spread = std::max(spread, std::abs(static_cast<double>(scores[t * E]) - scores[0]));
  }
  EXPECT_GT(spread, 0.1);  // the others still depend on x
  // All dead, and no input to speak of: nothing to learn, nothing to divide by.
  const std::vector<float> nothing(static_cast<std::size_t>(T * E)),
      no_input(static_cast<std::size_t>(T * D));
  for (const float score :
       scores_of(fit_regression_router(as_rows(no_input, D), as_rows(nothing, E), {.steps = 5}, {}),
                 as_rows(x, D)))
    EXPECT_EQ(score, 0.0f);
}

TEST(RegressionRouter, RefusesBadInput) {
  const auto refused = [](const std::vector<float>& x, std::int64_t D, const std::vector<float>& y,
                          std::int64_t E, const RegressionSpec& spec) {
    try {
      fit_regression_router({x.data(), static_cast<std::int64_t>(x.size()) / D, D},
                            {y.data(), E > 0 ? static_cast<std::int64_t>(y.size()) / E : 2, E},
                            spec, {});
    } catch (const InvalidArgument& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  std::vector<float> x(8, 1.0f), y(4, 1.0f);
  EXPECT_EQ(refused(x, 4, y, 2, {.steps = 2}), "");
  EXPECT_NE(refused(x, 4, y, 4, {}).find("x is [2, 4], target [1, 4]"), std::string::npos);
  EXPECT_NE(refused(x, 4, {}, 0, {}).find("at least one token and one expert"), std::string::npos);
  EXPECT_NE(refused({}, 4, {}, 2, {}).find("at least one token"), std::string::npos);
  EXPECT_NE(refused(x, 4, y, 2, {.width = 0}).find("width 0"), std::string::npos);
  EXPECT_NE(refused(x, 4, y, 2, {.batch = 0}), "");
  EXPECT_NE(refused(x, 4, y, 2, {.rate = 0.0}), "");
  EXPECT_NE(refused(x, 4, y, 2, {.rate = std::numeric_limits<double>::infinity()}), "");
  y[3] = -1.0f;
  EXPECT_NE(refused(x, 4, y, 2, {}).find("expert 1 for token 1 is -1"), std::string::npos);
  y[3] = std::numeric_limits<float>::infinity();
  EXPECT_NE(refused(x, 4, y, 2, {}).find("expert 1 for token 1"), std::string::npos);
  y[3] = 1.0f;
  x[6] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_NE(refused(x, 4, y, 2, {}).find("input 2 of token 1"), std::string::npos);

  const RegressionRouter router = random_regression(4, 3, 2);
  std::vector<float> scores(4);
  EXPECT_THROW(regression_scores(router, {x.data(), 2, 3}, {scores.data(), 2, 2}, {}),
               InvalidArgument);
  EXPECT_THROW(regression_scores(router, {x.data(), 2, 4}, {scores.data(), 1, 2}, {}),
               InvalidArgument);
  EXPECT_THROW(router_quality(as_rows(y, 2), as_rows(y, 2), 3), InvalidArgument);
  EXPECT_THROW(router_quality(as_rows(y, 2), as_rows(y, 2), 0), InvalidArgument);
  EXPECT_THROW(router_quality(as_rows(y, 2), as_rows(y, 4), 1), InvalidArgument);
}

TEST(RouterQuality, CountsWhatIsChosen) {
  const std::vector<float> norms = {3, 4, 0, 1, 2, 2}, scores = {1, 0, 2, 5, 1, 0};
  // Token 0: the oracle takes 1 and 0, the scores 2 and 0. Token 1: 1 and 2; 0 and 1.
  const RouterQuality quality = router_quality(as_rows(scores, 3), as_rows(norms, 3), 2);
  EXPECT_DOUBLE_EQ(quality.recall, 0.5);
  EXPECT_DOUBLE_EQ(quality.captured, (9.0 + 0.0 + 1.0 + 4.0) / (16.0 + 9.0 + 4.0 + 4.0));
  const RouterQuality best = router_quality(as_rows(norms, 3), as_rows(norms, 3), 2);
  EXPECT_DOUBLE_EQ(best.recall, 1.0);
  EXPECT_DOUBLE_EQ(best.captured, 1.0);
  const std::vector<float> none(6);
  EXPECT_DOUBLE_EQ(router_quality(as_rows(scores, 3), as_rows(none, 3), 2).captured, 1.0);
}

// The numbers of torch.optim.Adam(lr=0.1, betas=(0.9, 0.99)) on two given gradients.
TEST(Adam, FirstStepsAreItsDefinition) {
  Adam adam(2);
  std::vector<float> values = {1.0f, -1.0f};
  adam.step(std::vector<float>{0.5f, -2.0f}, 0.1, values);
  EXPECT_NEAR(values[0], 0.9, 1e-6);  // the first step is the rate itself, whatever the gradient
  EXPECT_NEAR(values[1], -0.9, 1e-6);
  adam.step(std::vector<float>{-0.5f, -2.0f}, 0.1, values);
  // m = 0.09 * 0.5 - 0.1 * 0.5 = -0.005, over 0.19; v = 0.25.
  EXPECT_NEAR(values[0], 0.9 + 0.1 * (0.005 / 0.19) / 0.5, 1e-6);
  EXPECT_NEAR(values[1], -0.8, 1e-6);
}

}  // namespace
}  // namespace cleave
