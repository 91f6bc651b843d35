// moe_ffn() with a RouterCall: the router's product, the routing and the FFN in one.

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cleave/error.h"
#include "cleave/packed.h"
#include "kernels/ffn_cases.h"
#include "kernels/random_ffn.h"

namespace cleave::testing {
namespace {

/// A layer on some tokens, and what its parts give one after the other.
struct Layer {
  Layer(std::mt19937& rng, const FfnKind& kind, const FfnShape& s, WeightType type,
        const RouteSpec& given)
      : spec(given),
        experts(random_bank(rng, kind, s), type),
        shared(random_dense(rng, s.D, pick(rng, 1, 130), kind.gated, kind.biases, kind.activation)
                   .view(),
               type),
        router(random_matrix(rng, s.E, s.D).view(), type),
        x(random_matrix(rng, s.T, s.D)),
        y(random_matrix(rng, s.T, s.D)),
        logits(random_matrix(rng, s.T, s.E)),
        expected(y),
        expected_logits(logits) {}

  void run(const ParallelFor& parallel) {
    moe_ffn({router, spec, logits.view(), routing}, experts, 1.5f, shared, x.view(), y.view(),
            workspace, parallel);
  }
  void run_apart(const ParallelFor& parallel) {
    linear(router, x.view(), {}, expected_logits.view(), false, workspace, parallel);
    route(expected_logits.view(), spec, expected_routing, parallel);
    moe_ffn(experts, expected_routing, 1.5f, shared, x.view(), expected.view(), workspace,
            parallel);
  }

  RouteSpec spec;
  PackedExperts experts, shared;
  PackedLinear router;
  OwnedMatrix x, y, logits, expected, expected_logits;
  Routing routing, expected_routing;
  Workspace workspace;
};

/// Parts one after the other on this thread, the last one first.
ParallelFor backwards(int threads) {
  ParallelFor parallel;
  static int parts;
  parts = threads;
  parallel.threads = threads;
  parallel.run = [](void*, std::int64_t n, std::int64_t grain, void* context,
                    void (*body)(void*, std::int64_t, std::int64_t)) {
    const std::int64_t ranges = std::min<std::int64_t>(parts, std::max<std::int64_t>(1, n / grain));
    for (std::int64_t i = ranges; i-- > 0;) body(context, n * i / ranges, n * (i + 1) / ranges);
  };
  return parallel;
}

TEST(RouterCall, GivesWhatItsPartsGiveOneAfterTheOther) {
  Pools pools;
  unsigned seed = 0;
  for (const WeightType type : kWeightTypes)
    for (const FfnKind& kind : all_ffn_kinds())
      for (int round = 0; round < 3; ++round) {
        std::mt19937 rng(++seed);
        const FfnShape shape = draw_shape(rng);
        SCOPED_TRACE(
            fmt::format("seed={} {} {}", seed, weight_type_name(type), describe(kind, shape)));
        const GateMode mode = pick(rng, 0, 1) == 0 ? GateMode::kHard : GateMode::kSoftmax;
        Layer layer(rng, kind, shape, type,
                    {.experts_per_token = shape.K,
                     .mode = mode,
                     .threshold = pick(rng, 0, 1) == 0 ? 0.0f : 0.5f});
        const ParallelFor parallel =
            shape.drops ? backwards(shape.threads + 1) : pools.of(shape.threads);
        layer.run_apart(parallel);
        layer.run(parallel);
        EXPECT_EQ(layer.logits.values, layer.expected_logits.values);
        EXPECT_EQ(layer.routing.num_tokens, shape.T);
        EXPECT_EQ(layer.routing.ids, layer.expected_routing.ids);
        EXPECT_EQ(layer.routing.weights, layer.expected_routing.weights);
        ASSERT_EQ(layer.y.values, layer.expected.values);
      }
}

TEST(RouterCall, ALogitThatIsNotFiniteIsAnErrorOnAnyNumberOfThreads) {
  Pools pools;
  for (const int threads : {0, 1, 2, 4}) {
    std::mt19937 rng(1);
    FfnShape shape;
    shape.T = 3, shape.D = 16, shape.I = 32, shape.E = 6, shape.K = 2;
    Layer layer(rng, {}, shape, WeightType::kF32, {.experts_per_token = 2});
    layer.x.values[20] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_THROW(layer.run(pools.of(threads)), InvalidArgument) << threads;
    // And then it runs again.
    layer.x.values[20] = 0.0f;
    EXPECT_NO_THROW(layer.run(pools.of(threads))) << threads;
  }
}

TEST(RouterCall, RefusesWhatDoesNotFit) {
  std::mt19937 rng(1);
  FfnShape shape;
  shape.T = 3, shape.D = 16, shape.I = 32, shape.E = 6, shape.K = 2;
  const auto layer = [&](std::int64_t k) {
    return Layer(rng, {}, shape, WeightType::kF32, {.experts_per_token = k});
  };
  Layer many = layer(7), none = layer(0), wide = layer(2), narrow = layer(2), several = layer(2);
  wide.router = PackedLinear(random_matrix(rng, 6, 17).view(), WeightType::kF32);
  narrow.logits = random_matrix(rng, 3, 5);
  several.shared = several.experts;
  for (Layer* wrong : {&many, &none, &wide, &narrow, &several}) {
    const OwnedMatrix before = wrong->y;
    EXPECT_THROW(wrong->run({}), InvalidArgument);
    EXPECT_EQ(wrong->y.values, before.values);
  }
}

}  // namespace
}  // namespace cleave::testing
