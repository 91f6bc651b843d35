#include "cleave/calibrate.h"

#include <algorithm>
#include <cmath>

#include "fail.h"
#include "kernels/dispatch.h"
#include "kernels/product.h"
#include "support/buffer.h"
#include "window_stream.h"

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

/// The windows of all texts between two layers, and what is observed of them.
class Observation {
 public:
  Observation(Model& model, std::span<const CalibrationText> texts)
      : model_(model), stream_(model, windows_of(texts)) {
    const std::int64_t H = model.config().intermediate_size;
    hidden_ = Buffer(stream_.context() * H);
    gate_ = Buffer(stream_.context() * H);
    for (const CalibrationText& text : texts)
      window_weight_.insert(window_weight_.end(), static_cast<std::size_t>(text.windows.count()),
                            static_cast<float>(text.weight));
  }

  /// One layer for all windows; observed unless `stats` is nullptr.
  void run_layer(std::int64_t l, NeuronStats* stats) {
    const DenseFfn dense = model_.dense_ffn(l);
    for (std::int64_t w = 0; w < stream_.num_windows(); ++w) run_window(l, dense.view(), w, stats);
  }

 private:
  static std::vector<const TokenWindows*> windows_of(std::span<const CalibrationText> texts) {
    std::vector<const TokenWindows*> windows;
    for (const CalibrationText& text : texts) windows.push_back(&text.windows);
    return windows;
  }

  void run_window(std::int64_t l, const FfnView& ffn, std::int64_t w, NeuronStats* stats) {
    const MatrixView<const float> normed = stream_.attend(l, w);
    const std::int64_t T = normed.rows, H = ffn.up.rows;
    const MatrixView<float> hidden(hidden_.data(), T, H);
    const bool gated = !ffn.gate.empty();
    const MatrixView<float> gate =
        gated ? MatrixView<float>(gate_.data(), T, H) : MatrixView<float>();
    hidden_activations(ffn, normed, hidden, gate, model_.parallel());
    if (stats != nullptr) {
      std::vector<float> weights(static_cast<std::size_t>(T), window_weight_[w]);
      weights[0] = 0.0f;  // an attention sink: its size drowns all others
      stats->observe(l, hidden, normed, weights, model_.parallel());
      if (gated) stats->observe_gate(l, gate, weights);
    }
    linear_add(hidden, ffn.down, ffn.down_bias, stream_.residual(w), model_.parallel());
  }

  Model& model_;
  WindowStream stream_;
  Buffer hidden_, gate_;              // [context, H]
  std::vector<float> window_weight_;  // [windows], of each token
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
  Observation observation(model, texts);
  for (std::int64_t l = 0; l < spec.num_layers; ++l) {
    // What comes after the last layer that is wanted is of no use.
    if (std::find(wanted.begin() + l, wanted.end(), 1) == wanted.end()) break;
    observation.run_layer(l, wanted[l] != 0 ? &stats : nullptr);
    if (progress) progress(l + 1, spec.num_layers);
  }
  return stats;
}

}  // namespace cleave
