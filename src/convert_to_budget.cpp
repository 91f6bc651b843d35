#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "capture.h"
#include "cleave/convert.h"
#include "cleave/model.h"
#include "cleave/refit.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "support/buffer.h"

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

/// The calibration text inside the model: all tokens after as many layers as have run.
class Stream {
 public:
  Stream(Model& model, const TokenWindows& windows)
      : model_(model),
        windows_(windows),
        cache_(model.config(), windows.context),
        tokens_(windows.count() * windows.context),
        x_(tokens_ * model.config().hidden_size),
        input_(tokens_ * model.config().hidden_size) {
    for (std::int64_t w = 0; w < windows.count(); ++w)
      model.embed(windows.window(w), window(x_, w));
  }

  /// The layer's attention; then x() is what its FFN adds to, and input() what it reads.
  void attend(std::int64_t layer) {
    for (std::int64_t w = 0; w < windows_.count(); ++w)
      model_.attend(layer, cache_, window(x_, w), window(input_, w));
  }
  std::int64_t tokens() const { return tokens_; }
  MatrixView<float> x() const { return {x_.data(), tokens_, model_.config().hidden_size}; }
  MatrixView<const float> input() const {
    return {input_.data(), tokens_, model_.config().hidden_size};
  }

 private:
  MatrixView<float> window(const Buffer& all, std::int64_t w) const {
    const std::int64_t D = model_.config().hidden_size;
    return {all.data() + w * windows_.context * D, windows_.context, D};
  }
  Model& model_;
  const TokenWindows& windows_;
  KvCache cache_;
  std::int64_t tokens_;
  Buffer x_, input_;
};

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

  /// hidden [T, H] = act(gate x) .* (up x), with their biases.
  void hidden_values(MatrixView<const float> x, MatrixView<float> hidden,
                     const ParallelFor& parallel) const {
    const FfnView view = ffn.view();
    Buffer gate(kRowBlock * ffn.hidden);
    for (std::int64_t first = 0; first < x.rows; first += kRowBlock) {
      const std::int64_t T = std::min(kRowBlock, x.rows - first);
      const auto rows = x.slice_rows(first, T);
      const auto out = hidden.slice_rows(first, T);
      linear(rows, view.up, view.up_bias, out, parallel);
      const MatrixView<float> gated(gate.data(), T, ffn.hidden);
      if (!view.gate.empty()) linear(rows, view.gate, view.gate_bias, gated, parallel);
      parallel(T, 8, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t)
          isa_kernels().activate(ffn.activation, view.gate.empty() ? nullptr : gated.row(t),
                                 out.row(t), out.row(t), ffn.hidden);
      });
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

/// Rows of the dense FFN in the order of `neurons`, cut at `begin`.
ExpertBank gather(const SplitSource& source, const std::vector<std::int32_t>& neurons,
                  std::vector<std::int64_t> begin, const float* down_t) {
  const std::int64_t H = source.ffn.hidden, D = source.ffn.d_model;
  ExpertBank bank;
  bank.d_model = D;
  bank.dense_hidden = H;
  bank.begin = std::move(begin);
  bank.neuron_order = neurons;
  bank.activation = source.ffn.activation;
  const auto rows_of = [&](const std::vector<float>& matrix) {
    std::vector<float> rows;
    rows.reserve(matrix.empty() ? 0 : neurons.size() * static_cast<std::size_t>(D));
    if (!matrix.empty())
      for (const std::int32_t j : neurons)
        rows.insert(rows.end(), matrix.begin() + j * D, matrix.begin() + (j + 1) * D);
    return rows;
  };
  const auto values_of = [&](const std::vector<float>& vector) {
    std::vector<float> values;
    if (!vector.empty())
      for (const std::int32_t j : neurons) values.push_back(vector[j]);
    return values;
  };
  bank.gate = rows_of(source.ffn.gate);
  bank.up = rows_of(source.ffn.up);
  bank.gate_bias = values_of(source.ffn.gate_bias);
  bank.up_bias = values_of(source.ffn.up_bias);
  bank.down_t.assign(down_t, down_t + static_cast<std::int64_t>(neurons.size()) * D);
  return bank;
}

double mean_square(const float* x, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum / static_cast<double>(n);
}

class BudgetConversion {
 public:
  BudgetConversion(const Checkpoint& source, const BudgetSpec& spec, const TokenWindows& windows,
                   const ProgressCall& progress)
      : spec_(spec),
        progress_(progress),
        shares_(divide(source.config(), spec)),
        model_(Model::load(source, {.threads = spec.threads})),
        windows_(windows),
        stream_(model_, windows),
        hidden_(stream_.tokens() * source.config().intermediate_size),
        target_(stream_.tokens() * source.config().hidden_size) {
    if (spec.correction != 0.0) dense_.emplace(model_, windows);
  }

  Conversion run() {
    Conversion conversion;
    conversion.router = spec_.router.steps > 0 ? "trained on energies" : "ridge";
    conversion.scale = ScalePolicy::kActive;
    conversion.calibration_tokens = stream_.tokens();
    const std::int64_t layers = model_.config().num_layers;
    for (std::int64_t l = 0; l < layers; ++l) {
      conversion.layers.push_back(convert_layer(l, conversion));
      if (progress_) progress_("convert", l + 1, layers);
    }
    return conversion;
  }

 private:
  MoeLayer convert_layer(std::int64_t l, Conversion& conversion) {
    const ParallelFor parallel = model_.parallel();
    const SplitSource source(model_.dense_ffn(l));
    const std::int64_t T = stream_.tokens(), D = source.ffn.d_model, H = source.ffn.hidden;
    const MatrixView<float> hidden(hidden_.data(), T, H), target(target_.data(), T, D);
    if (dense_) {
      dense_->attend(l);
      source.hidden_values(dense_->input(), hidden, parallel);
      down_product(hidden, source.down_t, source.ffn.down_bias, target, parallel);
      for (std::int64_t t = 0; t < T; ++t) isa_kernels().add(target.row(t), dense_->x().row(t), D);
    }
    stream_.attend(l);
    source.hidden_values(stream_.input(), hidden, parallel);
    down_product(hidden, source.down_t, {}, target, parallel);
    const std::vector<float> weight = token_weights(target);

    const LayerTokens tokens{stream_.input(), hidden, weight, source.down_square};
    CaptureSpec capture_spec;
    capture_spec.width = spec_.expert_width;
    capture_spec.shared = shares_.shared;
    capture_spec.experts = shares_.experts;
    capture_spec.active = shares_.active;
    capture_spec.rounds = spec_.rounds;
    capture_spec.training = spec_.router;
    capture_spec.seed = spec_.seed + static_cast<std::uint64_t>(l);
    const Capture capture = capture_energy(tokens, capture_spec, parallel);
    conversion.captured_energy.push_back(capture.energy);
    conversion.oracle_energy.push_back(capture.oracle_energy);
    conversion.router_recall.push_back(capture.recall);
    return finish_layer(source, capture, tokens, target, conversion);
  }

  /// What is left of a token's importance once its size is taken out: the next norm divides by it.
  std::vector<float> token_weights(MatrixView<const float> y) const {
    std::vector<float> weight(static_cast<std::size_t>(y.rows));
    std::vector<float> sum(static_cast<std::size_t>(y.cols));
    double total = 0.0;
    for (std::int64_t t = 0; t < y.rows; ++t) {
      const float* x = stream_.x().row(t);
      for (std::int64_t d = 0; d < y.cols; ++d) sum[d] = x[d] + y(t, d);
      const bool first = t % windows_.context == 0;
      weight[t] = static_cast<float>((first ? spec_.first_token_weight : 1.0) /
                                     (mean_square(sum.data(), y.cols) + 1e-12));
      total += weight[t];
    }
    const auto factor = static_cast<float>(static_cast<double>(y.rows) / total);
    for (float& w : weight) w *= factor;
    return weight;
  }

  MoeLayer finish_layer(const SplitSource& source, const Capture& capture,
                        const LayerTokens& tokens, MatrixView<float> target,
                        Conversion& conversion) {
    const ParallelFor parallel = model_.parallel();
    const std::int64_t T = target.rows, D = source.ffn.d_model, H = source.ffn.hidden;
    const auto& expert_of = capture.partition.expert_of_neuron;
    // Rows of the features: experts in order, then the shared slice.
    std::vector<std::int32_t> order(static_cast<std::size_t>(H));
    std::iota(order.begin(), order.end(), 0);
    const auto place = [&](std::int32_t j) {
      return expert_of[j] < 0 ? capture.partition.num_experts : expert_of[j];
    };
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int32_t a, std::int32_t b) { return place(a) < place(b); });
    std::vector<float> prior(static_cast<std::size_t>(H * D));
    for (std::int64_t r = 0; r < H; ++r)
      std::copy_n(source.down_t.data() + order[r] * D, D, prior.data() + r * D);

    const auto ids = choose_experts(tokens.input, capture.router, shares_.active, parallel);
    // Masked features take the place of the hidden values, row by row.
    const std::int64_t I = spec_.expert_width, routed = H - shares_.shared;
    const MatrixView<float> features(hidden_.data(), T, H);
    parallel(T, 16, [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> row(static_cast<std::size_t>(H));
      for (std::int64_t t = begin; t < end; ++t) {
        std::fill(row.begin(), row.begin() + routed, 0.0f);
        const float* h = tokens.hidden.row(t);
        for (std::int64_t k = 0; k < shares_.active; ++k) {
          const std::int64_t first = ids[t * shares_.active + k] * I;
          for (std::int64_t r = first; r < first + I; ++r) row[r] = h[order[r]];
        }
        for (std::int64_t r = routed; r < H; ++r) row[r] = h[order[r]];
        std::copy(row.begin(), row.end(), features.row(t));
      }
    });
    if (dense_) {
      const auto alpha = static_cast<float>(spec_.correction);
      parallel(T, 64, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t t = begin; t < end; ++t)
          for (std::int64_t d = 0; d < D; ++d) {
            const float lost = dense_->x()(t, d) - (stream_.x()(t, d) + target(t, d));
            target(t, d) += alpha * lost;
          }
      });
    }
    std::vector<float> down = prior;
    if (spec_.refit) {
      RidgeRefit fit(H, D);
      fit.observe(features, target, tokens.weight, parallel);
      down = fit.solve({prior.data(), H, D}, spec_.refit_spec, parallel);
    }
    Buffer y(T * D);
    const MatrixView<float> out(y.data(), T, D);
    down_product(features, down, source.ffn.down_bias, out, parallel);
    double error = 0.0, size = 0.0;
    for (std::int64_t t = 0; t < T; ++t) {
      for (std::int64_t d = 0; d < D; ++d) {
        const double e = out(t, d) - target(t, d);
        error += tokens.weight[t] * e * e;
        size += tokens.weight[t] * static_cast<double>(target(t, d)) * target(t, d);
      }
      isa_kernels().add(out.row(t), stream_.x().row(t), D);
    }
    conversion.layer_error.push_back(size > 0.0 ? error / size : 0.0);

    MoeLayer layer;
    std::vector<std::int64_t> begin;
    for (std::int64_t e = 0; e <= shares_.experts; ++e) begin.push_back(e * I);
    layer.experts =
        gather(source, {order.begin(), order.begin() + routed}, std::move(begin), down.data());
    layer.experts.down_bias = source.ffn.down_bias;
    if (shares_.shared > 0)
      layer.shared = gather(source, {order.begin() + routed, order.end()}, {0, shares_.shared},
                            down.data() + routed * D);
    layer.router = capture.router;
    layer.experts_per_token = shares_.active;
    layer.gate = GateMode::kHard;
    layer.scale = 1.0f;
    return layer;
  }

  BudgetSpec spec_;
  const ProgressCall& progress_;
  Shares shares_;
  Model model_;
  const TokenWindows& windows_;
  Stream stream_;                // through the converted layers
  std::optional<Stream> dense_;  // through the dense model, where the correction needs it
  Buffer hidden_, target_;       // [T, H], [T, D] of the layer at hand
};

}  // namespace

Conversion convert_to_budget(
    const Checkpoint& source, const BudgetSpec& spec, const TokenWindows& calibration,
    const std::function<void(const std::string&, std::int64_t, std::int64_t)>& progress) {
  return BudgetConversion(source, spec, calibration, progress).run();
}

}  // namespace cleave
