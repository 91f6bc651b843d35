// What is measured by KL of a decoder is measured by distances of an encoder's hidden states:
// evaluation, choices, baselines, report.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "budget_layer.h"
#include "cleave/baselines.h"
#include "cleave/convert.h"
#include "cleave/error.h"
#include "cleave/evaluate.h"
#include "cleave/export.h"
#include "cleave/report.h"
#include "cleave/self_text.h"
#include "hidden_distance.h"
#include "support/paths.h"
#include "support/tiny_encoder.h"
#include "support/tiny_models.h"
#include "window_stream.h"

namespace cleave {
namespace {

using namespace testing;

TEST(HiddenDistance, IsOneLessTheCosine) {
  const float x[] = {3, 4}, along[] = {30, 40}, across[] = {-4, 3}, against[] = {-0.3f, -0.4f};
  const float between[] = {4, 3}, zero[] = {0, 0};
  EXPECT_EQ(cosine_distance(x, x, 2), 0.0);
  EXPECT_EQ(cosine_distance(x, along, 2), 0.0);
  EXPECT_EQ(cosine_distance(x, across, 2), 1.0);
  EXPECT_NEAR(cosine_distance(x, against, 2), 2.0, 1e-15);
  EXPECT_NEAR(cosine_distance(x, between, 2), 0.04, 1e-15);  // 1 - 24 / 25
  EXPECT_EQ(cosine_distance(zero, zero, 2), 0.0);
  EXPECT_EQ(cosine_distance(x, zero, 2), 1.0);
  const float broken[] = {NAN, 1}, large[] = {3e38f, 3e38f}, small[] = {1e-45f, 1e-45f};
  EXPECT_TRUE(std::isnan(cosine_distance(x, broken, 2)));
  EXPECT_EQ(cosine_distance(large, small, 2), 0.0);
}

TEST(HiddenDistance, OfAWindowIsSummedOrPooled) {
  const std::vector<float> a = {3, 4, 0, 1}, b = {4, 3, 1, 0};  // two tokens of two values
  EXPECT_NEAR(summed_distance({a.data(), 2, 2}, {b.data(), 2, 2}), 0.04 + 1.0, 1e-15);
  // Sums (3, 5) and (5, 3): 1 - 30 / 34.
  EXPECT_NEAR(pooled_distance({a.data(), 2, 2}, {b.data(), 2, 2}), 4.0 / 34.0, 1e-15);
  EXPECT_EQ(pooled_distance({a.data(), 2, 2}, {a.data(), 2, 2}), 0.0);
}

constexpr std::int64_t kContext = 20, kVocab = 64;

TokenWindows random_text(std::int64_t windows, unsigned seed) {
  std::mt19937 rng(seed);
  TokenWindows text{{}, kContext};
  for (std::int64_t i = 0; i < windows * kContext; ++i)
    text.tokens.push_back(static_cast<std::int32_t>(rng() % kVocab));
  return text;
}

Model encoder() { return Model::load(Checkpoint::open(tiny_encoder_dir()), {.threads = 2}); }

/// Budgets of H = 40: experts of 4 neurons.
BudgetSpec small_budget(double active_share = 0.5) {
  BudgetSpec spec;
  spec.active_share = active_share;
  spec.expert_width = 4;
  spec.threads = 2;
  return spec;
}

Model converted(const BudgetSpec& spec, const TokenWindows& text) {
  const Checkpoint source = Checkpoint::open(tiny_encoder_dir());
  const Conversion conversion = convert_to_budget(source, spec, text);
  Model model = Model::load(source, {.threads = 2});
  for (std::size_t l = 0; l < conversion.layers.size(); ++l)
    model.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
  return model;
}

TEST(EvaluateEncoder, MatchesPlainSumsOverTheHiddenStates) {
  const TokenWindows text = random_text(3, 1);
  Model dense = encoder(), model = converted(small_budget(), random_text(20, 2));
  const EvalResult result = evaluate(model, text, &dense);
  const std::int64_t D = dense.config().hidden_size;
  double cosine = 0.0, pooled = 0.0;
  for (std::int64_t w = 0; w < 3; ++w) {
    const std::vector<float> a = hidden_of(dense, text.window(w)),
                             b = hidden_of(model, text.window(w));
    cosine += summed_distance({a.data(), kContext, D}, {b.data(), kContext, D});
    pooled += pooled_distance({a.data(), kContext, D}, {b.data(), kContext, D});
  }
  EXPECT_FALSE(result.has_head);
  EXPECT_NEAR(result.cosine_distance, cosine / (3 * kContext), 1e-12);
  EXPECT_NEAR(result.pooled_distance, pooled / 3, 1e-12);
  EXPECT_GT(result.cosine_distance, 1e-3);
  EXPECT_EQ(result.divergence(), result.cosine_distance);
  EXPECT_EQ(result.predicted_tokens, 0);
  EXPECT_EQ(result.tokens, 3 * kContext);
  EXPECT_GT(result.tokens_per_s, 0.0);
  EXPECT_EQ(result.kl, 0.0);
}

TEST(EvaluateEncoder, AModelIsAtNoDistanceFromItself) {
  Model dense = encoder(), same = encoder();
  const TokenWindows text = random_text(2, 3);
  double so_far = 1.0;
  const EvalResult result = evaluate(
      same, text, &dense, [&](std::int64_t, std::int64_t, double distance) { so_far = distance; });
  EXPECT_EQ(result.cosine_distance, 0.0);
  EXPECT_EQ(result.pooled_distance, 0.0);
  EXPECT_EQ(so_far, 0.0);
  const HiddenStates states = hidden_states(dense, text);
  const EvalResult kept =
      evaluate(dense, text, {.reference = &dense, .reference_states = &states, .states = &states});
  EXPECT_EQ(kept.divergence(), 0.0);
  EXPECT_EQ(kept.tokens_per_s, 0.0);  // nothing ran
}

TEST(EvaluateEncoder, ScalingTheHiddenStatesChangesNothing) {
  Model dense = encoder();
  const TokenWindows text = random_text(2, 4), other = random_text(2, 5);
  const HiddenStates reference = hidden_states(dense, text);
  HiddenStates states = hidden_states(dense, other);
  const auto measured = [&] {
    return evaluate(dense, text,
                    {.reference = &dense, .reference_states = &reference, .states = &states});
  };
  const EvalResult plain = measured();
  for (float& value : states.values) value *= 4.0f;  // exact
  const EvalResult scaled = measured();
  EXPECT_GT(plain.cosine_distance, 0.01);
  EXPECT_NEAR(scaled.cosine_distance, plain.cosine_distance, 1e-14);
  EXPECT_NEAR(scaled.pooled_distance, plain.pooled_distance, 1e-14);
}

TEST(EvaluateEncoder, RefusesWhatCannotBeCompared) {
  Model model = encoder();
  Model decoder = Model::load(Checkpoint::open(tiny_golden("llama").directory), {.threads = 1});
  const TokenWindows text = random_text(1, 6);
  EXPECT_THROW(evaluate(model, text), InvalidArgument);  // no perplexity
  EXPECT_THROW(evaluate(model, text, &decoder), InvalidArgument);
  EXPECT_THROW(evaluate(decoder, text, &model), InvalidArgument);
  EXPECT_THROW(self_generated_text(model, {.windows = 1, .context = 8}), InvalidArgument);
}

TEST(ConvertEncoder, RefitRepairsAndAllExpertsAreTheDenseModel) {
  const TokenWindows text = random_text(40, 7), held_out = random_text(4, 8);
  Model dense = encoder();
  const auto distance = [&](const BudgetSpec& spec) {
    Model model = converted(spec, text);
    return evaluate(model, held_out, &dense).divergence();
  };
  BudgetSpec unrepaired = small_budget();
  unrepaired.refit = false;
  EXPECT_LT(distance(small_budget()), 0.9 * distance(unrepaired));
  BudgetSpec whole = small_budget(1.0);
  whole.shared_share = 0.5;
  EXPECT_LT(distance(whole), 1e-6);
}

/// As it is read again from disk.
Model written(const BudgetSpec& spec, const TokenWindows& text) {
  const Checkpoint source = Checkpoint::open(tiny_encoder_dir());
  const TempDir dir;
  write_conversion(dir.path() / "out", source, convert_to_budget(source, spec, text), "{}",
                   {.dtype = DType::kF32});
  return Model::load(Checkpoint::open(dir.path() / "out"), {.threads = 2});
}

/// What the FFN of layer 0 gives beyond `bias` on what a dense model's layer 0 reads: [T, D].
std::vector<float> first_output(const Model& model, bool routed, MatrixView<const float> x,
                                const std::vector<float>& bias, const ParallelFor& parallel) {
  std::vector<float> result(static_cast<std::size_t>(x.rows * x.cols));
  const MatrixView<float> y(result.data(), x.rows, x.cols);
  if (routed)
    model.moe_layer(0).forward(x, y, parallel);
  else
    dense_ffn(model.dense_ffn(0).view(), x, y, parallel);
  for (std::int64_t t = 0; t < y.rows; ++t)
    for (std::int64_t d = 0; d < y.cols; ++d) y(t, d) -= bias[d];
  return result;
}

TEST(ConvertEncoder, TheOutputBiasGivesTheMeanOfWhatIsLost) {
  const TokenWindows text = random_text(40, 9);
  Model dense = encoder();
  const ParallelFor parallel = dense.parallel();
  // What layer 0 reads is the same in both, so the weighted means of its outputs must be.
  WindowStream stream(dense, text);
  const std::int64_t T = stream.tokens(), D = dense.config().hidden_size;
  std::vector<float> input(T * D);
  const MatrixView<float> x(input.data(), T, D);
  stream.attend(0, x);
  const std::vector<float> bias = dense.dense_ffn(0).down_bias;
  std::vector<float> of_dense = first_output(dense, false, x, bias, parallel);
  const MatrixView<float> y(of_dense.data(), T, D);
  const std::vector<float> weight = token_weights(stream.rows(), y, kContext, 1.0, 0);
  const auto check = [&](const BudgetSpec& spec, const char* name) {
    // Not from disk where experts are chosen: a rounded router may choose others for a token.
    const bool routed = spec.shared_share < 1.0;
    const Model model = routed ? converted(spec, text) : written(spec, text);
    std::vector<float> of_model = first_output(model, routed, x, bias, parallel);
    const MatrixView<float> z(of_model.data(), T, D);
    for (const float value : mean_difference(y, z, weight)) EXPECT_NEAR(value, 0.0f, 1e-5f) << name;
    // Without it, the means differ.
    const std::vector<float> stored =
        routed ? model.moe_layer(0).experts.down_bias : model.dense_ffn(0).down_bias;
    float largest = 0.0f;
    for (std::int64_t d = 0; d < D; ++d) largest = std::max(largest, std::abs(stored[d] - bias[d]));
    EXPECT_GT(largest, spec.refit ? 1e-3f : 1e-2f) << name;
  };
  BudgetSpec spec = small_budget(), unrepaired = spec, parallel_mode = spec, rounds = spec;
  unrepaired.refit = false;
  parallel_mode.calibration_mode = CalibrationMode::kParallel;
  rounds.refit_rounds = 2;
  BudgetSpec pruned = unrepaired, refitted = spec;
  pruned.shared_share = refitted.shared_share = 1.0;
  check(spec, "default");
  check(unrepaired, "without refit");
  check(parallel_mode, "parallel");
  check(rounds, "two rounds");
  check(pruned, "pruned");
  check(refitted, "pruned and refitted");
}

TEST(ConvertEncoder, EveryPartitionAndRouterDoesWithoutAGate) {
  const TokenWindows text = random_text(20, 10), held_out = random_text(2, 11);
  Model dense = encoder();
  const auto check = [&](const BudgetSpec& spec, const char* name) {
    Model model = converted(spec, text);
    const EvalResult result = evaluate(model, held_out, &dense);
    EXPECT_GT(result.divergence(), 0.0) << name;
    EXPECT_LT(result.divergence(), 0.9) << name;
    EXPECT_EQ(result.active_experts, 2.0) << name;
  };
  for (const char* name : {"captured", "profiles", "kmeans", "coactivation", "cmoe", "expertweaver",
                           "importance", "contiguous", "random"}) {
    BudgetSpec spec = small_budget();
    spec.partition = *parse_budget_partition(name);
    check(spec, name);
  }
  for (const char* name :
       {"trained", "ridge", "logistic", "low-rank", "mean-gate", "representative"}) {
    BudgetSpec spec = small_budget();
    spec.router_method = *parse_router_method(name);
    check(spec, name);
  }
}

TEST(ConvertEncoder, AllocationGoesByTheCosineDistance) {
  const TokenWindows text = random_text(40, 12);
  BudgetSpec spec = small_budget();
  spec.allocation = Allocation::kKl;
  const Conversion conversion = convert_to_budget(Checkpoint::open(tiny_encoder_dir()), spec, text);
  ASSERT_TRUE(conversion.allocation.has_value());
  for (const double cost : conversion.allocation->layer_kl) {
    EXPECT_GT(cost, 0.0);
    EXPECT_LT(cost, 1.0);
  }
  EXPECT_GT(*conversion.allocation->candidates[conversion.allocation->chosen].kl, 0.0);
}

class ReportOfAnEncoder : public ::testing::Test {
 protected:
  ConversionReport report(BaselineSet set) {
    const TokenWindows calibration = random_text(40, 13);
    Model dense = encoder();
    const std::vector<BaselineSpec> specs = baseline_specs(set, 40, 0.5);
    const std::vector<Baseline> baselines = prepare_baselines(dense, calibration, specs);
    ConversionReport report;
    report.has_head = false;
    TextReport text{"random", 4, kContext, 4 * kContext, {}};
    const TokenWindows held_out = random_text(4, 14);
    text.rows = measure_baselines(dense, baselines, held_out, hidden_states(dense, held_out));
    report.texts.push_back(std::move(text));
    return report;
  }
};

TEST_F(ReportOfAnEncoder, EveryBaselineRunsOnTwoMatricesWithBiases) {
  const ConversionReport all = report(BaselineSet::kAll);
  EXPECT_EQ(all.texts[0].rows.size(), baseline_specs(BaselineSet::kAll, 40, 0.5).size());
  for (const QualityRow& row : all.texts[0].rows) {
    EXPECT_FALSE(row.has_head);
    EXPECT_GT(row.cosine_distance, 0.0) << row.method;
    EXPECT_LT(row.cosine_distance, 1.5) << row.method;
    EXPECT_GT(row.pooled_distance, 0.0) << row.method;
    if (row.method == "random split, E 8, ridge router") {
      EXPECT_NEAR(row.router_share, 8.0 * 24 / (2.0 * 40 * 24), 1e-12);
    }
  }
}

TEST(EncoderReport, TheRefittedMaskIsTheConversionInWhichAllIsShared) {
  const TokenWindows calibration = random_text(40, 15), held_out = random_text(4, 16);
  Model dense = encoder();
  std::vector<BaselineSpec> specs = baseline_specs(BaselineSet::kQuick, 40, 0.5);
  std::erase_if(specs, [](const auto& spec) { return spec.method != "static mask, refitted"; });
  ASSERT_EQ(specs.size(), 1u);
  const std::vector<QualityRow> rows =
      measure_baselines(dense, prepare_baselines(dense, calibration, specs), held_out,
                        hidden_states(dense, held_out));
  BudgetSpec spec = small_budget();
  spec.shared_share = 1.0;
  Model pruned = written(spec, calibration);
  const double distance = evaluate(pruned, held_out, &dense).divergence();
  EXPECT_GT(distance, 1e-3);
  EXPECT_NEAR(rows.at(0).cosine_distance, distance, 1e-4 * distance);
}

TEST(EncoderReport, NamesTheCosineDistance) {
  ConversionReport report;
  report.model = "moe";
  report.has_head = false;
  report.rho = 0.5;
  TextReport text{"wiki", 2, 8, 16, {}};
  const auto add = [&](const char* method, double distance, bool ours) {
    QualityRow row;
    row.method = method;
    row.rho = row.active_share = 0.5;
    row.has_head = false;
    row.cosine_distance = distance;
    row.pooled_distance = distance / 2;
    row.ours = row.routed = ours;
    text.rows.push_back(row);
  };
  add("dense", 0.0, false);
  text.rows[0].rho = text.rows[0].active_share = 1.0;
  add("this conversion", 0.125, true);
  add("static mask", 0.25, false);
  text.sweep = {{{}, 4, 0.25, 0.26}, {{}, 8, 0.5, 0.51}};
  for (ActivePoint& point : text.sweep) point.has_head = false, point.cosine_distance = 0.5;
  report.texts = {text};
  EXPECT_EQ(verdict(report),
            "This conversion beats static pruning on every text: at 50 % of the FFN its cosine "
            "distance is 0.125 against 0.250 of static mask on wiki.");
  const std::string markdown = report_markdown(report), html = report_html(report);
  EXPECT_NE(markdown.find("| method | kind | rho | FFN multiply-adds | cosine distance | pooled |\n"
                          "|---|---|---|---|---|---|\n"),
            std::string::npos);
  EXPECT_NE(markdown.find("| static mask | pruning | 0.5 | 50 % | 0.2500 | 0.1250 |"),
            std::string::npos);
  EXPECT_NE(markdown.find("| 8 | 0.5 | 51 % | 0.5000 | 0.0000 |"), std::string::npos);
  EXPECT_NE(html.find("<th>cosine distance</th><th>pooled</th></tr>"), std::string::npos);
  EXPECT_NE(html.find(">cosine distance to the dense model<"), std::string::npos);
  EXPECT_NE(html.find("<title>static mask: cosine distance 0.250</title>"), std::string::npos);
  for (const std::string& out : {markdown, html, verdict(report)})
    for (const char* of_a_head : {"KL", "perplexity", "top-1", "nats"})
      EXPECT_EQ(out.find(of_a_head), std::string::npos) << of_a_head;
  const auto json = nlohmann::json::parse(report_json(report));
  const auto& row = json.at("texts")[0].at("rows")[1];
  EXPECT_EQ(row.at("cosine_distance"), 0.125);
  EXPECT_EQ(row.at("pooled_distance"), 0.0625);
  EXPECT_EQ(json.at("texts")[0].at("sweep")[1].at("cosine_distance"), 0.5);
  for (const char* of_a_head : {"kl", "perplexity", "top1_agreement"})
    EXPECT_FALSE(row.contains(of_a_head)) << of_a_head;
  // Alone, the measure begins the line.
  report.texts[0].rows.resize(2);
  EXPECT_EQ(verdict(report).rfind("Cosine distance 0.125 on wiki at 50 % of the FFN; ", 0), 0u);
}

}  // namespace
}  // namespace cleave
