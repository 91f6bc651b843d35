#include "cleave/threshold.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "cleave/convert.h"
#include "cleave/error.h"
#include "cleave/evaluate.h"
#include "cleave/tokenizer.h"
#include "support/paths.h"
#include "support/random_ffn.h"

namespace cleave {
namespace {

using testing::random_values;

double average_used(MatrixView<const float> logits, std::int64_t most, float threshold) {
  Routing routing;
  route(logits, {.experts_per_token = most, .mode = GateMode::kHard, .threshold = threshold},
        routing);
  std::int64_t used = 0;
  for (const std::int32_t id : routing.ids) used += id != Routing::kUnused ? 1 : 0;
  return static_cast<double>(used) / static_cast<double>(logits.rows);
}

TEST(CalibrateThreshold, KeepsTheAverageOnItsTokens) {
  const std::int64_t T = 500, E = 24;
  for (const double spread : {1.0, 1.0 / 1024.0}) {  // of written hard gates as well
    const auto values = random_values(T * E, 3, spread);
    const MatrixView<const float> logits(values.data(), T, E);
    for (const std::int64_t most : {E, std::int64_t{9}})
      for (const double average : {1.0, 2.5, 6.0, 8.9}) {
        const float threshold = calibrate_threshold(logits, most, average);
        EXPECT_NEAR(average_used(logits, most, threshold), average, 0.01)
            << "spread " << spread << ", at most " << most;
      }
    EXPECT_EQ(calibrate_threshold(logits, 9, 9.0), 0.0f);
  }
}

TEST(CalibrateThreshold, RefusesBadInput) {
  auto values = random_values(40, 3);
  const MatrixView<const float> logits(values.data(), 5, 8);
  EXPECT_THROW(calibrate_threshold(logits, 0, 1.0), InvalidArgument);
  EXPECT_THROW(calibrate_threshold(logits, 9, 1.0), InvalidArgument);
  EXPECT_THROW(calibrate_threshold(logits, 8, 0.5), InvalidArgument);
  EXPECT_THROW(calibrate_threshold(logits, 4, 5.0), InvalidArgument);
  EXPECT_THROW(calibrate_threshold({values.data(), 0, 8}, 4, 2.0), InvalidArgument);
  values[13] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(calibrate_threshold(logits, 4, 2.0), InvalidArgument);
}

/// The bundled model at half of its neurons, written with hard gates: K = 8 of 24.
class Rerouting : public ::testing::Test {
 protected:
  static constexpr std::int64_t kContext = 256;
  static void SetUpTestSuite() {
    dir_ = new testing::TempDir;
    const Checkpoint source = Checkpoint::open(testing::demo_llama_dir());
    BudgetSpec spec;
    spec.refit = false;  // so that with all experts on it is the dense model again
    spec.router_method = RouterMethod::kRidge;
    write_conversion(dir_->path() / "moe", source, convert_to_budget(source, spec, text(0, 4)),
                     "{}", {});
  }
  static void TearDownTestSuite() { delete dir_; }
  /// Windows [first, last) of the bundled text.
  static TokenWindows text(std::int64_t first, std::int64_t last) {
    const auto file = testing::demo_llama_dir() / "sample.txt";
    const Checkpoint source = Checkpoint::open(testing::demo_llama_dir());
    const auto tokens = Tokenizer::from_checkpoint(source).encode(read_text(file));
    return {{tokens.begin() + first * kContext, tokens.begin() + last * kContext}, kContext};
  }
  static Model routed(std::int64_t experts_per_token = 0) {
    return Model::load(Checkpoint::open(dir_->path() / "moe"),
                       {.experts_per_token = experts_per_token});
  }
  static EvalResult against_dense(Model& model) {
    Model dense = Model::load(Checkpoint::open(testing::demo_llama_dir()));
    return evaluate(model, text(4, 6), &dense);
  }
  static testing::TempDir* dir_;
};
testing::TempDir* Rerouting::dir_ = nullptr;

TEST_F(Rerouting, MoreExpertsAreNearerAndAllAreTheDenseModel) {
  double before = std::numeric_limits<double>::infinity();
  for (const std::int64_t active : {4, 8, 12, 24}) {
    Model model = routed(active);
    EXPECT_EQ(model.config().experts_per_token, active);
    const EvalResult result = against_dense(model);
    EXPECT_EQ(result.active_experts, static_cast<double>(active));
    EXPECT_LT(result.kl, 0.8 * before) << active;
    before = result.kl;
  }
  EXPECT_LT(before, 1e-6);
  Model own = routed(), same = routed(8);
  const EvalResult as_written = against_dense(own), as_asked = against_dense(same);
  // Gates of 1 / K by a softmax of nearly equal logits, and of exactly 1 / K.
  EXPECT_NEAR(as_written.kl, as_asked.kl, 0.02 * as_written.kl);
}

TEST_F(Rerouting, CalibratedThresholdsKeepTheBudget) {
  Model model = routed(24);
  // Not the text of the conversion, on which the routers are surer than elsewhere.
  const auto thresholds = calibrate_thresholds(model, text(6, 12), 8.0);
  ASSERT_EQ(thresholds.size(), 4u);
  EXPECT_EQ(model.config().experts_per_token, 24);
  EXPECT_NEAR(evaluate(model, text(6, 12)).active_experts, 8.0, 0.1);
  const EvalResult result = against_dense(model);
  EXPECT_NEAR(result.active_experts, 8.0, 0.5);  // on another part of it
  Model quarter = routed(4);
  EXPECT_LT(result.kl, against_dense(quarter).kl);
}

TEST_F(Rerouting, RefusesWhatMakesNoSense) {
  Model model = routed();
  EXPECT_THROW(model.set_active_experts(0), InvalidArgument);
  EXPECT_THROW(model.set_active_experts(25), InvalidArgument);
  EXPECT_THROW(routed(25), InvalidArgument);
  EXPECT_THROW(model.set_router_threshold(0, 1.5f), InvalidArgument);
  EXPECT_THROW(model.set_router_threshold(4, 0.5f), InvalidArgument);
  EXPECT_THROW(calibrate_thresholds(model, text(0, 1), 9.0), InvalidArgument);
  const Checkpoint source = Checkpoint::open(testing::demo_llama_dir());
  EXPECT_THROW(Model::load(source, {.experts_per_token = 2}), InvalidArgument);
  Model dense = Model::load(source);
  EXPECT_THROW(dense.set_router_threshold(0, 0.5f), InvalidArgument);
  EXPECT_THROW(calibrate_thresholds(dense, text(0, 1), 2.0), InvalidArgument);
}

}  // namespace
}  // namespace cleave
