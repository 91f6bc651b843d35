#include "cleave/baselines.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "baseline_ffn.h"
#include "fail.h"
#include "window_stream.h"

namespace cleave {
namespace {

// CMoE's code calibrates on one batch of 8 x 2048 tokens.
constexpr std::int64_t kCmoeTokens = 16384;
// Fine experts are a thirty-second of the FFN: 48 neurons of SmolLM2's 1536.
constexpr std::int64_t kFineParts = 32;

std::int64_t neurons_of(std::int64_t hidden, double rho) {
  return std::clamp<std::int64_t>(std::llround(rho * static_cast<double>(hidden)), 1, hidden);
}

BaselineSpec static_row(const char* method, std::int64_t hidden, double rho, BaselineScore score,
                        bool compensate) {
  const std::int64_t kept = neurons_of(hidden, rho);
  return {.method = method,
          .rho = static_cast<double>(kept) / static_cast<double>(hidden),
          .score = score,
          .shared = kept,
          .compensate = compensate};
}

/// A mask as it is, and with the repair that a conversion has.
void add_static_rows(const char* method, std::int64_t hidden, double rho, BaselineScore score,
                     bool compensate, std::vector<BaselineSpec>& specs) {
  specs.push_back(static_row(method, hidden, rho, score, compensate));
  specs.push_back(static_row(method, hidden, rho, score, false));
  specs.back().method += ", refitted";
  specs.back().refit = true;
}

BaselineSpec neuron_oracle(std::int64_t hidden, double rho) {
  BaselineSpec spec = static_row("neuron oracle", hidden, rho, BaselineScore::kEnergy, false);
  spec.router = BaselineRouter::kOracleNeuron;
  spec.deployable = false;
  return spec;
}

/// Not so a router of more than one matrix, which only its own engine could run.
bool has_stock_class(BaselineRouter router) {
  return router != BaselineRouter::kRegression && router != BaselineRouter::kMass;
}

/// Oracles see the experts' outputs.
bool is_deployable(BaselineRouter router) {
  return router != BaselineRouter::kOracleNorm && router != BaselineRouter::kOracleLabel &&
         router != BaselineRouter::kOracleNeuron && has_stock_class(router);
}

/// All neurons in E equal experts (or the next lower number that divides H).
BaselineSpec split_row(const std::string& split_name, const std::string& router_name,
                       std::int64_t hidden, std::int64_t experts, double rho, BaselineSplit split,
                       BaselineRouter router) {
  std::int64_t E = experts;
  while (hidden % E != 0) --E;
  const std::int64_t K = std::clamp<std::int64_t>(std::llround(rho * static_cast<double>(E)), 1, E);
  return {.method = fmt::format("{}, E {}, {}", split_name, E, router_name),
          .rho = static_cast<double>(K) / static_cast<double>(E),
          .deployable = is_deployable(router),
          .split = split,
          .router = router,
          .num_experts = E,
          .experts_per_token = K};
}

/// Half the budget always on, the rest in experts of H / parts neurons. Where `parts` does not
/// divide H, the remainder is always on.
BaselineSpec shared_row(std::int64_t hidden, std::int64_t parts, double rho) {
  const std::int64_t width = hidden / parts;
  const auto units =
      std::clamp<std::int64_t>(std::llround(rho * static_cast<double>(parts)), 1, parts);
  const std::int64_t active = (units + 1) / 2, always = units - active;
  BaselineSpec spec;
  spec.shared = always * width + hidden % parts;
  spec.num_experts = parts - always;
  spec.experts_per_token = active;
  spec.rho = static_cast<double>(spec.shared + active * width) / static_cast<double>(hidden);
  return spec;
}

BaselineSpec shared_kmeans(std::int64_t hidden, double rho, BaselineRouter router,
                           bool compensate) {
  BaselineSpec spec = shared_row(hidden, kFineParts, rho);
  spec.method = fmt::format("half shared, k-means width {}, {} router{}", hidden / kFineParts,
                            router == BaselineRouter::kRidge ? "ridge" : "regression MLP",
                            compensate ? ", compensation" : "");
  spec.deployable = is_deployable(router);
  spec.split = BaselineSplit::kKMeans;
  spec.router = router;
  spec.compensate = compensate;
  return spec;
}

BaselineSpec cmoe(std::int64_t hidden, std::int64_t experts, double rho) {
  BaselineSpec spec = shared_row(hidden, experts, rho);
  spec.method =
      fmt::format("CMoE S{}A{}E{}", experts - spec.num_experts, spec.experts_per_token, experts);
  spec.split = BaselineSplit::kCmoe;
  spec.router = BaselineRouter::kRepresentative;
  spec.score = BaselineScore::kTopRate;
  spec.calibration_tokens = kCmoeTokens;
  return spec;
}

/// What any grouping of the neurons has to beat: two that know nothing of them.
void add_blind_splits(std::int64_t hidden, double rho, std::vector<BaselineSpec>& specs) {
  specs.push_back(split_row("contiguous split", "ridge router", hidden, 8, rho,
                            BaselineSplit::kContiguous, BaselineRouter::kRidge));
  specs.push_back(split_row("random split", "ridge router", hidden, 8, rho, BaselineSplit::kRandom,
                            BaselineRouter::kRidge));
}

void add_split_rows(std::int64_t hidden, double rho, std::vector<BaselineSpec>& specs) {
  const auto add = [&](const char* split_name, const char* router_name, std::int64_t experts,
                       BaselineSplit split, BaselineRouter router) {
    specs.push_back(split_row(split_name, router_name, hidden, experts, rho, split, router));
  };
  add("contiguous split", "label-rule oracle", 4, BaselineSplit::kContiguous,
      BaselineRouter::kOracleLabel);
  specs.push_back(specs.back());
  specs.back().method += ", scale E/K";
  specs.back().scale_up = true;
  add("random split", "oracle router", 8, BaselineSplit::kRandom, BaselineRouter::kOracleNorm);
  add("random split", "random router", 8, BaselineSplit::kRandom, BaselineRouter::kRandom);
  for (const std::int64_t experts : {8, 32}) {
    const BaselineSplit split = BaselineSplit::kKMeans;
    add("k-means on gate rows", "oracle router", experts, split, BaselineRouter::kOracleNorm);
    add("k-means on gate rows", "ridge router with bias", experts, split,
        BaselineRouter::kRidgeBias);
    add("k-means on gate rows", "ridge router", experts, split, BaselineRouter::kRidge);
  }
  add("k-means on gate rows", "regression MLP router", 32, BaselineSplit::kKMeans,
      BaselineRouter::kRegression);
  for (const std::int64_t rank : {32, 128}) {
    add("k-means on gate rows", "mass router", 8, BaselineSplit::kKMeans, BaselineRouter::kMass);
    specs.back().method += fmt::format(" of rank {}", rank);
    specs.back().rank = rank;
  }
}

/// The FFN with the refitted columns of `down` and its bias, if there are some.
DenseFfn repaired(DenseFfn ffn, const BaselineLayer& layer) {
  if (layer.down_t.empty()) return ffn;
  if (!layer.down_bias.empty()) ffn.down_bias = layer.down_bias;
  const float* row = layer.down_t.data();
  for (std::int64_t j = 0; j < ffn.hidden; ++j) {
    if (layer.expert_of_neuron[j] != BaselineLayer::kShared) continue;
    for (std::int64_t d = 0; d < ffn.d_model; ++d) ffn.down[d * ffn.hidden + j] = row[d];
    row += ffn.d_model;
  }
  return ffn;
}

/// Mean over layers, where all have one.
std::optional<RouterQuality> mean_quality(const Baseline& baseline) {
  const BaselineRouter router = baseline.spec.router;
  if (router == BaselineRouter::kOracleNorm || router == BaselineRouter::kOracleNeuron)
    return RouterQuality{1.0, 1.0};
  RouterQuality mean{0.0, 0.0};
  const auto layers = static_cast<double>(baseline.layers.size());
  for (const BaselineLayer& layer : baseline.layers) {
    if (!layer.quality) return std::nullopt;
    mean.recall += layer.quality->recall / layers;
    mean.captured += layer.quality->captured / layers;
  }
  return mean;
}

QualityRow row_of(const Baseline& baseline, const ModelConfig& config, const Quality& quality) {
  const BaselineSpec& spec = baseline.spec;
  QualityRow row;
  static_cast<Quality&>(row) = quality;
  row.method = spec.method;
  row.rho = spec.rho;
  row.active_share = baseline_active_share(spec, config.intermediate_size, config.hidden_size,
                                           config.gated_ffn ? 3 : 2);
  row.deployable = spec.deployable;
  row.stock = has_stock_class(spec.router);
  row.routed = spec.router != BaselineRouter::kNone;
  row.router = mean_quality(baseline);
  row.router_share = row.active_share - spec.rho;
  return row;
}

}  // namespace

std::optional<BaselineSet> parse_baseline_set(const std::string& name) {
  if (name == "none") return BaselineSet::kNone;
  if (name == "quick") return BaselineSet::kQuick;
  if (name == "all") return BaselineSet::kAll;
  return std::nullopt;
}

std::vector<BaselineSpec> baseline_specs(BaselineSet set, std::int64_t hidden, double rho,
                                         std::uint64_t seed) {
  if (!(rho > 0.0 && rho <= 1.0))
    fail_argument("baseline_specs: rho = {}; expected a share of the neurons in (0, 1]", rho);
  if (hidden < kFineParts)
    fail_argument("baseline_specs: H = {} hidden neurons; expected at least {}", hidden,
                  kFineParts);
  std::vector<BaselineSpec> specs;
  if (set == BaselineSet::kNone) return specs;
  if (set == BaselineSet::kAll) {
    specs.push_back(cmoe(hidden, 8, rho));
    specs.push_back(cmoe(hidden, 16, rho));
  }
  add_static_rows("FLAP-style pruning", hidden, rho, BaselineScore::kFluctuation, true, specs);
  add_static_rows("static mask", hidden, rho, BaselineScore::kEnergy, false, specs);
  add_blind_splits(hidden, rho, specs);
  if (set == BaselineSet::kAll) {
    add_split_rows(hidden, rho, specs);
    specs.push_back(shared_kmeans(hidden, rho, BaselineRouter::kRidge, false));
    specs.push_back(shared_kmeans(hidden, rho, BaselineRouter::kRegression, false));
  }
  specs.push_back(shared_kmeans(hidden, rho, BaselineRouter::kRidge, true));
  specs.push_back(neuron_oracle(hidden, rho));
  for (BaselineSpec& spec : specs) spec.seed = seed;
  return specs;
}

HiddenStates baseline_states(Model& dense, const Baseline& baseline, const TokenWindows& text) {
  const ModelConfig& config = dense.config();
  if (static_cast<std::int64_t>(baseline.layers.size()) != config.num_layers)
    fail_argument("baseline_states: '{}' has {} layers, the model {}", baseline.spec.method,
                  baseline.layers.size(), config.num_layers);
  WindowStream stream(dense, text);
  std::vector<float> output(static_cast<std::size_t>(text.context * config.hidden_size));
  const MatrixView<float> y(output.data(), text.context, config.hidden_size);
  for (std::int64_t l = 0; l < config.num_layers; ++l) {
    const BaselineLayer& layer = baseline.layers[l];
    if (static_cast<std::int64_t>(layer.expert_of_neuron.size()) != config.intermediate_size)
      fail_argument("baseline_states: layer {} of '{}' has {} neurons, the model {}", l,
                    baseline.spec.method, layer.expert_of_neuron.size(), config.intermediate_size);
    const DenseFfn ffn = repaired(dense.dense_ffn(l), layer);
    const MaskedFfn masked(ffn, baseline.spec, layer);
    for (std::int64_t w = 0; w < stream.num_windows(); ++w) {
      const MatrixView<const float> x = stream.attend(l, w);
      std::fill(output.begin(), output.end(), 0.0f);
      masked.run(x, y, dense.parallel());
      stream.add(w, y);
    }
  }
  return {config.hidden_size, std::move(stream).finish()};
}

double baseline_active_share(const BaselineSpec& spec, std::int64_t hidden, std::int64_t d_model,
                             std::int64_t matrices) {
  const auto of_ffn = static_cast<double>(matrices);
  const auto H = static_cast<double>(hidden), D = static_cast<double>(d_model);
  const auto E = static_cast<double>(spec.num_experts);
  double router = 0.0;
  switch (spec.router) {
    case BaselineRouter::kRandom:
    case BaselineRouter::kRidge:
    case BaselineRouter::kRidgeBias:
      router = E * D;
      break;
    case BaselineRouter::kRegression:
      router = static_cast<double>(RegressionSpec{}.width) * (D + E);
      break;
    case BaselineRouter::kMass: {
      const double width = (H - static_cast<double>(spec.shared)) / E;
      router = (of_ffn - 1.0) * E * D * std::min({static_cast<double>(spec.rank), width, D});
      break;
    }
    case BaselineRouter::kRepresentative:
      router = (of_ffn - 1.0) * E * D;
      break;
    default:
      break;
  }
  return spec.rho + router / (of_ffn * H * D);
}

std::vector<QualityRow> measure_baselines(Model& dense, std::span<const Baseline> baselines,
                                          const TokenWindows& text,
                                          const HiddenStates& dense_states,
                                          const BaselineProgress& progress) {
  std::vector<QualityRow> rows;
  for (const Baseline& baseline : baselines) {
    const HiddenStates states = baseline_states(dense, baseline, text);
    const EvalResult result = evaluate(
        dense, text, {.reference = &dense, .reference_states = &dense_states, .states = &states});
    rows.push_back(row_of(baseline, dense.config(), result));
    if (progress)
      progress(baseline.spec.method, static_cast<std::int64_t>(rows.size()),
               static_cast<std::int64_t>(baselines.size()));
  }
  return rows;
}

}  // namespace cleave
