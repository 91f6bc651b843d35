#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "cleave/error.h"
#include "random_ffn.h"

namespace cleave {
namespace {

using namespace testing;

TEST(Route, MatchesReferenceOnRandomShapes) {
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 rng(seed);
    const std::int64_t T = pick(rng, 0, 9), E = pick(rng, 1, 40), K = pick(rng, 1, E);
    SCOPED_TRACE(fmt::format("seed={} T={} E={} K={}", seed, T, E, K));
    OwnedMatrix logits = random_matrix(rng, T, E);
    if (seed % 3 == 0)  // many ties
      for (float& value : logits.values) value = std::round(value * 2.0f);
    for (const GateMode mode : {GateMode::kSoftmax, GateMode::kHard}) {
      Routing actual, expected;
      route(logits.view(), K, mode, actual);
      route_reference(logits.view(), K, mode, expected);
      ASSERT_EQ(actual.ids, expected.ids);
      ASSERT_EQ(actual.num_tokens, T);
      ASSERT_EQ(actual.experts_per_token, K);
      for (std::size_t i = 0; i < expected.weights.size(); ++i)
        ASSERT_NEAR(actual.weights[i], expected.weights[i], static_cast<double>(K + 4) * kEpsilon);
    }
  }
}

TEST(Route, TiesGoToTheLowerId) {
  const std::vector<float> logits = {1.0f, 2.0f, 2.0f, 1.0f};
  Routing routing;
  route({logits.data(), 1, 4}, 3, GateMode::kHard, routing);
  EXPECT_EQ(routing.ids, (std::vector<std::int32_t>{1, 2, 0}));
  EXPECT_EQ(routing.weights, (std::vector<float>{1.0f, 1.0f, 1.0f}));
}

TEST(Route, ALargeLogitDoesNotOverflow) {
  const std::vector<float> logits = {1e30f, -1e30f, 0.0f};
  Routing routing;
  route({logits.data(), 1, 3}, 2, GateMode::kSoftmax, routing);
  EXPECT_EQ(routing.ids, (std::vector<std::int32_t>{0, 2}));
  EXPECT_EQ(routing.weights, (std::vector<float>{1.0f, 0.0f}));
}

TEST(Route, RefusesWhatItCannotHonour) {
  std::vector<float> logits = {0.0f, 1.0f, 2.0f, std::nanf("")};
  Routing routing;
  EXPECT_THROW(route({logits.data(), 1, 3}, 0, GateMode::kHard, routing), InvalidArgument);
  EXPECT_THROW(route({logits.data(), 1, 3}, 4, GateMode::kHard, routing), InvalidArgument);
  try {
    route({logits.data(), 2, 2}, 1, GateMode::kHard, routing);
    FAIL() << "a NaN logit went through";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("token 1"), std::string::npos) << error.what();
  }
}

TEST(GroupTokens, MatchesReferenceOnRandomRoutings) {
  for (unsigned seed = 0; seed < 100; ++seed) {
    std::mt19937 rng(seed);
    const std::int64_t T = pick(rng, 0, 30), E = pick(rng, 1, 12), K = pick(rng, 1, E);
    SCOPED_TRACE(fmt::format("seed={} T={} E={} K={}", seed, T, E, K));
    const Routing routing = random_routing(rng, T, E, K);
    const TokenGroups actual = group_tokens(routing, E),
                      expected = group_tokens_reference(routing, E);
    ASSERT_EQ(actual.begin, expected.begin);
    ASSERT_EQ(actual.pair, expected.pair);
  }
}

TEST(GroupTokens, RefusesAnIdOutOfRange) {
  Routing routing{1, 1, {3}, {1.0f}};
  EXPECT_THROW(group_tokens(routing, 3), InvalidArgument);
  routing.ids = {-1};
  EXPECT_THROW(group_tokens(routing, 3), InvalidArgument);
  routing.ids = {0, 1};
  EXPECT_THROW(group_tokens(routing, 3), InvalidArgument);
}

}  // namespace
}  // namespace cleave
