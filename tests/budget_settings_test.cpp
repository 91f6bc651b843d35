// Settings of a conversion to a budget that are not the default.

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "budget_layer.h"
#include "cleave/error.h"
#include "support/budget.h"
#include "support/random_ffn.h"
#include "support/random_llama.h"
#include "support/thread_pool.h"

namespace cleave {
namespace {

using BudgetGate = testing::BudgetTest;
using BudgetModes = testing::BudgetTest;
using BudgetRounds = testing::BudgetTest;

/// A random FFN of 8 shared neurons and 6 experts of 4, the hidden values of some tokens, and what
/// a router makes of them.
struct GatedRows {
  static constexpr std::int64_t kTokens = 20, kWidth = 8, kExperts = 6, kHidden = 32;
  SplitSource source{testing::random_ffn({.hidden = kHidden, .d_model = kWidth, .seed = 3})};
  std::vector<float> x = testing::random_values(kTokens * kWidth, 5);
  std::vector<float> hidden = std::vector<float>(kTokens * kHidden), features = hidden;
  LinearRouter router{kExperts, kWidth, testing::random_values(kExperts* kWidth, 6)};
  ThreadPool pool{2};

  MatrixView<const float> input() const { return {x.data(), kTokens, kWidth}; }
  BudgetRows rows() const {
    NeuronPartition partition{kExperts, {}};
    for (std::int32_t j = 0; j < kHidden; ++j)  // of four, one shared
      partition.expert_of_neuron.push_back(j % 4 == 0 ? NeuronPartition::kShared
                                                      : (j - j / 4 - 1) / 4);
    return {source.ffn.view(), partition};
  }
  /// What `features` hold after routing to K experts.
  void mask(std::int64_t active, GateMode gate) {
    const auto parallel = pool.parallel_for();
    source.hidden_values(input(), {hidden.data(), kTokens, kHidden}, parallel);
    mask_features(rows(), route_tokens(input(), router, active, gate, parallel),
                  gate_scale(gate, active), {hidden.data(), kTokens, kHidden},
                  {features.data(), kTokens, kHidden}, parallel);
  }
};

TEST(GatedFeatures, EqualLogitsOfAllExpertsWeighOneAsHardOnesDo) {
  GatedRows layer;
  layer.router = zero_router(GatedRows::kExperts, GatedRows::kWidth);
  layer.mask(GatedRows::kExperts, GateMode::kHard);
  const std::vector<float> hard = layer.features;
  layer.mask(GatedRows::kExperts, GateMode::kSoftmax);
  // 1 / 6 and 6 times it are rounded, and so is the product with h.
  const double bound = 3 * std::numeric_limits<float>::epsilon();
  for (std::size_t i = 0; i < hard.size(); ++i)
    EXPECT_NEAR(layer.features[i], hard[i], bound * std::abs(hard[i])) << i;
}

TEST(GatedFeatures, AreWhatTheLayerMultipliesDownBy) {
  for (const GateMode gate : {GateMode::kHard, GateMode::kSoftmax}) {
    GatedRows layer;
    const std::int64_t T = GatedRows::kTokens, D = GatedRows::kWidth;
    layer.mask(3, gate);
    std::vector<float> expected(T * D), y(T * D, 0.0f);
    down_product({layer.features.data(), T, GatedRows::kHidden}, layer.rows().down_t(), {},
                 {expected.data(), T, D}, layer.pool.parallel_for());
    make_budget_layer(layer.rows(), layer.router, 3, gate)
        .forward(layer.input(), {y.data(), T, D}, layer.pool.parallel_for());
    for (std::size_t i = 0; i < y.size(); ++i)
      EXPECT_NEAR(y[i], expected[i], 1e-5) << gate_mode_name(gate) << " " << i;
  }
}

TEST_F(BudgetGate, SoftmaxIsWrittenAsItIs) {
  BudgetSpec spec = budget(0.5);
  spec.gate = GateMode::kSoftmax;
  const Conversion conversion = convert_to_budget(source_, spec, calibration_);
  Model in_memory = Model::load(source_);
  for (std::size_t l = 0; l < conversion.layers.size(); ++l) {
    EXPECT_EQ(conversion.layers[l].gate, GateMode::kSoftmax);
    EXPECT_EQ(conversion.layers[l].scale, 8.0f);
    in_memory.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
  }
  write_conversion(dir_.path() / "moe", source_, conversion, "{}", {});
  const auto provenance = read_provenance(dir_.path() / "moe");
  ASSERT_TRUE(provenance.has_value());
  EXPECT_EQ(provenance->gate, GateMode::kSoftmax);
  EXPECT_EQ(provenance->router_epsilon, 1.0);
  EXPECT_EQ(provenance->folded_scale, 8.0);
  Model re_read = Model::load(Checkpoint::open(dir_.path() / "moe"));
  const auto a = testing::logits_of(in_memory, held_out_.window(0));
  const auto b = testing::logits_of(re_read, held_out_.window(0));
  ASSERT_EQ(a.size(), b.size());
  // No small router stands in for the gate, and K = 8 is folded in without rounding.
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-4) << i;
}

TEST_F(BudgetGate, TheRefitRepairsUnderSoftmaxWeights) {
  BudgetSpec spec = budget(0.5);
  spec.gate = GateMode::kSoftmax;
  spec.correction = 0.0;  // so that the first layer has one target
  const Conversion repaired = convert_to_budget(source_, spec, calibration_);
  const double kl_repaired = evaluate_written(repaired).kl;
  spec.refit = false;
  const Conversion plain = convert_to_budget(source_, spec, calibration_);
  for (std::size_t l = 0; l < plain.layer_error.size(); ++l)
    EXPECT_LT(repaired.layer_error[l], 0.8 * plain.layer_error[l]) << "layer " << l;
  EXPECT_LT(kl_repaired, 0.8 * evaluate_written(plain).kl);
}

TEST_F(BudgetModes, ParallelFitsEveryLayerOnTheDenseStream) {
  BudgetSpec spec = budget(0.5);
  spec.correction = 0.0;
  const Conversion sequential = convert_to_budget(source_, spec, calibration_);
  spec.calibration_mode = CalibrationMode::kParallel;
  const Conversion parallel = convert_to_budget(source_, spec, calibration_);
  spec.correction = 0.5;  // of nothing
  const Conversion corrected = convert_to_budget(source_, spec, calibration_);

  // The first layer sees the embeddings either way, the others another stream.
  for (std::size_t l = 0; l < parallel.layers.size(); ++l) {
    const auto &a = sequential.layers[l].experts.down_t, &b = parallel.layers[l].experts.down_t;
    EXPECT_EQ(a == b, l == 0) << "layer " << l;
    EXPECT_EQ(b, corrected.layers[l].experts.down_t) << "layer " << l;
  }
}

TEST_F(BudgetRounds, ASecondOneFitsRouterAndDownAgainToTheSameExperts) {
  BudgetSpec spec = budget(0.5);
  EXPECT_EQ(spec.refit_rounds, 1);
  const Conversion one = convert_to_budget(source_, spec, calibration_);
  spec.refit_rounds = 2;
  const Conversion two = convert_to_budget(source_, spec, calibration_);
  const MoeLayer &before = one.layers.front(), &after = two.layers.front();
  EXPECT_EQ(before.experts.neuron_order, after.experts.neuron_order);
  EXPECT_EQ(before.shared.neuron_order, after.shared.neuron_order);
  EXPECT_NE(before.router.weight, after.router.weight);
  EXPECT_NE(before.experts.down_t, after.experts.down_t);
  for (std::size_t l = 0; l < two.layers.size(); ++l) {
    EXPECT_LT(two.layer_error[l], 1.1 * one.layer_error[l]) << "layer " << l;
    EXPECT_LE(two.captured_energy[l], two.oracle_energy[l] + 1e-9) << "layer " << l;
  }
}

TEST_F(BudgetRounds, AreRefusedWhereTheyWouldChangeNothing) {
  BudgetSpec spec = budget(0.5);
  spec.refit_rounds = 0;
  expect_refused(spec, "0 refit rounds");
  spec.refit_rounds = 2;
  spec.refit = false;
  expect_refused(spec, "nothing is repaired");
  spec.refit = true;
  spec.shared_share = 1.0;
  expect_refused(spec, "nothing is routed");
  spec.shared_share = 0.5;
  spec.router_method = RouterMethod::kMeanGate;
  expect_refused(spec, "does not look at their energies");
}

}  // namespace
}  // namespace cleave
