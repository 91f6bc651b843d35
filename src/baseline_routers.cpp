#include "baseline_routers.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace cleave {
namespace {

/// Norms over the token's mean norm, as in convert(): no token counts more than another.
void relative_norms(MatrixView<const float> norms, MatrixView<float> relative) {
  for (std::int64_t t = 0; t < norms.rows; ++t) {
    const float* row = norms.row(t);
    double sum = 0.0;
    for (std::int64_t e = 0; e < norms.cols; ++e) sum += row[e];
    for (std::int64_t e = 0; e < norms.cols; ++e)
      relative(t, e) =
          sum > 0.0 ? static_cast<float>(row[e] * static_cast<double>(norms.cols) / sum) : 0.0f;
  }
}

}  // namespace

bool is_fitted(BaselineRouter router) {
  return router == BaselineRouter::kRidge || router == BaselineRouter::kRidgeBias ||
         router == BaselineRouter::kRegression;
}

bool is_measured(BaselineRouter router) {
  return router != BaselineRouter::kNone && router != BaselineRouter::kOracleNorm &&
         router != BaselineRouter::kOracleNeuron;
}

bool reads_hidden(BaselineRouter router) {
  return router == BaselineRouter::kOracleLabel || router == BaselineRouter::kRepresentative;
}

std::int64_t SideBySideRidge::add(std::int64_t num_experts) {
  targets_ += num_experts;
  return targets_ - num_experts;
}

void SideBySideRidge::observe(MatrixView<const float> x,
                              std::span<const MatrixView<const float>> norms) {
  if (targets_ == 0) return;
  const std::int64_t width = D_ + (bias_ ? 1 : 0);
  if (!fit_) fit_.emplace(width, targets_);
  target_.resize(static_cast<std::size_t>(x.rows * targets_));
  std::int64_t begin = 0;
  for (const MatrixView<const float>& part : norms) {
    relative_norms(part, {target_.data() + begin, x.rows, part.cols, targets_});
    begin += part.cols;
  }
  const MatrixView<const float> targets(target_.data(), x.rows, targets_);
  if (!bias_) {
    fit_->observe(x, targets);
    return;
  }
  input_.assign(static_cast<std::size_t>(x.rows * width), 1.0f);
  for (std::int64_t t = 0; t < x.rows; ++t) std::copy_n(x.row(t), D_, input_.data() + t * width);
  fit_->observe({input_.data(), x.rows, width}, targets);
}

void SideBySideRidge::solve(std::int64_t begin, std::int64_t num_experts, BaselineLayer& layer) {
  if (!solved_) solved_ = fit_->solve();
  layer.router = {num_experts, D_, {}};
  for (std::int64_t e = begin; e < begin + num_experts; ++e) {
    const float* row = solved_->weight.data() + e * solved_->d_model;
    layer.router.weight.insert(layer.router.weight.end(), row, row + D_);
    if (bias_) layer.router_bias.push_back(row[D_]);
  }
}

BaselineRouters::BaselineRouters(const FfnView& ffn, std::span<const BaselinePartition> partitions,
                                 std::span<const Baseline> baselines, std::int64_t tokens)
    : ffn_(ffn), tokens_(tokens), plain_(ffn.up.cols, false), biased_(ffn.up.cols, true) {
  for (const BaselinePartition& partition : partitions) {
    const auto wanted = [&](auto&& condition) {
      return std::any_of(baselines.begin(), baselines.end(), [&](const Baseline& b) {
        return key_of(b.spec) == partition.key && condition(b.spec.router);
      });
    };
    if (!wanted(is_measured)) continue;
    const std::int64_t E = partition.key.num_experts;
    groups_.push_back({.key = partition.key,
                       .split = ExpertSplit(ffn, partition.expert_of_neuron, E),
                       .norms = std::vector<float>(static_cast<std::size_t>(tokens * E))});
    if (wanted([](BaselineRouter r) { return r == BaselineRouter::kRidge; }))
      groups_.back().plain = plain_.add(E);
    if (wanted([](BaselineRouter r) { return r == BaselineRouter::kRidgeBias; }))
      groups_.back().biased = biased_.add(E);
    groups_.back().learns =
        wanted([](BaselineRouter r) { return r == BaselineRouter::kRegression; });
  }
}

void BaselineRouters::observe(MatrixView<const float> x, MatrixView<const float> h,
                              const ParallelFor& parallel) {
  std::vector<MatrixView<const float>> plain, biased;
  for (Group& group : groups_) {
    const MatrixView<float> part = norms(group, seen_, x.rows);
    expert_squares(group.split, h, {}, 0.0, part, parallel);
    for (std::int64_t i = 0; i < part.rows * part.cols; ++i) part.data[i] = std::sqrt(part.data[i]);
    if (group.plain >= 0) plain.push_back(part);
    if (group.biased >= 0) biased.push_back(part);
  }
  plain_.observe(x, plain);
  biased_.observe(x, biased);
  seen_ += x.rows;
}

/// One thread a router: a step is too short to be shared.
void BaselineRouters::learn(MatrixView<const float> x, std::int64_t layer,
                            const ParallelFor& parallel) {
  std::vector<Group*> learners;
  for (Group& group : groups_)
    if (group.learns) learners.push_back(&group);
  parallel(static_cast<std::int64_t>(learners.size()), 1,
           [&](std::int64_t begin, std::int64_t end) {
             for (std::int64_t i = begin; i < end; ++i) {
               Group& group = *learners[i];
               group.learned = fit_regression_router(
                   x, norms(group, 0, tokens_), {.seed = layer_seed(group.key.seed, layer)}, {});
             }
           });
}

const BaselineRouters::Group& BaselineRouters::group_of(const BaselineSpec& spec) const {
  return *std::find_if(groups_.begin(), groups_.end(),
                       [&](const Group& g) { return g.key == key_of(spec); });
}

void BaselineRouters::solve(const BaselineSpec& spec, const Group& group, MatrixView<const float> x,
                            BaselineLayer& into, const ParallelFor& parallel) {
  const std::int64_t E = group.split.num_experts;
  if (spec.router == BaselineRouter::kRegression)
    into.regression = *group.learned;
  else if (spec.router == BaselineRouter::kRidge)
    plain_.solve(group.plain, E, into);
  else if (spec.router == BaselineRouter::kRidgeBias)
    biased_.solve(group.biased, E, into);
  else if (spec.router == BaselineRouter::kMass)
    into.mass = fit_mass_router(ffn_, into.expert_of_neuron, E, x, spec.rank, parallel);
}

void BaselineRouters::fit(MatrixView<const float> x, std::int64_t layer,
                          std::span<Baseline> baselines, const ParallelFor& parallel) {
  learn(x, layer, parallel);
  for (Baseline& b : baselines) {
    if (!is_measured(b.spec.router) || reads_hidden(b.spec.router)) continue;
    BaselineLayer& into = b.layers[layer];
    solve(b.spec, group_of(b.spec), x, into, parallel);
    std::vector<float> scores(static_cast<std::size_t>(tokens_ * b.spec.num_experts));
    router_scores(b.spec, into, x, {scores.data(), tokens_, b.spec.num_experts}, parallel);
    into.quality = quality(b.spec, scores);
  }
}

RouterQuality BaselineRouters::quality(const BaselineSpec& spec,
                                       const std::vector<float>& scores) const {
  const std::int64_t E = spec.num_experts;
  return router_quality({scores.data(), tokens_, E}, {group_of(spec).norms.data(), tokens_, E},
                        spec.experts_per_token);
}

}  // namespace cleave
