#include "cleave/c_api.h"

#include <fmt/format.h>

#include <cmath>

#include "c_api/c_layer.h"
#include "cleave/version.h"
#include "kernels/ffn_cases.h"

namespace cleave {
namespace {

using namespace testing;

// The C enums and the C++ ones they stand for, written out a second time.
constexpr Activation kActivationOf[] = {Activation::kSilu,     Activation::kGelu,
                                        Activation::kGeluTanh, Activation::kRelu,
                                        Activation::kRelu2,    Activation::kIdentity};
constexpr std::int32_t kStored[] = {CLEAVE_F32, CLEAVE_BF16, CLEAVE_F16};
constexpr std::int32_t kPacked[] = {CLEAVE_F32, CLEAVE_BF16, CLEAVE_F16, CLEAVE_INT8, CLEAVE_INT4};

/// A call with the layer's experts, on threads of any kind.
void expect_call_is_right(std::mt19937& rng, const CLayer& layer, const FfnShape& shape) {
  const ExpertsHandle experts = create(layer.desc());
  ASSERT_NE(experts, nullptr);
  ASSERT_EQ(experts->packed.activation(), kActivationOf[layer.spec.activation]);
  const int threads = std::max(1, shape.threads);
  CCall c(experts.get(), shape.T, shape.K, threads, layer.spec.seed);
  if (shape.drops) drop_slots(rng, c.routing);
  const bool default_scale = pick(rng, 0, 3) == 0;  // 0 counts as 1
  c.call.scale = default_scale ? 0.0f : 1.5f;
  const Expectation expected(layer, c, default_scale ? 1.0f : 1.5f);
  if (pick(rng, 0, 1) == 0) {
    const cleave_threads callback = callback_threads(threads);
    ASSERT_EQ(c.run(shape.threads == 0 ? nullptr : &callback), CLEAVE_OK) << cleave_last_error();
  } else {
    for (const cleave_status status : Spmd(threads).run(c)) ASSERT_EQ(status, CLEAVE_OK);
  }
  expect_near(c.y, expected.y, expected.magnitude, expected.bound);
}

TEST(CApi, ExpertsEqualTheReferenceOnRandomShapes) {
  unsigned seed = 0;
  for (const std::int32_t stored : kStored)
    for (const std::int32_t packed : kPacked)
      for (std::int32_t activation = 0; activation < 6; ++activation)
        for (const bool gated : {true, false})
          for (const bool biases : {true, false}) {
            std::mt19937 rng(++seed);
            const FfnShape shape = draw_shape(rng);
            SCOPED_TRACE(fmt::format("seed={} stored={} packed={} {}", seed, stored, packed,
                                     describe({kActivationOf[activation], gated, biases}, shape)));
            const CLayer layer({.E = shape.E,
                                .D = shape.D,
                                .I = shape.I,
                                .gated = gated,
                                .biases = biases,
                                .activation = activation,
                                .stored = stored,
                                .packed = packed,
                                .seed = seed});
            expect_call_is_right(rng, layer, shape);
            if (::testing::Test::HasFatalFailure()) return;
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
    const std::int64_t T = pick(rng, 0, 70), E = pick(rng, 1, 64), K = pick(rng, 1, E);
    const std::int64_t gap = pick(rng, 0, 2);
    const bool hard = pick(rng, 0, 1) == 0;
    const OwnedMatrix logits = random_matrix(rng, T, E + gap);
    const MatrixView<const float> view(logits.values.data(), T, E, E + gap);
    const RouteSpec spec{.experts_per_token = K,
                         .mode = hard ? GateMode::kHard : GateMode::kSoftmax,
                         .threshold = pick(rng, 0, 1) == 0 ? 0.0f : 0.3f,
                         .normalise = pick(rng, 0, 3) != 0 || hard};
    Routing expected;
    route_reference(view, spec, expected);
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
    call.gate = hard ? CLEAVE_GATE_HARD : CLEAVE_GATE_SOFTMAX;
    call.threshold = spec.threshold;
    call.keep_probabilities = spec.normalise ? 0 : 1;
    ASSERT_EQ(cleave_route(&call), CLEAVE_OK) << cleave_last_error();
    ASSERT_EQ(ids, expected.ids) << "seed " << seed;
    // A float exponential, a sum of up to E and a division: each within a few ulp.
    for (std::size_t i = 0; i < weights.size(); ++i)
      ASSERT_NEAR(weights[i], expected.weights[i], sum_bound(E + 6)) << "seed " << seed;
  }
}

TEST(CApi, IdsOfManyExpertsAreChecked) {
  const CLayer layer({.E = 8200, .D = 2, .I = 1});
  const ExpertsHandle experts = create(layer.desc());
  CCall c(experts.get(), 3, 2, 1, 5);
  for (const std::int32_t id : {0, 4095, 4096, 8191, 8192, 8199}) {
    c.routing.ids = {0, 1, 4095, 4096, id, id};
    expect_refusal(c.run(), fmt::format("topk_ids has expert {} twice for token 2", id));
    c.routing.ids = {id, -1, id, -1, -1, id};
    EXPECT_EQ(c.run(), CLEAVE_OK) << cleave_last_error();
  }
}

// docs/c_api.md: shared experts as a handle of their own.
TEST(CApi, SharedExpertsAreASecondHandle) {
  const CLayer routed({.E = 6}), shared({.E = 1, .I = 48, .seed = 9});
  const ExpertsHandle experts = create(routed.desc()), always = create(shared.desc());
  const std::int64_t T = 11;
  CCall both(experts.get(), T, 2, 1, 5);
  const Expectation expected_routed(routed, both, 1.0f);
  CCall dense(always.get(), T, 0, 1, 5);
  dense.y.values = both.y.values;
  const Expectation expected_shared(shared, dense, 1.0f);
  const std::vector<float> start = both.y.values;

  ASSERT_EQ(both.run(), CLEAVE_OK) << cleave_last_error();
  cleave_ffn_call call = dense.call;
  call.x = both.call.x;
  call.y = both.call.y;
  ASSERT_EQ(both.x.values, dense.x.values);
  ASSERT_EQ(cleave_dense_run(always.get(), &call), CLEAVE_OK) << cleave_last_error();
  for (std::size_t i = 0; i < start.size(); ++i) {
    const double sum =
        static_cast<double>(expected_routed.y.values[i]) + expected_shared.y.values[i] - start[i];
    const double size = static_cast<double>(expected_routed.magnitude.values[i]) +
                        expected_shared.magnitude.values[i];
    ASSERT_NEAR(both.y.values[i], sum,
                size * (expected_routed.bound + expected_shared.bound + sum_bound(2)));
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
