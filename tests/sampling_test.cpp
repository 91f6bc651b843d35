#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "cleave/error.h"
#include "cleave/model.h"
#include "support/tiny_models.h"

namespace cleave {
namespace {

using namespace testing;

std::vector<float> as_logits(const std::vector<double>& probabilities) {
  std::vector<float> logits;
  for (const double p : probabilities) logits.push_back(static_cast<float>(std::log(p)));
  return logits;
}

TEST(Sampler, GreedyTakesTheLargestAndTheLowerIdOfEquals) {
  Sampler sampler({});
  EXPECT_EQ(sampler(std::vector<float>{0.0f, 3.0f, 3.0f, -1.0f}), 1);
}

TEST(Sampler, FrequenciesFollowTheTemperature) {
  const std::vector<double> p = {0.5, 0.3, 0.15, 0.05};
  for (const double temperature : {0.5, 1.0, 2.0}) {
    Sampler sampler({.temperature = temperature, .seed = 1});
    std::vector<double> expected;
    double sum = 0.0;
    for (const double value : p) sum += expected.emplace_back(std::pow(value, 1.0 / temperature));
    std::vector<int> count(4, 0);
    constexpr int kDraws = 20000;
    for (int i = 0; i < kDraws; ++i) ++count[sampler(as_logits(p))];
    for (int i = 0; i < 4; ++i) {
      const double share = expected[i] / sum;  // five standard deviations of a share
      EXPECT_NEAR(static_cast<double>(count[i]) / kDraws, share,
                  5.0 * std::sqrt(share * (1.0 - share) / kDraws))
          << "token " << i << " at temperature " << temperature;
    }
  }
}

TEST(Sampler, TopPKeepsTheSmallestSetThatReachesIt) {
  const std::vector<float> logits = as_logits({0.1, 0.5, 0.15, 0.25});
  const auto drawn = [&](double top_p) {
    Sampler sampler({.temperature = 1.0, .top_p = top_p, .seed = 3});
    std::set<std::int32_t> ids;
    for (int i = 0; i < 500; ++i) ids.insert(sampler(logits));
    return ids;
  };
  EXPECT_EQ(drawn(0.4), (std::set<std::int32_t>{1}));
  EXPECT_EQ(drawn(0.6), (std::set<std::int32_t>{1, 3}));
  EXPECT_EQ(drawn(0.8), (std::set<std::int32_t>{1, 2, 3}));
  EXPECT_EQ(drawn(1.0), (std::set<std::int32_t>{0, 1, 2, 3}));
}

TEST(Sampler, TheSameSeedGivesTheSameTokens) {
  const std::vector<float> logits(50, 0.0f);
  const auto draw = [&](std::uint64_t seed) {
    Sampler sampler({.temperature = 1.0, .seed = seed});
    std::vector<std::int32_t> ids;
    for (int i = 0; i < 8; ++i) ids.push_back(sampler(logits));
    return ids;
  };
  EXPECT_EQ(draw(5), draw(5));
  EXPECT_NE(draw(5), draw(6));
  // The top 53 bits of std::mt19937_64, which the standard fixes, as a fraction of 50 tokens.
  std::mt19937_64 rng(5);
  for (const std::int32_t id : draw(5))
    EXPECT_EQ(id, static_cast<std::int32_t>(static_cast<double>(rng() >> 11) * 0x1p-53 * 50.0));
}

TEST(Sampler, RefusesNonsense) {
  EXPECT_THROW(Sampler({.temperature = -1.0}), InvalidArgument);
  EXPECT_THROW(Sampler({.top_p = 0.0}), InvalidArgument);
  EXPECT_THROW(Sampler({.top_p = 1.5}), InvalidArgument);
  Sampler sampler({.temperature = 1.0});
  EXPECT_THROW(sampler(std::vector<float>{0.0f, std::nanf("")}), InvalidArgument);
  EXPECT_THROW(sampler(std::vector<float>{}), InvalidArgument);
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_THROW(sampler(std::vector<float>{inf, 0.0f}), InvalidArgument);
  EXPECT_EQ(sampler(std::vector<float>{-inf, 0.0f}), 1);  // a masked token is never drawn
}

TEST(Generate, GreedyEqualsRecomputingFromTheStart) {
  for (const char* name : {"llama", "mixtral"}) {
    Model model = Model::load(Checkpoint::open(tiny_golden(name).directory), {.threads = 2});
    std::vector<std::int32_t> tokens = {5, 17, 40};
    const auto produced = generate(model, tokens, {.max_tokens = 10, .ignore_eos = true});
    ASSERT_EQ(produced.size(), 10u);
    for (const std::int32_t id : produced) {
      const std::vector<float> logits = all_logits(model, tokens);
      const auto last = logits.end() - model.config().vocab_size;
      EXPECT_EQ(std::max_element(last, logits.end()) - last, id) << name;
      tokens.push_back(id);
    }
  }
}

TEST(Generate, StopsAtAnEndOfSequenceAndAtTheCallersWord) {
  Model model = Model::load(Checkpoint::open(tiny_golden("llama").directory));
  const std::vector<std::int32_t> prompt = {3, 4};
  const GenerateSpec all = {
      .max_tokens = 60, .sampling = {.temperature = 3.0, .seed = 2}, .ignore_eos = true};
  const auto endless = generate(model, prompt, all);
  const auto end = std::find(endless.begin(), endless.end(), 2);  // eos_token_id of the model
  ASSERT_NE(end, endless.end()) << "choose another seed";
  GenerateSpec stopping = all;
  stopping.ignore_eos = false;
  EXPECT_EQ(generate(model, prompt, stopping), std::vector(endless.begin(), end));
  std::vector<std::int32_t> heard;
  const auto short_one = generate(model, prompt, all, [&](std::int32_t id) {
    heard.push_back(id);
    return heard.size() < 3;
  });
  EXPECT_EQ(short_one, std::vector(endless.begin(), endless.begin() + 3));
  EXPECT_EQ(heard, short_one);
}

TEST(Generate, RefusesAnEmptyPromptAndANegativeLength) {
  Model model = Model::load(Checkpoint::open(tiny_golden("llama").directory));
  EXPECT_THROW(generate(model, {}, {}), InvalidArgument);
  const std::vector<std::int32_t> prompt = {3};
  EXPECT_THROW(generate(model, prompt, {.max_tokens = -1}), InvalidArgument);
  EXPECT_TRUE(generate(model, prompt, {.max_tokens = 0}).empty());
}

}  // namespace
}  // namespace cleave
