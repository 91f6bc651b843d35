#include "cleave/calibrate.h"

#include <algorithm>
#include <cmath>

#include "fail.h"
#include "kernels/dispatch.h"
#include "kernels/product.h"
#include "support/buffer.h"

namespace cleave {
namespace {

void check_texts(const Model& model, std::span<const CalibrationText> texts) {
  if (texts.empty()) fail_argument("calibrate: no text; give at least one");
  for (std::size_t i = 0; i < texts.size(); ++i) {
    if (!(texts[i].weight > 0.0) || !std::isfinite(texts[i].weight))
      fail_argument("calibrate: text {} has the weight {}; must be above 0", i, texts[i].weight);
    if (texts[i].windows.context < 2 || texts[i].windows.count() < 1)
      fail_argument(
          "calibrate: text {} has {} tokens and windows of {}; needs at least one window of 2 or "
          "more",
          i, texts[i].windows.tokens.size(), texts[i].windows.context);
  }
  if (model.config().is_moe())
    fail_argument(
        "calibrate: the model is a mixture of experts (E = {}); give the dense model it was made "
        "of",
        model.config().num_experts);
}

NeuronStatsSpec complete(const Model& model, NeuronStatsSpec spec) {
  const ModelConfig& config = model.config();
  const auto fill = [](std::int64_t& size, std::int64_t value, const char* name) {
    if (size == 0) size = value;
    if (size != value)
      fail_argument("calibrate: the spec says {} = {}, the model has {}; leave it 0", name, size,
                    value);
  };
  fill(spec.num_layers, config.num_layers, "L");
  fill(spec.hidden, config.intermediate_size, "H");
  fill(spec.d_model, config.hidden_size, "D");
  spec.top = std::min(spec.top, spec.hidden);
  return spec;
}

std::vector<char> wanted_layers(std::span<const std::int64_t> layers, std::int64_t num_layers) {
  std::vector<char> wanted(static_cast<std::size_t>(num_layers), layers.empty() ? 1 : 0);
  for (const std::int64_t l : layers) {
    if (l < 0 || l >= num_layers)
      fail_argument("calibrate: layer {}; must be in [0, {})", l, num_layers);
    wanted[l] = 1;
  }
  return wanted;
}

/// The windows of all texts, side by side, between two layers.
class Stream {
 public:
  Stream(Model& model, std::span<const CalibrationText> texts) : model_(model), texts_(texts) {
    std::int64_t tokens = 0, longest = 0;
    for (const CalibrationText& text : texts) {
      tokens += text.windows.count() * text.windows.context;
      longest = std::max(longest, text.windows.context);
    }
    const std::int64_t D = model.config().hidden_size, H = model.config().intermediate_size;
    x_ = Buffer(tokens * D);
    normed_ = Buffer(longest * D);
    hidden_ = Buffer(longest * H);
    gate_ = Buffer(longest * H);
    weights_.resize(static_cast<std::size_t>(longest));
    cache_ = std::make_unique<KvCache>(model.config(), longest);
    std::int64_t begin = 0;
    for (const CalibrationText& text : texts)
      for (std::int64_t w = 0; w < text.windows.count(); ++w, begin += text.windows.context)
        model.embed(text.windows.window(w), {x_.data() + begin * D, text.windows.context, D});
  }

  /// One layer for all windows; observed unless `stats` is nullptr.
  void run_layer(std::int64_t l, NeuronStats* stats) {
    const DenseFfn dense = model_.dense_ffn(l);
    const std::int64_t D = dense.d_model;
    std::int64_t begin = 0;
    for (const CalibrationText& text : texts_) {
      const std::int64_t T = text.windows.context;
      for (std::int64_t w = 0; w < text.windows.count(); ++w, begin += T)
        run_window(l, dense.view(), {x_.data() + begin * D, T, D}, text.weight, stats);
    }
  }

 private:
  void run_window(std::int64_t l, const FfnView& ffn, MatrixView<float> x, double weight,
                  NeuronStats* stats) {
    const std::int64_t T = x.rows, H = ffn.up.rows;
    const MatrixView<float> normed(normed_.data(), T, x.cols), hidden(hidden_.data(), T, H);
    const bool gated = !ffn.gate.empty();
    const MatrixView<float> gate =
        gated ? MatrixView<float>(gate_.data(), T, H) : MatrixView<float>();
    model_.attend(l, *cache_, x, normed);
    hidden_activations(ffn, normed, hidden, gate, model_.parallel());
    if (stats != nullptr) {
      const std::span<float> weights(weights_.data(), static_cast<std::size_t>(T));
      std::fill(weights.begin(), weights.end(), static_cast<float>(weight));
      weights[0] = 0.0f;  // an attention sink: its size drowns all others
      stats->observe(l, hidden, normed, weights, model_.parallel());
      if (gated) stats->observe_gate(l, gate, weights);
    }
    linear_add(hidden, ffn.down, ffn.down_bias, x, model_.parallel());
  }

  Model& model_;
  std::span<const CalibrationText> texts_;
  Buffer x_, normed_, hidden_, gate_;
  std::vector<float> weights_;
  std::unique_ptr<KvCache> cache_;
};

}  // namespace

std::vector<float> down_norms(const FfnView& ffn) {
  std::vector<double> square(static_cast<std::size_t>(ffn.down.cols));
  for (std::int64_t d = 0; d < ffn.down.rows; ++d)
    for (std::int64_t j = 0; j < ffn.down.cols; ++j)
      square[j] += static_cast<double>(ffn.down(d, j)) * ffn.down(d, j);
  std::vector<float> norms(square.size());
  for (std::size_t j = 0; j < norms.size(); ++j)
    norms[j] = static_cast<float>(std::sqrt(square[j]));
  return norms;
}

void hidden_activations(const FfnView& ffn, MatrixView<const float> x, MatrixView<float> hidden,
                        MatrixView<float> gate, const ParallelFor& parallel) {
  const std::int64_t T = x.rows, H = ffn.up.rows;
  const bool gated = !ffn.gate.empty(), keep_gate = gate.data != nullptr;
  if (x.cols != ffn.up.cols || hidden.rows != T || hidden.cols != H ||
      (keep_gate && (gate.rows != T || gate.cols != H)))
    fail_argument(
        "hidden_activations: x is [{}, {}], hidden [{}, {}], gate [{}, {}]; expected [T, {}], [T, "
        "{}] and the same or empty",
        x.rows, x.cols, hidden.rows, hidden.cols, gate.rows, gate.cols, ffn.up.cols, H);
  if (keep_gate && !gated)
    fail_argument("hidden_activations: the FFN has no gate; leave the view for it empty");
  Buffer own_gate(gated && !keep_gate ? T * H : 0);
  if (gated && !keep_gate) gate = {own_gate.data(), T, H};
  linear(x, ffn.up, ffn.up_bias, hidden, parallel);
  if (gated) linear(x, ffn.gate, ffn.gate_bias, gate, parallel);
  parallel(T, 8, [&](std::int64_t begin, std::int64_t end) {
    const IsaKernels& isa = isa_kernels();
    for (std::int64_t t = begin; t < end; ++t) {
      float* h = hidden.row(t);
      if (!gated) {
        isa.activate(ffn.activation, nullptr, h, h, H);
        continue;
      }
      isa.activate(ffn.activation, nullptr, gate.row(t), gate.row(t), H);
      isa.activate(Activation::kIdentity, gate.row(t), h, h, H);
    }
  });
}

NeuronStats calibrate(Model& model, std::span<const CalibrationText> texts, NeuronStatsSpec spec,
                      std::span<const std::int64_t> layers,
                      const std::function<void(std::int64_t, std::int64_t)>& progress) {
  check_texts(model, texts);
  spec = complete(model, spec);
  const std::vector<char> wanted = wanted_layers(layers, spec.num_layers);
  NeuronStats stats(spec);
  Stream stream(model, texts);
  for (std::int64_t l = 0; l < spec.num_layers; ++l) {
    // What comes after the last layer that is wanted is of no use.
    if (std::find(wanted.begin() + l, wanted.end(), 1) == wanted.end()) break;
    stream.run_layer(l, wanted[l] != 0 ? &stats : nullptr);
    if (progress) progress(l + 1, spec.num_layers);
  }
  return stats;
}

}  // namespace cleave
