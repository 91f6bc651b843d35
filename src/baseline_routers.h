#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "baseline_ffn.h"
#include "baseline_partition.h"
#include "cleave/baselines.h"
#include "cleave/fit_router.h"

namespace cleave {

/// Whether a router learns from the experts' outputs on the calibration text.
bool is_fitted(BaselineRouter router);
/// Whether a router chooses experts, and not by what it is measured with.
bool is_measured(BaselineRouter router);
/// Whether it sees the FFN's hidden values, beside x or in its place.
bool reads_hidden(BaselineRouter router);

/// Layers must not share what is drawn.
inline std::uint64_t layer_seed(std::uint64_t seed, std::int64_t layer) {
  return seed * 0x9E3779B97F4A7C15u + static_cast<std::uint64_t>(layer) + 1;
}

/// Ridge routers of several partitions from one regression: the targets stand side by side.
class SideBySideRidge {
 public:
  SideBySideRidge(std::int64_t d_model, bool bias) : D_(d_model), bias_(bias) {}
  /// Call before observe(). @return  where the E columns of the partition begin
  std::int64_t add(std::int64_t num_experts);
  /// x [T, D]; norms: one [T, E] for each add(), in that order.
  void observe(MatrixView<const float> x, std::span<const MatrixView<const float>> norms);
  /// Router and bias of the partition whose columns begin at `begin`.
  void solve(std::int64_t begin, std::int64_t num_experts, BaselineLayer& layer);

 private:
  std::int64_t D_, targets_ = 0;
  bool bias_;
  std::optional<RouterFit> fit_;
  std::optional<LinearRouter> solved_;
  std::vector<float> target_, input_;
};

/// The routers of one layer of all baselines: fits them, and measures them. Baselines with the same
/// partition share the experts' outputs and what is learned from them. Holds tokens * E floats a
/// partition.
class BaselineRouters {
 public:
  /// @param ffn     what it looks at must outlive it
  /// @param tokens  how many will be observed
  BaselineRouters(const FfnView& ffn, std::span<const BaselinePartition> partitions,
                  std::span<const Baseline> baselines, std::int64_t tokens);

  bool empty() const { return groups_.empty(); }
  /// Takes tokens of the text, in order. x [T, D]   h [T, H]
  void observe(MatrixView<const float> x, MatrixView<const float> h, const ParallelFor& parallel);
  /// Gives every baseline its router of `layer`, if that is fitted, and what it is worth, if it
  /// reads x alone.
  ///   x [tokens, D], all that was observed
  void fit(MatrixView<const float> x, std::int64_t layer, std::span<Baseline> baselines,
           const ParallelFor& parallel);
  /// What scores [tokens, E] of a baseline's router are worth.
  RouterQuality quality(const BaselineSpec& spec, const std::vector<float>& scores) const;

 private:
  struct Group {  // one partition
    SplitKey key;
    ExpertSplit split;
    std::int64_t plain = -1, biased = -1;          // where its ridge columns begin, if it has some
    bool learns = false;                           // kRegression
    std::vector<float> norms;                      // [tokens, E]
    std::optional<RegressionRouter> learned = {};  // once it did
  };
  static MatrixView<float> norms(Group& group, std::int64_t begin, std::int64_t count) {
    const std::int64_t E = group.split.num_experts;
    return {group.norms.data() + begin * E, count, E};
  }
  void learn(MatrixView<const float> x, std::int64_t layer, const ParallelFor& parallel);
  void solve(const BaselineSpec& spec, const Group& group, MatrixView<const float> x,
             BaselineLayer& into, const ParallelFor& parallel);
  const Group& group_of(const BaselineSpec& spec) const;

  FfnView ffn_;
  std::int64_t tokens_, seen_ = 0;
  SideBySideRidge plain_, biased_;
  std::vector<Group> groups_;
};

}  // namespace cleave
