// Fits all baselines layer by layer on the dense model's stream.

#include <algorithm>
#include <cmath>

#include "baseline_ffn.h"
#include "baseline_partition.h"
#include "baseline_refit.h"
#include "baseline_routers.h"
#include "cleave/baselines.h"
#include "cleave/calibrate.h"
#include "cleave/fit_router.h"
#include "fail.h"
#include "kernels/product.h"
#include "window_stream.h"

namespace cleave {
namespace {

constexpr std::int64_t kSkipped = 1;  // tokens at a window's start that routers leave out
constexpr std::int64_t kKeptBytes = std::int64_t{1} << 29;  // of h, before it is computed again
constexpr std::int64_t kColumnGrain = 16;                   // neurons worth a thread

/// All windows of the calibration text at one layer: what the FFN reads, and h. Both are kept
/// without the attention sink.
class LayerWindows {
 public:
  LayerWindows(const DenseFfn& ffn, std::int64_t windows, std::int64_t context, bool keep_inputs,
               const ParallelFor& parallel)
      : ffn_(ffn),
        context_(context),
        kept_(context - kSkipped),
        keep_(keep_inputs),
        keep_hidden_(keep_inputs && windows * context * ffn.hidden * 4 <= kKeptBytes),
        tokens_(windows * kept_),
        inputs_(keep_ ? tokens_ * ffn.d_model : 0),
        hidden_((keep_hidden_ ? windows : 1) * context * ffn.hidden),
        parallel_(parallel) {}

  /// Computes h of a whole window, [context, H], and keeps what is kept.
  MatrixView<const float> put(std::int64_t w, MatrixView<const float> x) {
    if (keep_) std::copy_n(x.row(kSkipped), kept_ * ffn_.d_model, input(w).data);
    const MatrixView<float> h = hidden(w);
    hidden_activations(ffn_.view(), x, h, {}, parallel_);
    return h;
  }
  /// [tokens, D] of all windows, and [context - 1, D] of one.
  MatrixView<float> inputs() const { return {inputs_.data(), tokens_, ffn_.d_model}; }
  MatrixView<float> input(std::int64_t w) const { return inputs().slice_rows(w * kept_, kept_); }
  /// [context - 1, H]
  MatrixView<const float> activations(std::int64_t w) {
    const MatrixView<float> h = hidden(w).slice_rows(kSkipped, kept_);
    if (!keep_hidden_) hidden_activations(ffn_.view(), input(w), h, {}, parallel_);
    return h;
  }

 private:
  MatrixView<float> hidden(std::int64_t w) const {
    return {hidden_.data() + (keep_hidden_ ? w : 0) * context_ * ffn_.hidden, context_,
            ffn_.hidden};
  }
  const DenseFfn& ffn_;
  std::int64_t context_, kept_;  // tokens of a window, and those without the sink
  bool keep_, keep_hidden_;
  std::int64_t tokens_;
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
      return is_measured(b.spec.router) || (b.spec.compensate && routed(b.spec));
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
          fail_file(
              "prepare_baselines: neuron {} of layer {} is {} at token {} of the calibration text; "
              "must be finite; is the checkpoint damaged?",
              j, layer_, h(t, j), window * stream_.context() + t);
  }

  void make_partitions() {
    for (const Baseline& b : baselines_) {
      const SplitKey key = key_of(b.spec);
      const auto same = [&](const BaselinePartition& p) { return p.key == key; };
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
      const BaselinePartition& partition = partition_of(b.spec);
      layer.expert_of_neuron = partition.expert_of_neuron;
      layer.representatives = partition.representatives;
      if (b.spec.router == BaselineRouter::kRandom)
        layer.router =
            random_router(b.spec.num_experts, ffn_.d_model, layer_seed(b.spec.seed, layer_));
    }
  }

  const BaselinePartition& partition_of(const BaselineSpec& spec) const {
    return *std::find_if(partitions_.begin(), partitions_.end(),
                         [&](const BaselinePartition& p) { return p.key == key_of(spec); });
  }

  void fit_routers() {
    BaselineRouters routers(ffn_.view(), partitions_, baselines_, windows_.inputs().rows);
    if (routers.empty()) return;
    for (std::int64_t w = 0; w < stream_.num_windows(); ++w)
      routers.observe(windows_.input(w), windows_.activations(w), model_.parallel());
    routers.fit(windows_.inputs(), layer_, baselines_, model_.parallel());
    for (Baseline& b : baselines_)
      if (is_measured(b.spec.router) && reads_hidden(b.spec.router))
        b.layers[layer_].quality = routers.quality(b.spec, hidden_scores(b));
  }

  /// [tokens, E] of a router that sees more than x.
  std::vector<float> hidden_scores(const Baseline& b) {
    const MaskedFfn masked(ffn_, b.spec, b.layers[layer_]);
    const std::int64_t E = b.spec.num_experts;
    std::vector<float> scores(static_cast<std::size_t>(windows_.inputs().rows * E));
    for (std::int64_t w = 0, done = 0; w < stream_.num_windows(); ++w) {
      const MatrixView<const float> x = windows_.input(w);
      masked.score(x, windows_.activations(w), {scores.data() + done * E, x.rows, E},
                   model_.parallel());
      done += x.rows;
    }
    return scores;
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
      const MatrixView<const float> x = windows_.input(w), h = windows_.activations(w);
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
  std::vector<BaselinePartition> partitions_;
};

void check_spec(const BaselineSpec& spec, std::int64_t H) {
  const std::int64_t rest = H - spec.shared, E = spec.num_experts, K = spec.experts_per_token;
  const bool routed = spec.split != BaselineSplit::kNone;
  if (spec.refit && (spec.router != BaselineRouter::kNone || spec.compensate || spec.shared < 1 ||
                     spec.score == BaselineScore::kTopRate))
    fail_argument(
        "prepare_baselines: '{}' cannot be refitted: expected neurons chosen by energy or "
        "fluctuation, and neither a router nor compensation",
        spec.method);
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
  std::vector<Baseline> baselines, refitted;
  for (const BaselineSpec& spec : specs) {
    check_spec(spec, dense.config().intermediate_size);
    (spec.refit ? refitted : baselines)
        .push_back({spec, std::vector<BaselineLayer>(static_cast<std::size_t>(L))});
  }
  if (specs.empty()) return baselines;
  if (calibration.context < 2 || calibration.count() < 1)
    fail_argument(
        "prepare_baselines: the calibration text has {} tokens and windows of {}; needs at least "
        "one window of 2 or more",
        calibration.tokens.size(), calibration.context);
  if (!baselines.empty()) {
    WindowStream stream(dense, calibration);
    for (std::int64_t l = 0; l < L; ++l) {
      LayerFit(dense, stream, l, baselines).run();
      if (progress) progress("baselines", l + 1, L);
    }
  }
  for (Baseline& baseline : refitted) refit_baseline(dense, calibration, progress, baseline);
  for (std::size_t i = 0, next = 0; i < specs.size(); ++i)  // back into the order of `specs`
    if (specs[i].refit)
      baselines.insert(baselines.begin() + static_cast<std::ptrdiff_t>(i),
                       std::move(refitted[next++]));
  return baselines;
}

}  // namespace cleave
