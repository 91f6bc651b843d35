#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "cleave/convert.h"
#include "cleave/error.h"
#include "cleave/evaluate.h"
#include "cleave/export.h"
#include "cleave/model.h"
#include "support/budget.h"
#include "support/random_llama.h"

namespace cleave {
namespace {

using testing::logits_of;
using Budget = testing::BudgetTest;

TEST_F(Budget, RoutingAndRefitBothPay) {
  BudgetSpec spec = budget(0.5);
  const double routed = kl(spec);
  spec.refit = false;
  const double unrepaired = kl(spec);
  spec.shared_share = 1.0;
  const double cut = kl(spec);
  spec.refit = true;
  const double cut_repaired = kl(spec);
  EXPECT_LT(routed, 0.8 * unrepaired);
  EXPECT_LT(routed, cut_repaired);
  EXPECT_LT(unrepaired, cut);
}

TEST_F(Budget, MoreNeuronsAreBetterAndAllAreTheDenseModel) {
  const double quarter = kl(budget(0.25)), most = kl(budget(0.75));
  EXPECT_LT(most, 0.7 * quarter);
  EXPECT_LT(kl(budget(1.0)), 1e-3);
}

TEST_F(Budget, WithoutSharedExpertsItIsMixtral) {
  BudgetSpec spec = budget(0.5);
  const double with_shared = kl(spec);
  spec.shared_share = 0.0;
  const Conversion conversion = convert_to_budget(source_, spec, calibration_);
  EXPECT_LT(evaluate_written(conversion).kl, 1.4 * with_shared);  // 1.19 when this was written
  const ModelConfig config = Checkpoint::open(dir_.path() / "out").config();
  EXPECT_EQ(config.family, Family::kMixtral);
  EXPECT_EQ(config.num_experts, 32);
  EXPECT_EQ(config.experts_per_token, 16);
}

TEST_F(Budget, WrittenModelIsWhatWasConverted) {
  const Conversion conversion = convert_to_budget(source_, budget(0.5), calibration_);
  Model in_memory = Model::load(source_);
  for (std::size_t l = 0; l < conversion.layers.size(); ++l)
    in_memory.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
  write_conversion(dir_.path() / "moe", source_, conversion, "{}", {});
  const Checkpoint written = Checkpoint::open(dir_.path() / "moe");
  EXPECT_EQ(written.config().family, Family::kGraniteMoeShared);
  EXPECT_EQ(written.config().shared_intermediate_size, 128);
  EXPECT_EQ(written.config().num_experts, 24);
  EXPECT_EQ(written.config().experts_per_token, 8);
  Model re_read = Model::load(written);
  const auto a = logits_of(in_memory, held_out_.window(0));
  const auto b = logits_of(re_read, held_out_.window(0));
  ASSERT_EQ(a.size(), b.size());
  // The gates are 1 / K only up to the router's epsilon, and a near-tie may fall the other way.
  double square = 0.0, size = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    square += std::pow(a[i] - b[i], 2);
    size += std::pow(a[i], 2);
  }
  EXPECT_LT(square / size, 1e-4);
}

/// The errors that a conversion reports, found again by the layers that it returned, on a stream of
/// the test's own. [L]
std::vector<double> errors_again(Model& dense, const Conversion& conversion, const BudgetSpec& spec,
                                 const TokenWindows& text) {
  const std::int64_t D = dense.config().hidden_size, C = text.context, T = text.count() * C;
  const bool parallel = spec.calibration_mode == CalibrationMode::kParallel;
  const double correction = parallel ? 0.0 : spec.correction;
  std::vector<float> converted(static_cast<std::size_t>(T * D)), teacher = converted;
  std::vector<float> normed(static_cast<std::size_t>(C * D)), y = normed, aim = normed;
  const auto rows = [&](std::vector<float>& all, std::int64_t w) {
    return MatrixView<float>(all.data() + w * C * D, C, D);
  };
  KvCache cache(dense.config(), C);
  const auto through_dense = [&](std::int64_t l, const DenseFfn& ffn, std::vector<float>& x,
                                 std::int64_t w, std::vector<float>& out) {
    std::fill(out.begin(), out.end(), 0.0f);
    dense.attend(l, cache, rows(x, w), {normed.data(), C, D});
    dense_ffn(ffn.view(), {normed.data(), C, D}, {out.data(), C, D}, {});
  };
  for (std::int64_t w = 0; w < text.count(); ++w) {
    dense.embed(text.window(w), rows(converted, w));
    dense.embed(text.window(w), rows(teacher, w));
  }
  std::vector<double> errors;
  for (std::size_t layer = 0; layer < conversion.layers.size(); ++layer) {
    const auto l = static_cast<std::int64_t>(layer);
    const DenseFfn ffn = dense.dense_ffn(l);
    double error = 0.0, size = 0.0;
    for (std::int64_t w = 0; w < text.count(); ++w) {
      through_dense(l, ffn, teacher, w, y);
      for (std::int64_t i = 0; i < C * D; ++i) teacher[w * C * D + i] += y[i];
      through_dense(l, ffn, converted, w, aim);
      std::fill(y.begin(), y.end(), 0.0f);
      conversion.layers[layer].forward({normed.data(), C, D}, {y.data(), C, D}, {});
      for (std::int64_t t = 0; t < C; ++t) {
        float* x = converted.data() + (w * C + t) * D;
        double stream = 0.0, off = 0.0, aimed = 0.0;
        for (std::int64_t d = 0; d < D; ++d) {
          const double after = static_cast<double>(x[d]) + aim[t * D + d];
          const double target =
              aim[t * D + d] + correction * (teacher[(w * C + t) * D + d] - after);
          stream += after * after / static_cast<double>(D);
          off += std::pow(y[t * D + d] - target, 2);
          aimed += target * target;
          x[d] += parallel ? aim[t * D + d] : y[t * D + d];
        }
        error += off / stream;
        size += aimed / stream;
      }
    }
    errors.push_back(error / size);
  }
  return errors;
}

TEST_F(Budget, TheStreamIsThatOfTheConvertedModel) {
  calibration_.tokens.resize(4 * kContext);
  for (int variant = 0; variant < 4; ++variant) {
    SCOPED_TRACE(variant);
    BudgetSpec spec = budget(0.5);
    if (variant == 0) spec.correction = 0.0;
    if (variant == 2) spec.gate = GateMode::kSoftmax;
    if (variant == 3) spec.calibration_mode = CalibrationMode::kParallel;
    const Conversion conversion = convert_to_budget(source_, spec, calibration_);
    Model dense = Model::load(source_);
    const auto expected = errors_again(dense, conversion, spec, calibration_);
    ASSERT_EQ(conversion.layer_error.size(), expected.size());
    // Sums in another order; a near-tie of a router may fall the other way.
    for (std::size_t l = 0; l < expected.size(); ++l)
      EXPECT_NEAR(conversion.layer_error[l], expected[l], 2e-3 * expected[l]) << "layer " << l;
    for (std::size_t l = 0; l < expected.size(); ++l) {
      EXPECT_LE(conversion.captured_energy[l], conversion.oracle_energy[l] + 1e-9);
      EXPECT_GT(conversion.router_recall[l], 0.4);
    }
  }
}

TEST_F(Budget, TheCorrectionAimsAtTheDenseStream) {
  calibration_.tokens.resize(6 * kContext);
  Model dense = Model::load(source_);
  const HiddenStates wanted = hidden_states(dense, calibration_);
  // |states - dense states|^2 / |dense states|^2 after the last layer, on the calibration text.
  const auto distance = [&](double correction) {
    BudgetSpec spec = budget(0.5);
    spec.correction = correction;
    const Conversion conversion = convert_to_budget(source_, spec, calibration_);
    Model model = Model::load(source_);
    for (std::size_t l = 0; l < conversion.layers.size(); ++l)
      model.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
    const HiddenStates states = hidden_states(model, calibration_);
    double off = 0.0, size = 0.0;
    for (std::size_t i = 0; i < states.values.size(); ++i) {
      off += std::pow(static_cast<double>(states.values[i]) - wanted.values[i], 2);
      size += std::pow(static_cast<double>(wanted.values[i]), 2);
    }
    return off / size;
  };
  const double none = distance(0.0), half = distance(0.5), wrong_way = distance(-0.5);
  EXPECT_LT(half, 0.9 * none);
  EXPECT_GT(wrong_way, 1.1 * none);
}

TEST_F(Budget, RoutersAreAsGoodAsWhatTheyLearnFrom) {
  calibration_.tokens.resize(4 * kContext);
  const auto energy = [&](RouterMethod method, std::int64_t rank = 0) {
    BudgetSpec spec = budget(0.5);
    spec.router.steps = 60;
    spec.router_method = method;
    spec.router_rank = rank;
    const Conversion conversion = convert_to_budget(source_, spec, calibration_);
    EXPECT_EQ(conversion.router, router_method_name(method));
    return std::accumulate(conversion.captured_energy.begin(), conversion.captured_energy.end(),
                           0.0) /
           4.0;
  };
  const double trained = energy(RouterMethod::kTrained), ridge = energy(RouterMethod::kRidge);
  const double rank_2 = energy(RouterMethod::kLowRank, 2), mean = energy(RouterMethod::kMeanGate);
  const double one = energy(RouterMethod::kRepresentative);
  EXPECT_GT(trained, ridge);
  EXPECT_GT(energy(RouterMethod::kLogistic), ridge);
  EXPECT_GT(ridge, rank_2);
  EXPECT_GT(ridge, mean);
  EXPECT_GT(mean, one);
}

TEST_F(Budget, WhatFollowsTheRouterCatchesMostOfAllPartitions) {
  calibration_.tokens.resize(4 * kContext);
  const auto energy = [&](BudgetPartition partition) {
    BudgetSpec spec = budget(0.5);
    spec.partition = partition;
    spec.router_method = RouterMethod::kRidge;
    spec.refit = false;
    const Conversion conversion = convert_to_budget(source_, spec, calibration_);
    for (const MoeLayer& layer : conversion.layers) {
      EXPECT_EQ(layer.shared.rows(), 128) << conversion.partition;
      EXPECT_EQ(layer.experts.num_experts(), 24) << conversion.partition;
    }
    return std::accumulate(conversion.captured_energy.begin(), conversion.captured_energy.end(),
                           0.0) /
           4.0;
  };
  const double captured = energy(BudgetPartition::kCaptured),
               random = energy(BudgetPartition::kRandom);
  for (int i = 1; i <= static_cast<int>(BudgetPartition::kContiguous); ++i) {
    const auto partition = static_cast<BudgetPartition>(i);
    EXPECT_GT(captured, energy(partition)) << budget_partition_name(partition);
  }
  EXPECT_GT(energy(BudgetPartition::kProfiles), random);
  EXPECT_GT(captured, random);
}

TEST(DivideBudget, EveryNeuronIsSharedOrInAnExpertAndTheBudgetRuns) {
  for (const std::int64_t width : {1, 16, 64})
    for (const double share : {0.25, 0.5, 0.75, 1.0})
      for (const double shared : {0.0, 0.25, 0.5, 1.0}) {
        SCOPED_TRACE(::testing::Message() << width << " " << share << " " << shared);
        const std::int64_t hidden = 1536;
        BudgetSpec spec;
        spec.expert_width = width;
        spec.active_share = share;
        spec.shared_share = shared;
        const BudgetShares parts = divide_budget(hidden, spec);
        EXPECT_EQ(parts.shared + parts.experts * width, hidden);
        EXPECT_EQ(parts.shared + parts.active * width, std::llround(share * 1536.0));
        EXPECT_LE(std::abs(2.0 * (static_cast<double>(parts.shared) - share * shared * 1536.0)),
                  static_cast<double>(width));
        EXPECT_LE(parts.active, parts.experts);
        EXPECT_EQ(parts.active == 0, shared == 1.0);
      }
}

}  // namespace
}  // namespace cleave
