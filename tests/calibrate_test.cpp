#include "cleave/calibrate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>
#include <numeric>
#include <string>

#include "cleave/error.h"
#include "neuron_stats.h"
#include "support/random_ffn.h"
#include "support/thread_pool.h"
#include "support/tiny_model.h"

namespace cleave {
namespace {

using testing::random_ffn;
using testing::random_values;

constexpr std::int64_t kStatsHidden = 150, kStatsWidth = 9,
                       kStatsTop = 4;  // more than two panels of a SymmetricSum

NeuronStatsSpec full_spec() {
  return {.num_layers = 3,
          .hidden = kStatsHidden,
          .d_model = kStatsWidth,
          .top = kStatsTop,
          .input_moment = true,
          .gram = true,
          .coactivation = true};
}

struct Tokens {
  std::int64_t count = 0;
  std::vector<float> hidden, input, weights;
  MatrixView<const float> h() const { return {hidden.data(), count, kStatsHidden}; }
  MatrixView<const float> x() const { return {input.data(), count, kStatsWidth}; }
  Tokens part(std::int64_t begin, std::int64_t end) const {
    return {end - begin,
            {hidden.begin() + begin * kStatsHidden, hidden.begin() + end * kStatsHidden},
            {input.begin() + begin * kStatsWidth, input.begin() + end * kStatsWidth},
            {weights.begin() + begin, weights.begin() + end}};
  }
};

Tokens random_tokens(std::int64_t count, std::uint64_t seed) {
  Tokens tokens{count,
                random_values(count * kStatsHidden, seed),
                random_values(count * kStatsWidth, seed + 1),
                {}};
  for (std::int64_t t = 0; t < count; ++t)
    tokens.weights.push_back(t % 5 == 0 ? 0.0f : static_cast<float>(1 + t % 3));
  return tokens;
}

void observe(NeuronStats& stats, const Tokens& tokens, const ParallelFor& parallel = {}) {
  stats.observe(1, tokens.h(), tokens.x(), tokens.weights, parallel);
}

/// sum over tokens of w * a_i * b_j / sum of w, in double.
template <typename Value>
double weighted_mean(const Tokens& tokens, const Value& value) {
  double sum = 0.0, weight = 0.0;
  for (std::int64_t t = 0; t < tokens.count; ++t) {
    sum += tokens.weights[t] * value(t);
    weight += tokens.weights[t];
  }
  return sum / weight;
}

bool among_top(const Tokens& tokens, std::int64_t t, std::int64_t j) {
  int larger = 0;
  for (std::int64_t i = 0; i < kStatsHidden; ++i) {
    const float a = std::abs(tokens.h()(t, i)), b = std::abs(tokens.h()(t, j));
    larger += a > b || (a == b && i < j);
  }
  return larger < kStatsTop;
}

TEST(NeuronStats, EqualsItsDefinition) {
  const Tokens tokens = random_tokens(700, 1);  // more than one block
  NeuronStats stats(full_spec());
  observe(stats, tokens.part(0, 33));
  observe(stats, tokens.part(33, 700));
  EXPECT_EQ(stats.num_tokens(1), 560);
  const auto mean = stats.mean(1), square = stats.square(1), variance = stats.variance(1);
  const auto rate = stats.rate(1), gram = stats.gram(1), together = stats.coactivation(1);
  const auto moment = stats.input_moment(1);
  const std::vector<float> norm(kStatsHidden, 2.0f);
  const auto energy = stats.energy(1, norm);
  const auto h = tokens.h();
  for (std::int64_t j = 0; j < kStatsHidden; j += 7) {
    const double m = weighted_mean(tokens, [&](auto t) { return h(t, j); });
    const double s = weighted_mean(tokens, [&](auto t) { return h(t, j) * double{h(t, j)}; });
    EXPECT_NEAR(mean[j], m, 1e-6);
    EXPECT_NEAR(square[j], s, 1e-6);
    EXPECT_NEAR(variance[j], s - m * m, 1e-6);
    EXPECT_NEAR(energy[j], 4.0 * s, 1e-5);
    EXPECT_NEAR(rate[j], weighted_mean(tokens, [&](auto t) { return among_top(tokens, t, j); }),
                1e-6);
    EXPECT_NEAR(together[j * kStatsHidden + j], rate[j], 1e-6);
    for (std::int64_t i = 0; i < kStatsHidden; i += 11) {
      EXPECT_NEAR(gram[j * kStatsHidden + i],
                  weighted_mean(tokens, [&](auto t) { return h(t, j) * double{h(t, i)}; }), 1e-5);
      EXPECT_NEAR(
          together[j * kStatsHidden + i],
          weighted_mean(tokens,
                        [&](auto t) { return among_top(tokens, t, j) && among_top(tokens, t, i); }),
          1e-6);
    }
  }
  for (std::int64_t a = 0; a < kStatsWidth; ++a)
    for (std::int64_t b = 0; b < kStatsWidth; ++b)
      EXPECT_NEAR(moment[a * kStatsWidth + b],
                  weighted_mean(
                      tokens, [&](auto t) { return tokens.x()(t, a) * double{tokens.x()(t, b)}; }),
                  1e-5);
}

TEST(NeuronStats, ThreadsAndMergingChangeNothing) {
  const Tokens tokens = random_tokens(300, 5);
  NeuronStats whole(full_spec()), first(full_spec()), second(full_spec());
  observe(whole, tokens);
  ThreadPool pool(3);
  observe(first, tokens.part(0, 120), pool.parallel_for());
  observe(second, tokens.part(120, 300), pool.parallel_for());
  const auto gate = random_values(4 * kStatsHidden, 8);
  second.observe_gate(1, {gate.data(), 4, kStatsHidden});
  second.observe_gate(2, {gate.data(), 4, kStatsHidden});
  first.merge(second);
  EXPECT_EQ(first.num_tokens(1), whole.num_tokens(1));
  EXPECT_EQ(first.total_weight(1), whole.total_weight(1));
  EXPECT_EQ(first.gate_means(1).size(), static_cast<std::size_t>(kStatsHidden));
  EXPECT_EQ(first.gate_means(2), second.gate_means(2));
  EXPECT_EQ(first.rate(1), whole.rate(1));
  EXPECT_EQ(first.coactivation(1), whole.coactivation(1));
  const auto a = first.gram(1), b = whole.gram(1);
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-5);
  const auto c = first.square(1), d = whole.square(1);
  for (std::size_t i = 0; i < c.size(); ++i) ASSERT_NEAR(c[i], d[i], 1e-6);
}

TEST(NeuronStats, ATokenOfWeightTwoIsTwoTokens) {
  Tokens tokens = random_tokens(6, 9);
  tokens.weights.assign(6, 2.0f);
  NeuronStats heavy(full_spec()), twice(full_spec());
  observe(heavy, tokens);
  tokens.weights.assign(6, 1.0f);
  observe(twice, tokens);
  observe(twice, tokens);
  EXPECT_EQ(heavy.total_weight(1), twice.total_weight(1));
  const auto a = heavy.gram(1), b = twice.gram(1);
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-5);
  EXPECT_EQ(heavy.rate(1), twice.rate(1));
}

TEST(NeuronStats, LargestMagnitudesPreferLowerIds) {
  const std::vector<float> row = {1.0f, -3.0f, 0.5f, 3.0f, -1.0f, 2.0f};
  std::vector<std::int32_t> ids(4);
  largest_magnitudes(row.data(), 6, 4, ids.data());
  EXPECT_EQ(ids, (std::vector<std::int32_t>{1, 3, 5, 0}));
}

std::filesystem::path test_file(const std::string& name) {
  return std::filesystem::path(::testing::TempDir()) / ("calibrate_" + name);
}

TEST(NeuronStats, WriteThenReadIsTheSame) {
  const auto path = test_file("stats.safetensors");
  NeuronStats stats(full_spec());
  observe(stats, random_tokens(90, 12));
  const auto gate = random_values(4 * kStatsHidden, 8);
  stats.observe_gate(1, {gate.data(), 4, kStatsHidden});
  stats.save(path);
  NeuronStats back = NeuronStats::load(path);
  EXPECT_EQ(back.num_tokens(1), stats.num_tokens(1));
  EXPECT_EQ(back.total_weight(1), stats.total_weight(1));
  EXPECT_EQ(back.mean(1), stats.mean(1));
  EXPECT_EQ(back.square(1), stats.square(1));
  EXPECT_EQ(back.rate(1), stats.rate(1));
  EXPECT_EQ(back.gate_means(1), stats.gate_means(1));
  EXPECT_EQ(back.spec().top, kStatsTop);
  const auto a = back.gram(1), b = stats.gram(1);
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], 1e-6 * std::abs(b[i]) + 1e-12);
  back.merge(stats);  // what was read can be added to
  EXPECT_EQ(back.num_tokens(1), 2 * stats.num_tokens(1));
  EXPECT_THROW(back.mean(0), InvalidArgument);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) / 2);
  EXPECT_THROW(NeuronStats::load(path), FileError);
  const NamedTensor other{"weight", {1}, [] { return std::vector<float>{1.0f}; }};
  write_safetensors(path, {&other, 1}, DType::kF32);
  EXPECT_THROW(NeuronStats::load(path), FileError);
}

template <typename Call>
std::string stats_message(const Call& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(NeuronStats, NamesTheLayerAndTokenOfABadValue) {
  NeuronStats stats(full_spec());
  observe(stats, random_tokens(10, 1));
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    Tokens tokens = random_tokens(10, 2);
    tokens.hidden[3 * kStatsHidden + 5] = bad;
    const std::string message = stats_message([&] { observe(stats, tokens); });
    EXPECT_NE(message.find("layer 1: hidden of token 13"), std::string::npos) << message;
    EXPECT_NE(message.find("column 5"), std::string::npos) << message;
    tokens = random_tokens(10, 2);
    tokens.input[9 * kStatsWidth] = bad;
    EXPECT_NE(stats_message([&] { observe(stats, tokens); }).find("input of token 19"),
              std::string::npos);
  }
  EXPECT_EQ(stats.num_tokens(1), 8);
}

TEST(NeuronStats, RefusesWhatDoesNotFit) {
  EXPECT_THROW(NeuronStats({.num_layers = 1, .hidden = 0, .d_model = 4}), InvalidArgument);
  EXPECT_THROW(NeuronStats({.num_layers = 1, .hidden = 4, .d_model = 4, .top = 5}),
               InvalidArgument);
  NeuronStats stats(full_spec());
  const Tokens tokens = random_tokens(10, 1);
  EXPECT_THROW(stats.observe(3, tokens.h(), tokens.x()), InvalidArgument);
  EXPECT_THROW(stats.observe(0, tokens.h(), tokens.h()), InvalidArgument);
  const std::vector<float> negative(10, -1.0f), few(9, 1.0f);
  EXPECT_THROW(stats.observe(0, tokens.h(), tokens.x(), negative), InvalidArgument);
  EXPECT_THROW(stats.observe(0, tokens.h(), tokens.x(), few), InvalidArgument);
  EXPECT_THROW(stats.mean(0), InvalidArgument);
  NeuronStatsSpec other = full_spec();
  other.gram = false;
  NeuronStats without(other);
  EXPECT_THROW(stats.merge(without), InvalidArgument);
  observe(without, tokens);
  EXPECT_THROW(without.gram(1), InvalidArgument);
  EXPECT_THROW(without.energy(1, few), InvalidArgument);
  const std::vector<float> zeros(10, 0.0f);
  EXPECT_THROW(stats.observe_gate(0, tokens.h(), zeros), InvalidArgument);
}

TEST(HiddenActivations, TimesDownIsTheFfn) {
  for (const bool gated : {true, false}) {
    const DenseFfn ffn = random_ffn({.hidden = 40, .d_model = 12, .gated = gated, .biases = true});
    const std::int64_t T = 5, H = 40, D = 12;
    const auto x = random_values(T * D, 3);
    std::vector<float> hidden(T * H), gate(T * H), y(T * D), expected(T * D);
    const MatrixView<float> gate_view =
        gated ? MatrixView<float>(gate.data(), T, H) : MatrixView<float>();
    hidden_activations(ffn.view(), {x.data(), T, D}, {hidden.data(), T, H}, gate_view, {});
    linear({hidden.data(), T, H}, ffn.view().down, ffn.view().down_bias, {y.data(), T, D}, {});
    dense_ffn(ffn.view(), {x.data(), T, D}, {expected.data(), T, D}, {});
    for (std::size_t i = 0; i < y.size(); ++i) EXPECT_NEAR(y[i], expected[i], 1e-5);
    if (!gated) continue;
    std::vector<float> z(T * H);
    linear({x.data(), T, D}, ffn.view().gate, ffn.view().gate_bias, {z.data(), T, H}, {});
    for (std::size_t i = 0; i < z.size(); ++i)
      EXPECT_NEAR(gate[i], activate(ffn.activation, z[i]), 1e-5);
    std::vector<float> alone(T * H);
    hidden_activations(ffn.view(), {x.data(), T, D}, {alone.data(), T, H}, {}, {});
    EXPECT_EQ(alone, hidden);
  }
}

TEST(DownNorms, AreThoseOfTheColumns) {
  const DenseFfn ffn = random_ffn({.hidden = 6, .d_model = 3});
  const auto norms = down_norms(ffn.view());
  for (int j = 0; j < 6; ++j)
    EXPECT_NEAR(norms[j], std::hypot(ffn.down[j], ffn.down[6 + j], ffn.down[12 + j]), 1e-6);
}

class Calibrate : public ::testing::Test {
 protected:
  Calibrate() {
    const auto directory = test_file("model");
    testing::write_tiny_model(directory);
    checkpoint_ = std::make_unique<Checkpoint>(Checkpoint::open(directory));
    model_ = std::make_unique<Model>(Model::load(*checkpoint_, {.threads = 2}));
  }
  std::unique_ptr<Checkpoint> checkpoint_;
  std::unique_ptr<Model> model_;
};

TEST_F(Calibrate, SeesWhatTheFfnsOfAForwardPassSee) {
  CalibrationText first{{{1, 4, 5, 6, 7, 8, 9, 10}, 4}, 1.0}, second{{{2, 3, 4, 5, 6, 7}, 6}, 3.0};
  const std::vector<CalibrationText> texts = {first, second};
  const NeuronStats stats = calibrate(*model_, texts, {.top = 3, .gram = true});
  EXPECT_EQ(stats.spec().hidden, 12);
  NeuronStats expected(stats.spec());
  for (const CalibrationText& text : texts)
    for (std::int64_t w = 0; w < text.windows.count(); ++w) {
      ForwardHooks hooks;
      hooks.ffn_input = [&](std::int64_t l, MatrixView<const float> input) {
        const auto x = input.slice_rows(1, input.rows - 1);
        const DenseFfn ffn = model_->dense_ffn(l);
        std::vector<float> hidden(static_cast<std::size_t>(x.rows * 12));
        const MatrixView<float> h(hidden.data(), x.rows, 12);
        hidden_activations(ffn.view(), x, h, {}, {});
        const std::vector<float> weights(static_cast<std::size_t>(x.rows),
                                         static_cast<float>(text.weight));
        expected.observe(l, h, x, weights);
      };
      KvCache cache(model_->config(), text.windows.context);
      std::vector<float> out(static_cast<std::size_t>(text.windows.context * 8));
      model_->forward(text.windows.window(w), cache, {out.data(), text.windows.context, 8}, hooks);
    }
  for (std::int64_t l = 0; l < 2; ++l) {
    EXPECT_EQ(stats.num_tokens(l), 3 + 3 + 5);
    EXPECT_EQ(stats.total_weight(l), 6.0 + 15.0);
    EXPECT_EQ(stats.gate_means(l).size(), 3u * 12u);
    const auto a = stats.gram(l), b = expected.gram(l);
    for (std::size_t i = 0; i < a.size(); ++i)
      ASSERT_NEAR(a[i], b[i], 1e-5 + 1e-4 * std::abs(b[i]));
    const auto c = stats.input_moment(l), d = expected.input_moment(l);
    for (std::size_t i = 0; i < c.size(); ++i)
      ASSERT_NEAR(c[i], d[i], 1e-5 + 1e-4 * std::abs(d[i]));
  }
}

TEST_F(Calibrate, OnlyTheLayersThatAreWanted) {
  const std::vector<CalibrationText> texts = {{{{1, 4, 5, 6}, 4}, 1.0}};
  const std::vector<std::int64_t> layers = {0};
  const NeuronStats stats = calibrate(*model_, texts, {.top = 3}, layers);
  EXPECT_EQ(stats.num_tokens(0), 3);
  EXPECT_EQ(stats.num_tokens(1), 0);
  const std::vector<std::int64_t> wrong = {2};
  EXPECT_THROW(calibrate(*model_, texts, {}, wrong), InvalidArgument);
  EXPECT_THROW(calibrate(*model_, {}, {}), InvalidArgument);
  EXPECT_THROW(calibrate(*model_, texts, {.hidden = 13}), InvalidArgument);
  const std::vector<CalibrationText> weightless = {{{{1, 4, 5, 6}, 4}, 0.0}};
  EXPECT_THROW(calibrate(*model_, weightless, {}), InvalidArgument);
}

}  // namespace
}  // namespace cleave
