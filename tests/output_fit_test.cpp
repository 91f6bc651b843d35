#include "output_fit.h"

#include <gtest/gtest.h>

#include <cmath>

#include "cleave/factorize.h"
#include "cleave/fit_router.h"
#include "cleave/moe_layer.h"
#include "support/random_ffn.h"

namespace cleave {
namespace {

using testing::ffn_in_double;
using testing::random_ffn;
using testing::random_values;

struct Fixture {
  static constexpr std::int64_t H = 32, D = 6, E = 8, K = 3, T = 150;
  DenseFfn ffn = random_ffn({.hidden = H, .d_model = D, .seed = 4});
  std::vector<float> x = random_values(T * D, 12);
  ExpertBank bank = factorize(ffn.view(), partition_neurons(ffn.view(), {.num_experts = E}));
  LinearRouter router = random_router(E, D, 3, 0.7);

  OutputSample sample() const { return {bank, router, K, {x.data(), T, D}, {}}; }

  /// The error by running the layer, against the FFN in double.
  double error_of(GateMode gate, double temperature, double scale) const {
    MoeLayer layer{bank, router, K, gate, static_cast<float>(scale)};
    for (float& w : layer.router.weight) w = static_cast<float>(w * temperature);
    std::vector<float> y(T * D);
    layer.forward({x.data(), T, D}, {y.data(), T, D}, {});
    double mean = 0.0;
    for (std::int64_t t = 0; t < T; ++t) {
      const auto expected = ffn_in_double(ffn, x.data() + t * D);
      double error = 0.0, square = 0.0;
      for (std::int64_t d = 0; d < D; ++d) {
        error += std::pow(y[t * D + d] - expected[d], 2);
        square += expected[d] * expected[d];
      }
      mean += error / square / T;
    }
    return mean;
  }
};

TEST(OutputFit, ReportsTheErrorThatTheLayerHas) {
  const Fixture f;
  for (const GateMode gate : {GateMode::kSoftmax, GateMode::kHard})
    for (const std::optional<double> fixed :
         {std::optional<double>(), std::optional<double>(3.0)}) {
      const OutputFit fit = f.sample().fit(gate, fixed);
      EXPECT_NEAR(fit.relative_error, f.error_of(gate, fit.temperature, fit.scale), 1e-5);
      if (fixed) {
        EXPECT_EQ(fit.scale, *fixed);
      }
    }
}

TEST(OutputFit, NoNearbyScaleOrTemperatureIsBetter) {
  const Fixture f;
  for (const GateMode gate : {GateMode::kSoftmax, GateMode::kHard}) {
    const OutputFit fit = f.sample().fit(gate, {});
    for (const double factor : {0.8, 0.95, 1.05, 1.25})
      EXPECT_GT(f.error_of(gate, fit.temperature, fit.scale * factor), fit.relative_error);
    if (gate == GateMode::kHard) continue;  // has no temperature
    for (const double factor : {0.1, 0.25, 4.0, 10.0}) {
      EXPECT_GT(f.error_of(gate, fit.temperature * factor, fit.scale), fit.relative_error - 1e-6);
    }
  }
}

TEST(OutputFit, AllExpertsWithHardGatesNeedNoScale) {
  const Fixture f;
  const OutputSample sample(f.bank, f.router, Fixture::E, {f.x.data(), f.T, f.D}, {});
  const OutputFit fit = sample.fit(GateMode::kHard, {});
  EXPECT_NEAR(fit.scale, 1.0, 1e-6);
  EXPECT_NEAR(fit.relative_error, 0.0, 1e-10);
}

TEST(OutputFit, AHugeTokenCountsNoMoreThanAnother) {
  Fixture f;
  const double before = f.sample().fit(GateMode::kHard, {}).scale;
  for (std::int64_t d = 0; d < f.D; ++d) f.x[d] *= 1000.0f;
  // One token in 150 cannot move a mean of bounded terms far; as a plain sum it would decide alone.
  EXPECT_NEAR(f.sample().fit(GateMode::kHard, {}).scale, before, 0.05 * before);
}

TEST(OutputFit, DeadExpertsKeepTheAverageWeightOfOne) {
  Fixture f;
  std::fill(f.bank.down_t.begin(), f.bank.down_t.end(), 0.0f);
  EXPECT_EQ(f.sample().fit(GateMode::kSoftmax, {}).scale, 3.0);
  EXPECT_EQ(f.sample().fit(GateMode::kHard, {}).scale, 1.0);
}

}  // namespace
}  // namespace cleave
