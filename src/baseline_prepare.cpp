// Fits all baselines layer by layer on the dense model's stream.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <utility>

#include "baseline_ffn.h"
#include "cleave/baselines.h"
#include "cleave/calibrate.h"
#include "cleave/fit_router.h"
#include "fail.h"
#include "kernels/product.h"
#include "kmeans.h"
#include "partition_cmoe.h"
#include "support/random.h"
#include "window_stream.h"

namespace cleave {
namespace {

constexpr std::int64_t kSkipped = 1;  // tokens at a window's start that routers leave out
constexpr std::int64_t kKeptBytes = std::int64_t{1} << 29;  // of h, before it is computed again
constexpr std::int64_t kColumnGrain = 16;                   // neurons worth a thread

MatrixView<const float> without_sink(MatrixView<const float> m) {
  return m.slice_rows(kSkipped, m.rows - kSkipped);
}

/// Everything that does not depend on who is routed.
struct LayerMoments {
  std::vector<double> sum, square;  // [H], of h
  std::vector<double> down;         // [H], |d_j|
  std::int64_t tokens = 0;
  ActivationColumns columns;  // of the first `column_tokens` tokens of the text

  void add(MatrixView<const float> h, const ParallelFor& parallel) {
    parallel(h.cols, kColumnGrain, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = 0; t < h.rows; ++t)
        for (std::int64_t j = begin; j < end; ++j) {
          const double value = h(t, j);
          sum[j] += value;
          square[j] += value * value;
        }
    });
    tokens += h.rows;
  }

  double mean(std::int64_t j) const { return sum[j] / static_cast<double>(tokens); }
  double score(BaselineScore score, std::int64_t j) const {
    switch (score) {
      case BaselineScore::kEnergy:
        return square[j] * down[j] * down[j];
      case BaselineScore::kFluctuation:
        return (square[j] - static_cast<double>(tokens) * mean(j) * mean(j)) * down[j] * down[j];
      case BaselineScore::kTopRate:
        return columns.tokens.empty() ? 0.0 : static_cast<double>(columns.tokens[j].size());
    }
    return 0.0;
  }
};

/// What decides a partition: rows that agree in it share the work.
struct SplitKey {
  BaselineSplit split;
  BaselineScore score;
  std::int64_t shared, num_experts;
  std::uint64_t seed;
  bool operator==(const SplitKey&) const = default;
};
SplitKey key_of(const BaselineSpec& spec) {
  return {spec.split, spec.score, spec.shared, spec.num_experts, spec.seed};
}

struct Partition {
  SplitKey key;
  std::vector<std::int32_t> expert_of_neuron;  // [H]
  std::vector<std::int32_t> representatives;   // [E], kCmoe
};

void split_rest(const FfnView& ffn, const LayerMoments& moments, std::uint64_t seed,
                const std::vector<std::int32_t>& rest, Partition& partition) {
  const SplitKey& key = partition.key;
  const auto n = static_cast<std::int64_t>(rest.size());
  std::vector<std::int32_t> order = rest, expert(rest.size());
  for (std::int64_t i = 0; i < n; ++i)
    expert[i] = static_cast<std::int32_t>(i * key.num_experts / n);
  if (key.split == BaselineSplit::kRandom) {
    std::mt19937_64 rng(seed);
    shuffle(order, rng);
  } else if (key.split == BaselineSplit::kKMeans) {
    const MatrixView<const float> rows = ffn.gate.empty() ? ffn.up : ffn.gate;
    std::vector<float> gathered;
    for (const std::int32_t j : rest)
      gathered.insert(gathered.end(), rows.row(j), rows.row(j) + rows.cols);
    expert = balanced_kmeans({gathered.data(), n, rows.cols},
                             {.clusters = static_cast<std::int32_t>(key.num_experts), .seed = seed})
                 .cluster_of_row;
  } else if (key.split == BaselineSplit::kCmoe) {
    RoutedSpec spec{.num_experts = static_cast<std::int32_t>(key.num_experts), .iterations = 1};
    for (std::size_t j = 0; j < partition.expert_of_neuron.size(); ++j)
      if (partition.expert_of_neuron[j] == BaselineLayer::kShared)
        spec.shared.push_back(static_cast<std::int32_t>(j));
    CmoePartition split = cmoe_clusters(moments.columns, spec);
    for (std::int64_t i = 0; i < n; ++i) expert[i] = split.partition.expert_of_neuron[rest[i]];
    partition.representatives = std::move(split.representative);
  }
  for (std::int64_t i = 0; i < n; ++i) partition.expert_of_neuron[order[i]] = expert[i];
}

Partition make_partition(const SplitKey& key, const FfnView& ffn, const LayerMoments& moments,
                         std::int64_t layer) {
  const std::int64_t H = ffn.up.rows;
  Partition partition{key, std::vector<std::int32_t>(H, BaselineLayer::kOff), {}};
  std::vector<std::int32_t> order(static_cast<std::size_t>(H));
  std::iota(order.begin(), order.end(), 0);
  std::vector<double> score(static_cast<std::size_t>(H));
  for (std::int64_t j = 0; j < H; ++j) score[j] = moments.score(key.score, j);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return score[a] > score[b]; });
  for (std::int64_t i = 0; i < key.shared; ++i)
    partition.expert_of_neuron[order[i]] = BaselineLayer::kShared;
  std::vector<std::int32_t> rest(order.begin() + key.shared, order.end());
  std::sort(rest.begin(), rest.end());
  // As convert(): layers must not share a permutation.
  if (key.split != BaselineSplit::kNone)
    split_rest(ffn, moments, key.seed + static_cast<std::uint64_t>(layer), rest, partition);
  return partition;
}

bool is_ridge(BaselineRouter router) {
  return router == BaselineRouter::kRidge || router == BaselineRouter::kRidgeBias;
}

/// Routers of several partitions from one regression: the targets stand side by side.
class RidgeFits {
 public:
  RidgeFits(std::vector<ExpertSplit> splits, std::int64_t d_model, bool bias)
      : splits_(std::move(splits)), D_(d_model), bias_(bias) {
    for (const ExpertSplit& split : splits_) targets_ += split.num_experts;
    if (targets_ > 0) fit_.emplace(D_ + (bias_ ? 1 : 0), targets_);
  }

  void observe(MatrixView<const float> x, MatrixView<const float> h, const ParallelFor& parallel) {
    if (!fit_) return;
    const std::int64_t width = D_ + (bias_ ? 1 : 0);
    target_.resize(static_cast<std::size_t>(x.rows * targets_));
    std::int64_t begin = 0;
    for (const ExpertSplit& split : splits_) {
      const MatrixView<float> part(target_.data() + begin, x.rows, split.num_experts, targets_);
      expert_squares(split, h, {}, 0.0, part, parallel);
      make_relative(part);
      begin += split.num_experts;
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

  /// Router and bias of one partition.
  void solve(const std::vector<std::int32_t>& expert_of_neuron, BaselineLayer& layer) {
    if (!solved_) solved_ = fit_->solve();
    std::int64_t begin = 0, which = 0;
    while (splits_[which].expert != expert_of_neuron) begin += splits_[which++].num_experts;
    const std::int64_t E = splits_[which].num_experts, width = solved_->d_model;
    layer.router = {E, D_, {}};
    for (std::int64_t e = begin; e < begin + E; ++e) {
      const float* row = solved_->weight.data() + e * width;
      layer.router.weight.insert(layer.router.weight.end(), row, row + D_);
      if (bias_) layer.router_bias.push_back(row[D_]);
    }
  }

 private:
  /// Squares become norms over the token's mean norm, as in convert(): no token counts more than
  /// another.
  static void make_relative(MatrixView<float> squares) {
    for (std::int64_t t = 0; t < squares.rows; ++t) {
      float* row = squares.row(t);
      double sum = 0.0;
      for (std::int64_t e = 0; e < squares.cols; ++e) sum += row[e] = std::sqrt(row[e]);
      if (sum <= 0.0) continue;
      for (std::int64_t e = 0; e < squares.cols; ++e)
        row[e] = static_cast<float>(row[e] * static_cast<double>(squares.cols) / sum);
    }
  }

  std::vector<ExpertSplit> splits_;
  std::int64_t D_, targets_ = 0;
  bool bias_;
  std::optional<RouterFit> fit_;
  std::optional<LinearRouter> solved_;
  std::vector<float> target_, input_;
};

/// All windows of the calibration text at one layer: what the FFN reads, and h.
class LayerWindows {
 public:
  LayerWindows(const DenseFfn& ffn, std::int64_t windows, std::int64_t context, bool keep_inputs,
               const ParallelFor& parallel)
      : ffn_(ffn),
        context_(context),
        keep_(keep_inputs),
        keep_hidden_(keep_inputs && windows * context * ffn.hidden * 4 <= kKeptBytes),
        inputs_(keep_ ? windows * context * ffn.d_model : 0),
        hidden_((keep_hidden_ ? windows : 1) * context * ffn.hidden),
        parallel_(parallel) {}

  /// Computes and keeps h of a window.
  MatrixView<const float> put(std::int64_t w, MatrixView<const float> x) {
    if (keep_) std::copy_n(x.data, context_ * ffn_.d_model, input(w).data);
    hidden_activations(ffn_.view(), x, hidden(w), {}, parallel_);
    return hidden(w);
  }
  MatrixView<float> input(std::int64_t w) const {
    return {inputs_.data() + w * context_ * ffn_.d_model, context_, ffn_.d_model};
  }
  MatrixView<const float> activations(std::int64_t w) {
    if (!keep_hidden_) hidden_activations(ffn_.view(), input(w), hidden(w), {}, parallel_);
    return hidden(w);
  }

 private:
  MatrixView<float> hidden(std::int64_t w) const {
    return {hidden_.data() + (keep_hidden_ ? w : 0) * context_ * ffn_.hidden, context_,
            ffn_.hidden};
  }
  const DenseFfn& ffn_;
  std::int64_t context_;
  bool keep_, keep_hidden_;
  Buffer inputs_, hidden_;
  ParallelFor parallel_;
};

/// The calibration of one layer, from its FFN and the dense stream.
class LayerFit {
 public:
  LayerFit(Model& model, WindowStream& stream, std::int64_t layer, std::vector<Baseline>& baselines)
      : model_(model),
        stream_(stream),
        layer_(layer),
        baselines_(baselines),
        ffn_(model.dense_ffn(layer)),
        windows_(ffn_, stream.num_windows(), stream.context(), looks_again(), model.parallel()) {}

  void run() {
    first_pass();
    make_partitions();
    fit_routers();
    set_off_values();
  }

 private:
  bool looks_again() const {
    return std::any_of(baselines_.begin(), baselines_.end(), [](const Baseline& b) {
      return is_ridge(b.spec.router) || (b.spec.compensate && routed(b.spec));
    });
  }
  static bool routed(const BaselineSpec& spec) { return spec.num_experts > 0; }

  /// Moments of h; the stream moves on to the next layer.
  void first_pass() {
    const std::int64_t H = ffn_.hidden, D = ffn_.d_model;
    moments_.sum.assign(static_cast<std::size_t>(H), 0.0);
    moments_.square = moments_.sum;
    const std::vector<float> norms = down_norms(ffn_.view());
    moments_.down.assign(norms.begin(), norms.end());
    std::int64_t column_tokens = 0;
    for (const Baseline& b : baselines_)
      if (b.spec.score == BaselineScore::kTopRate)
        column_tokens = std::max(column_tokens, b.spec.calibration_tokens > 0
                                                    ? b.spec.calibration_tokens
                                                    : stream_.num_windows() * stream_.context());
    std::vector<float> output(static_cast<std::size_t>(stream_.context() * D));
    const MatrixView<float> y(output.data(), stream_.context(), D);
    for (std::int64_t w = 0; w < stream_.num_windows(); ++w) {
      const MatrixView<const float> x = stream_.attend(layer_, w), h = windows_.put(w, x);
      check_finite(h, w);
      // All tokens: a mask that does not know the attention sink at position 0 drops the neurons
      // that make it (KL of a static mask of SmolLM2-135M at half the budget 1.69 instead of 1.61).
      moments_.add(h, model_.parallel());
      if (w * stream_.context() < column_tokens)
        add_activations(h, {}, std::min(kCmoeTopNeurons, h.cols), moments_.columns);
      std::fill(output.begin(), output.end(), 0.0f);
      linear_add(h, ffn_.view().down, ffn_.down_bias, y, model_.parallel());
      stream_.add(w, y);
    }
  }

  void check_finite(MatrixView<const float> h, std::int64_t window) const {
    for (std::int64_t t = 0; t < h.rows; ++t)
      for (std::int64_t j = 0; j < h.cols; ++j)
        if (!std::isfinite(h(t, j)))
          fail_argument(
              "prepare_baselines: neuron {} of layer {} is {} at token {} of the calibration text; "
              "must be finite; is the checkpoint damaged?",
              j, layer_, h(t, j), window * stream_.context() + t);
  }

  void make_partitions() {
    for (const Baseline& b : baselines_) {
      const SplitKey key = key_of(b.spec);
      const auto same = [&](const Partition& p) { return p.key == key; };
      if (std::none_of(partitions_.begin(), partitions_.end(), same))
        partitions_.push_back({key, {}, {}});
    }
    model_.parallel()(static_cast<std::int64_t>(partitions_.size()), 1,
                      [&](std::int64_t begin, std::int64_t end) {
                        for (std::int64_t i = begin; i < end; ++i)
                          partitions_[i] =
                              make_partition(partitions_[i].key, ffn_.view(), moments_, layer_);
                      });
    for (Baseline& b : baselines_) {
      BaselineLayer& layer = b.layers[layer_];
      const Partition& partition = partition_of(b.spec);
      layer.expert_of_neuron = partition.expert_of_neuron;
      layer.representatives = partition.representatives;
      if (b.spec.router == BaselineRouter::kRandom)
        layer.router = random_router(
            b.spec.num_experts, ffn_.d_model,
            b.spec.seed * 0x9E3779B97F4A7C15u + static_cast<std::uint64_t>(layer_) + 1);
    }
  }

  const Partition& partition_of(const BaselineSpec& spec) const {
    return *std::find_if(partitions_.begin(), partitions_.end(),
                         [&](const Partition& p) { return p.key == key_of(spec); });
  }

  std::vector<ExpertSplit> splits_of(BaselineRouter router) const {
    std::vector<ExpertSplit> splits;
    for (const Partition& p : partitions_)
      if (std::any_of(baselines_.begin(), baselines_.end(), [&](const Baseline& b) {
            return b.spec.router == router && key_of(b.spec) == p.key;
          }))
        splits.emplace_back(ffn_.view(), p.expert_of_neuron, p.key.num_experts);
    return splits;
  }

  void fit_routers() {
    RidgeFits plain(splits_of(BaselineRouter::kRidge), ffn_.d_model, false);
    RidgeFits biased(splits_of(BaselineRouter::kRidgeBias), ffn_.d_model, true);
    const bool any = std::any_of(baselines_.begin(), baselines_.end(),
                                 [](const Baseline& b) { return is_ridge(b.spec.router); });
    for (std::int64_t w = 0; any && w < stream_.num_windows(); ++w) {
      const auto x = without_sink(windows_.input(w)), h = without_sink(windows_.activations(w));
      plain.observe(x, h, model_.parallel());
      biased.observe(x, h, model_.parallel());
    }
    for (Baseline& b : baselines_) {
      BaselineLayer& layer = b.layers[layer_];
      if (b.spec.router == BaselineRouter::kRidge) plain.solve(layer.expert_of_neuron, layer);
      if (b.spec.router == BaselineRouter::kRidgeBias) biased.solve(layer.expert_of_neuron, layer);
    }
  }

  void set_off_values() {
    for (Baseline& b : baselines_) {
      if (!b.spec.compensate) continue;
      std::vector<double> mean(static_cast<std::size_t>(ffn_.hidden));
      for (std::int64_t j = 0; j < ffn_.hidden; ++j) mean[j] = moments_.mean(j);
      if (routed(b.spec)) mean_while_off(b, mean);
      b.layers[layer_].off_value.assign(mean.begin(), mean.end());
    }
  }

  /// Over the tokens that do not choose a neuron's expert; `mean` stays where there is none.
  void mean_while_off(const Baseline& b, std::vector<double>& mean) {
    const BaselineLayer& layer = b.layers[layer_];
    const MaskedFfn masked(ffn_, b.spec, layer);
    const std::int64_t E = b.spec.num_experts, H = ffn_.hidden;
    std::vector<double> sum(static_cast<std::size_t>(H));
    std::vector<std::int64_t> tokens(static_cast<std::size_t>(E));
    std::vector<std::uint8_t> on(static_cast<std::size_t>(stream_.context() * E));
    for (std::int64_t w = 0; w < stream_.num_windows(); ++w) {
      const auto x = without_sink(windows_.input(w)), h = without_sink(windows_.activations(w));
      masked.choose(x, h, on.data(), model_.parallel());
      for (std::int64_t i = 0; i < x.rows * E; ++i) tokens[i % E] += on[i] == 0 ? 1 : 0;
      model_.parallel()(H, kColumnGrain, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = 0; t < x.rows; ++t)
          for (std::int64_t j = begin; j < end; ++j) {
            const std::int32_t e = layer.expert_of_neuron[j];
            if (e >= 0 && on[t * E + e] == 0) sum[j] += h(t, j);
          }
      });
    }
    for (std::int64_t j = 0; j < H; ++j) {
      const std::int32_t e = layer.expert_of_neuron[j];
      if (e >= 0 && tokens[e] > 0) mean[j] = sum[j] / static_cast<double>(tokens[e]);
    }
  }

  Model& model_;
  WindowStream& stream_;
  std::int64_t layer_;
  std::vector<Baseline>& baselines_;
  DenseFfn ffn_;
  LayerWindows windows_;
  LayerMoments moments_;
  std::vector<Partition> partitions_;
};

void check_spec(const BaselineSpec& spec, std::int64_t H) {
  const std::int64_t rest = H - spec.shared, E = spec.num_experts, K = spec.experts_per_token;
  const bool routed = spec.split != BaselineSplit::kNone;
  if (spec.shared < 0 || spec.shared > H || (E > 0) != routed ||
      (routed && (rest <= 0 || rest % E != 0 || K < 1 || K > E)))
    fail_argument(
        "prepare_baselines: '{}' keeps {} of H = {} neurons on and splits the others into E = {} "
        "experts, K = {} active; E must divide what is left, and K be in [1, E]",
        spec.method, spec.shared, H, E, K);
}

}  // namespace

std::vector<Baseline> prepare_baselines(Model& dense, const TokenWindows& calibration,
                                        std::span<const BaselineSpec> specs,
                                        const BaselineProgress& progress) {
  const std::int64_t L = dense.config().num_layers;
  std::vector<Baseline> baselines;
  for (const BaselineSpec& spec : specs) {
    check_spec(spec, dense.config().intermediate_size);
    baselines.push_back({spec, std::vector<BaselineLayer>(static_cast<std::size_t>(L))});
  }
  if (baselines.empty()) return baselines;
  if (calibration.context < 2 || calibration.count() < 1)
    fail_argument(
        "prepare_baselines: the calibration text has {} tokens and windows of {}; needs at least "
        "one window of 2 or more",
        calibration.tokens.size(), calibration.context);
  WindowStream stream(dense, calibration);
  for (std::int64_t l = 0; l < L; ++l) {
    LayerFit(dense, stream, l, baselines).run();
    if (progress) progress("baselines", l + 1, L);
  }
  return baselines;
}

}  // namespace cleave
