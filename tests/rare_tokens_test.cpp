// Text for the first layers: tokens that the calibration text lacks.

#include "rare_tokens.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "cleave/convert.h"
#include "cleave/error.h"
#include "support/budget.h"
#include "support/tiny_encoder.h"

namespace cleave {
namespace {

using RareTokens = testing::BudgetTest;

std::set<std::int32_t> tokens_of(const TokenWindows& text) {
  return {text.tokens.begin(), text.tokens.end()};
}

/// Of the windows' tokens, those that are not the text's, with how often they come.
std::map<std::int32_t, int> replaced(const TokenWindows& windows, const TokenWindows& text) {
  std::map<std::int32_t, int> count;
  for (std::size_t i = 0; i < windows.tokens.size(); ++i)
    if (windows.tokens[i] != text.tokens[i]) ++count[windows.tokens[i]];
  return count;
}

TEST_F(RareTokens, ReplaceFourTenthsByWhatTheTextLacks) {
  Model model = Model::load(source_);
  const TokenWindows windows = rare_token_windows(model, calibration_, 2, 1);
  ASSERT_EQ(windows.count(), 2);
  ASSERT_EQ(windows.context, calibration_.context);
  const std::set<std::int32_t> seen = tokens_of(calibration_);
  int places = 0, least = 1 << 30, most = 0;
  for (const auto& [token, times] : replaced(windows, calibration_)) {
    EXPECT_FALSE(seen.contains(token)) << token;
    places += times;
    least = std::min(least, times);
    most = std::max(most, times);
  }
  for (std::int64_t w = 0; w < 2; ++w)
    EXPECT_EQ(windows.window(w)[0], calibration_.window(w)[0]) << "a window's first token";
  const double n = static_cast<double>(windows.tokens.size()), p = kRareTokens;
  EXPECT_NEAR(places, p * n, 5 * std::sqrt(n * p * (1 - p)) + 2);  // five deviations
  EXPECT_LE(most, least + 1) << "one came again before all had come";
}

TEST_F(RareTokens, LeaveSpecialTokensAroundATextAlone) {
  Model model = Model::load(source_);
  TokenWindows framed = calibration_;
  framed.before = 5;
  framed.after = 7;
  const TokenWindows windows = rare_token_windows(model, framed, 2, 1);
  EXPECT_EQ(windows.before, 5);
  EXPECT_EQ(windows.after, 7);
  EXPECT_FALSE(replaced(windows, framed).empty());
  for (std::int64_t w = 0; w < windows.count(); ++w) {
    const auto is = windows.window(w), was = framed.window(w);
    EXPECT_TRUE(std::equal(is.begin(), is.begin() + 5, was.begin()));
    EXPECT_TRUE(std::equal(is.end() - 7, is.end(), was.end() - 7));
  }
}

TEST_F(RareTokens, AreNoneWhereTheTextHasTheWholeVocabulary) {
  Model model = Model::load(source_);
  TokenWindows all;
  all.context = calibration_.context;
  const auto V = static_cast<std::int32_t>(model.config().vocab_size);
  for (std::int32_t t = 0; static_cast<std::int64_t>(all.tokens.size()) % all.context != 0 || t < V;
       ++t)
    all.tokens.push_back(t % V);
  EXPECT_EQ(rare_token_windows(model, all, 3, 1).count(), 0);
}

TEST_F(RareTokens, TheFirstLayerLosesLessOfThem) {
  Model model = Model::load(source_);
  // Other places and another order than what the conversion sees.
  const TokenWindows unseen = rare_token_windows(model, calibration_, 2, 99);
  std::vector<float> x;
  ForwardHooks hooks;
  hooks.ffn_input = [&](std::int64_t layer, MatrixView<const float> rows) {
    if (layer == 0) x.insert(x.end(), rows.data, rows.data + rows.rows * rows.cols);
  };
  const std::int64_t D = model.config().hidden_size;
  for (std::int64_t w = 0; w < unseen.count(); ++w) {
    KvCache cache(model.config(), unseen.context);
    std::vector<float> hidden(static_cast<std::size_t>(unseen.context * D));
    model.forward(unseen.window(w), cache, {hidden.data(), unseen.context, D}, hooks);
  }
  const MatrixView<const float> input(x.data(), static_cast<std::int64_t>(x.size()) / D, D);
  const DenseFfn dense = model.dense_ffn(0);
  std::vector<float> expected(x.size(), 0.0f);
  dense_ffn(dense.view(), input, {expected.data(), input.rows, D}, {});
  const auto error = [&](double rare_tokens) {
    BudgetSpec spec = budget(0.5);
    spec.rare_tokens = rare_tokens;
    const Conversion conversion = convert_to_budget(source_, spec, calibration_);
    std::vector<float> y(x.size(), 0.0f);
    conversion.layers[0].forward(input, {y.data(), input.rows, D}, {});
    double sum = 0.0;
    for (std::size_t i = 0; i < y.size(); ++i) sum += (y[i] - expected[i]) * (y[i] - expected[i]);
    return sum;
  };
  EXPECT_LT(error(0.4), 0.9 * error(0.0));
}

TEST_F(RareTokens, AreNotPartOfWhatIsReported) {
  const auto convert = [&](double rare_tokens) {
    BudgetSpec spec = budget(0.5);
    spec.rare_tokens = rare_tokens;
    return convert_to_budget(source_, spec, calibration_);
  };
  const Conversion with = convert(0.4), without = convert(0.0);
  EXPECT_EQ(with.calibration_tokens, without.calibration_tokens);
  for (const std::vector<double>& load : with.expert_load) {
    double sum = 0.0;  // K of them a token
    for (const double share : load) sum += share;
    EXPECT_NEAR(sum, static_cast<double>(with.layers[0].experts_per_token), 1e-9);
  }
  EXPECT_NE(with.layers[0].experts.down_t, without.layers[0].experts.down_t);
}

TEST_F(RareTokens, RefuseATokenThatTheModelLacks) {
  Model model = Model::load(source_);
  for (const std::int32_t bad : {-1, static_cast<std::int32_t>(model.config().vocab_size)}) {
    TokenWindows text = calibration_;
    text.tokens[5] = bad;
    EXPECT_THROW(rare_token_windows(model, text, 1, 1), InvalidArgument) << bad;
  }
}

TEST_F(RareTokens, RefusesAShareThatIsNone) {
  for (const double share : {-0.1, 1.5, std::nan("")}) {
    BudgetSpec spec = budget(0.5);
    spec.rare_tokens = share;
    EXPECT_THROW(convert_to_budget(source_, spec, calibration_), InvalidArgument) << share;
  }
}

// The size of an embedding says whether a token was trained; that of its sum with a position's row
// says nothing. The vocabulary (64) is larger than the number of positions (40).
TEST(RareTokensOfAnEncoder, GoByTheEmbeddingAlone) {
  const Checkpoint source = Checkpoint::open(testing::tiny_encoder_dir());
  Model model = Model::load(source);
  const std::int64_t V = model.config().vocab_size, D = model.config().hidden_size;
  ASSERT_GT(V, model.config().max_position_embeddings);
  TokenWindows text;
  text.context = 20;
  text.before = text.after = 1;
  for (std::int32_t i = 0; i < 100 * 20; ++i) text.tokens.push_back(10 + i % 7);
  const std::vector<float> rows = source.read("embeddings.word_embeddings.weight");
  std::vector<double> square(static_cast<std::size_t>(V), 0.0);
  for (std::size_t i = 0; i < rows.size(); ++i) square[i / D] += double{rows[i]} * rows[i];
  const auto [least, most] = std::minmax_element(square.begin() + 10, square.begin() + 17);
  std::set<std::int32_t> expected, actual;
  for (std::int32_t t = 0; t < V; ++t)
    if ((t < 10 || t > 16) && square[t] > *least && square[t] < *most) expected.insert(t);
  ASSERT_GT(expected.size(), 5u);
  ASSERT_LT(expected.size(), 52u);
  for (const auto& [token, times] : replaced(rare_token_windows(model, text, 100, 1), text))
    actual.insert(token);
  EXPECT_EQ(actual, expected);
}

}  // namespace
}  // namespace cleave
