#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "cleave/error.h"
#include "cleave/moe_layer.h"
#include "ffn_cases.h"

namespace cleave {
namespace {

using namespace testing;

TEST(MoeFfn, MatchesReferenceOnRandomShapes) {
  Pools pools;
  unsigned seed = 0;
  for (const FfnKind& kind : all_ffn_kinds())
    for (int round = 0; round < 6; ++round) {
      std::mt19937 rng(++seed);
      const FfnShape s = draw_shape(rng);
      SCOPED_TRACE(fmt::format("seed={} {}", seed, describe(kind, s)));
      const ExpertBank bank = random_bank(rng, kind, s);
      const Routing routing = random_routing(rng, s);
      const OwnedMatrix x = random_matrix(rng, s.T, s.D);
      OwnedMatrix actual = random_matrix(rng, s.T, s.D), expected = actual, magnitude = actual;
      moe_ffn_reference(bank, routing, 1.5f, x.view(), expected.view(), magnitude.view());
      moe_ffn(bank, routing, 1.5f, x.view(), actual.view(), pools.of(s.threads));
      expect_near(actual, expected, magnitude, ffn_bound(s.D, most_neurons(bank, s.K)));
      if (::testing::Test::HasFatalFailure()) return;
    }
}

TEST(MoeFfn, AllTokensOnOneExpertAndEmptyExperts) {
  std::mt19937 rng(5);
  const std::int64_t T = 600, D = 20;  // more tokens than one gathered product takes
  ExpertBank bank = random_bank(rng, D, 30, 3, true, false, Activation::kSilu);
  // Experts without tokens must not be read: poison them.
  for (std::int64_t r = 0; r < bank.rows(); ++r)
    if (r < bank.begin[1] || r >= bank.begin[2]) bank.up[r * D] = std::nanf("");
  Routing routing{T, 1, std::vector<std::int32_t>(T, 1), std::vector<float>(T, 0.5f)};
  const OwnedMatrix x = random_matrix(rng, T, D);
  OwnedMatrix actual = random_matrix(rng, T, D), expected = actual, magnitude = actual;
  moe_ffn_reference(bank, routing, 1.0f, x.view(), expected.view(), magnitude.view());
  moe_ffn(bank, routing, 1.0f, x.view(), actual.view(), {});
  expect_near(actual, expected, magnitude, ffn_bound(D, 30));
}

// The ways through moe_ffn meet at 4 tokens, at 64 tokens and at 96 neurons; on either side the
// same answer.
TEST(MoeFfn, NarrowAndWideExpertsOnFewAndManyTokens) {
  ThreadPool pool(3);
  for (const std::int64_t H : {20, 110 * 3})
    for (const std::int64_t T : {4, 5, 63, 64, 200}) {
      std::mt19937 rng(static_cast<unsigned>(H + T));
      const std::int64_t D = 9;
      ExpertBank bank = random_bank(rng, D, H, 3, true, true, Activation::kSilu);
      bank.begin = {0, H / 3, 2 * (H / 3), H};
      Routing routing = random_routing(rng, T, 3, 2);
      drop_slots(rng, routing);
      const OwnedMatrix x = random_matrix(rng, T, D);
      OwnedMatrix actual = random_matrix(rng, T, D), expected = actual, magnitude = actual;
      SCOPED_TRACE(fmt::format("T={} H={}", T, H));
      moe_ffn_reference(bank, routing, 2.0f, x.view(), expected.view(), magnitude.view());
      moe_ffn(bank, routing, 2.0f, x.view(), actual.view(), pool.parallel_for());
      expect_near(actual, expected, magnitude, ffn_bound(D, H));
    }
}

TEST(MoeFfn, PermutingTokensPermutesOutputs) {
  std::mt19937 rng(6);
  const std::int64_t T = 40, D = 24, K = 2;
  const ExpertBank bank = random_bank(rng, D, 64, 4, true, true, Activation::kSilu);
  const OwnedMatrix x = random_matrix(rng, T, D);
  const Routing routing = random_routing(rng, T, 4, K);
  OwnedMatrix y{T, D, std::vector<float>(T * D)}, reversed_y = y, reversed_x = x;
  Routing reversed = routing;
  for (std::int64_t t = 0; t < T; ++t) {
    std::copy_n(x.view().row(T - 1 - t), D, reversed_x.view().row(t));
    std::copy_n(routing.ids.begin() + (T - 1 - t) * K, K, reversed.ids.begin() + t * K);
    std::copy_n(routing.weights.begin() + (T - 1 - t) * K, K, reversed.weights.begin() + t * K);
  }
  moe_ffn(bank, routing, 1.0f, x.view(), y.view(), {});
  moe_ffn(bank, reversed, 1.0f, reversed_x.view(), reversed_y.view(), {});
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t c = 0; c < D; ++c)
      EXPECT_NEAR(y.view()(t, c), reversed_y.view()(T - 1 - t, c), 1e-4) << t << "," << c;
}

TEST(MoeFfn, RefusesShapesThatDisagree) {
  std::mt19937 rng(7);
  const ExpertBank bank = random_bank(rng, 8, 16, 2, true, false, Activation::kSilu);
  const Routing routing = random_routing(rng, 3, 2, 1);
  OwnedMatrix x = random_matrix(rng, 3, 8), y = x, narrow = random_matrix(rng, 3, 7);
  EXPECT_THROW(moe_ffn(bank, routing, 1.0f, narrow.view(), y.view(), {}), InvalidArgument);
  EXPECT_THROW(moe_ffn(bank, random_routing(rng, 3, 4, 4), 1.0f, x.view(), y.view(), {}),
               InvalidArgument);
  EXPECT_THROW(moe_ffn(bank, random_routing(rng, 2, 2, 1), 1.0f, x.view(), y.view(), {}),
               InvalidArgument);
}

TEST(DenseFfn, MatchesReferenceOnRandomShapes) {
  Pools pools;
  unsigned seed = 0;
  for (const FfnKind& kind : all_ffn_kinds())
    for (const std::int64_t most_tokens : {12, 12, 300, 1100}) {
      std::mt19937 rng(++seed);
      const std::int64_t T = pick(rng, 0, most_tokens), D = pick(rng, 1, 50);
      const std::int64_t H = pick(rng, 1, 90);
      const FfnShape s{T, D, H, 1, 1, static_cast<int>(pick(rng, 0, 4))};
      SCOPED_TRACE(fmt::format("seed={} {}", seed, describe(kind, s)));
      const DenseFfn ffn = random_dense(rng, D, H, kind.gated, kind.biases, kind.activation);
      const OwnedMatrix x = random_matrix(rng, T, D);
      OwnedMatrix actual = random_matrix(rng, T, D), expected = actual, magnitude = actual;
      dense_ffn_reference(ffn.view(), x.view(), expected.view(), magnitude.view());
      dense_ffn(ffn.view(), x.view(), actual.view(), pools.of(s.threads));
      expect_near(actual, expected, magnitude, ffn_bound(D, H));
      if (::testing::Test::HasFatalFailure()) return;
    }
}

// A dense FFN cut into contiguous experts; by hand, so that this test needs no partitioner.
MoeLayer cut(const DenseFfn& ffn, std::int64_t E, GateMode gate, float scale) {
  MoeLayer layer;
  ExpertBank& bank = layer.experts;
  bank.d_model = ffn.d_model;
  bank.dense_hidden = ffn.hidden;
  bank.activation = ffn.activation;
  for (std::int64_t e = 0; e <= E; ++e) bank.begin.push_back(e * ffn.hidden / E);
  bank.gate = ffn.gate, bank.up = ffn.up;
  bank.gate_bias = ffn.gate_bias, bank.up_bias = ffn.up_bias, bank.down_bias = ffn.down_bias;
  for (std::int64_t j = 0; j < ffn.hidden; ++j)
    for (std::int64_t c = 0; c < ffn.d_model; ++c)
      bank.down_t.push_back(ffn.down[c * ffn.hidden + j]);
  layer.router = {E, ffn.d_model, std::vector<float>(E * ffn.d_model, 0.0f)};
  layer.experts_per_token = E;
  layer.gate = gate;
  layer.scale = scale;
  return layer;
}

TEST(MoeLayer, AllExpertsOnEqualTheDenseFfn) {
  std::mt19937 rng(8);
  const std::int64_t D = 32, H = 64;
  const DenseFfn ffn = random_dense(rng, D, H, true, true, Activation::kSilu);
  for (const std::int64_t T : {1, 3, 50}) {
    const OwnedMatrix x = random_matrix(rng, T, D);
    const OwnedMatrix start = random_matrix(rng, T, D);
    OwnedMatrix expected = start, magnitude = start;
    dense_ffn_reference(ffn.view(), x.view(), expected.view(), magnitude.view());
    for (const auto& [gate, scale] :
         {std::pair(GateMode::kSoftmax, 4.0f), std::pair(GateMode::kHard, 1.0f)}) {
      OwnedMatrix actual = start;
      Routing routing;
      cut(ffn, 4, gate, scale).forward(x.view(), actual.view(), {}, &routing);
      expect_near(actual, expected, magnitude, ffn_bound(D, H));
      EXPECT_EQ(routing.num_tokens, T);
      EXPECT_EQ(routing.ids.size(), static_cast<std::size_t>(T * 4));
    }
  }
}

TEST(MoeLayer, RefusesARouterOfAnotherShape) {
  std::mt19937 rng(9);
  MoeLayer layer =
      cut(random_dense(rng, 8, 16, true, false, Activation::kSilu), 4, GateMode::kSoftmax, 4.0f);
  layer.router.num_experts = 3;
  OwnedMatrix x = random_matrix(rng, 2, 8), y = x;
  EXPECT_THROW(layer.forward(x.view(), y.view(), {}), InvalidArgument);
}

TEST(MoeLayer, RefusesARoutingThatDoesNotFit) {
  std::mt19937 rng(9);
  const MoeLayer layer =
      cut(random_dense(rng, 8, 16, true, false, Activation::kSilu), 4, GateMode::kSoftmax, 4.0f);
  const Routing fits{2, 1, {0, 3}, {1.0f, 1.0f}};
  OwnedMatrix x = random_matrix(rng, 2, 8), y = x, narrow = random_matrix(rng, 2, 7),
              longer = random_matrix(rng, 3, 8);
  layer.forward_routed(x.view(), fits, y.view(), {});
  const OwnedMatrix before = y;
  const auto expect_refusal = [&](OwnedMatrix& in, const Routing& routing, OwnedMatrix& out) {
    try {
      layer.forward_routed(in.view(), routing, out.view(), {});
      ADD_FAILURE() << "nothing is refused";
    } catch (const InvalidArgument& e) {
      EXPECT_EQ(std::string(e.what()).find("MoeLayer::forward_routed: "), 0u) << e.what();
    }
  };
  expect_refusal(narrow, fits, y);
  expect_refusal(x, fits, narrow);
  expect_refusal(x, fits, longer);
  expect_refusal(longer, fits, longer);
  expect_refusal(x, {2, 1, {0, 4}, {1.0f, 1.0f}}, y);
  expect_refusal(x, {2, 2, {0, 1}, {1.0f, 1.0f}}, y);
  EXPECT_EQ(y.values, before.values);
}

}  // namespace
}  // namespace cleave
