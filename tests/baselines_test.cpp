#include "cleave/baselines.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>

#include "baseline_ffn.h"
#include "cleave/calibrate.h"
#include "cleave/error.h"
#include "cleave/factorize.h"
#include "cleave/tokenizer.h"
#include "partition_cmoe.h"
#include "support/paths.h"
#include "support/random_llama.h"

namespace cleave {
namespace {

using testing::demo_llama_dir;
using testing::TempDir;
using testing::write_random_llama;

constexpr std::int64_t kHidden = 64;

class Baselines : public ::testing::Test {
 protected:
  Baselines() {
    write_random_llama(dir_.path() / "dense", {.hidden = kHidden});
    text_.context = 16;
    std::mt19937 rng(5);
    for (int i = 0; i < 6 * 16; ++i) text_.tokens.push_back(static_cast<std::int32_t>(rng() % 40));
  }

  Model dense() const {
    return Model::load(Checkpoint::open(dir_.path() / "dense"), {.threads = 2});
  }

  /// h [T, H] of a layer for all tokens, by plain loops.
  std::vector<std::vector<double>> activations(Model& model, std::int64_t layer) const {
    const DenseFfn ffn = model.dense_ffn(layer);
    std::vector<std::vector<double>> all;
    ForwardHooks hooks;
    hooks.ffn_input = [&](std::int64_t l, MatrixView<const float> x) {
      for (std::int64_t t = 0; l == layer && t < x.rows; ++t) {
        std::vector<double> h(kHidden);
        for (std::int64_t j = 0; j < kHidden; ++j) {
          double gate = 0.0, up = 0.0;
          for (std::int64_t d = 0; d < x.cols; ++d) {
            gate += static_cast<double>(ffn.view().gate(j, d)) * x(t, d);
            up += static_cast<double>(ffn.view().up(j, d)) * x(t, d);
          }
          h[j] = activate(ffn.activation, gate) * up;
        }
        all.push_back(h);
      }
    };
    hidden_states(model, text_, hooks);
    return all;
  }

  TempDir dir_;
  TokenWindows text_;
};

const BaselineSpec& named(const std::vector<BaselineSpec>& specs, const std::string& method) {
  const auto found = std::find_if(specs.begin(), specs.end(),
                                  [&](const BaselineSpec& spec) { return spec.method == method; });
  if (found == specs.end()) throw InvalidArgument("no row " + method);
  return *found;
}

double largest_gap(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double largest = 0.0;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    largest = std::max(largest, std::abs(static_cast<double>(a[i]) - b[i]));
  return largest;
}

// The final norm brings every state to a size near 1; two layers of products over 64 terms.
constexpr double kRounding = 5e-5;

TEST_F(Baselines, WithEverythingOnTheyAreTheDenseModel) {
  Model model = dense();
  const HiddenStates expected = hidden_states(model, text_);
  const auto specs = baseline_specs(BaselineSet::kAll, kHidden, 1.0);
  EXPECT_EQ(specs.size(), 25u);
  for (const Baseline& baseline : prepare_baselines(model, text_, specs)) {
    SCOPED_TRACE(baseline.spec.method);
    EXPECT_EQ(baseline.spec.rho, 1.0);
    const HiddenStates states = baseline_states(model, baseline, text_);
    EXPECT_LT(largest_gap(states.values, expected.values), kRounding);
    const EvalResult result = evaluate(
        model, text_, {.reference = &model, .reference_states = &expected, .states = &states});
    EXPECT_LT(result.kl, 1e-9);
    EXPECT_EQ(result.top1_agreement, 1.0);
  }
}

TEST_F(Baselines, ARoutedRowIsTheConvertedModel) {
  Model model = dense();
  for (const bool scale_up : {false, true}) {
    BaselineSpec spec{.method = "random",
                      .split = BaselineSplit::kRandom,
                      .router = BaselineRouter::kRandom,
                      .num_experts = 8,
                      .experts_per_token = 3,
                      .scale_up = scale_up,
                      .seed = 4};
    const Baseline baseline = prepare_baselines(model, text_, {&spec, 1}).front();
    const HiddenStates states = baseline_states(model, baseline, text_);
    Model converted = dense();
    for (std::int64_t l = 0; l < 2; ++l) {
      MoeLayer layer;
      layer.experts =
          factorize(model.dense_ffn(l).view(),
                    {.num_experts = 8, .expert_of_neuron = baseline.layers[l].expert_of_neuron});
      layer.router = baseline.layers[l].router;
      layer.experts_per_token = 3;
      layer.gate = GateMode::kHard;
      layer.scale = scale_up ? 8.0f / 3.0f : 1.0f;
      converted.set_moe(l, layer);
    }
    EXPECT_LT(largest_gap(states.values, hidden_states(converted, text_).values), kRounding);
    EXPECT_NE(baseline.layers[0].expert_of_neuron, baseline.layers[1].expert_of_neuron);
  }
}

TEST_F(Baselines, StaticMasksKeepTheNeuronsOfTheirScore) {
  Model model = dense();
  const auto h = activations(model, 1);
  const std::vector<float> down = down_norms(model.dense_ffn(1).view());
  const auto n = static_cast<double>(h.size());
  std::vector<double> mean(kHidden), energy(kHidden), variance(kHidden);
  for (std::int64_t j = 0; j < kHidden; ++j) {
    for (const auto& row : h) mean[j] += row[j] / n;
    for (const auto& row : h)
      energy[j] += row[j] * row[j] / n * static_cast<double>(down[j]) * down[j];
    for (const auto& row : h)
      variance[j] +=
          (row[j] - mean[j]) * (row[j] - mean[j]) / n * static_cast<double>(down[j]) * down[j];
  }
  const auto quick = baseline_specs(BaselineSet::kQuick, kHidden, 0.5);
  const std::vector<BaselineSpec> specs = {named(quick, "FLAP-style pruning"),
                                           named(quick, "static mask")};
  const auto baselines = prepare_baselines(model, text_, specs);
  for (const auto& [index, score] : {std::pair{0, variance}, std::pair{1, energy}}) {
    const BaselineLayer& layer = baselines[index].layers[1];
    double least_on = 1e30, most_off = 0.0;
    for (std::int64_t j = 0; j < kHidden; ++j)
      (layer.expert_of_neuron[j] == BaselineLayer::kShared ? least_on : most_off) =
          layer.expert_of_neuron[j] == BaselineLayer::kShared ? std::min(least_on, score[j])
                                                              : std::max(most_off, score[j]);
    EXPECT_GE(least_on, most_off * (1.0 - 1e-5)) << specs[index].method;
    EXPECT_EQ(std::count(layer.expert_of_neuron.begin(), layer.expert_of_neuron.end(),
                         BaselineLayer::kShared),
              kHidden / 2);
  }
  const BaselineLayer& flap = baselines[0].layers[1];
  for (std::int64_t j = 0; j < kHidden; ++j) EXPECT_NEAR(flap.off_value[j], mean[j], 1e-5);
  EXPECT_TRUE(baselines[1].layers[1].off_value.empty());
}

// Mean compensation: over the calibration text, what is off gives on average what it would have.
TEST_F(Baselines, ARoutedOffNeuronGivesItsMeanWhileOff) {
  Model model = dense();
  const BaselineSpec spec = named(baseline_specs(BaselineSet::kQuick, kHidden, 0.5),
                                  "half shared, k-means width 2, ridge router, compensation");
  ASSERT_TRUE(spec.compensate);
  ASSERT_EQ(spec.router, BaselineRouter::kRidge);
  const Baseline baseline = prepare_baselines(model, text_, {&spec, 1}).front();
  const DenseFfn ffn = model.dense_ffn(0);
  const MaskedFfn masked(ffn, baseline.spec, baseline.layers[0]);
  std::vector<double> sum(kHidden), tokens(kHidden);
  ForwardHooks hooks;
  hooks.ffn_input = [&](std::int64_t l, MatrixView<const float> all) {
    if (l != 0) return;
    const auto x = all.slice_rows(1, all.rows - 1);
    std::vector<float> h(x.rows * kHidden);
    hidden_activations(ffn.view(), x, {h.data(), x.rows, kHidden}, {}, {});
    std::vector<std::uint8_t> on(x.rows * spec.num_experts);
    masked.choose(x, {h.data(), x.rows, kHidden}, on.data(), {});
    for (std::int64_t t = 0; t < x.rows; ++t) {
      EXPECT_EQ(std::accumulate(on.begin() + t * spec.num_experts,
                                on.begin() + (t + 1) * spec.num_experts, std::int64_t{0}),
                spec.experts_per_token);
      for (std::int64_t j = 0; j < kHidden; ++j) {
        const std::int32_t e = baseline.layers[0].expert_of_neuron[j];
        if (e < 0 || on[t * spec.num_experts + e] != 0) continue;
        sum[j] += h[t * kHidden + j];
        tokens[j] += 1.0;
      }
    }
  };
  hidden_states(model, text_, hooks);
  int checked = 0;
  for (std::int64_t j = 0; j < kHidden; ++j) {
    if (tokens[j] == 0.0) continue;
    EXPECT_NEAR(baseline.layers[0].off_value[j], sum[j] / tokens[j], 1e-5) << j;
    ++checked;
  }
  EXPECT_GT(checked, kHidden / 4);
}

TEST_F(Baselines, OraclesChooseByTheExpertsOutputs) {
  Model model = dense();
  const DenseFfn ffn = model.dense_ffn(0);
  BaselineLayer layer;
  for (std::int32_t j = 0; j < kHidden; ++j) layer.expert_of_neuron.push_back(j * 7 % 64 / 16);
  BaselineSpec spec{.split = BaselineSplit::kContiguous, .num_experts = 4, .experts_per_token = 1};
  const auto x_values = testing::random_values(9 * 16, 3, 1.0);
  const MatrixView<const float> x(x_values.data(), 9, 16);
  std::vector<float> h(9 * kHidden);
  hidden_activations(ffn.view(), x, {h.data(), 9, kHidden}, {}, {});
  for (const BaselineRouter router : {BaselineRouter::kOracleNorm, BaselineRouter::kOracleLabel}) {
    spec.router = router;
    std::vector<std::uint8_t> on(9 * 4);
    MaskedFfn(ffn, spec, layer).choose(x, {h.data(), 9, kHidden}, on.data(), {});
    for (std::int64_t t = 0; t < 9; ++t) {
      std::vector<double> score(4);
      std::vector<std::vector<double>> output(5, std::vector<double>(16));
      for (std::int64_t j = 0; j < kHidden; ++j)
        for (std::int64_t d = 0; d < 16; ++d) {
          const double part = static_cast<double>(h[t * kHidden + j]) * ffn.view().down(d, j);
          output[layer.expert_of_neuron[j]][d] += part;
          output[4][d] += part;
        }
      for (std::int64_t e = 0; e < 4; ++e)
        for (std::int64_t d = 0; d < 16; ++d) {
          // E = 4, K = 1: the label compares with a quarter of the teacher.
          const double target = router == BaselineRouter::kOracleLabel ? output[4][d] / 4.0 : 0.0;
          const double off = output[e][d] - target;
          score[e] += router == BaselineRouter::kOracleLabel ? -off * off : off * off;
        }
      const auto best = std::max_element(score.begin(), score.end()) - score.begin();
      for (std::int64_t e = 0; e < 4; ++e) EXPECT_EQ(on[t * 4 + e], e == best ? 1 : 0) << t;
    }
  }
}

TEST_F(Baselines, TheResultDoesNotDependOnTheThreads) {
  Model one = Model::load(Checkpoint::open(dir_.path() / "dense"), {.threads = 1});
  Model three = Model::load(Checkpoint::open(dir_.path() / "dense"), {.threads = 3});
  const auto specs = baseline_specs(BaselineSet::kAll, kHidden, 0.5, 3);
  const auto a = prepare_baselines(one, text_, specs), b = prepare_baselines(three, text_, specs);
  for (std::size_t i = 0; i < specs.size(); ++i) {
    EXPECT_EQ(a[i].layers[1].expert_of_neuron, b[i].layers[1].expert_of_neuron) << specs[i].method;
    EXPECT_EQ(a[i].layers[1].representatives, b[i].layers[1].representatives) << specs[i].method;
  }
}

TEST_F(Baselines, ARegressionRowChoosesByItsRouter) {
  Model model = dense();
  const auto specs = baseline_specs(BaselineSet::kAll, kHidden, 0.5, 3);
  const BaselineSpec& spec = named(specs, "k-means on gate rows, E 32, regression MLP router");
  EXPECT_FALSE(spec.deployable);
  std::vector<BaselineSpec> budgets = {spec, spec};  // of one partition: one router
  budgets[1].experts_per_token = 4;
  const auto baselines = prepare_baselines(model, text_, budgets);
  const BaselineLayer& layer = baselines[0].layers[1];
  EXPECT_EQ(layer.regression.weight, baselines[1].layers[1].regression.weight);
  EXPECT_NE(layer.regression.weight, baselines[0].layers[0].regression.weight);
  EXPECT_LE(baselines[1].layers[1].quality->recall, 1.0);
  EXPECT_NE(layer.quality->recall, baselines[1].layers[1].quality->recall);

  const DenseFfn ffn = model.dense_ffn(1);
  const auto x = testing::random_values(5 * 16, 3, 1.0);
  std::vector<float> h(5 * kHidden), scores(5 * 32);
  hidden_activations(ffn.view(), {x.data(), 5, 16}, {h.data(), 5, kHidden}, {}, {});
  std::vector<std::uint8_t> on(5 * 32);
  MaskedFfn(ffn, spec, layer).choose({x.data(), 5, 16}, {h.data(), 5, kHidden}, on.data(), {});
  regression_scores(layer.regression, {x.data(), 5, 16}, {scores.data(), 5, 32}, {});
  for (std::int64_t t = 0; t < 5; ++t)
    for (std::int64_t e = 0; e < 32; ++e) {
      std::int64_t above = 0;
      for (std::int64_t other = 0; other < 32; ++other)
        above += scores[t * 32 + other] > scores[t * 32 + e] ? 1 : 0;
      EXPECT_EQ(on[t * 32 + e], above < spec.experts_per_token ? 1 : 0) << t << " " << e;
    }
  const double router = 128.0 * (16 + 32) / (3.0 * kHidden * 16);
  EXPECT_NEAR(baseline_active_share(spec, kHidden, 16), spec.rho + router, 1e-12);
}

TEST_F(Baselines, RefusesWhatMakesNoSense) {
  Model model = dense();
  EXPECT_THROW(baseline_specs(BaselineSet::kAll, kHidden, 0.0), InvalidArgument);
  EXPECT_THROW(baseline_specs(BaselineSet::kAll, kHidden, 1.5), InvalidArgument);
  EXPECT_THROW(baseline_specs(BaselineSet::kQuick, 8, 0.5), InvalidArgument);
  EXPECT_TRUE(baseline_specs(BaselineSet::kNone, kHidden, 0.5).empty());
  EXPECT_FALSE(parse_baseline_set("some"));
  EXPECT_EQ(parse_baseline_set("quick"), BaselineSet::kQuick);
  const auto quick = baseline_specs(BaselineSet::kQuick, kHidden, 0.5);
  BaselineSpec spec = named(quick, "half shared, k-means width 2, ridge router, compensation");
  EXPECT_THROW(prepare_baselines(model, {{1, 2, 3}, 4}, {&spec, 1}), InvalidArgument);
  spec.num_experts = 7;
  EXPECT_THROW(prepare_baselines(model, text_, {&spec, 1}), InvalidArgument);
  BaselineSpec refitted = named(quick, "static mask, refitted");
  refitted.compensate = true;
  EXPECT_THROW(prepare_baselines(model, text_, {&refitted, 1}), InvalidArgument);
  Baseline short_of_layers{spec, {}};
  EXPECT_THROW(baseline_states(model, short_of_layers, text_), InvalidArgument);
}

TEST_F(Baselines, BudgetsAreWhatTheRowsSay) {
  for (const double rho : {0.75, 0.5, 0.25})
    for (const BaselineSpec& spec : baseline_specs(BaselineSet::kAll, 1536, rho)) {
      SCOPED_TRACE(fmt::format("{} {}", spec.method, rho));
      EXPECT_NEAR(spec.rho, rho, 1e-12);
      const double routed = spec.num_experts == 0
                                ? 0.0
                                : static_cast<double>((1536 - spec.shared) / spec.num_experts *
                                                      spec.experts_per_token);
      EXPECT_EQ(static_cast<double>(spec.shared) + routed, rho * 1536);
      EXPECT_EQ(spec.deployable, spec.method.find("oracle") == std::string::npos &&
                                     spec.method.find("MLP") == std::string::npos &&
                                     spec.method.find("mass") == std::string::npos);
      EXPECT_GE(baseline_active_share(spec, 1536, 576), rho);
    }
  const auto specs = baseline_specs(BaselineSet::kAll, 1536, 0.75);
  EXPECT_EQ(specs[0].method, "CMoE S3A3E8");
  EXPECT_EQ(specs[1].method, "CMoE S6A6E16");
  // An H that nothing divides: budgets are rounded, the rows still fit.
  for (const BaselineSpec& spec : baseline_specs(BaselineSet::kAll, 1543, 0.5)) {
    if (spec.num_experts == 0) continue;
    EXPECT_EQ((1543 - spec.shared) % spec.num_experts, 0) << spec.method;
  }
}

TEST(CmoeClusters, FindsPlantedGroupsAndEqualCapacities) {
  // Three groups of four neurons, each active on its own tokens; one of each is active more often.
  ActivationColumns columns{60, std::vector<std::vector<std::int32_t>>(12)};
  for (std::int32_t j = 0; j < 12; ++j)
    for (std::int32_t t = 0; t < 20 - (j / 3); ++t) columns.tokens[j].push_back(j % 3 * 20 + t);
  const CmoePartition split = cmoe_clusters(columns, {.num_experts = 3, .iterations = 1});
  const std::vector<std::int32_t>& expert = split.partition.expert_of_neuron;
  for (std::int32_t j = 3; j < 12; ++j) EXPECT_EQ(expert[j], expert[j % 3]);
  EXPECT_NE(expert[0], expert[1]);
  EXPECT_NE(expert[1], expert[2]);
  for (std::int32_t e = 0; e < 3; ++e) {
    EXPECT_EQ(std::count(expert.begin(), expert.end(), e), 4);
    EXPECT_EQ(expert[split.representative[e]], e);
  }
}

TEST(CmoeClusters, CountTheTenLargest) {
  ActivationColumns columns;
  auto values = testing::random_values(7 * 40, 5, 1.0);
  add_activations({values.data(), 7, 40}, {}, kCmoeTopNeurons, columns);
  EXPECT_EQ(columns.num_tokens, 7);
  for (std::int32_t t = 0; t < 7; ++t) {
    int marked = 0;
    float least = 1e30f, most_other = 0.0f;
    for (std::int32_t j = 0; j < 40; ++j) {
      const auto& tokens = columns.tokens[j];
      const bool is = std::find(tokens.begin(), tokens.end(), t) != tokens.end();
      marked += is ? 1 : 0;
      const float size = std::abs(values[t * 40 + j]);
      if (is)
        least = std::min(least, size);
      else
        most_other = std::max(most_other, size);
    }
    EXPECT_EQ(marked, 10);
    EXPECT_GE(least, most_other);
  }
}

// A trained model, however small: what must hold for any.
TEST(BaselinesOfTheDemoModel, StandInTheExpectedOrder) {
  const Checkpoint checkpoint = Checkpoint::open(demo_llama_dir());
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(checkpoint);
  const std::string sample = (demo_llama_dir() / "sample.txt").string();
  const TokenWindows text = make_windows(tokenizer.encode(read_text(sample)), 128, 512, sample);
  Model model = Model::load(checkpoint, {.threads = 2});
  const HiddenStates dense = hidden_states(model, text);
  const auto specs = baseline_specs(BaselineSet::kAll, 512, 0.5);
  std::vector<std::string> seen;
  const auto rows = measure_baselines(model, prepare_baselines(model, text, specs), text, dense,
                                      [&](const std::string& what, std::int64_t, std::int64_t all) {
                                        seen.push_back(what);
                                        EXPECT_EQ(all, static_cast<std::int64_t>(specs.size()));
                                      });
  EXPECT_EQ(seen.size(), specs.size());
  std::map<std::string, double> kl, recall, captured;
  for (const QualityRow& row : rows) {
    SCOPED_TRACE(row.method);
    EXPECT_TRUE(std::isfinite(row.kl) && row.kl > 0.0);
    EXPECT_TRUE(std::isfinite(row.perplexity) && row.perplexity > 1.0);
    kl[row.method] = row.kl;
    EXPECT_EQ(row.stock, row.method.find("MLP") == std::string::npos &&
                             row.method.find("mass") == std::string::npos);
    ASSERT_EQ(row.router.has_value(), row.routed);
    EXPECT_EQ(row.router_share > 0.0, row.routed && row.method.find("oracle") == std::string::npos);
    if (row.router) {
      recall[row.method] = row.router->recall;
      captured[row.method] = row.router->captured;
    }
    RecordProperty(row.method, fmt::format("{:.4f}", row.kl));
  }
  for (const auto& [method, value] : kl) EXPECT_LE(kl.at("neuron oracle"), value) << method;
  EXPECT_LT(kl.at("random split, E 8, oracle router"), kl.at("random split, E 8, random router"));
  for (const auto& [method, value] : recall) {
    SCOPED_TRACE(method);
    if (method.find("oracle") != std::string::npos && method.find("label") == std::string::npos) {
      EXPECT_EQ(value, 1.0);
      EXPECT_EQ(captured.at(method), 1.0);
      continue;
    }
    EXPECT_LT(captured.at(method), 1.0);
    EXPECT_GT(captured.at(method), value);
    const BaselineSpec& spec = named(specs, method);
    const double chance =
        static_cast<double>(spec.experts_per_token) / static_cast<double>(spec.num_experts);
    if (method == "random split, E 8, random router")
      EXPECT_NEAR(value, chance, 0.05);
    else
      EXPECT_GT(value, chance);
  }
  EXPECT_GT(captured.at("k-means on gate rows, E 8, mass router of rank 32"),
            captured.at("random split, E 8, random router") + 0.1);
  // With the same experts, a router of more layers is nearer to what they do.
  EXPECT_GT(recall.at("k-means on gate rows, E 32, regression MLP router"),
            recall.at("k-means on gate rows, E 32, ridge router"));
  EXPECT_GT(recall.at("half shared, k-means width 16, regression MLP router"),
            recall.at("half shared, k-means width 16, ridge router"));
}

}  // namespace
}  // namespace cleave
