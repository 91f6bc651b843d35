#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "cleave/error.h"
#include "ffn_cases.h"

namespace cleave {
namespace {

using namespace testing;

TEST(Route, MatchesReferenceOnRandomShapes) {
  Pools pools;
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 rng(seed);
    const std::int64_t T = pick(rng, 0, 70), E = pick(rng, 1, 64), K = pick(rng, 1, E);
    const int threads = static_cast<int>(pick(rng, 0, 4));
    SCOPED_TRACE(fmt::format("seed={} T={} E={} K={} threads={}", seed, T, E, K, threads));
    OwnedMatrix logits = random_matrix(rng, T, E);
    if (pick(rng, 0, 2) == 0)  // many ties
      for (float& value : logits.values) value = std::round(value * 2.0f);
    for (const GateMode mode : {GateMode::kSoftmax, GateMode::kHard}) {
      Routing actual, expected;
      route(logits.view(), {.experts_per_token = K, .mode = mode}, actual, pools.of(threads));
      route_reference(logits.view(), {.experts_per_token = K, .mode = mode}, expected);
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

// Many of few experts are selected in another way.
TEST(Route, TiesGoToTheLowerIdWithManySelected) {
  const std::vector<float> logits = {2, 1, 2, 3, 1, 2, 0, 3, 1, 2};
  Routing routing;
  route({logits.data(), 1, 10}, 7, GateMode::kHard, routing);
  EXPECT_EQ(routing.ids, (std::vector<std::int32_t>{3, 7, 0, 2, 5, 9, 1}));
}

TEST(Route, ThreadsDoNotChangeIt) {
  std::mt19937 rng(3);
  const OwnedMatrix logits = random_matrix(rng, 200, 40);
  ThreadPool pool(3);
  for (const std::int64_t K : {2, 20}) {
    Routing one, three;
    route(logits.view(), {.experts_per_token = K}, one);
    route(logits.view(), {.experts_per_token = K}, three, pool.parallel_for());
    EXPECT_EQ(one.ids, three.ids);
    EXPECT_EQ(one.weights, three.weights);
  }
}

TEST(Route, ALargeLogitDoesNotOverflow) {
  const std::vector<float> logits = {1e30f, -1e30f, 0.0f};
  Routing routing;
  route({logits.data(), 1, 3}, 2, GateMode::kSoftmax, routing);
  EXPECT_EQ(routing.ids, (std::vector<std::int32_t>{0, 2}));
  EXPECT_EQ(routing.weights, (std::vector<float>{1.0f, 0.0f}));
}

// Thresholds below, at and between the ratios that occur, among them those of ties.
TEST(Route, ThresholdMatchesReferenceOnRandomShapes) {
  Pools pools;
  for (unsigned seed = 0; seed < 300; ++seed) {
    std::mt19937 rng(seed);
    const std::int64_t T = pick(rng, 0, 70), E = pick(rng, 1, 64), K = pick(rng, 1, E);
    const int threads = static_cast<int>(pick(rng, 0, 4));
    OwnedMatrix logits = random_matrix(rng, T, E);
    const bool ties = pick(rng, 0, 2) == 0;
    for (float& value : logits.values) value = ties ? std::round(value * 2.0f) : value * 4.0f;
    constexpr float kThresholds[] = {0.0f, 1e-3f, 0.1f, 0.36787944f, 0.5f, 0.9f, 1.0f};
    RouteSpec spec{.experts_per_token = K, .threshold = kThresholds[pick(rng, 0, 6)]};
    SCOPED_TRACE(fmt::format("seed={} T={} E={} K={} threshold={}", seed, T, E, K, spec.threshold));
    for (const GateMode mode : {GateMode::kSoftmax, GateMode::kHard})
      for (const bool normalise : {true, false}) {
        spec.mode = mode;
        spec.normalise = normalise;
        Routing actual, expected;
        route(logits.view(), spec, actual, pools.of(threads));
        route_reference(logits.view(), spec, expected);
        ASSERT_EQ(actual.ids, expected.ids);
        for (std::size_t i = 0; i < expected.weights.size(); ++i)
          ASSERT_NEAR(actual.weights[i], expected.weights[i],
                      static_cast<double>(E + 4) * kEpsilon);
      }
  }
}

TEST(Route, ThresholdZeroIsPlainTopKAndHigherOnesUseFewerExperts) {
  std::mt19937 rng(5);
  const std::int64_t T = 50, E = 16, K = 6;
  OwnedMatrix logits = random_matrix(rng, T, E);
  for (float& value : logits.values) value *= 3.0f;
  Routing plain, previous;
  route(logits.view(), K, GateMode::kSoftmax, plain);
  route(logits.view(), {.experts_per_token = K, .threshold = 0.0f}, previous);
  EXPECT_EQ(previous.ids, plain.ids);
  EXPECT_EQ(previous.weights, plain.weights);
  for (const float threshold : {0.01f, 0.1f, 0.3f, 0.7f, 1.0f}) {
    Routing routing;
    route(logits.view(), {.experts_per_token = K, .threshold = threshold}, routing);
    for (std::int64_t t = 0; t < T; ++t) {
      float sum = 0.0f;
      for (std::int64_t k = 0; k < K; ++k) {
        const std::int64_t i = t * K + k;
        sum += routing.weights[i];
        if (routing.ids[i] == Routing::kUnused) {
          EXPECT_EQ(routing.weights[i], 0.0f);
          EXPECT_GT(k, 0) << "the largest is always in use";
          continue;
        }
        EXPECT_EQ(routing.ids[i], previous.ids[i]) << "a higher threshold only takes away";
      }
      EXPECT_NEAR(sum, 1.0f, 1e-6f);
    }
    previous = routing;
  }
}

TEST(Route, ThresholdOneKeepsTiesWithTheLargest) {
  const std::vector<float> logits = {1.0f, 2.0f, 2.0f, 1.5f};
  Routing routing;
  route({logits.data(), 1, 4}, {.experts_per_token = 3, .threshold = 1.0f}, routing);
  EXPECT_EQ(routing.ids, (std::vector<std::int32_t>{1, 2, Routing::kUnused}));
  EXPECT_EQ(routing.weights, (std::vector<float>{0.5f, 0.5f, 0.0f}));
}

TEST(Route, WithoutNormalisationTheWeightsAreThoseOfAllExperts) {
  const std::vector<float> logits = {std::log(1.0f), std::log(2.0f), std::log(5.0f)};
  Routing routing;
  route({logits.data(), 1, 3}, {.experts_per_token = 2, .normalise = false}, routing);
  EXPECT_EQ(routing.ids, (std::vector<std::int32_t>{2, 1}));
  EXPECT_NEAR(routing.weights[0], 5.0 / 8, 1e-6);
  EXPECT_NEAR(routing.weights[1], 2.0 / 8, 1e-6);
}

TEST(Route, RefusesAThresholdThatIsNoShare) {
  const std::vector<float> logits = {0.0f, 1.0f};
  Routing routing;
  for (const float threshold : {-0.1f, 1.1f, std::nanf("")})
    EXPECT_THROW(route({logits.data(), 1, 2}, {.threshold = threshold}, routing), InvalidArgument);
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
  for (unsigned seed = 0; seed < 200; ++seed) {
    std::mt19937 rng(seed);
    const std::int64_t T = pick(rng, 0, 70), E = pick(rng, 1, 64), K = pick(rng, 1, E);
    SCOPED_TRACE(fmt::format("seed={} T={} E={} K={}", seed, T, E, K));
    Routing routing = random_routing(rng, T, E, K);
    if (pick(rng, 0, 1) == 0) drop_slots(rng, routing);
    const TokenGroups actual = group_tokens(routing, E),
                      expected = group_tokens_reference(routing, E);
    ASSERT_EQ(actual.begin, expected.begin);
    ASSERT_EQ(actual.pair, expected.pair);
  }
}

TEST(GroupTokens, RefusesAnIdOutOfRange) {
  Routing routing{1, 1, {3}, {1.0f}};
  EXPECT_THROW(group_tokens(routing, 3), InvalidArgument);
  routing.ids = {-2};
  EXPECT_THROW(group_tokens(routing, 3), InvalidArgument);
  routing.ids = {0, 1};
  EXPECT_THROW(group_tokens(routing, 3), InvalidArgument);
}

}  // namespace
}  // namespace cleave
