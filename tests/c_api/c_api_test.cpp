#include "cleave/c_api.h"

#include <fmt/format.h>

#include <cmath>

#include "c_api/c_layer.h"
#include "cleave/version.h"

namespace cleave {
namespace {

using namespace testing;

// The C enums and the C++ ones they stand for, written out a second time.
constexpr Activation kActivationOf[] = {Activation::kSilu,     Activation::kGelu,
                                        Activation::kGeluTanh, Activation::kRelu,
                                        Activation::kRelu2,    Activation::kIdentity};
constexpr std::int32_t kStored[] = {CLEAVE_F32, CLEAVE_BF16, CLEAVE_F16};
constexpr std::int32_t kPacked[] = {CLEAVE_F32, CLEAVE_BF16, CLEAVE_F16, CLEAVE_INT8, CLEAVE_INT4};

TEST(CApi, ExpertsEqualTheReferenceOnRandomShapes) {
  for (unsigned seed = 0; seed < 180; ++seed) {
    std::mt19937 rng(seed);
    CLayerSpec s;
    s.E = pick(rng, 1, seed % 5 == 0 ? 40 : 8);
    s.D = pick(rng, 1, 100);
    s.I = pick(rng, 1, 70);
    s.gated = seed % 2 == 0;
    s.biases = seed % 3 == 0;
    s.activation = static_cast<std::int32_t>(seed / 2 % 6);
    s.stored = kStored[seed % 3];
    s.packed = kPacked[seed % 5];
    s.seed = seed;
    const std::int64_t T = pick(rng, 0, seed % 9 == 0 ? 200 : 20), K = pick(rng, 1, s.E);
    SCOPED_TRACE(fmt::format("seed={} E={} D={} I={} T={} K={} stored={} packed={} activation={}",
                             seed, s.E, s.D, s.I, T, K, s.stored, s.packed, s.activation));
    const CLayer layer(s);
    const ExpertsHandle experts = create(layer.desc());
    ASSERT_NE(experts, nullptr);
    CCall c(experts.get(), T, K, 1, seed);
    c.call.scale = seed % 4 == 0 ? 0.0f : 1.5f;  // 0 counts as 1
    const float scale = seed % 4 == 0 ? 1.0f : 1.5f;

    ASSERT_EQ(experts->packed.activation(), kActivationOf[s.activation]);
    const Expectation expected(layer, c, scale);
    ASSERT_EQ(c.run(), CLEAVE_OK) << cleave_last_error();
    expect_near(c.y, expected.y, expected.magnitude, expected.bound);
  }
}

// Which row of w13 is a gate's, and which way w2 lies: types that lose nothing give it back.
TEST(CApi, PacksTheConventionalLayouts) {
  for (const std::int32_t stored : kStored)
    for (const std::int32_t packed : {CLEAVE_F32 + 0, stored + 0})
      for (const bool gated : {true, false}) {
        const CLayer layer({.E = 3,
                            .D = 37,
                            .I = 21,
                            .gated = gated,
                            .biases = true,
                            .stored = stored,
                            .packed = packed});
        const ExpertsHandle experts = create(layer.desc());
        const ExpertBank bank = experts->packed.unpack();
        const std::int64_t I = 21, D = 37, up_row = gated ? I : 0;
        ASSERT_EQ(bank.gate.empty(), !gated);
        for (std::int64_t e = 0; e < 3; ++e)
          for (std::int64_t i = 0; i < I; ++i) {
            const float* rows = layer.w13.data() + e * layer.rows * D;
            const float* bias = layer.w13_bias.data() + e * layer.rows;
            ASSERT_EQ(bank.up_bias[e * I + i], bias[up_row + i]);
            if (gated) {
              ASSERT_EQ(bank.gate_bias[e * I + i], bias[i]);
            }
            for (std::int64_t d = 0; d < D; ++d) {
              ASSERT_EQ(bank.up[(e * I + i) * D + d], rows[(up_row + i) * D + d]);
              if (gated) {
                ASSERT_EQ(bank.gate[(e * I + i) * D + d], rows[i * D + d]);
              }
              ASSERT_EQ(bank.down_t[(e * I + i) * D + d], layer.w2[(e * D + d) * I + i]);
            }
          }
      }
}

TEST(CApi, DenseEqualsTheReference) {
  for (const std::int32_t packed : kPacked)
    for (const std::int64_t T : {0, 1, 7, 130}) {
      const CLayer layer({.E = 1, .D = 50, .I = 90, .biases = true, .packed = packed});
      const ExpertsHandle experts = create(layer.desc());
      const CCall c(experts.get(), T, 0, 1, 3);
      const Expectation expected(layer, c, 1.0f);
      ASSERT_EQ(c.run(), CLEAVE_OK) << cleave_last_error();
      expect_near(c.y, expected.y, expected.magnitude, expected.bound);
    }
}

TEST(CApi, RowsMayHaveGaps) {
  const CLayer layer({});
  const ExpertsHandle experts = create(layer.desc());
  const std::int64_t T = 9, D = 40;
  CCall whole(experts.get(), T, 2, 1, 5);
  CCall apart(experts.get(), T, 2, 1, 5);
  std::mt19937 rng(1);
  OwnedMatrix x = random_matrix(rng, T, D + 3), y = random_matrix(rng, T, D + 5);
  const OwnedMatrix before = y;
  for (std::int64_t t = 0; t < T; ++t) {
    std::copy_n(whole.x.view().row(t), D, x.view().row(t));
    std::copy_n(whole.y.view().row(t), D, y.view().row(t));
  }
  apart.call.x = x.values.data();
  apart.call.x_stride = D + 3;
  apart.call.y = y.values.data();
  apart.call.y_stride = D + 5;
  ASSERT_EQ(whole.run(), CLEAVE_OK);
  ASSERT_EQ(apart.run(), CLEAVE_OK) << cleave_last_error();
  for (std::int64_t t = 0; t < T; ++t)
    for (std::int64_t d = 0; d < D + 5; ++d)
      ASSERT_EQ(y.view()(t, d), d < D ? whole.y.view()(t, d) : before.view()(t, d));
}

TEST(CApi, AnUnusedSlotAddsNothing) {
  const CLayer layer({.biases = true});
  const ExpertsHandle experts = create(layer.desc());
  for (const std::int64_t T : {1, 9, 60}) {
    CCall zero_weight(experts.get(), T, 2, 1, 5);
    CCall unused(experts.get(), T, 2, 1, 5);
    for (std::int64_t pair = 0; pair < 2 * T; pair += 3) {
      zero_weight.routing.weights[pair] = 0.0f;
      unused.routing.ids[pair] = Routing::kUnused;
    }
    const Expectation expected(layer, zero_weight, 1.0f);
    ASSERT_EQ(unused.run(), CLEAVE_OK) << cleave_last_error();
    expect_near(unused.y, expected.y, expected.magnitude, expected.bound);
  }
}

TEST(CApi, RouteEqualsTheReference) {
  for (unsigned seed = 0; seed < 60; ++seed) {
    std::mt19937 rng(seed);
    const std::int64_t T = pick(rng, 0, 20), E = pick(rng, 1, 40), K = pick(rng, 1, E);
    const std::int64_t gap = seed % 3;
    const OwnedMatrix logits = random_matrix(rng, T, E + gap);
    const MatrixView<const float> view(logits.values.data(), T, E, E + gap);
    const GateMode mode = seed % 2 == 0 ? GateMode::kSoftmax : GateMode::kHard;
    Routing expected;
    route_reference(view, {.experts_per_token = K, .mode = mode}, expected);
    std::vector<std::int32_t> ids(T * K, -7);
    std::vector<float> weights(T * K, -7.0f);
    cleave_route_call call = cleave_route_call_init();
    call.num_tokens = T;
    call.num_experts = E;
    call.experts_per_token = K;
    call.logits = logits.values.data();
    call.logits_stride = gap == 0 ? 0 : E + gap;
    call.topk_ids = ids.data();
    call.topk_weights = weights.data();
    call.gate = seed % 2 == 0 ? CLEAVE_GATE_SOFTMAX : CLEAVE_GATE_HARD;
    ASSERT_EQ(cleave_route(&call), CLEAVE_OK) << cleave_last_error();
    ASSERT_EQ(ids, expected.ids) << "seed " << seed;
    // A float exponential, a sum of K and a division: each within a few ulp.
    for (std::size_t i = 0; i < weights.size(); ++i)
      ASSERT_NEAR(weights[i], expected.weights[i], sum_bound(K + 6)) << "seed " << seed;
  }
}

// Any number of tokens up to the one that the size was asked for, whichever way the work is cut;
// make_workspace() gives not a byte more.
TEST(CApi, OneWorkspaceServesAllSmallerCalls) {
  for (const std::int64_t E : {1, 2, 24}) {
    const CLayer layer({.E = E, .D = 33, .I = 20, .packed = CLEAVE_INT4});
    const ExpertsHandle experts = create(layer.desc());
    for (const std::int64_t K : {std::int64_t{1}, E})
      for (const int n : {1, 3}) {
        const CCall largest(experts.get(), 1300, K, n, 1);
        const cleave_threads threads = callback_threads(n);
        for (const std::int64_t T : {1, 2, 13, 100, 191, 400, 1024, 1100, 1300}) {
          CCall c(experts.get(), T, K, n, 2);
          ASSERT_LE(c.call.workspace_size, largest.call.workspace_size) << "T " << T;
          const OwnedMatrix start = c.y;
          ASSERT_EQ(c.run(&threads), CLEAVE_OK) << cleave_last_error();
          OwnedMatrix first = c.y;
          c.y.values = start.values;
          c.call.workspace = largest.call.workspace;
          c.call.workspace_size = largest.call.workspace_size;
          ASSERT_EQ(c.run(&threads), CLEAVE_OK) << cleave_last_error();
          ASSERT_EQ(first.values, c.y.values) << "T " << T;
          for (const float value : first.values) ASSERT_TRUE(std::isfinite(value));
        }
      }
  }
}

TEST(CApi, SaysWhatItIs) {
  EXPECT_EQ(cleave_abi_version(), static_cast<std::uint32_t>(CLEAVE_ABI_VERSION));
  EXPECT_STREQ(cleave_version(), kVersion);
  EXPECT_STREQ(cleave_isa(), isa_name());
  EXPECT_EQ(cleave_experts_bytes(nullptr), 0u);
  const CLayer layer({});
  const ExpertsHandle experts = create(layer.desc());
  EXPECT_EQ(cleave_experts_bytes(experts.get()), static_cast<std::size_t>(experts->packed.bytes()));
}

}  // namespace
}  // namespace cleave
