#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "cleave/error.h"
#include "cleave/factorize.h"
#include "cleave/packed.h"
#include "ffn_cases.h"

namespace cleave {
namespace {

using namespace testing;

TEST(PackedExperts, FloatsUnpackToTheSameBits) {
  for (const bool gated : {true, false}) {
    std::mt19937 rng(3);
    ExpertBank bank = random_bank(rng, 37, 90, 5, gated, true, Activation::kSilu);
    const ExpertBank back = PackedExperts(bank, WeightType::kF32).unpack();
    EXPECT_EQ(back.begin, bank.begin);
    EXPECT_EQ(back.gate, bank.gate);
    EXPECT_EQ(back.up, bank.up);
    EXPECT_EQ(back.down_t, bank.down_t);
    EXPECT_EQ(back.gate_bias, bank.gate_bias);
    EXPECT_EQ(back.up_bias, bank.up_bias);
  }
}

/// What `type` may lose of one of these weights, which share a scale: a bound on |packed - exact|,
/// from its definition. `largest` is the largest |w| that shares int4's units.
double type_loss(WeightType type, std::span<const float> sharing, float exact, float largest) {
  const auto [low, high] = std::minmax_element(sharing.begin(), sharing.end());
  const double range = std::max(0.0f, *high) - std::min(0.0f, *low);
  switch (type) {
    case WeightType::kF32:
      return 0.0;
    case WeightType::kBF16:
      return std::abs(exact) * 0x1p-8;
    case WeightType::kF16:
      return std::abs(exact) * 0x1p-11 + 0x1p-24;
    case WeightType::kInt8:
      return 0.5001 * std::max(std::abs(*high), std::abs(*low)) / 127;
    case WeightType::kInt4:
      // Half a step of the range's 15. The minimum may lie a unit of largest / 255 below it, and
      // the scale is rounded up to units of 2 * largest / 15 / 255; either may fall short by a
      // thousandth of its unit.
      return 0.5001 * (range + 3 * largest / 255) / 15 + 0.001 * 3 * largest / 255;
  }
  return 0.0;
}

/// A row of gate or of up: [D], a scale in int8, and one for each 32 in int4.
void expect_row_loses_little(WeightType type, std::span<const float> exact,
                             std::span<const float> seen, float largest) {
  for (std::size_t i = 0; i < exact.size(); ++i) {
    const std::size_t block = i / 32 * 32;
    const auto sharing = type == WeightType::kInt4
                             ? exact.subspan(block, std::min<std::size_t>(32, exact.size() - block))
                             : exact;
    ASSERT_NEAR(seen[i], exact[i], type_loss(type, sharing, exact[i], largest)) << "input " << i;
  }
}

/// down of one expert, rows [begin, end) of both banks: in int8 a scale for each neuron, in int4
/// one for each output and panel of neurons.
void expect_down_loses_little(WeightType type, const ExpertBank& exact, const ExpertBank& seen,
                              std::int64_t begin, std::int64_t end, float largest) {
  const std::int64_t D = exact.d_model, panel = exact.gate.empty() ? 32 : 16;
  for (std::int64_t r = begin; r < end; ++r) {
    const std::span<const float> row(exact.down_t.data() + r * D, D);
    const std::int64_t first = begin + (r - begin) / panel * panel;
    for (std::int64_t c = 0; c < D; ++c) {
      std::vector<float> column;
      for (std::int64_t j = first; j < std::min(first + panel, end); ++j)
        column.push_back(exact.down_t[j * D + c]);
      const auto sharing = type == WeightType::kInt4 ? std::span<const float>(column) : row;
      ASSERT_NEAR(seen.down_t[r * D + c], row[c], type_loss(type, sharing, row[c], largest))
          << "neuron " << r << " output " << c;
    }
  }
}

TEST(PackedExperts, LoseNoMoreThanTheirTypeSays) {
  std::mt19937 rng(4);
  for (const WeightType type : kWeightTypes)
    for (const bool gated : {true, false}) {
      const std::int64_t D = 101;
      const ExpertBank bank = random_bank(rng, D, 210, 4, gated, true, Activation::kSilu);
      const ExpertBank seen = PackedExperts(bank, type).unpack();
      const auto row = [&](const std::vector<float>& matrix, std::int64_t r) {
        return std::span<const float>(matrix.data() + r * D, D);
      };
      for (std::int64_t e = 0; e < 4; ++e) {
        SCOPED_TRACE(fmt::format("{} gated={} expert {}", weight_type_name(type), gated, e));
        for (std::int64_t r = bank.begin[e]; r < bank.begin[e + 1]; ++r) {
          SCOPED_TRACE(fmt::format("neuron {}", r));
          expect_row_loses_little(type, row(bank.up, r), row(seen.up, r), 1.0f);
          if (gated) expect_row_loses_little(type, row(bank.gate, r), row(seen.gate, r), 1.0f);
        }
        expect_down_loses_little(type, bank, seen, bank.begin[e], bank.begin[e + 1], 1.0f);
      }
      EXPECT_EQ(seen.up_bias, bank.up_bias);
      EXPECT_EQ(seen.gate_bias, bank.gate_bias);
    }
}

// The numbers of the documents: without the units of a panel, which wide layers do not feel.
TEST(PackedExperts, TakeTheBitsThatTheDocumentsName) {
  std::mt19937 rng(5);
  const std::int64_t D = 480, H = 128;
  for (const bool gated : {true, false}) {
    const ExpertBank bank = random_bank(rng, D, H, 1, gated, false, Activation::kSilu);
    const double weights = static_cast<double>(D * H), matrices = gated ? 3 : 2;
    const auto bits = [&](WeightType type) {
      const PackedExperts packed(bank, type);
      return static_cast<double>(packed.bytes()) * 8 / (matrices * weights);
    };
    EXPECT_EQ(bits(WeightType::kF32), 32.0);
    EXPECT_EQ(bits(WeightType::kBF16), 16.0);
    EXPECT_EQ(bits(WeightType::kF16), 16.0);
    EXPECT_NEAR(bits(WeightType::kInt8), 8.0, 0.1);
    EXPECT_NEAR(bits(WeightType::kInt4), gated ? (2 * 4.5 + 5.0) / 3 : 4.5, 0.05);
  }
}

/// moe_ffn() against its reference, twice.
void expect_moe_ffn_is_right(std::mt19937& rng, const ExpertBank& bank, const Routing& routing,
                             WeightType type, Workspace& workspace, const ParallelFor& parallel) {
  const std::int64_t T = routing.num_tokens, D = bank.d_model;
  const PackedExperts packed(bank, type, parallel);
  const OwnedMatrix x =
      type == WeightType::kBF16 ? random_bf16_matrix(rng, T, D) : random_matrix(rng, T, D);
  OwnedMatrix actual = random_matrix(rng, T, D), expected = actual, magnitude = actual;
  moe_ffn_reference(packed.unpack(), routing, 1.5f, x.view(), expected.view(), magnitude.view());
  OwnedMatrix again = actual;
  moe_ffn(packed, routing, 1.5f, x.view(), actual.view(), workspace, parallel);
  expect_near(actual, expected, magnitude,
              ffn_bound(D, most_neurons(bank, routing.experts_per_token)) + hidden_bound(type));
  moe_ffn(packed, routing, 1.5f, x.view(), again.view(), workspace, parallel);
  ASSERT_EQ(actual.values, again.values) << "not deterministic";
}

TEST(PackedMoeFfn, MatchesReferenceOnRandomShapes) {
  Pools pools;
  Workspace workspace;
  unsigned seed = 0;
  for (const WeightType type : kWeightTypes)
    for (const FfnKind& kind : all_ffn_kinds())
      for (int round = 0; round < 4; ++round) {
        std::mt19937 rng(++seed);
        const FfnShape shape = draw_shape(rng);
        SCOPED_TRACE(
            fmt::format("seed={} {} {}", seed, weight_type_name(type), describe(kind, shape)));
        const ExpertBank bank = random_bank(rng, kind, shape);
        const Routing routing = random_routing(rng, shape);
        expect_moe_ffn_is_right(rng, bank, routing, type, workspace, pools.of(shape.threads));
        if (::testing::Test::HasFatalFailure()) return;
      }
}

TEST(PackedDenseFfn, MatchesReferenceOnRandomShapes) {
  Pools pools;
  Workspace workspace;
  unsigned seed = 0;
  for (const WeightType type : kWeightTypes)
    for (const FfnKind& kind : all_ffn_kinds()) {
      std::mt19937 rng(++seed);
      FfnShape s = draw_shape(rng);
      s.E = s.K = 1;
      SCOPED_TRACE(fmt::format("seed={} {} {}", seed, weight_type_name(type), describe(kind, s)));
      const DenseFfn ffn = random_dense(rng, s.D, s.I, kind.gated, kind.biases, kind.activation);
      const PackedExperts packed(ffn.view(), type);
      const DenseFfn seen = to_dense(packed.unpack());
      const OwnedMatrix x = type == WeightType::kBF16 ? random_bf16_matrix(rng, s.T, s.D)
                                                      : random_matrix(rng, s.T, s.D);
      OwnedMatrix actual = random_matrix(rng, s.T, s.D), expected = actual, magnitude = actual;
      dense_ffn_reference(seen.view(), x.view(), expected.view(), magnitude.view());
      dense_ffn(packed, x.view(), actual.view(), workspace, pools.of(s.threads));
      expect_near(actual, expected, magnitude, ffn_bound(s.D, s.I) + hidden_bound(type));
      if (::testing::Test::HasFatalFailure()) return;
    }
}

// A pass of a prompt takes 512 tokens through narrow experts, 1024 through others.
TEST(PackedMoeFfn, MatchesReferenceInTheSecondPassOfNarrowExperts) {
  Pools pools;
  Workspace workspace;
  unsigned seed = 0;
  for (const WeightType type : {WeightType::kBF16, WeightType::kF32})
    for (const std::int64_t width : {16, 32})
      for (const std::int64_t T : {700, 1100})
        for (const bool gated : {true, false}) {
          std::mt19937 rng(++seed);
          const std::int64_t E = pick(rng, 3, 24), K = pick(rng, 1, E), D = pick(rng, 1, 130);
          const int threads = static_cast<int>(pick(rng, 0, 4));
          SCOPED_TRACE(fmt::format("seed={} {} width={} T={} D={} E={} K={} gated={} threads={}",
                                   seed, weight_type_name(type), width, T, D, E, K, gated,
                                   threads));
          ExpertBank bank = random_bank(rng, D, E * width, E, gated, true, Activation::kSilu);
          for (std::int64_t e = 0; e <= E; ++e) bank.begin[e] = e * width;
          Routing routing = random_routing(rng, T, E, K);
          if (pick(rng, 0, 1) == 0) drop_slots(rng, routing);
          expect_moe_ffn_is_right(rng, bank, routing, type, workspace, pools.of(threads));
          if (::testing::Test::HasFatalFailure()) return;
        }
}

// Of hidden values only so many are kept at once: 1024 or 2048 in decode, blocks of weights have
// 512 or 1024 steps, and an expert may have more rows than a stretch.
TEST(PackedMoeFfn, MatchesReferenceWithWideExpertsAndManyRows) {
  ThreadPool pool(3);
  Workspace workspace;
  for (const WeightType type : kWeightTypes)
    for (const bool gated : {true, false}) {
      std::mt19937 rng(11);
      const ExpertBank wide = random_bank(rng, 40, 2 * 2070, 2, gated, true, Activation::kSilu);
      for (const std::int64_t T : {1, 5, 40}) {
        SCOPED_TRACE(fmt::format("{} gated={} T={}", weight_type_name(type), gated, T));
        const Routing routing = random_routing(rng, T, 2, T == 5 ? 2 : 1);
        expect_moe_ffn_is_right(rng, wide, routing, type, workspace, pool.parallel_for());
      }
      SCOPED_TRACE(fmt::format("{} gated={} 100 rows", weight_type_name(type), gated));
      const ExpertBank narrow = random_bank(rng, 70, 32 * 40, 32, gated, true, Activation::kSilu);
      const Routing one{100, 1, std::vector<std::int32_t>(100, 3), std::vector<float>(100, 0.5f)};
      expect_moe_ffn_is_right(rng, narrow, one, type, workspace, pool.parallel_for());
    }
}

/// A dense FFN cut into experts at random, all of them on.
struct AllOn {
  AllOn(std::mt19937& rng, std::int64_t D, std::int64_t H, std::int64_t E, bool gated)
      : dense(random_dense(rng, D, H, gated, true, Activation::kSilu)) {
    NeuronPartition partition{static_cast<std::int32_t>(E), {}};
    for (std::int64_t j = 0; j < H; ++j)  // the first E so that none is empty
      partition.expert_of_neuron.push_back(
          static_cast<std::int32_t>(j < E ? j : pick(rng, 0, E - 1)));
    std::shuffle(partition.expert_of_neuron.begin(), partition.expert_of_neuron.end(), rng);
    bank = factorize(dense.view(), partition);
  }
  /// Each token's experts in an order of its own.
  Routing routing(std::mt19937& rng, std::int64_t T) const {
    const std::int64_t E = bank.num_experts();
    Routing all{T, E, {}, std::vector<float>(T * E, 1.0f)};
    std::vector<std::int32_t> ids(E);
    std::iota(ids.begin(), ids.end(), 0);
    for (std::int64_t t = 0; t < T; ++t) {
      std::shuffle(ids.begin(), ids.end(), rng);
      all.ids.insert(all.ids.end(), ids.begin(), ids.end());
    }
    return all;
  }
  DenseFfn dense;
  ExpertBank bank;
};

// Factorizing changes no weight, so nothing but rounding may differ. int8 and int4 round weights by
// their neighbours, which are others in the dense FFN: there it is the one of the weights as the
// experts have them.
TEST(PackedMoeFfn, AllExpertsEqualTheDenseFfn) {
  Pools pools;
  Workspace workspace;
  std::mt19937 rng(7);
  const std::int64_t D = 50, H = 96, E = 6;
  for (const WeightType type : kWeightTypes)
    for (const bool gated : {true, false})
      for (const std::int64_t T : {1, 5, 33, 600}) {  // decoded up to 15 tokens at most
        const int threads = static_cast<int>(pick(rng, 0, 4));
        SCOPED_TRACE(
            fmt::format("{} gated={} T={} threads={}", weight_type_name(type), gated, T, threads));
        const AllOn on(rng, D, H, E, gated);
        const PackedExperts experts(on.bank, type);
        const bool by_neighbours = type == WeightType::kInt8 || type == WeightType::kInt4;
        ExpertBank seen = experts.unpack();
        seen.neuron_order = on.bank.neuron_order;
        const DenseFfn whole = by_neighbours ? to_dense(seen) : on.dense;
        const PackedExperts one(whole.view(), by_neighbours ? WeightType::kF32 : type);

        const OwnedMatrix x =
            type == WeightType::kBF16 ? random_bf16_matrix(rng, T, D) : random_matrix(rng, T, D);
        OwnedMatrix actual = random_matrix(rng, T, D), expected = actual, magnitude = actual;
        dense_ffn_reference(to_dense(one.unpack()).view(), x.view(), OwnedMatrix(actual).view(),
                            magnitude.view());
        dense_ffn(one, x.view(), expected.view(), workspace, pools.of(threads));
        for (std::int64_t t = 0; t < T; ++t)  // which belongs to no expert
          for (std::int64_t c = 0; c < D; ++c) actual.view()(t, c) += whole.down_bias[c];
        moe_ffn(experts, on.routing(rng, T), 1.0f, x.view(), actual.view(), workspace,
                pools.of(threads));
        // Each of the two may be off by so much.
        expect_near(actual, expected, magnitude, 2 * (ffn_bound(D, H) + hidden_bound(type)));
        if (::testing::Test::HasFatalFailure()) return;
      }
}

/// moe_ffn() into rows of y that are farther apart than D. @param neurons  most of K experts
void expect_strided_rows_are_right(std::mt19937& rng, const PackedExperts& packed,
                                   const FfnShape& s, std::int64_t neurons,
                                   const ParallelFor& parallel) {
  constexpr std::int64_t kGap = 7;
  const Routing routing = random_routing(rng, s);
  const OwnedMatrix x = random_bf16_matrix(rng, s.T, s.D);
  OwnedMatrix wide = random_matrix(rng, s.T, s.D + kGap), before = wide;
  OwnedMatrix expected = random_matrix(rng, s.T, s.D), magnitude = expected, actual = expected;
  for (std::int64_t t = 0; t < s.T; ++t)
    std::copy_n(before.view().row(t), s.D, expected.view().row(t));
  moe_ffn_reference(packed.unpack(), routing, 1.5f, x.view(), expected.view(), magnitude.view());
  Workspace workspace;
  moe_ffn(packed, routing, 1.5f, x.view(), {wide.values.data(), s.T, s.D, s.D + kGap}, workspace,
          parallel);
  for (std::int64_t t = 0; t < s.T; ++t) {
    std::copy_n(wide.view().row(t), s.D, actual.view().row(t));
    for (std::int64_t c = s.D; c < s.D + kGap; ++c)
      ASSERT_EQ(wide.view()(t, c), before.view()(t, c)) << "beside y, token " << t;
  }
  expect_near(actual, expected, magnitude,
              ffn_bound(s.D, neurons) + hidden_bound(WeightType::kBF16));
}

// Rows per expert at which another way begins: 3, 5, 7 (large ones), 10 (of those up to 12 tokens)
// and 13 (one expert), 14 (narrow ones).
TEST(PackedMoeFfn, EveryWayBeginsRight) {
  Pools pools;
  struct Ffn {
    std::int64_t D, I, E, K;
    std::vector<std::int64_t> rows;
  };
  for (const Ffn& f :
       {Ffn{40, 16, 6, 2, {3, 9, 14}}, Ffn{64, 48, 6, 3, {3, 5, 10}}, Ffn{40, 80, 1, 1, {3, 5, 13}},
        Ffn{130, 2816, 4, 1, {3, 5, 7}}, Ffn{130, 2816, 4, 3, {9, 10}}}) {
    std::mt19937 rng(static_cast<unsigned>(f.I));
    const ExpertBank bank = random_bank(rng, f.D, f.I * f.E, f.E, true, false, Activation::kSilu);
    const PackedExperts packed(bank, WeightType::kBF16);
    for (const std::int64_t rows : f.rows)
      for (const std::int64_t T : {(rows * f.E - 1) / f.K, (rows * f.E - 1) / f.K + 1})
        for (const int threads : {1, 3}) {
          SCOPED_TRACE(
              fmt::format("D={} I={} E={} K={} T={} threads={}", f.D, f.I, f.E, f.K, T, threads));
          FfnShape shape;
          shape.T = T, shape.D = f.D, shape.I = f.I, shape.E = f.E, shape.K = f.K;
          expect_strided_rows_are_right(rng, packed, shape, most_neurons(bank, f.K),
                                        pools.of(threads));
          if (::testing::Test::HasFatalFailure()) return;
        }
  }
}

/// Routed and shared experts in one call, in exactly as much memory as that asks for.
void expect_shared_experts_are_right(std::mt19937& rng, const FfnKind& kind, const FfnShape& s,
                                     WeightType type, WeightType shared_type,
                                     const ParallelFor& parallel) {
  const ExpertBank bank = random_bank(rng, kind, s);
  const Routing routing = random_routing(rng, s);
  const std::int64_t T = s.T, D = s.D, width = pick(rng, 1, 130);
  const DenseFfn slice = random_dense(rng, D, width, kind.gated, kind.biases, kind.activation);
  const PackedExperts packed(bank, type), shared(slice.view(), shared_type);
  const bool rounds = type == WeightType::kBF16 || shared_type == WeightType::kBF16;
  const OwnedMatrix x = rounds ? random_bf16_matrix(rng, T, D) : random_matrix(rng, T, D);
  OwnedMatrix actual = random_matrix(rng, T, D), expected = actual, magnitude = actual;
  OwnedMatrix magnitude_of_shared = actual;
  moe_ffn_reference(packed.unpack(), routing, 1.5f, x.view(), expected.view(), magnitude.view());
  dense_ffn_reference(to_dense(shared.unpack()).view(), x.view(), expected.view(),
                      magnitude_of_shared.view());
  for (std::size_t i = 0; i < magnitude.values.size(); ++i)
    magnitude.values[i] += magnitude_of_shared.values[i];
  std::vector<std::byte> memory(
      moe_ffn_workspace_size(packed, shared, T, routing.experts_per_token, parallel.threads) + 64);
  const auto offset = -reinterpret_cast<std::uintptr_t>(memory.data()) % 64;
  Workspace workspace(std::span<std::byte>(memory).subspan(offset, memory.size() - 64));
  moe_ffn(packed, routing, 1.5f, shared, x.view(), actual.view(), workspace, parallel);
  const std::int64_t neurons = most_neurons(bank, routing.experts_per_token) + width;
  expect_near(actual, expected, magnitude,
              ffn_bound(D, neurons) + hidden_bound(rounds ? WeightType::kBF16 : type));
}

TEST(PackedMoeFfn, RunsSharedExpertsBesideTheOthers) {
  Pools pools;
  unsigned seed = 0;
  for (const WeightType type : kWeightTypes)
    for (const FfnKind& kind : all_ffn_kinds())
      for (int round = 0; round < 3; ++round) {
        std::mt19937 rng(++seed);
        const FfnShape shape = draw_shape(rng);
        SCOPED_TRACE(
            fmt::format("seed={} {} {}", seed, weight_type_name(type), describe(kind, shape)));
        const WeightType other = kWeightTypes[pick(rng, 0, std::ssize(kWeightTypes) - 1)];
        expect_shared_experts_are_right(rng, kind, shape, type, round == 0 ? other : type,
                                        pools.of(shape.threads));
        if (::testing::Test::HasFatalFailure()) return;
      }
}

TEST(PackedMoeFfn, RefusesSharedExpertsThatAreSeveralOrOfAnotherWidth) {
  Workspace workspace;
  std::mt19937 rng(1);
  const auto bank = [&](std::int64_t D, std::int64_t E) {
    return PackedExperts(random_bank(rng, D, 32, E, true, false, Activation::kSilu),
                         WeightType::kF32);
  };
  const PackedExperts packed = bank(8, 4), several = bank(8, 2), wide = bank(12, 1);
  const OwnedMatrix x = random_matrix(rng, 1, 8);
  OwnedMatrix y = x;
  const Routing routing{1, 2, {0, 1}, {0.5f, 0.5f}};
  for (const PackedExperts* shared : {&several, &wide}) {
    const auto run = [&] {
      moe_ffn(packed, routing, 1.0f, *shared, x.view(), y.view(), workspace, {});
    };
    EXPECT_THROW(run(), InvalidArgument);
  }
  EXPECT_EQ(y.values, x.values);
}

TEST(PackedMoeFfn, RefusesATokenWithOneExpertTwice) {
  Workspace workspace;
  std::mt19937 rng(1);
  const PackedExperts packed(random_bank(rng, 8, 32, 4, true, false, Activation::kSilu),
                             WeightType::kF32);
  const OwnedMatrix x = random_matrix(rng, 3, 8);
  OwnedMatrix y = x;
  const Routing routing{3, 2, {0, 1, 2, 3, 1, 1}, std::vector<float>(6, 0.5f)};
  EXPECT_THROW(moe_ffn(packed, routing, 1.0f, x.view(), y.view(), workspace, {}), InvalidArgument);
}

// Pairs are counted in 32 bits. Nothing is read before that is checked: there is memory for one
// row.
TEST(PackedMoeFfn, RefusesMorePairsThanItCanCount) {
  Workspace workspace;
  std::mt19937 rng(1);
  const DenseFfn dense = random_dense(rng, 8, 32, true, false, Activation::kSilu);
  const PackedExperts experts(random_bank(rng, 8, 32, 4, true, false, Activation::kSilu),
                              WeightType::kF32);
  const PackedExperts one(dense.view(), WeightType::kF32);
  OwnedMatrix x = random_matrix(rng, 1, 8), y = x;
  const std::int32_t ids[] = {0, 1};
  const float weights[] = {1.0f, 1.0f};
  const auto expect_refusal = [](const auto& call) {
    try {
      call();
      FAIL() << "2^31 pairs went through";
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find("below 2^31"), std::string::npos) << error.what();
    }
  };
  for (const std::int64_t T : {std::int64_t{1} << 30, std::int64_t{1} << 31, std::int64_t{1} << 62})
    expect_refusal([&] {
      moe_ffn(experts, RoutingView{T, 2, ids, weights}, 1.0f, {x.values.data(), T, 8},
              {y.values.data(), T, 8}, workspace, {});
    });
  const std::int64_t T = std::int64_t{1} << 31;
  expect_refusal([&] {
    dense_ffn(one, {x.values.data(), T, 8}, {y.values.data(), T, 8}, workspace, {});
  });
}

// Half of the tokens on one expert, half on another, two without any: every way of cutting the work
// and every number of threads must see the same rows.
TEST(PackedMoeFfn, SkewedRoutingAndEmptyExperts) {
  Workspace workspace;
  for (const int threads : {1, 2, 5})
    for (const std::int64_t T : {1, 7, 40, 500}) {
      ThreadPool pool(threads);
      std::mt19937 rng(static_cast<unsigned>(T));
      const ExpertBank bank = random_bank(rng, 40, 160, 4, true, false, Activation::kSilu);
      const PackedExperts packed(bank, WeightType::kF32);
      Routing routing{T, 1, std::vector<std::int32_t>(T, 1), std::vector<float>(T, 0.5f)};
      for (std::int64_t t = 0; t < T / 2; ++t) routing.ids[t] = 2;
      const OwnedMatrix x = random_matrix(rng, T, 40);
      OwnedMatrix actual = random_matrix(rng, T, 40), expected = actual, magnitude = actual;
      moe_ffn_reference(bank, routing, 1.0f, x.view(), expected.view(), magnitude.view());
      moe_ffn(packed, routing, 1.0f, x.view(), actual.view(), workspace, pool.parallel_for());
      expect_near(actual, expected, magnitude, ffn_bound(40, 160));
    }
}

}  // namespace
}  // namespace cleave
