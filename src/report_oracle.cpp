// The converted model with routers that see what the experts would add.

#include <algorithm>
#include <utility>

#include "baseline_ffn.h"
#include "cleave/calibrate.h"
#include "cleave/report.h"
#include "down_square.h"
#include "support/buffer.h"
#include "window_stream.h"

namespace cleave {
namespace {

class OracleLayer {
 public:
  explicit OracleLayer(MoeLayer layer)
      : layer_(std::move(layer)),
        down_square_(down_squares(layer_.experts.down_t, layer_.experts.d_model)) {}

  /// y[t] += the layer's output for x[t]. x, y [T, D].
  void run(MatrixView<const float> x, MatrixView<float> y, const ParallelFor& parallel) const {
    const std::int64_t T = x.rows, E = layer_.experts.num_experts(), K = layer_.experts_per_token;
    const Buffer energy_memory(T * E), logit_memory(T * E);
    const MatrixView<float> energy(energy_memory.data(), T, E), logits(logit_memory.data(), T, E);
    energies(x, energy, parallel);
    std::vector<std::uint8_t> on(static_cast<std::size_t>(T * E));
    choose_largest(energy, K, on.data(), parallel);
    linear(x, layer_.router.view(), {}, logits, parallel);
    prefer(on, logits);
    Routing routing;
    route(logits, {.experts_per_token = K, .mode = layer_.gate}, routing, parallel);
    layer_.forward_routed(x, routing, y, parallel);
  }

 private:
  /// sum over an expert's neurons of h_j^2 |d_j|^2. energy [T, E], written.
  void energies(MatrixView<const float> x, MatrixView<float> energy,
                const ParallelFor& parallel) const {
    const ExpertBank& bank = layer_.experts;
    const std::int64_t rows = bank.rows(), D = bank.d_model;
    FfnView ffn;
    if (!bank.gate.empty()) ffn.gate = {bank.gate.data(), rows, D};
    ffn.up = {bank.up.data(), rows, D};
    ffn.gate_bias = bank.gate_bias;
    ffn.up_bias = bank.up_bias;
    ffn.activation = bank.activation;
    const Buffer hidden(x.rows * rows);
    const MatrixView<float> h(hidden.data(), x.rows, rows);
    hidden_activations(ffn, x, h, {}, parallel);
    parallel(x.rows, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t)
        for (std::int64_t e = 0; e < energy.cols; ++e) {
          float sum = 0.0f;
          for (std::int64_t r = bank.begin[e]; r < bank.begin[e + 1]; ++r)
            sum += h(t, r) * h(t, r) * down_square_[r];
          energy(t, e) = sum;
        }
    });
  }

  /// The logits of what is not chosen fall below those of what is, which keep their weights.
  void prefer(const std::vector<std::uint8_t>& on, MatrixView<float> logits) const {
    for (std::int64_t t = 0; t < logits.rows; ++t) {
      float* row = logits.row(t);
      const std::uint8_t* chosen = on.data() + t * logits.cols;
      float lowest = row[std::find(chosen, chosen + logits.cols, 1) - chosen];
      for (std::int64_t e = 0; e < logits.cols; ++e)
        if (chosen[e] != 0) lowest = std::min(lowest, row[e]);
      for (std::int64_t e = 0; e < logits.cols; ++e)
        if (chosen[e] == 0) row[e] = lowest - 1.0f;
    }
  }

  MoeLayer layer_;
  std::vector<float> down_square_;  // [rows], |d_j|^2
};

}  // namespace

HiddenStates oracle_states(Model& converted, const TokenWindows& text) {
  const ModelConfig& config = converted.config();
  WindowStream stream(converted, text);
  std::vector<float> output(static_cast<std::size_t>(text.context * config.hidden_size));
  const MatrixView<float> y(output.data(), text.context, config.hidden_size);
  const auto through = [&](std::int64_t layer, const auto& run) {
    for (std::int64_t w = 0; w < stream.num_windows(); ++w) {
      const MatrixView<const float> x = stream.attend(layer, w);
      std::fill(output.begin(), output.end(), 0.0f);
      run(x);
      stream.add(w, y);
    }
  };
  for (std::int64_t l = 0; l < config.num_layers; ++l) {
    if (converted.num_experts(l) > 0) {
      const OracleLayer layer(converted.moe_layer(l));
      through(l, [&](MatrixView<const float> x) { layer.run(x, y, converted.parallel()); });
    } else {
      const DenseFfn ffn = converted.dense_ffn(l);
      through(
          l, [&](MatrixView<const float> x) { dense_ffn(ffn.view(), x, y, converted.parallel()); });
    }
  }
  return {config.hidden_size, std::move(stream).finish()};
}

}  // namespace cleave
