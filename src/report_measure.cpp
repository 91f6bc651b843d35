#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "cleave/fit_router.h"
#include "cleave/report.h"
#include "cleave/version.h"
#include "fail.h"
#include "window_stream.h"

namespace cleave {
namespace {

class Stopwatch {
 public:
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - start_).count();
    start_ = now;
    return seconds;
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Sums over the tokens of one layer.
class LayerMeter {
 public:
  LayerMeter(Model& converted, Model& dense, std::int64_t layer)
      : moe_(converted.moe_layer(layer)),
        ffn_(dense.dense_ffn(layer)),
        parallel_(converted.parallel()) {
    report_.layer = layer;
    report_.load.assign(static_cast<std::size_t>(moe_.experts.num_experts()), 0.0);
  }

  /// Adds a window. x [T, D]   y [T, D], written: the layer's output
  void run(MatrixView<const float> x, MatrixView<float> y) {
    const std::int64_t T = x.rows, D = x.cols, E = moe_.experts.num_experts();
    Routing routing;
    std::fill_n(y.data, T * D, 0.0f);
    moe_.forward(x, y, parallel_, &routing);
    std::vector<float> target(static_cast<std::size_t>(T * D)),
        norms(static_cast<std::size_t>(T * E));
    dense_ffn(ffn_.view(), x, {target.data(), T, D}, parallel_);
    expert_output_norms(moe_.experts, x, {norms.data(), T, E}, parallel_);
    for (std::int64_t t = 1; t < T; ++t) {  // position 0 is an attention sink
      add_error(y.row(t), target.data() + t * D, D);
      add_routing(routing, t, norms.data() + t * E);
    }
  }

  LayerReport result() {
    double pairs = 0.0;
    for (const double count : report_.load) pairs += count;
    for (double& share : report_.load) {
      share /= std::max(pairs, 1.0);
      if (share > 0.0) report_.load_entropy -= share * std::log(share);
    }
    report_.relative_error = error_ / std::max(error_tokens_, 1.0);
    report_.router_recall = recall_ / std::max(tokens_, 1.0);
    report_.captured_energy = oracle_energy_ > 0.0 ? energy_ / oracle_energy_ : 1.0;
    return report_;
  }

 private:
  void add_error(const float* y, const float* target, std::int64_t D) {
    double off = 0.0, size = 0.0;
    for (std::int64_t d = 0; d < D; ++d) {
      const double difference = static_cast<double>(y[d]) - target[d];
      off += difference * difference;
      size += static_cast<double>(target[d]) * target[d];
    }
    if (size <= 0.0) return;
    error_ += off / size;
    error_tokens_ += 1.0;
  }

  void add_routing(const Routing& routing, std::int64_t t, const float* norms) {
    const std::int64_t K = routing.experts_per_token;
    std::vector<std::int32_t> best(report_.load.size());
    for (std::size_t e = 0; e < best.size(); ++e) best[e] = static_cast<std::int32_t>(e);
    std::partial_sort(best.begin(), best.begin() + K, best.end(),
                      [norms](std::int32_t a, std::int32_t b) {
                        return norms[a] != norms[b] ? norms[a] > norms[b] : a < b;
                      });
    const auto energy = [norms](std::int32_t e) {
      return static_cast<double>(norms[e]) * norms[e];
    };
    for (std::int64_t k = 0; k < K; ++k) {
      oracle_energy_ += energy(best[k]);
      const std::int32_t id = routing.ids[t * K + k];
      if (id == Routing::kUnused) continue;
      report_.load[id] += 1.0;
      energy_ += energy(id);
      if (std::find(best.begin(), best.begin() + K, id) != best.begin() + K)
        recall_ += 1.0 / static_cast<double>(K);
    }
    tokens_ += 1.0;
  }

  MoeLayer moe_;
  DenseFfn ffn_;
  ParallelFor parallel_;
  LayerReport report_;
  double error_ = 0.0, error_tokens_ = 0.0, recall_ = 0.0, tokens_ = 0.0;
  double energy_ = 0.0, oracle_energy_ = 0.0;
};

void check_models(const ModelConfig& converted, const ModelConfig& dense) {
  if (!converted.is_moe())
    fail_argument("report: the model has no experts; give a converted model, then the dense one");
  if (dense.is_moe())
    fail_argument("report: the second model holds experts; give the dense one it was made of");
  if (converted.hidden_size != dense.hidden_size || converted.num_layers != dense.num_layers ||
      converted.vocab_size != dense.vocab_size)
    fail_argument(
        "report: the models have D = {}, L = {}, V = {} and D = {}, L = {}, V = {}; expected a "
        "model and the dense one it was made of",
        converted.hidden_size, converted.num_layers, converted.vocab_size, dense.hidden_size,
        dense.num_layers, dense.vocab_size);
}

void set_costs(const ModelConfig& converted, const ModelConfig& dense, ConversionReport& report) {
  const ModelCost before = model_cost(dense), after = model_cost(converted);
  report.dense_macs_per_token = before.macs_per_token;
  report.macs_per_token = after.macs_per_token;
  report.dense_ffn_macs_per_token = before.ffn_macs_per_token;
  report.ffn_macs_per_token = after.ffn_macs_per_token;
  report.router_macs_per_token = after.router_macs_per_token;
  report.rho = static_cast<double>(after.ffn_macs_per_token) /
               static_cast<double>(before.ffn_macs_per_token);
}

TextReport start_text(const NamedText& text) {
  TextReport report;
  report.name = text.name;
  report.windows = text.windows.count();
  report.context = text.windows.context;
  report.tokens = report.windows * report.context;
  return report;
}

QualityRow row(const std::string& method, double rho, double active_share,
               const EvalResult& result) {
  QualityRow row;
  row.method = method;
  row.rho = rho;
  row.active_share = active_share;
  row.perplexity = result.perplexity;
  row.kl = result.kl;
  row.top1_agreement = result.top1_agreement;
  return row;
}

TokenWindows first_tokens(const TokenWindows& text, std::int64_t tokens) {
  const std::int64_t windows =
      std::clamp<std::int64_t>(tokens / text.context, 1, std::max<std::int64_t>(text.count(), 1));
  TokenWindows sample{text.tokens, text.context};
  sample.tokens.resize(static_cast<std::size_t>(windows * text.context));
  return sample;
}

}  // namespace

std::vector<LayerReport> measure_layers(Model& converted, Model& dense, const TokenWindows& text) {
  WindowStream stream(converted, text);
  std::vector<float> output(
      static_cast<std::size_t>(text.context * converted.config().hidden_size));
  const MatrixView<float> y(output.data(), text.context, converted.config().hidden_size);
  std::vector<LayerReport> layers;
  for (std::int64_t l = 0; l < converted.config().num_layers; ++l) {
    if (converted.num_experts(l) == 0) {
      const DenseFfn ffn = converted.dense_ffn(l);
      for (std::int64_t w = 0; w < stream.num_windows(); ++w) {
        const MatrixView<const float> x = stream.attend(l, w);
        std::fill(output.begin(), output.end(), 0.0f);
        dense_ffn(ffn.view(), x, y, converted.parallel());
        stream.add(w, y);
      }
      continue;
    }
    LayerMeter meter(converted, dense, l);
    for (std::int64_t w = 0; w < stream.num_windows(); ++w) {
      meter.run(stream.attend(l, w), y);
      stream.add(w, y);
    }
    layers.push_back(meter.result());
  }
  return layers;
}

ConversionReport make_report(Model& converted, Model& dense, std::span<const NamedText> texts,
                             const TokenWindows* calibration, const ReportSpec& spec,
                             const BaselineProgress& progress) {
  check_models(converted.config(), dense.config());
  if (texts.empty()) fail_argument("report: no text was given; expected at least one");
  ConversionReport report;
  report.tool_version = kVersion;
  report.seed = spec.seed;
  report.threads = converted.threads();
  report.instruction_set = isa_name();
  set_costs(converted.config(), dense.config(), report);
  const double active_share =
      static_cast<double>(report.ffn_macs_per_token + report.router_macs_per_token) /
      static_cast<double>(report.dense_ffn_macs_per_token);
  const auto say = [&](const std::string& what, std::int64_t done, std::int64_t all) {
    if (progress) progress(what, done, all);
  };

  Stopwatch watch;
  std::vector<Baseline> baselines;
  if (calibration != nullptr && spec.baselines != BaselineSet::kNone) {
    const auto specs = baseline_specs(spec.baselines, dense.config().intermediate_size,
                                      std::min(report.rho, 1.0), spec.seed);
    baselines = prepare_baselines(dense, *calibration, specs, progress);
    report.calibration_tokens = calibration->count() * calibration->context;
    report.timings_s.emplace_back("preparing the baselines", watch.lap());
  }
  for (const NamedText& text : texts) {
    TextReport result = start_text(text);
    say("dense on " + text.name, 0, 2);
    const HiddenStates states = hidden_states(dense, text.windows);
    result.rows.push_back(
        row("dense", 1.0, 1.0,
            evaluate(dense, text.windows,
                     {.reference = &dense, .reference_states = &states, .states = &states})));
    say("conversion on " + text.name, 1, 2);
    result.rows.push_back(
        row("this conversion", report.rho, active_share,
            evaluate(converted, text.windows, {.reference = &dense, .reference_states = &states})));
    result.rows.back().ours = result.rows.back().routed = true;
    report.timings_s.emplace_back("both models on " + text.name, watch.lap());
    for (QualityRow& measured : measure_baselines(dense, baselines, text.windows, states, progress))
      result.rows.push_back(std::move(measured));
    if (!baselines.empty()) report.timings_s.emplace_back("baselines on " + text.name, watch.lap());
    report.texts.push_back(std::move(result));
  }
  report.layers =
      measure_layers(converted, dense, first_tokens(texts.front().windows, spec.layer_tokens));
  report.timings_s.emplace_back("measuring the layers", watch.lap());
  return report;
}

}  // namespace cleave
