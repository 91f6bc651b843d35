#include <gtest/gtest.h>

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <string>

#include "cleave/error.h"
#include "cleave/fit_router.h"
#include "cleave/partition.h"
#include "support/random_ffn.h"

namespace cleave {
namespace {

using testing::random_values;

using RouterRows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Tokens whose experts' gains are a rising function of the logits of a linear router.
struct PlantedRouter {
  std::int64_t T = 1500, D = 12, E = 10, K = 3;
  std::vector<float> x, weight, gain;

  explicit PlantedRouter(double noise = 0.0) {
    x = random_values(T * D, 11);
    weight = random_values(E * D, 12);
    const auto extra = random_values(T * E, 13, noise);
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t e = 0; e < E; ++e) {
        double logit = extra[t * E + e];
        for (std::int64_t d = 0; d < D; ++d) logit += weight[e * D + d] * x[t * D + d];
        gain.push_back(static_cast<float>(std::exp(0.2 * logit)));
      }
  }
  MatrixView<const float> inputs() const { return {x.data(), T, D}; }
  MatrixView<const float> gains() const { return {gain.data(), T, E}; }

  /// Share of the K experts of largest gain that the router chooses too.
  double recall(const LinearRouter& router) const {
    std::vector<float> logits(static_cast<std::size_t>(T * E));
    linear(inputs(), router.view(), {}, {logits.data(), T, E}, {});
    std::int64_t hits = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      const auto best = highest_neurons({gain.data() + t * E, static_cast<std::size_t>(E)}, K);
      const auto own = highest_neurons({logits.data() + t * E, static_cast<std::size_t>(E)}, K);
      for (const std::int32_t e : own)
        hits += std::find(best.begin(), best.end(), e) != best.end() ? 1 : 0;
    }
    return static_cast<double>(hits) / static_cast<double>(T * K);
  }
};

TEST(LogisticRouter, RecoversAPlantedRouter) {
  const PlantedRouter planted;
  const LinearRouter start = random_router(planted.E, planted.D, 5);
  RouterTrainSpec spec;
  spec.batch = 256;
  spec.steps = 400;
  spec.rate = 1e-2;
  const LinearRouter router =
      logistic_router(planted.inputs(), planted.gains(), planted.K, start, spec, {});
  EXPECT_LT(planted.recall(start), 0.5);
  EXPECT_GT(planted.recall(router), 0.9);
}

TEST(LogisticRouter, WeighsAMistakeByWhatItCosts) {
  // One input feature; expert 0 pays 10 when it is positive, expert 1 pays 1 when it is not, expert
  // 2 pays 0.5 always. With K = 1 and no bias, 0 has to win where it pays.
  const std::int64_t T = 400;
  std::vector<float> x, gain;
  for (std::int64_t t = 0; t < T; ++t) {
    const float side = t % 4 == 0 ? 1.0f : -1.0f;  // rarely
    x.insert(x.end(), {side, 1.0f});
    gain.insert(gain.end(), {side > 0 ? 10.0f : 0.0f, side > 0 ? 0.0f : 1.0f, 0.5f});
  }
  RouterTrainSpec spec;
  spec.batch = 128;
  spec.rate = 3e-2;
  const LinearRouter router =
      logistic_router({x.data(), T, 2}, {gain.data(), T, 3}, 1, random_router(3, 2, 1), spec, {});
  const auto logit = [&](std::int64_t e, float side) {
    return router.weight[e * 2] * side + router.weight[e * 2 + 1];
  };
  for (const std::int64_t other : {1, 2}) EXPECT_GT(logit(0, 1.0f), logit(other, 1.0f));
  for (const std::int64_t other : {0, 2}) EXPECT_GT(logit(1, -1.0f), logit(other, -1.0f));
}

TEST(LogisticRouter, RefusesBadInput) {
  const PlantedRouter planted;
  const LinearRouter start = random_router(planted.E, planted.D, 5);
  try {
    logistic_router(planted.inputs(), planted.gains(), planted.E + 1, start, {}, {});
    ADD_FAILURE() << "K > E was taken";
  } catch (const InvalidArgument& error) {
    EXPECT_NE(std::string(error.what()).find("logistic_router"), std::string::npos);
  }
}

TEST(LowRankRouter, IsTheNearestOfItsRank) {
  const PlantedRouter planted;
  const LinearRouter full{planted.E, planted.D, planted.weight};
  const std::int64_t R = 4;
  const LinearRouter low = low_rank_router(planted.inputs(), full, R, {});
  const auto as_matrix = [](const std::vector<float>& v, std::int64_t rows, std::int64_t cols) {
    return Eigen::MatrixXd(Eigen::Map<const RouterRows>(v.data(), rows, cols).cast<double>());
  };
  const Eigen::MatrixXd X = as_matrix(planted.x, planted.T, planted.D);
  const Eigen::MatrixXd Z = X * as_matrix(full.weight, planted.E, planted.D).transpose();
  const Eigen::MatrixXd W = as_matrix(low.weight, planted.E, planted.D);
  // Eckart and Young: no matrix of rank R is nearer to Z than its truncated decomposition.
  const Eigen::VectorXd all = Eigen::JacobiSVD<Eigen::MatrixXd>(Z).singularValues();
  const double least = all.tail(planted.E - R).norm();
  EXPECT_NEAR((X * W.transpose() - Z).norm(), least, 1e-4 * Z.norm());
  const Eigen::VectorXd own = Eigen::JacobiSVD<Eigen::MatrixXd>(W).singularValues();
  EXPECT_GT(own[R - 1], 1e-2 * own[0]);
  EXPECT_LT(own[R], 1e-5 * own[0]);
}

TEST(LowRankRouter, KeepsARouterOfItsRankAndImprovesANoisyOne) {
  PlantedRouter planted(/*noise=*/6.0);
  // Rank 2: every expert's row is a mixture of the first two.
  for (std::int64_t e = 2; e < planted.E; ++e)
    for (std::int64_t d = 0; d < planted.D; ++d) {
      const double angle = 0.7 * static_cast<double>(e);
      planted.weight[e * planted.D + d] = static_cast<float>(
          std::cos(angle) * planted.weight[d] + std::sin(angle) * planted.weight[planted.D + d]);
    }
  const LinearRouter full{planted.E, planted.D, planted.weight};
  const LinearRouter same = low_rank_router(planted.inputs(), full, 2, {});
  for (std::size_t i = 0; i < full.weight.size(); ++i)
    EXPECT_NEAR(same.weight[i], full.weight[i], 1e-4);

  std::vector<float> target(static_cast<std::size_t>(planted.T * planted.E));
  const auto noise = random_values(planted.T * planted.E, 21, 15.0);
  linear(planted.inputs(), full.view(), {}, {target.data(), planted.T, planted.E}, {});
  planted.gain = target;  // the truth; the fit sees it with noise
  for (std::size_t i = 0; i < target.size(); ++i) target[i] += noise[i];
  RouterFit fit(planted.D, planted.E);
  fit.observe(planted.inputs(), {target.data(), planted.T, planted.E});
  const LinearRouter ridge = fit.solve();
  EXPECT_GT(planted.recall(low_rank_router(planted.inputs(), ridge, 2, {})),
            planted.recall(ridge) + 0.02);
}

TEST(LowRankRouter, RefusesBadInput) {
  const PlantedRouter planted;
  LinearRouter router{planted.E, planted.D, planted.weight};
  EXPECT_THROW(low_rank_router(planted.inputs(), router, 0, {}), InvalidArgument);
  EXPECT_THROW(low_rank_router(planted.inputs(), router, planted.E + 1, {}), InvalidArgument);
  EXPECT_THROW(low_rank_router({planted.x.data(), planted.D, planted.T}, router, 1, {}),
               InvalidArgument);
  router.weight[3] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(low_rank_router(planted.inputs(), router, 2, {}), InvalidArgument);
}

/// An FFN of E blocks of neurons whose gates open for tokens near the block's centre.
struct BlockFfn {
  std::int64_t E = 4, width = 5, D = 32, T = 200;
  DenseFfn ffn;
  NeuronPartition partition;
  std::vector<float> x, hidden;
  std::vector<std::int64_t> kind;  // [T]

  BlockFfn() {
    const std::int64_t H = E * width + 2;  // two shared ones at the end
    ffn = testing::random_ffn({.hidden = H, .d_model = D, .seed = 3});
    const auto centre = random_values(E * D, 4);
    const auto noise = random_values((H + T) * D, 5, 0.3);
    partition.num_experts = static_cast<std::int32_t>(E);
    for (std::int64_t j = 0; j < H; ++j) {
      const std::int64_t e = j < E * width ? j % E : -1;
      partition.expert_of_neuron.push_back(e < 0 ? NeuronPartition::kShared
                                                 : static_cast<std::int32_t>(e));
      for (std::int64_t d = 0; d < D && e >= 0; ++d)
        ffn.gate[j * D + d] = centre[e * D + d] + noise[j * D + d];
    }
    for (std::int64_t t = 0; t < T; ++t) {
      kind.push_back(t % E);
      for (std::int64_t d = 0; d < D; ++d)
        x.push_back(centre[kind.back() * D + d] + noise[(H + t) * D + d]);
      for (std::int64_t j = 0; j < H; ++j) {
        double gate = 0.0;
        for (std::int64_t d = 0; d < D; ++d) gate += ffn.gate[j * D + d] * x[t * D + d];
        hidden.push_back(static_cast<float>(std::max(gate, 0.0)));
      }
    }
  }
  NeuronSample sample() const { return {{hidden.data(), T, E * width + 2}}; }
  /// Share of the tokens whose own expert has the largest logit.
  double right(const LinearRouter& router) const {
    std::vector<float> logits(static_cast<std::size_t>(T * E));
    linear({x.data(), T, D}, router.view(), {}, {logits.data(), T, E}, {});
    std::int64_t hits = 0;
    for (std::int64_t t = 0; t < T; ++t) {
      const float* row = logits.data() + t * E;
      hits += std::max_element(row, row + E) - row == kind[t] ? 1 : 0;
    }
    return static_cast<double>(hits) / static_cast<double>(T);
  }
};

TEST(MeanGateRouter, IsTheMeanOfTheGateRowsAndFindsPlantedExperts) {
  const BlockFfn block;
  const LinearRouter router = mean_gate_router(block.ffn.view(), block.partition);
  for (std::int64_t e = 0; e < block.E; ++e)
    for (std::int64_t d = 0; d < block.D; ++d) {
      double sum = 0.0;
      for (std::int64_t i = 0; i < block.width; ++i)
        sum += block.ffn.gate[(e + i * block.E) * block.D + d];
      EXPECT_NEAR(router.weight[e * block.D + d], sum / static_cast<double>(block.width), 1e-6);
    }
  EXPECT_GT(block.right(router), 0.95);
}

TEST(MeanGateRouter, RefusesBadInput) {
  BlockFfn block;
  NeuronPartition empty = block.partition;
  for (std::int32_t& e : empty.expert_of_neuron)
    if (e == 2) e = NeuronPartition::kDropped;
  EXPECT_THROW(mean_gate_router(block.ffn.view(), empty), InvalidArgument);
  block.partition.expert_of_neuron.pop_back();
  EXPECT_THROW(mean_gate_router(block.ffn.view(), block.partition), InvalidArgument);
}

TEST(RepresentativeRouter, TakesTheNeuronNearestToItsExpertsMean) {
  const BlockFfn block;
  const std::int64_t top = 6, H = block.E * block.width + 2;
  const auto representative = representative_neurons(block.sample(), block.partition, top);
  ASSERT_EQ(static_cast<std::int64_t>(representative.size()), block.E);
  // The definition, on full 0/1 columns.
  std::vector<std::vector<double>> column(static_cast<std::size_t>(H),
                                          std::vector<double>(static_cast<std::size_t>(block.T)));
  for (std::int64_t t = 0; t < block.T; ++t) {
    std::vector<float> magnitude(block.hidden.begin() + t * H, block.hidden.begin() + (t + 1) * H);
    for (const std::int32_t j : highest_neurons(magnitude, top))
      column[j][t] = magnitude[j] > 0.0f ? 1.0 : 0.0;
  }
  for (std::int64_t e = 0; e < block.E; ++e) {
    std::vector<std::pair<double, std::int32_t>> distance;
    for (std::int64_t j = 0; j < H; ++j) {
      if (block.partition.expert_of_neuron[j] != e) continue;
      double sum = 0.0;
      for (std::int64_t t = 0; t < block.T; ++t) {
        double mean = 0.0;
        for (std::int64_t i = 0; i < block.width; ++i) mean += column[e + i * block.E][t];
        sum += std::abs(column[j][t] - mean / static_cast<double>(block.width));
      }
      distance.emplace_back(sum, static_cast<std::int32_t>(j));
    }
    const auto nearest = *std::min_element(distance.begin(), distance.end());
    const auto chosen = std::find_if(distance.begin(), distance.end(), [&](const auto& d) {
      return d.second == representative[static_cast<std::size_t>(e)];
    });
    ASSERT_NE(chosen, distance.end()) << "expert " << e << " is represented by a stranger";
    EXPECT_NEAR(chosen->first, nearest.first, 1e-9) << "expert " << e;
  }

  const LinearRouter router = representative_router(block.ffn.view(), representative);
  for (std::int64_t e = 0; e < block.E; ++e)
    for (std::int64_t d = 0; d < block.D; ++d)
      EXPECT_EQ(router.weight[e * block.D + d],
                block.ffn.gate[representative[static_cast<std::size_t>(e)] * block.D + d]);
  EXPECT_GT(block.right(router), 0.9);
}

TEST(RepresentativeRouter, RefusesBadInput) {
  const BlockFfn block;
  const std::vector<std::int32_t> outside{0, 22};
  EXPECT_THROW(representative_router(block.ffn.view(), outside), InvalidArgument);
  EXPECT_THROW(representative_router(block.ffn.view(), {}), InvalidArgument);
  EXPECT_THROW(representative_neurons(block.sample(), block.partition, 0), InvalidArgument);
  EXPECT_THROW(representative_neurons(block.sample(), {2, {0, 1, 0}}, 3), InvalidArgument);
  NeuronPartition empty = block.partition;
  empty.num_experts = 5;
  EXPECT_THROW(representative_neurons(block.sample(), empty, 3), InvalidArgument);
}

TEST(RouterMethods, HaveNamesThatCanBeRead) {
  std::set<std::string> names;
  for (const RouterMethod method :
       {RouterMethod::kTrained, RouterMethod::kRidge, RouterMethod::kLogistic,
        RouterMethod::kLowRank, RouterMethod::kMeanGate, RouterMethod::kRepresentative}) {
    names.insert(router_method_name(method));
    EXPECT_EQ(parse_router_method(router_method_name(method)), method);
  }
  EXPECT_EQ(names.size(), 6u);
  EXPECT_FALSE(parse_router_method("low-rank:3").has_value());
}

TEST(BudgetPartitions, HaveNamesThatCanBeRead) {
  std::set<std::string> names;
  for (int i = 0; i <= static_cast<int>(BudgetPartition::kRandom); ++i) {
    const auto partition = static_cast<BudgetPartition>(i);
    names.insert(budget_partition_name(partition));
    EXPECT_EQ(parse_budget_partition(budget_partition_name(partition)), partition);
  }
  EXPECT_EQ(names.size(), 9u);
  EXPECT_FALSE(parse_budget_partition("unknown").has_value());
}

}  // namespace
}  // namespace cleave
