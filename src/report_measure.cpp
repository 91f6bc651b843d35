#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <set>

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
      : ffn_(dense.dense_ffn(layer)), parallel_(converted.parallel()) {
    report_.layer = layer;
    if (converted.num_experts(layer) > 0)
      moe_ = converted.moe_layer(layer);
    else
      narrow_ = converted.dense_ffn(layer);
    report_.load.assign(static_cast<std::size_t>(converted.num_experts(layer)), 0.0);
  }
  /// Whether the conversion changed the layer's shape.
  bool changed() const { return moe_ || narrow_.hidden != ffn_.hidden; }

  /// Adds a window. x [T, D]   y [T, D], written: the layer's output
  void run(MatrixView<const float> x, MatrixView<float> y) {
    const std::int64_t T = x.rows, D = x.cols;
    Routing routing;
    std::fill_n(y.data, T * D, 0.0f);
    if (moe_)
      moe_->forward(x, y, parallel_, &routing);
    else
      dense_ffn(narrow_.view(), x, y, parallel_);
    if (!changed()) return;
    std::vector<float> target(static_cast<std::size_t>(T * D));
    dense_ffn(ffn_.view(), x, {target.data(), T, D}, parallel_);
    // Position 0 is an attention sink.
    for (std::int64_t t = 1; t < T; ++t) add_error(y.row(t), target.data() + t * D, D);
    if (!moe_) return;
    const std::int64_t E = moe_->experts.num_experts();
    std::vector<float> norms(static_cast<std::size_t>(T * E));
    expert_output_norms(moe_->experts, x, {norms.data(), T, E}, parallel_);
    for (std::int64_t t = 1; t < T; ++t) add_routing(routing, t, norms.data() + t * E);
  }

  LayerReport result() {
    double pairs = 0.0;
    for (const double count : report_.load) pairs += count;
    for (double& share : report_.load) {
      share /= std::max(pairs, 1.0);
      if (share > 0.0) report_.load_entropy -= share * std::log(share);
    }
    report_.relative_error = error_ / std::max(error_tokens_, 1.0);
    report_.router_recall = moe_ ? recall_ / std::max(tokens_, 1.0) : 1.0;
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

  std::optional<MoeLayer> moe_;
  DenseFfn narrow_, ffn_;  // without experts: the converted model's; the dense model's
  ParallelFor parallel_;
  LayerReport report_;
  double error_ = 0.0, error_tokens_ = 0.0, recall_ = 0.0, tokens_ = 0.0;
  double energy_ = 0.0, oracle_energy_ = 0.0;
};

void check_models(const ModelConfig& converted, const ModelConfig& dense) {
  if (!converted.is_moe() && converted.intermediate_size >= dense.intermediate_size)
    fail_argument(
        "report: the model has no experts, and FFNs of {} neurons as the dense one's {}; give a "
        "converted model, then the dense one",
        converted.intermediate_size, dense.intermediate_size);
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

QualityRow row(const std::string& method, double rho, double active_share, const Quality& quality) {
  QualityRow row;
  static_cast<Quality&>(row) = quality;
  row.method = method;
  row.rho = rho;
  row.active_share = active_share;
  return row;
}

RouterQuality mean_quality(const std::vector<LayerReport>& layers) {
  RouterQuality mean{0.0, 0.0};
  double routed = 0.0;
  for (const LayerReport& layer : layers) {
    if (layer.load.empty()) continue;
    routed += 1.0;
    mean.recall += layer.router_recall;
    mean.captured += layer.captured_energy;
  }
  return {mean.recall / routed, mean.captured / routed};
}

TokenWindows first_tokens(const TokenWindows& text, std::int64_t tokens) {
  const std::int64_t windows =
      std::clamp<std::int64_t>(tokens / text.context, 1, std::max<std::int64_t>(text.count(), 1));
  TokenWindows sample = text;
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
    LayerMeter meter(converted, dense, l);
    for (std::int64_t w = 0; w < stream.num_windows(); ++w) {
      meter.run(stream.attend(l, w), y);
      stream.add(w, y);
    }
    if (meter.changed()) layers.push_back(meter.result());
  }
  return layers;
}

namespace {

/// A few K on both sides of a model's own, ascending.
std::vector<std::int64_t> swept_counts(std::int64_t own, std::int64_t experts) {
  std::set<std::int64_t> counts = {std::max<std::int64_t>(own / 4, 1),
                                   std::max<std::int64_t>(own / 2, 1), own, (own + experts) / 2,
                                   experts};
  return {counts.begin(), counts.end()};
}

/// What a report is made of, one part after the other.
class Measurement {
 public:
  Measurement(Model& converted, Model& dense, const ReportSpec& spec,
              const BaselineProgress& progress)
      : converted_(converted), dense_(dense), spec_(spec), progress_(progress) {
    report_.tool_version = kVersion;
    report_.seed = spec.seed;
    report_.threads = converted.threads();
    report_.instruction_set = isa_name();
    report_.has_head = dense.config().has_head;
    set_costs(converted.config(), dense.config(), report_);
  }

  ConversionReport run(std::span<const NamedText> texts, const TokenWindows* calibration) {
    if (calibration != nullptr && spec_.baselines != BaselineSet::kNone) prepare(*calibration);
    for (const NamedText& text : texts) measure(text);
    report_.layers =
        measure_layers(converted_, dense_, first_tokens(texts.front().windows, spec_.layer_tokens));
    report_.timings_s.emplace_back("measuring the layers", watch_.lap());
    if (routed() && spec_.baselines != BaselineSet::kNone) sweep(texts);
    return std::move(report_);
  }

 private:
  bool routed() const { return converted_.config().is_moe(); }

  void prepare(const TokenWindows& calibration) {
    const auto specs = baseline_specs(spec_.baselines, dense_.config().intermediate_size,
                                      std::min(report_.rho, 1.0), spec_.seed);
    baselines_ = prepare_baselines(dense_, calibration, specs, progress_);
    report_.calibration_tokens = calibration.count() * calibration.context;
    if (routed())
      router_ = mean_quality(
          measure_layers(converted_, dense_, first_tokens(calibration, spec_.layer_tokens)));
    report_.timings_s.emplace_back("preparing the baselines", watch_.lap());
  }

  void measure(const NamedText& text) {
    TextReport result = start_text(text);
    say("dense on " + text.name, 0, 2);
    states_.push_back(hidden_states(dense_, text.windows));
    const HiddenStates& states = states_.back();
    result.rows.push_back(
        row("dense", 1.0, 1.0,
            evaluate(dense_, text.windows,
                     {.reference = &dense_, .reference_states = &states, .states = &states})));
    say("conversion on " + text.name, 1, 2);
    result.rows.push_back(conversion_row(text.windows, states));
    if (routed() && spec_.baselines != BaselineSet::kNone)
      result.rows.push_back(oracle_row(text.windows, states));
    report_.timings_s.emplace_back("both models on " + text.name, watch_.lap());
    for (QualityRow& measured :
         measure_baselines(dense_, baselines_, text.windows, states, progress_))
      result.rows.push_back(std::move(measured));
    if (!baselines_.empty())
      report_.timings_s.emplace_back("baselines on " + text.name, watch_.lap());
    report_.texts.push_back(std::move(result));
  }

  QualityRow conversion_row(const TokenWindows& text, const HiddenStates& states) {
    const double router_share = static_cast<double>(report_.router_macs_per_token) /
                                static_cast<double>(report_.dense_ffn_macs_per_token);
    QualityRow ours =
        row("this conversion", report_.rho, report_.rho + router_share,
            evaluate(converted_, text, {.reference = &dense_, .reference_states = &states}));
    ours.ours = true;
    ours.routed = routed();
    ours.router = router_;
    ours.router_share = router_share;
    return ours;
  }

  QualityRow oracle_row(const TokenWindows& text, const HiddenStates& states) {
    const HiddenStates own = oracle_states(converted_, text);
    QualityRow oracle =
        row("this conversion, oracle router", report_.rho, report_.rho,
            evaluate(converted_, text,
                     {.reference = &dense_, .reference_states = &states, .states = &own}));
    oracle.deployable = false;
    oracle.routed = true;
    oracle.router = RouterQuality{1.0, 1.0};
    return oracle;
  }

  /// Last, since it leaves the gates exactly hard.
  void sweep(std::span<const NamedText> texts) {
    const std::int64_t own = converted_.config().experts_per_token;
    const auto counts = swept_counts(own, converted_.config().num_experts);
    for (std::size_t i = 0; i < counts.size(); ++i) {
      say("other numbers of experts", static_cast<std::int64_t>(i) + 1,
          static_cast<std::int64_t>(counts.size()));
      converted_.set_active_experts(counts[i]);
      const ModelCost cost = model_cost(converted_.config());
      const auto dense_macs = static_cast<double>(report_.dense_ffn_macs_per_token);
      const double rho = static_cast<double>(cost.ffn_macs_per_token) / dense_macs;
      const double router = static_cast<double>(cost.router_macs_per_token) / dense_macs;
      for (std::size_t t = 0; t < texts.size(); ++t) {
        TextReport& text = report_.texts[t];
        const auto point = [&](const Quality& of) {
          return ActivePoint{of, counts[i], rho, rho + router};
        };
        text.sweep.push_back(counts[i] == own ? point(text.rows[1])
                                              : point(evaluate(converted_, texts[t].windows,
                                                               {.reference = &dense_,
                                                                .reference_states = &states_[t]})));
      }
    }
    converted_.set_active_experts(own);
    report_.timings_s.emplace_back("other numbers of experts", watch_.lap());
  }

  void say(const std::string& what, std::int64_t done, std::int64_t all) const {
    if (progress_) progress_(what, done, all);
  }

  Model &converted_, &dense_;
  const ReportSpec& spec_;
  const BaselineProgress& progress_;
  Stopwatch watch_;
  ConversionReport report_;
  std::vector<Baseline> baselines_;
  std::vector<HiddenStates> states_;     // [texts], of the dense model
  std::optional<RouterQuality> router_;  // of the conversion, on the calibration text
};

}  // namespace

ConversionReport make_report(Model& converted, Model& dense, std::span<const NamedText> texts,
                             const TokenWindows* calibration, const ReportSpec& spec,
                             const BaselineProgress& progress) {
  check_models(converted.config(), dense.config());
  if (texts.empty()) fail_argument("report: no text was given; expected at least one");
  return Measurement(converted, dense, spec, progress).run(texts, calibration);
}

}  // namespace cleave
