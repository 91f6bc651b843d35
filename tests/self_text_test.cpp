#include "cleave/self_text.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "cleave/error.h"
#include "support/tiny_models.h"

namespace cleave {
namespace {

using namespace testing;

Model tiny_llama() {
  return Model::load(Checkpoint::open(tiny_golden("llama").directory), {.threads = 2});
}

/// Draws follow the model: the mean of -log p over the text is the mean entropy of the
/// distributions that its tokens were drawn from.
TEST(SelfText, FollowsTheModelsDistribution) {
  Model model = tiny_llama();
  const std::int64_t V = model.config().vocab_size;
  const auto& ends = model.config().eos_token_ids;
  ASSERT_FALSE(ends.empty());
  for (const double temperature : {0.5, 1.0}) {
    const TokenWindows text = self_generated_text(
        model, {.windows = 20, .context = 48, .temperature = temperature, .seed = 3});
    ASSERT_EQ(text.count(), 20);
    double surprise = 0.0, entropy = 0.0, variance = 0.0;
    int drawn = 0;
    for (std::int64_t w = 0; w < text.count(); ++w) {
      const auto window = text.window(w);
      const std::vector<float> logits = all_logits(model, window);
      for (std::int64_t t = 0; t + 1 < text.context; ++t) {
        std::vector<double> p(V);
        double sum = 0.0, mean = 0.0, square = 0.0, kept = 0.0;
        for (std::int64_t v = 0; v < V; ++v)
          sum += p[v] = std::exp(logits[t * V + v] / temperature);
        for (double& value : p) value /= sum;
        // In place of a token that ends a text stands any token, equally likely.
        for (const std::int32_t end : ends) kept += p[end];
        for (std::int64_t v = 0; v < V; ++v) {
          const bool end = std::find(ends.begin(), ends.end(), v) != ends.end();
          p[v] = (end ? 0.0 : p[v]) + kept / static_cast<double>(V);
        }
        for (const double value : p) {
          mean -= value * std::log(value);
          square += value * std::log(value) * std::log(value);
        }
        entropy += mean;
        variance += square - mean * mean;
        surprise -= std::log(p[window[t + 1]]);
        ++drawn;
      }
    }
    EXPECT_NEAR(surprise / drawn, entropy / drawn, 4.0 * std::sqrt(variance) / drawn)
        << "temperature " << temperature;
    EXPECT_LT(entropy / drawn, 0.95 * std::log(static_cast<double>(V)));  // not simply uniform
  }
}

TEST(SelfText, BeginsWithRandomTokensAndRepeatsWithItsSeed) {
  Model model = tiny_llama();
  const auto write = [&](std::uint64_t seed) {
    return self_generated_text(model, {.windows = 40, .context = 3, .seed = seed});
  };
  const TokenWindows text = write(1);
  EXPECT_EQ(text.tokens, write(1).tokens);
  EXPECT_NE(text.tokens, write(2).tokens);
  std::set<std::int32_t> first;
  for (std::int64_t w = 0; w < text.count(); ++w) first.insert(text.window(w)[0]);
  EXPECT_GT(first.size(), 20u);
}

TEST(SelfText, TellsItsProgress) {
  Model model = tiny_llama();
  std::vector<std::int64_t> told;
  self_generated_text(model, {.windows = 17, .context = 4},
                      [&](std::int64_t done, std::int64_t all) {
                        EXPECT_EQ(all, 68);
                        told.push_back(done);
                      });
  EXPECT_EQ(told, (std::vector<std::int64_t>{64, 68}));  // 16 windows at a time
}

TEST(SelfText, RefusesNonsense) {
  Model model = tiny_llama();
  EXPECT_THROW(self_generated_text(model, {.windows = 0}), InvalidArgument);
  EXPECT_THROW(self_generated_text(model, {.windows = 1, .context = 1}), InvalidArgument);
  EXPECT_THROW(self_generated_text(model, {.windows = 1, .context = 8, .temperature = 0.0}),
               InvalidArgument);
}

}  // namespace
}  // namespace cleave
