#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "capture.h"
#include "cleave/calibrate.h"
#include "cleave/convert.h"
#include "cleave/factorize.h"
#include "cleave/model.h"
#include "cleave/refit.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "support/buffer.h"
#include "window_stream.h"

namespace cleave {
namespace {

constexpr std::int64_t kRowBlock = 512;  // tokens whose gate and up values are there at a time

using ProgressCall = std::function<void(const std::string&, std::int64_t, std::int64_t)>;

/// Neurons of a layer by what becomes of them.
struct Shares {
  std::int64_t shared = 0;  // neurons, always on
  std::int64_t experts = 0;
  std::int64_t active = 0;  // experts per token
};

Shares divide(const ModelConfig& config, const BudgetSpec& spec) {
  const std::int64_t H = config.intermediate_size, I = spec.expert_width;
  if (!(spec.active_share > 0.0 && spec.active_share <= 1.0) ||
      !(spec.shared_share >= 0.0 && spec.shared_share <= 1.0))
    fail_argument(
        "convert: active share {} with {} of it shared; expected an active share above 0 and up to "
        "1, and a shared part from 0 to 1",
        spec.active_share, spec.shared_share);
  if (I < 1 || H % I != 0)
    fail_argument("convert: experts of {} neurons do not divide H = {}; give a divisor", I, H);
  const auto units = [&](double share) {
    return static_cast<std::int64_t>(std::llround(share * static_cast<double>(H / I)));
  };
  Shares shares;
  const std::int64_t budget = units(spec.active_share);
  if (budget < 1)
    fail_argument("convert: an active share of {} is less than one expert of {} among H = {}",
                  spec.active_share, I, H);
  const std::int64_t shared = units(spec.active_share * spec.shared_share);
  shares.shared = shared * I;
  shares.experts = H / I - shared;
  shares.active = budget - shared;
  return shares;
}

/// A dense FFN with the layout that the work on it wants.
struct SplitSource {
  DenseFfn ffn;
  std::vector<float> down_t;       // [H, D]
  std::vector<float> down_square;  // [H]

  explicit SplitSource(DenseFfn dense) : ffn(std::move(dense)) {
    const std::int64_t H = ffn.hidden, D = ffn.d_model;
    down_t.resize(static_cast<std::size_t>(H * D));
    down_square.assign(static_cast<std::size_t>(H), 0.0f);
    for (std::int64_t d = 0; d < D; ++d)
      for (std::int64_t j = 0; j < H; ++j) {
        const float value = ffn.down[d * H + j];
        down_t[j * D + d] = value;
        down_square[j] += value * value;
      }
  }

  /// hidden [T, H] of inputs x [T, D], in blocks, so that the gate's values need little room.
  void hidden_values(MatrixView<const float> x, MatrixView<float> hidden,
                     const ParallelFor& parallel) const {
    for (std::int64_t first = 0; first < x.rows; first += kRowBlock) {
      const std::int64_t T = std::min(kRowBlock, x.rows - first);
      hidden_activations(ffn.view(), x.slice_rows(first, T), hidden.slice_rows(first, T), {},
                         parallel);
    }
  }
};

/// y [T, D] = h [T, H] down_t [H, D], plus a bias if there is one.
void down_product(MatrixView<const float> h, const std::vector<float>& down_t,
                  std::span<const float> bias, MatrixView<float> y, const ParallelFor& parallel) {
  const MatrixView<const float> weight(down_t.data(), h.cols, y.cols);
  parallel(h.rows, 64, [&](std::int64_t begin, std::int64_t end) {
    isa_kernels().product_nn(plain(h.slice_rows(begin, end - begin)), plain(weight),
                             plain(y.slice_rows(begin, end - begin)), Store::kOverwrite);
    if (bias.empty()) return;
    for (std::int64_t t = begin; t < end; ++t) isa_kernels().add(bias.data(), y.row(t), y.cols);
  });
}

double mean_square(const float* x, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum / static_cast<double>(n);
}

/// A layer's rows as they will be stored: the experts one after the other, then the shared slice.
struct Rows {
  ExpertBank experts, shared;
  std::vector<std::int32_t> neuron;  // [rows], of the dense FFN

  Rows(const FfnView& ffn, const NeuronPartition& partition) {
    if (partition.num_experts > 0) experts = factorize(ffn, partition);
    shared = shared_slice(ffn, partition);
    neuron = experts.neuron_order;
    neuron.insert(neuron.end(), shared.neuron_order.begin(), shared.neuron_order.end());
  }
  std::int64_t size() const { return static_cast<std::int64_t>(neuron.size()); }
  std::int64_t routed() const { return static_cast<std::int64_t>(experts.neuron_order.size()); }

  /// [rows, D]
  std::vector<float> down_t() const {
    std::vector<float> down = experts.down_t;
    down.insert(down.end(), shared.down_t.begin(), shared.down_t.end());
    return down;
  }
  void set_down_t(const std::vector<float>& down) {
    const auto middle = down.begin() + static_cast<std::ptrdiff_t>(experts.down_t.size());
    experts.down_t.assign(down.begin(), middle);
    shared.down_t.assign(middle, down.end());
  }
};

/// features [T, rows] = the hidden values that run: of the shared slice, and of the token's
/// experts. Both may be the same memory, row by row.
void mask_features(const Rows& rows, const std::vector<std::int32_t>& ids, std::int64_t active,
                   MatrixView<const float> hidden, MatrixView<float> features,
                   const ParallelFor& parallel) {
  parallel(hidden.rows, 16, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(rows.size()));
    const auto copy = [&](const float* h, std::int64_t first, std::int64_t last) {
      for (std::int64_t r = first; r < last; ++r) row[r] = h[rows.neuron[r]];
    };
    for (std::int64_t t = begin; t < end; ++t) {
      std::fill(row.begin(), row.begin() + rows.routed(), 0.0f);
      for (std::int64_t k = 0; k < active; ++k) {
        const std::int32_t e = ids[t * active + k];
        copy(hidden.row(t), rows.experts.begin[e], rows.experts.begin[e + 1]);
      }
      copy(hidden.row(t), rows.routed(), rows.size());
      std::copy(row.begin(), row.end(), features.row(t));
    }
  });
}

/// sum_t weight_t |y_t - target_t|^2 / sum_t weight_t |target_t|^2.
double relative_error(MatrixView<const float> y, MatrixView<const float> target,
                      std::span<const float> weight) {
  double error = 0.0, size = 0.0;
  for (std::int64_t t = 0; t < y.rows; ++t)
    for (std::int64_t d = 0; d < y.cols; ++d) {
      const double aim = target(t, d), e = y(t, d) - aim;
      error += weight[t] * e * e;
      size += weight[t] * aim * aim;
    }
  return size > 0.0 ? error / size : 0.0;
}

class BudgetConversion {
 public:
  BudgetConversion(const Checkpoint& source, const BudgetSpec& spec, const TokenWindows& windows,
                   const ProgressCall& progress)
      : spec_(spec),
        progress_(progress),
        shares_(divide(source.config(), spec)),
        model_(Model::load(source, {.threads = spec.threads})),
        parallel_(model_.parallel()),
        windows_(windows),
        stream_(model_, windows),
        input_(stream_.tokens() * source.config().hidden_size),
        hidden_(stream_.tokens() * source.config().intermediate_size),
        target_(stream_.tokens() * source.config().hidden_size) {
    if (spec.router_method == RouterMethod::kLowRank && spec.router_rank > shares_.experts)
      fail_argument("convert: a router of rank {} for {} experts; give a rank of at most as many",
                    spec.router_rank, shares_.experts);
    if (spec.correction != 0.0) dense_.emplace(model_, windows);
  }

  Conversion run() {
    conversion_.partition = shares_.active == 0 ? "energy"
                            : spec_.partition == BudgetPartition::kCaptured
                                ? "captured energy"
                                : budget_partition_name(spec_.partition);
    conversion_.seed = spec_.seed;
    conversion_.router = shares_.active == 0 ? "none" : router_method_name(spec_.router_method);
    conversion_.scale = ScalePolicy::kActive;
    conversion_.calibration_tokens = stream_.tokens();
    const std::int64_t layers = model_.config().num_layers;
    for (std::int64_t l = 0; l < layers; ++l) {
      convert_layer(l);
      if (progress_) progress_("convert", l + 1, layers);
    }
    return std::move(conversion_);
  }

 private:
  void convert_layer(std::int64_t l) {
    const SplitSource source(model_.dense_ffn(l));
    const std::int64_t T = stream_.tokens(), D = source.ffn.d_model, H = source.ffn.hidden;
    const MatrixView<float> hidden(hidden_.data(), T, H), target(target_.data(), T, D);
    const MatrixView<float> input(input_.data(), T, D);
    if (dense_) advance_dense(source, l);
    stream_.attend(l, input);
    source.hidden_values(input, hidden, parallel_);
    down_product(hidden, source.down_t, {}, target, parallel_);
    const std::vector<float> weight = token_weights(target, l);
    const LayerTokens tokens{input,           hidden, weight, source.down_square, source.ffn.view(),
                             windows_.context};
    const Capture capture =
        shares_.active > 0
            ? capture_energy(tokens, capture_spec(static_cast<std::uint64_t>(l)), parallel_)
            : keep_most_energy(tokens, shares_.shared, parallel_);
    conversion_.captured_energy.push_back(capture.energy);
    conversion_.oracle_energy.push_back(capture.oracle_energy);
    conversion_.router_recall.push_back(capture.recall);
    if (dense_) aim_at_dense_stream(target, source.ffn.down_bias);

    Rows rows(source.ffn.view(), capture.partition);
    const MatrixView<float> features(hidden_.data(), T, rows.size(), H);
    std::vector<std::int32_t> ids;
    if (shares_.active > 0)
      ids = choose_experts(tokens.input, capture.router, shares_.active, parallel_);
    record_load(ids, rows.size(), l);
    mask_features(rows, ids, shares_.active, hidden, features, parallel_);
    if (spec_.refit) rows.set_down_t(repaired_down(rows, features, target, weight));
    advance(source, features, rows.down_t(), target, weight);
    keep(std::move(rows), capture, source.ffn.down_bias);
  }

  CaptureSpec capture_spec(std::uint64_t layer) const {
    CaptureSpec spec;
    spec.width = spec_.expert_width;
    spec.shared = shares_.shared;
    spec.experts = shares_.experts;
    spec.active = shares_.active;
    spec.partition = spec_.partition;
    spec.rounds = spec_.rounds;
    spec.router = spec_.router_method;
    spec.router_rank = spec_.router_rank;
    spec.training = spec_.router;
    spec.training.seed = spec.seed = spec_.seed + layer;  // layers must not share a permutation
    return spec;
  }

  /// One layer of the dense model on its own stream.
  void advance_dense(const SplitSource& source, std::int64_t layer) {
    const std::int64_t T = stream_.tokens(), D = source.ffn.d_model;
    const MatrixView<float> hidden(hidden_.data(), T, source.ffn.hidden);
    const MatrixView<float> y(target_.data(), T, D);
    const MatrixView<float> input(input_.data(), T, D);
    dense_->attend(layer, input);
    source.hidden_values(input, hidden, parallel_);
    down_product(hidden, source.down_t, source.ffn.down_bias, y, parallel_);
    for (std::int64_t t = 0; t < T; ++t) isa_kernels().add(y.row(t), dense_->rows().row(t), D);
  }

  /// A token counts by the error relative to the residual stream, by which the next norm divides.
  std::vector<float> token_weights(MatrixView<const float> y, std::int64_t layer) const {
    std::vector<float> weight(static_cast<std::size_t>(y.rows));
    std::vector<float> sum(static_cast<std::size_t>(y.cols));
    double total = 0.0;
    for (std::int64_t t = 0; t < y.rows; ++t) {
      const float* x = stream_.rows().row(t);
      for (std::int64_t d = 0; d < y.cols; ++d) sum[d] = x[d] + y(t, d);
      const double size = mean_square(sum.data(), y.cols);
      if (!std::isfinite(size))
        fail_argument(
            "convert: layer {}: the output of the FFN or its input is not finite at token {} of "
            "calibration window {}; is the model broken, or in a type too small for it?",
            layer, t % windows_.context, t / windows_.context);
      const bool first = t % windows_.context == 0;
      weight[t] = static_cast<float>((first ? spec_.first_token_weight : 1.0) / (size + 1e-12));
      total += weight[t];
    }
    const auto factor = static_cast<float>(static_cast<double>(y.rows) / total);
    for (float& w : weight) w *= factor;
    return weight;
  }

  /// How often each expert was chosen, and whether the text is enough for what is to be fitted.
  void record_load(const std::vector<std::int32_t>& ids, std::int64_t unknowns,
                   std::int64_t layer) {
    const std::int64_t T = stream_.tokens();
    if (spec_.refit && layer == 0 && T < 4 * unknowns)
      conversion_.notices.push_back(fmt::format(
          "the calibration text has {} tokens for the {} unknowns that every layer fits an output; "
          "the ridge penalty keeps `down` near the dense weights; more text would repair more",
          T, unknowns));
    if (ids.empty()) return;
    std::vector<double> load(static_cast<std::size_t>(shares_.experts), 0.0);
    for (const std::int32_t id : ids) load[id] += 1.0 / static_cast<double>(T);
    const auto unused = std::count(load.begin(), load.end(), 0.0);
    if (unused > 0)
      conversion_.notices.push_back(fmt::format(
          "layer {}: no calibration token chose {} of the {} experts; their weights stay as they "
          "were",
          layer, unused, shares_.experts));
    conversion_.expert_load.push_back(std::move(load));
  }

  /// target += correction * (dense stream - what the converted one would be without any loss here).
  void aim_at_dense_stream(MatrixView<float> target, const std::vector<float>& down_bias) {
    const auto part = static_cast<float>(spec_.correction);
    parallel_(target.rows, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t)
        for (std::int64_t d = 0; d < target.cols; ++d) {
          const float bias = down_bias.empty() ? 0.0f : down_bias[d];
          target(t, d) +=
              part * (dense_->rows()(t, d) - (stream_.rows()(t, d) + target(t, d) + bias));
        }
    });
  }

  std::vector<float> repaired_down(const Rows& rows, MatrixView<const float> features,
                                   MatrixView<const float> target, std::span<const float> weight) {
    const std::vector<float> prior = rows.down_t();
    RidgeRefit fit(rows.size(), target.cols);
    fit.observe(features, target, weight, parallel_);
    return fit.solve({prior.data(), rows.size(), target.cols}, spec_.refit_spec, parallel_);
  }

  /// The converted layer's output goes into the stream.
  void advance(const SplitSource& source, MatrixView<const float> features,
               const std::vector<float>& down, MatrixView<const float> target,
               std::span<const float> weight) {
    const std::int64_t D = source.ffn.d_model;
    Buffer y(features.rows * D);
    const MatrixView<float> out(y.data(), features.rows, D);
    down_product(features, down, {}, out, parallel_);
    conversion_.layer_error.push_back(relative_error(out, target, weight));
    for (std::int64_t t = 0; t < features.rows; ++t) {
      isa_kernels().add(out.row(t), stream_.rows().row(t), D);
      if (!source.ffn.down_bias.empty())
        isa_kernels().add(source.ffn.down_bias.data(), stream_.rows().row(t), D);
    }
  }

  void keep(Rows rows, const Capture& capture, const std::vector<float>& down_bias) {
    if (shares_.active == 0) {
      rows.shared.down_bias = down_bias;
      conversion_.pruned.push_back(std::move(rows.shared));
      return;
    }
    MoeLayer layer;
    layer.experts = std::move(rows.experts);
    if (shares_.shared > 0) layer.shared = std::move(rows.shared);
    layer.router = capture.router;
    layer.experts_per_token = shares_.active;
    layer.gate = GateMode::kHard;
    layer.scale = 1.0f;
    conversion_.layers.push_back(std::move(layer));
  }

  BudgetSpec spec_;
  const ProgressCall& progress_;
  Shares shares_;
  Model model_;
  ParallelFor parallel_;
  const TokenWindows& windows_;
  WindowStream stream_;                // through the converted layers
  std::optional<WindowStream> dense_;  // through the dense model, where the correction needs it
  Buffer input_, hidden_, target_;     // [T, D], [T, H], [T, D] of the layer at hand
  Conversion conversion_;
};

}  // namespace

Conversion convert_to_budget(
    const Checkpoint& source, const BudgetSpec& spec, const TokenWindows& calibration,
    const std::function<void(const std::string&, std::int64_t, std::int64_t)>& progress) {
  if (source.config().is_moe())
    fail_argument(
        "convert: {} is already a mixture of experts; give the dense model it was made of",
        source.path().string());
  if (calibration.context < 2 || calibration.count() < 1)
    fail_argument(
        "convert: the calibration text has {} tokens and windows of {}; needs at least one window "
        "of 2 or more",
        calibration.tokens.size(), calibration.context);
  return BudgetConversion(source, spec, calibration, progress).run();
}

}  // namespace cleave
