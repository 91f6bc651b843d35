#include "cleave/partition.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <string>

#include "cleave/error.h"
#include "kmeans.h"
#include "support/random_ffn.h"

namespace cleave {
namespace {

using testing::random_ffn;
using testing::random_values;

constexpr PartitionMethod kAllMethods[] = {PartitionMethod::kContiguous, PartitionMethod::kRandom,
                                           PartitionMethod::kKMeans};

std::vector<std::int64_t> sizes_of(const std::vector<std::int32_t>& cluster_of, std::int64_t E) {
  std::vector<std::int64_t> sizes(static_cast<std::size_t>(E));
  for (const std::int32_t e : cluster_of) ++sizes.at(static_cast<std::size_t>(e));
  return sizes;
}

std::string message_of(std::int64_t E, std::int64_t H) {
  try {
    check_divides(E, H);
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(Partition, NamesOfMethods) {
  EXPECT_STREQ(partition_method_name(PartitionMethod::kContiguous), "contiguous");
  EXPECT_STREQ(partition_method_name(PartitionMethod::kRandom), "random");
  EXPECT_STREQ(partition_method_name(PartitionMethod::kKMeans), "kmeans");
}

TEST(Partition, EveryExpertGetsExactlyItsShare) {
  for (const PartitionMethod method : kAllMethods)
    for (const auto& [H, E] : {std::pair{12, 3}, {96, 1}, {96, 96}, {60, 20}, {70, 7}}) {
      SCOPED_TRACE(std::string(partition_method_name(method)) + " H=" + std::to_string(H) +
                   " E=" + std::to_string(E));
      const DenseFfn ffn = random_ffn({.hidden = H, .d_model = 9, .seed = 5});
      const auto partition =
          partition_neurons(ffn.view(), {.method = method, .num_experts = E, .seed = 3});
      EXPECT_EQ(partition.num_experts, E);
      ASSERT_EQ(partition.expert_of_neuron.size(), static_cast<std::size_t>(H));
      for (const std::int64_t size : sizes_of(partition.expert_of_neuron, E))
        EXPECT_EQ(size, H / E);
    }
}

TEST(Partition, ContiguousKeepsTheOrder) {
  const DenseFfn ffn = random_ffn({.hidden = 6, .d_model = 2});
  const auto partition =
      partition_neurons(ffn.view(), {.method = PartitionMethod::kContiguous, .num_experts = 3});
  EXPECT_EQ(partition.expert_of_neuron, (std::vector<std::int32_t>{0, 0, 1, 1, 2, 2}));
}

TEST(Partition, SameSeedSamePartitionOtherSeedAnother) {
  const DenseFfn ffn = random_ffn({.hidden = 64, .d_model = 8});
  for (const PartitionMethod method : {PartitionMethod::kRandom, PartitionMethod::kKMeans}) {
    const auto draw = [&](std::uint64_t seed) {
      return partition_neurons(ffn.view(), {.method = method, .num_experts = 8, .seed = seed})
          .expert_of_neuron;
    };
    EXPECT_EQ(draw(1), draw(1));
    EXPECT_NE(draw(1), draw(2));
  }
}

// Written by an independent implementation of the same recipe (scripts/golden/shuffle.py:
// MT19937-64 from its paper, rejection, Fisher-Yates). If it moves, users' partitions move.
TEST(Partition, RandomPartitionIsTheSameOnEveryMachine) {
  const DenseFfn ffn = random_ffn({.hidden = 16, .d_model = 2});
  const auto partition = partition_neurons(
      ffn.view(), {.method = PartitionMethod::kRandom, .num_experts = 4, .seed = 7});
  EXPECT_EQ(partition.expert_of_neuron,
            (std::vector<std::int32_t>{3, 2, 0, 0, 3, 0, 0, 3, 3, 2, 2, 2, 1, 1, 1, 1}));
}

TEST(Partition, IndivisibleSizesNameTheNearestDivisors) {
  EXPECT_NE(message_of(7, 1536).find("nearest divisors are 6 and 8"), std::string::npos);
  EXPECT_NE(message_of(1000, 1536).find("nearest divisors are 768 and 1536"), std::string::npos);
  EXPECT_NE(message_of(5, 13).find("nearest divisors are 1 and 13"), std::string::npos);
  EXPECT_NE(message_of(2000, 1536).find("nearest divisor is 1536"), std::string::npos);
  EXPECT_NE(message_of(0, 1536).find("at least 1"), std::string::npos);
  EXPECT_NE(message_of(-8, 1536).find("at least 1"), std::string::npos);
  EXPECT_NE(message_of(1, 0).find("H = 0"), std::string::npos);
  EXPECT_EQ(message_of(8, 1536), "");
  EXPECT_EQ(message_of(1, 1), "");
}

TEST(Partition, RefusesWhatItCannotDo) {
  const DenseFfn ffn = random_ffn({.hidden = 12, .d_model = 4});
  for (const PartitionMethod method : kAllMethods)
    EXPECT_THROW(partition_neurons(ffn.view(), {.method = method, .num_experts = 5}),
                 InvalidArgument);
  EXPECT_THROW(partition_neurons(ffn.view(), {.num_experts = 4, .iterations = 0}), InvalidArgument);
}

TEST(Partition, KMeansReadsTheGateWhereThereIsOne) {
  // The gate has two kinds of rows, alternating; `up` has two kinds, in halves.
  DenseFfn ffn = random_ffn({.hidden = 8, .d_model = 2});
  for (int j = 0; j < 8; ++j) {
    ffn.gate[2 * j] = j % 2 == 0 ? 1.0f : 0.0f;
    ffn.gate[2 * j + 1] = j % 2 == 0 ? 0.0f : 1.0f;
    ffn.up[2 * j] = j < 4 ? 1.0f : 0.0f;
    ffn.up[2 * j + 1] = j < 4 ? 0.0f : 1.0f;
  }
  const auto gated = partition_neurons(ffn.view(), {.num_experts = 2}).expert_of_neuron;
  ffn.gate.clear();
  const auto ungated = partition_neurons(ffn.view(), {.num_experts = 2}).expert_of_neuron;
  for (int j = 0; j < 8; ++j) {
    EXPECT_EQ(gated[j] == gated[0], j % 2 == 0);
    EXPECT_EQ(ungated[j] == ungated[0], j < 4);
  }
}

TEST(KMeans, RecoversPlantedClusters) {
  const int E = 6, width = 20, D = 24, H = E * width;
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE("seed=" + std::to_string(seed));
    std::vector<float> rows = random_values(H * D, seed, 0.05);
    std::vector<std::int32_t> planted(H);
    std::iota(planted.begin(), planted.end(), 0);
    std::shuffle(planted.begin(), planted.end(), std::mt19937(seed));
    for (auto& p : planted) p /= width;
    // Rows of very different length: only their direction counts.
    for (int j = 0; j < H; ++j) {
      rows[j * D + planted[j]] += 1.0f;
      for (int d = 0; d < D; ++d) rows[j * D + d] *= static_cast<float>(1 + j % 17);
    }
    const auto found =
        balanced_kmeans({rows.data(), H, D}, {.clusters = E, .seed = seed}).cluster_of_row;
    for (int i = 0; i < H; ++i)
      for (int j = 0; j < i; ++j)
        ASSERT_EQ(found[i] == found[j], planted[i] == planted[j]) << i << " and " << j;
  }
}

TEST(KMeans, NeverEndsBelowItsStartAndReportsTheTrueObjective) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE("seed=" + std::to_string(seed));
    const int H = 96, D = 10, E = 8;
    const std::vector<float> rows = random_values(H * D, seed);
    const auto result = balanced_kmeans({rows.data(), H, D}, {.clusters = E, .seed = seed});
    EXPECT_GT(result.objective, result.start_objective);
    // Independently: sum over clusters of |sum of unit rows|^2 / size.
    double expected = 0.0;
    for (int e = 0; e < E; ++e) {
      std::vector<double> sum(D);
      for (int i = 0; i < H; ++i) {
        if (result.cluster_of_row[i] != e) continue;
        double norm = 0.0;
        for (int d = 0; d < D; ++d) norm += rows[i * D + d] * rows[i * D + d];
        for (int d = 0; d < D; ++d) sum[d] += rows[i * D + d] / std::sqrt(norm);
      }
      for (const double s : sum) expected += s * s / (H / E);
    }
    EXPECT_NEAR(result.objective, expected, 1e-4);
  }
}

TEST(KMeans, MoreRoundsAreNeverWorse) {
  const int H = 120, D = 12;
  const std::vector<float> rows = random_values(H * D, 11);
  double before = 0.0;
  for (const int rounds : {1, 2, 3, 5, 8, 25}) {
    const auto result = balanced_kmeans({rows.data(), H, D}, {.clusters = 6, .iterations = rounds});
    EXPECT_LE(result.rounds, rounds);
    EXPECT_GE(result.objective, before - 1e-5);
    before = result.objective;
  }
}

TEST(KMeans, ZeroAndDuplicateRowsKeepTheCapacities) {
  const int H = 24, D = 3, E = 6;
  std::vector<float> all_zero(H * D, 0.0f), all_equal(H * D, 2.5f);
  std::vector<float> mixed = random_values(H * D, 3);
  std::fill_n(mixed.begin(), H * D / 2, 0.0f);
  for (auto* rows : {&all_zero, &all_equal, &mixed}) {
    const auto result = balanced_kmeans({rows->data(), H, D}, {.clusters = E});
    for (const std::int64_t size : sizes_of(result.cluster_of_row, E)) EXPECT_EQ(size, H / E);
  }
}

TEST(KMeans, IgnoresThePaddingBetweenRows) {
  const int H = 32, D = 5, stride = 9;
  const std::vector<float> compact = random_values(H * D, 8);
  std::vector<float> padded(H * stride, 1e9f);
  for (int i = 0; i < H; ++i) std::copy_n(compact.data() + i * D, D, padded.data() + i * stride);
  EXPECT_EQ(balanced_kmeans({compact.data(), H, D}, {.clusters = 4}).cluster_of_row,
            balanced_kmeans({padded.data(), H, D, stride}, {.clusters = 4}).cluster_of_row);
}

}  // namespace
}  // namespace cleave
