#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <string>

#include "assignment.h"
#include "cleave/calibrate.h"
#include "cleave/error.h"
#include "cleave/factorize.h"
#include "cleave/partition.h"
#include "exact_kmeans.h"
#include "graph_clusters.h"
#include "support/random.h"
#include "support/random_ffn.h"

namespace cleave {
namespace {

using testing::random_ffn;
using testing::random_values;

/// Neurons that fire in groups: token t makes the neurons j with j % groups == t % groups large.
struct GroupedSample {
  std::int64_t tokens, hidden, groups;
  std::vector<float> values, norms;
  GroupedSample(std::int64_t T, std::int64_t H, std::int64_t G, std::uint64_t seed)
      : tokens(T), hidden(H), groups(G), values(random_values(T * H, seed, 0.05)) {
    std::mt19937_64 rng(seed + 1);
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t j = 0; j < H; ++j)
        if (j % G == t % G)
          values[t * H + j] = static_cast<float>((1.0 + unit_draw(rng)) * (t % 4 < 2 ? 1.0 : -1.0));
    for (std::int64_t j = 0; j < H; ++j) norms.push_back(1.0f + 0.1f * static_cast<float>(j % 3));
  }
  void kill(std::int64_t j) {
    for (std::int64_t t = 0; t < tokens; ++t) values[t * hidden + j] = 0.0f;
  }
  NeuronSample sample() const { return {{values.data(), tokens, hidden}, norms}; }
};

/// Exactly `shared` marked as shared, all experts of one width.
void expect_form(const NeuronPartition& partition, std::int64_t hidden, std::int32_t num_experts,
                 std::int64_t shared) {
  ASSERT_EQ(partition.num_experts, num_experts);
  ASSERT_EQ(partition.expert_of_neuron.size(), static_cast<std::size_t>(hidden));
  std::map<std::int32_t, std::int64_t> sizes;
  for (const std::int32_t e : partition.expert_of_neuron) ++sizes[e];
  EXPECT_EQ(sizes[NeuronPartition::kShared], shared);
  for (std::int32_t e = 0; e < num_experts; ++e)
    EXPECT_EQ(sizes[e], (hidden - shared) / num_experts) << "expert " << e;
}

/// Whether all routed neurons of an expert are of one group, but for those in `besides`.
void expect_groups(const NeuronPartition& partition, std::int64_t groups,
                   const std::set<std::int64_t>& besides = {}) {
  std::map<std::int32_t, std::set<std::int64_t>> groups_of;
  for (std::size_t j = 0; j < partition.expert_of_neuron.size(); ++j) {
    const std::int32_t e = partition.expert_of_neuron[j];
    const auto neuron = static_cast<std::int64_t>(j);
    if (e >= 0 && besides.count(neuron) == 0) groups_of[e].insert(neuron % groups);
  }
  for (const auto& [e, found] : groups_of) EXPECT_EQ(found.size(), 1u) << "expert " << e;
}

template <typename Call>
std::string partition_message(const Call& call) {
  try {
    call();
  } catch (const InvalidArgument& error) {
    return error.what();
  }
  return "";
}

TEST(RoutedSpec, SaysWhatDoesNotFit) {
  const auto says = [](const RoutedSpec& spec, const std::string& text) {
    const std::string message = partition_message([&] { routed_width(1536, spec); });
    EXPECT_NE(message.find(text), std::string::npos) << message;
  };
  EXPECT_EQ(routed_width(1536, {.num_experts = 96}), 16);
  EXPECT_EQ(routed_width(1536, {.num_experts = 5, .shared = {0}}), 307);
  says({.num_experts = 0}, "at least 1");
  says({.num_experts = 7}, "nearest divisors are 6 and 8");
  says({.num_experts = 1536, .shared = {3}}, "less than one each");
  says({.num_experts = 64, .width_multiple = 16}, "experts of 24, no multiple of 16");
  says({.num_experts = 1, .shared = {1536}}, "shared neuron 1536");
  says({.num_experts = 1, .shared = {4, 4}}, "named twice");
  says({.num_experts = 1, .iterations = 0}, "rounds");
}

TEST(HighestNeurons, TiesGoToTheLowerId) {
  const std::vector<float> score = {1.0f, 3.0f, 2.0f, 3.0f, -1.0f};
  EXPECT_EQ(highest_neurons(score, 4), (std::vector<std::int32_t>{1, 3, 2, 0}));
  EXPECT_TRUE(highest_neurons(score, 0).empty());
  EXPECT_THROW(highest_neurons(score, 6), InvalidArgument);
  EXPECT_THROW(highest_neurons(std::vector<float>{std::nanf("")}, 1), InvalidArgument);
}

TEST(PartitionNeurons, LeavesSharedNeuronsOut) {
  const DenseFfn ffn = random_ffn({.hidden = 24, .d_model = 5});
  for (const auto method :
       {PartitionMethod::kContiguous, PartitionMethod::kRandom, PartitionMethod::kKMeans}) {
    const auto partition =
        partition_neurons(ffn.view(), method, {.num_experts = 4, .shared = {7, 0, 23, 8}});
    expect_form(partition, 24, 4, 4);
    for (const int j : {0, 7, 8, 23})
      EXPECT_EQ(partition.expert_of_neuron[j], NeuronPartition::kShared);
    // Without shared ones it is the partition that there was before.
    EXPECT_EQ(partition_neurons(ffn.view(), method, {.num_experts = 4, .seed = 3}).expert_of_neuron,
              partition_neurons(ffn.view(), {.method = method, .num_experts = 4, .seed = 3})
                  .expert_of_neuron);
  }
}

TEST(ExactKMeans, NoRoundIsWorseThanTheOneBefore) {
  const auto rows = random_values(240 * 12, 4);
  const auto result =
      exact_balanced_kmeans({rows.data(), 240, 12}, {.clusters = 20, .seed = 1}, {});
  ASSERT_GT(result.spread.size(), 2u);
  for (std::size_t r = 1; r < result.spread.size(); ++r)
    EXPECT_LT(result.spread[r], result.spread[r - 1]);
  std::vector<int> sizes(20);
  for (const std::int32_t c : result.cluster_of_row) ++sizes[c];
  for (const int size : sizes) EXPECT_EQ(size, 12);
  EXPECT_EQ(
      exact_balanced_kmeans({rows.data(), 240, 12}, {.clusters = 20, .seed = 1}, {}).cluster_of_row,
      result.cluster_of_row);
}

/// Sum of |row - mean of its cluster|^2.
double spread_of(const std::vector<float>& rows, std::int64_t dims,
                 const std::vector<std::int32_t>& cluster_of) {
  std::map<std::int32_t, std::vector<double>> sum;
  std::map<std::int32_t, double> size;
  double spread = 0.0;
  for (std::size_t i = 0; i < cluster_of.size(); ++i) {
    auto& to = sum[cluster_of[i]];
    to.resize(static_cast<std::size_t>(dims));
    for (std::int64_t d = 0; d < dims; ++d) {
      const double value = rows[i * dims + d];
      to[d] += value;
      spread += value * value;
    }
    size[cluster_of[i]] += 1.0;
  }
  for (const auto& [cluster, total] : sum)
    for (const double value : total) spread -= value * value / size[cluster];
  return spread;
}

TEST(ImproveClusters, LowersTheSpreadUntilNoSwapDoes) {
  const std::int64_t n = 48, dims = 7;
  const auto rows = random_values(n * dims, 31);
  std::vector<float> products(n * n);
  const MatrixView<const float> view(rows.data(), n, dims);
  linear(view, view, {}, {products.data(), n, n}, {});
  const auto start = exact_balanced_kmeans(view, {.clusters = 12, .seed = 2}, {}).cluster_of_row;
  const auto end = improve_clusters(products, 12, start, 100);
  EXPECT_LT(spread_of(rows, dims, end), spread_of(rows, dims, start));
  for (std::size_t i = 0; i < end.size(); ++i)
    for (std::size_t j = i + 1; j < end.size(); ++j) {
      auto swapped = end;
      std::swap(swapped[i], swapped[j]);
      EXPECT_GE(spread_of(rows, dims, swapped), spread_of(rows, dims, end) - 1e-3);
    }
  EXPECT_EQ(improve_clusters(products, 12, end, 5), end);
}

TEST(PartitionProfiles, FindsNeuronsThatFireTogether) {
  GroupedSample grouped(60, 48, 4, 1);
  const auto partition = partition_profiles(grouped.sample(), {.num_experts = 4});
  expect_form(partition, 48, 4, 0);
  expect_groups(partition, 4);
  // A dead neuron goes where there is room; the others stay together.
  grouped.kill(5);
  grouped.kill(9);
  const auto with_dead =
      partition_profiles(grouped.sample(), {.num_experts = 4, .shared = {0, 2, 3, 1}});
  expect_form(with_dead, 48, 4, 4);
  expect_groups(with_dead, 4, {5, 9});
}

TEST(PartitionProfiles, WeighsByTheNormOfDown) {
  // Two kinds of neurons that only the norms tell apart.
  const std::vector<float> values(6 * 4, 1.0f), norms = {1.0f, 9.0f, 9.0f, 1.0f};
  const auto partition = partition_profiles({{values.data(), 6, 4}, norms}, {.num_experts = 2});
  EXPECT_EQ(partition.expert_of_neuron[0], partition.expert_of_neuron[3]);
  EXPECT_EQ(partition.expert_of_neuron[1], partition.expert_of_neuron[2]);
}

TEST(PartitionProfiles, RefusesBadSamples) {
  GroupedSample grouped(8, 12, 3, 1);
  const auto call = [&](const NeuronSample& sample) {
    return partition_message([&] { partition_profiles(sample, {.num_experts = 3}); });
  };
  grouped.values[2 * 12 + 7] = std::numeric_limits<float>::infinity();
  EXPECT_NE(call(grouped.sample()).find("neuron 7 is inf at token 2"), std::string::npos);
  const std::vector<float> zeros(8 * 12);
  EXPECT_NE(call({{zeros.data(), 8, 12}, {}}).find("are 0 at all 8 tokens"), std::string::npos);
  EXPECT_NE(call({{zeros.data(), 0, 12}, {}}).find("empty"), std::string::npos);
  NeuronSample few = grouped.sample();
  few.down_norm = few.down_norm.first(5);
  EXPECT_NE(call(few).find("5 norms"), std::string::npos);
}

std::vector<float> counts_of(const NeuronSample& sample, std::int64_t top) {
  NeuronStats stats({.num_layers = 1,
                     .hidden = sample.hidden.cols,
                     .d_model = 1,
                     .top = top,
                     .coactivation = true});
  const std::vector<float> input(static_cast<std::size_t>(sample.hidden.rows), 1.0f);
  stats.observe(0, sample.hidden, {input.data(), sample.hidden.rows, 1});
  return stats.coactivation(0);
}

/// The sum that partition_coactivation raises.
double inside_of(const std::vector<float>& a, const std::vector<std::int32_t>& expert_of) {
  const std::size_t H = expert_of.size();
  double sum = 0.0;
  for (std::size_t i = 0; i < H; ++i)
    for (std::size_t j = 0; j < H; ++j)
      if (expert_of[i] == expert_of[j] && a[i * H + i] > 0.0f && a[j * H + j] > 0.0f)
        sum += a[i * H + j] / std::sqrt(double{a[i * H + i]} * a[j * H + j]);
  return sum;
}

TEST(PartitionCoactivation, FindsNeuronsThatFireTogether) {
  GroupedSample grouped(80, 40, 4, 2);
  grouped.kill(6);
  const auto counts = counts_of(grouped.sample(), 10);
  const auto partition = partition_coactivation({counts.data(), 40, 40}, {.num_experts = 4});
  expect_form(partition, 40, 4, 0);
  expect_groups(partition, 4, {6});
  const auto shared =
      partition_coactivation({counts.data(), 40, 40}, {.num_experts = 4, .shared = {0, 1, 2, 3}});
  expect_form(shared, 40, 4, 4);
}

TEST(PartitionCoactivation, EndsWhereNoSwapGains) {
  const auto values = random_values(64 * 36, 11);
  const auto counts = counts_of({{values.data(), 64, 36}, {}}, 8);
  const auto expert_of =
      partition_coactivation({counts.data(), 36, 36}, {.num_experts = 6, .iterations = 100})
          .expert_of_neuron;
  const double end = inside_of(counts, expert_of);
  for (std::size_t i = 0; i < 36; ++i)
    for (std::size_t j = i + 1; j < 36; ++j) {
      auto swapped = expert_of;
      std::swap(swapped[i], swapped[j]);
      EXPECT_LE(inside_of(counts, swapped), end + 1e-4);
    }
  const DenseFfn ffn = random_ffn({.hidden = 36, .d_model = 1});
  const auto random = partition_neurons(ffn.view(), PartitionMethod::kRandom, {.num_experts = 6});
  EXPECT_GT(end, 1.1 * inside_of(counts, random.expert_of_neuron));
}

TEST(PartitionCoactivation, RefusesBadMatrices) {
  std::vector<float> zeros(16);
  EXPECT_THROW(partition_coactivation({zeros.data(), 4, 4}, {.num_experts = 2}), InvalidArgument);
  EXPECT_THROW(partition_coactivation({zeros.data(), 2, 4}, {.num_experts = 2}), InvalidArgument);
  zeros[5] = -1.0f;
  EXPECT_THROW(partition_coactivation({zeros.data(), 4, 4}, {.num_experts = 2}), InvalidArgument);
}

/// [H, T] 0/1 columns by the definition.
std::vector<std::vector<double>> columns_of(const NeuronSample& sample, std::int64_t top) {
  const std::int64_t T = sample.hidden.rows, H = sample.hidden.cols;
  std::vector<std::vector<double>> columns(H, std::vector<double>(T));
  for (std::int64_t t = 0; t < T; ++t) {
    std::vector<float> size;
    for (std::int64_t j = 0; j < H; ++j) size.push_back(std::abs(sample.hidden(t, j)));
    for (const std::int32_t j : highest_neurons(size, top)) columns[j][t] = 1.0;
  }
  return columns;
}

double l1(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += std::abs(a[i] - b[i]);
  return sum;
}

TEST(PartitionCmoe, EqualsItsDefinition) {
  const std::int64_t T = 50, H = 30, S = 6;
  const std::int32_t E = 4;
  const auto values = random_values(T * H, 21);
  const NeuronSample sample{{values.data(), T, H}, {}};
  const auto result = partition_cmoe(sample, {.num_experts = E, .shared_neurons = S, .top = 5});
  expect_form(result.partition, H, E, S);
  const auto& expert_of = result.partition.expert_of_neuron;

  const auto columns = columns_of(sample, 5);
  std::vector<float> rate;
  for (const auto& column : columns)
    rate.push_back(static_cast<float>(std::count(column.begin(), column.end(), 1.0)));
  const auto order = highest_neurons(rate, H);
  for (std::int64_t r = 0; r < S; ++r)
    EXPECT_EQ(expert_of[order[r]], NeuronPartition::kShared) << "rank " << r;

  // No other balanced assignment around the E next most active neurons costs less.
  std::vector<float> benefit;
  std::vector<std::int64_t> routed;
  double cost = 0.0;
  for (std::int64_t j = 0; j < H; ++j) {
    if (expert_of[j] < 0) continue;
    routed.push_back(j);
    for (std::int32_t e = 0; e < E; ++e)
      benefit.push_back(static_cast<float>(-l1(columns[j], columns[order[S + e]])));
    cost += l1(columns[j], columns[order[S + expert_of[j]]]);
  }
  const std::vector<std::int64_t> capacity(E, (H - S) / E);
  const auto best =
      assign_balanced({benefit.data(), static_cast<std::int64_t>(routed.size()), E}, capacity);
  double least = 0.0;
  for (std::size_t r = 0; r < routed.size(); ++r) least -= benefit[r * E + best[r]];
  EXPECT_NEAR(cost, least, 1e-4);

  // The representative is the member nearest to the mean of all.
  for (std::int32_t e = 0; e < E; ++e) {
    std::vector<double> mean(T);
    for (const std::int64_t j : routed)
      for (std::int64_t t = 0; t < T && expert_of[j] == e; ++t)
        mean[t] += columns[j][t] / static_cast<double>((H - S) / E);
    ASSERT_EQ(expert_of[result.representative[e]], e);
    for (const std::int64_t j : routed) {
      if (expert_of[j] != e) continue;
      EXPECT_LE(l1(columns[result.representative[e]], mean), l1(columns[j], mean) + 1e-4);
    }
  }
}

TEST(PartitionCmoe, TakesDeadNeuronsAndMoreRounds) {
  GroupedSample grouped(120, 48, 4, 3);
  grouped.kill(7);
  for (const std::int32_t iterations : {1, 20}) {
    const auto result = partition_cmoe(
        grouped.sample(),
        {.num_experts = 4, .shared_neurons = 16, .top = 12, .iterations = iterations});
    expect_form(result.partition, 48, 4, 16);
    EXPECT_EQ(result.representative.size(), 4u);
    EXPECT_GE(result.partition.expert_of_neuron[7], 0);  // dead, hence not shared
  }
  EXPECT_THROW(partition_cmoe(grouped.sample(), {.num_experts = 4, .top = 49}), InvalidArgument);
  EXPECT_THROW(partition_cmoe(grouped.sample(), {.num_experts = 4, .shared_neurons = 45}),
               InvalidArgument);
  const std::vector<float> zeros(10 * 8);
  EXPECT_THROW(partition_cmoe({{zeros.data(), 10, 8}, {}}, {.num_experts = 2, .top = 3}),
               InvalidArgument);
}

TEST(PartitionExpertWeaver, SharesByTheCoefficientOfVariation) {
  // 16 neurons, 4 samples. Neurons 0-3 vary much (deviation equal to the mean), the others are
  // constant: r = 1/4, alpha = 0.575, of N = 8 experts round(4.6) = 5 are shared.
  const std::int64_t samples = 4, H = 16;
  std::vector<float> a(samples * H);
  for (std::int64_t i = 0; i < samples; ++i)
    for (std::int64_t j = 0; j < H; ++j)
      a[i * H + j] = j < 4 ? (i % 2 == j % 2 ? 2.0f : 0.0f)
                           : (j < 6 || j % 2 == 0 ? 1.0f : -1.0f) * (1.0f + static_cast<float>(j));
  const auto result = partition_expert_weaver({a.data(), samples, H}, {.num_experts = 8});
  EXPECT_DOUBLE_EQ(result.specialised_share, 0.25);
  EXPECT_EQ(result.shared_experts, 5);
  expect_form(result.partition, H, 3, 10);
  for (int j = 6; j < 16; ++j)  // largest mean |a|
    EXPECT_EQ(result.partition.expert_of_neuron[j], NeuronPartition::kShared);
  // Of the rest, those that vary alike are together.
  const auto& expert_of = result.partition.expert_of_neuron;
  EXPECT_EQ(expert_of[0], expert_of[2]);
  EXPECT_EQ(expert_of[1], expert_of[3]);
  EXPECT_EQ(expert_of[4], expert_of[5]);

  const auto given =
      partition_expert_weaver({a.data(), samples, H}, {.num_experts = 4, .shared_experts = 0});
  expect_form(given.partition, H, 4, 0);
  EXPECT_THROW(partition_expert_weaver({a.data(), 1, H}, {.num_experts = 4}), InvalidArgument);
  EXPECT_THROW(partition_expert_weaver({a.data(), samples, H}, {.num_experts = 5}),
               InvalidArgument);
  EXPECT_THROW(
      partition_expert_weaver({a.data(), samples, H}, {.num_experts = 4, .shared_experts = 4}),
      InvalidArgument);
}

TEST(PartitionImportanceSpread, DealsOutByRank) {
  const std::vector<float> importance = {0.1f, 0.9f, 0.5f, 0.4f, 0.8f, 0.3f, 0.7f};
  const auto partition = partition_importance_spread(importance, {.num_experts = 3, .shared = {1}});
  // ranks: 4 6 2 | 3 5 0
  EXPECT_EQ(partition.expert_of_neuron,
            (std::vector<std::int32_t>{2, NeuronPartition::kShared, 2, 0, 0, 1, 1}));
}

}  // namespace
}  // namespace cleave
