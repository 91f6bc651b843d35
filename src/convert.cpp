#include "cleave/convert.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "cleave/error.h"
#include "cleave/factorize.h"
#include "cleave/model.h"
#include "cleave/version.h"
#include "decoder_tensors.h"
#include "output_fit.h"
#include "support/thread_pool.h"

namespace cleave {
namespace {

using Progress = std::function<void(const std::string&, std::int64_t, std::int64_t)>;

constexpr std::int64_t kSampleTokens = 512;  // a layer, on which temperature and scale are fitted

void check_spec(const Checkpoint& source, const ConvertSpec& spec,
                const TokenWindows* calibration) {
  const ModelConfig& config = source.config();
  if (config.is_moe())
    throw InvalidArgument(fmt::format(
        "convert: {} is already a mixture of experts (E = {}); give the dense model it was made of",
        source.path().string(), config.num_experts));
  const std::int64_t num_experts = spec.partition.num_experts;
  check_divides(num_experts, config.intermediate_size);
  if (spec.experts_per_token < 1 || spec.experts_per_token > num_experts)
    throw InvalidArgument(fmt::format("convert: K = {} active experts; must be in [1, E = {}]",
                                      spec.experts_per_token, num_experts));
  if (calibration != nullptr && (calibration->context < 2 || calibration->count() < 1))
    throw InvalidArgument(
        fmt::format("convert: the calibration text has {} tokens and windows of {}; needs at least "
                    "one window of 2 or more",
                    calibration->tokens.size(), calibration->context));
}

DenseFfn read_ffn(const Checkpoint& source, std::int64_t layer) {
  const ModelConfig& config = source.config();
  const std::int64_t H = config.intermediate_size, D = config.hidden_size;
  const LayerNames names(config, layer);
  DenseFfn ffn;
  ffn.hidden = H;
  ffn.d_model = D;
  ffn.activation = config.activation;
  if (config.gated_ffn) ffn.gate = source.read(names.gate + ".weight", {H, D});
  ffn.up = source.read(names.up + ".weight", {H, D});
  ffn.down = source.read(names.down + ".weight", {D, H});
  if (config.mlp_bias) {
    if (config.gated_ffn) ffn.gate_bias = source.read(names.gate + ".bias", {H});
    ffn.up_bias = source.read(names.up + ".bias", {H});
    ffn.down_bias = source.read(names.down + ".bias", {D});
  }
  return ffn;
}

/// Partitions and factorizes every layer, as many at a time as there are threads.
/// @param split_layer  (layer) -> ExpertBank; called from several threads
template <typename SplitLayer>
std::vector<MoeLayer> split_layers(const ModelConfig& config, const ConvertSpec& spec,
                                   const ParallelFor& parallel, int threads,
                                   const Progress& progress, const SplitLayer& split_layer) {
  const std::int64_t num_layers = config.num_layers;
  std::vector<MoeLayer> layers(static_cast<std::size_t>(num_layers));
  for (std::int64_t first = 0; first < num_layers; first += threads) {
    const std::int64_t count = std::min<std::int64_t>(threads, num_layers - first);
    parallel(count, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t l = first + begin; l < first + end; ++l) layers[l].experts = split_layer(l);
    });
    if (progress) progress("split", first + count, num_layers);
  }
  for (MoeLayer& layer : layers) {
    layer.experts_per_token = spec.experts_per_token;
    layer.gate = spec.gate;
  }
  return layers;
}

ExpertBank split_ffn(const FfnView& ffn, const PartitionSpec& spec, std::int64_t layer) {
  PartitionSpec own = spec;
  own.seed = spec.seed + static_cast<std::uint64_t>(layer);  // layers must not share a permutation
  return factorize(ffn, partition_neurons(ffn, own));
}

double fixed_scale(ScalePolicy policy, GateMode gate, double num_experts, double active) {
  const double average_weight = policy == ScalePolicy::kActive ? 1.0 : num_experts / active;
  return gate == GateMode::kSoftmax ? average_weight * active : average_weight;
}

/// Routers that need no text: zero where all experts run, else random.
void attach_blind_routers(const ConvertSpec& spec, Conversion& conversion) {
  const bool all_active = spec.experts_per_token == spec.partition.num_experts;
  conversion.router = all_active ? "zero" : "random";
  conversion.scale = spec.scale == ScalePolicy::kActive ? spec.scale : ScalePolicy::kExperts;
  for (std::size_t l = 0; l < conversion.layers.size(); ++l) {
    MoeLayer& layer = conversion.layers[l];
    const std::int64_t E = layer.experts.num_experts(), D = layer.experts.d_model;
    // The partition's stream must not be drawn again: random experts and random routers would
    // agree.
    const std::uint64_t seed = spec.partition.seed * 0x9E3779B97F4A7C15u + l + 1;
    layer.router = all_active ? zero_router(E, D) : random_router(E, D, seed);
    layer.scale =
        static_cast<float>(fixed_scale(conversion.scale, spec.gate, static_cast<double>(E),
                                       static_cast<double>(spec.experts_per_token)));
  }
}

/// What one layer remembers of the calibration text: the statistics of its router and a sample of
/// its inputs.
struct LayerStatistics {
  RouterFit fit;
  std::vector<float> sample;  // [n, D], n <= kSampleTokens
  std::int64_t seen = 0;

  /// Keeps kSampleTokens of `expected` tokens, evenly spaced.
  void sample_from(MatrixView<const float> input, std::int64_t expected) {
    for (std::int64_t t = 0; t < input.rows; ++t, ++seen) {
      const std::int64_t kept = std::min(kSampleTokens, expected);
      if ((seen + 1) * kept / expected != seen * kept / expected)
        sample.insert(sample.end(), input.row(t), input.row(t) + input.cols);
    }
  }
};

/// Divides each token's norms by their mean: the order of the experts stays, and a token with a
/// huge output counts no more in the regression than any other. Together with the relative error of
/// OutputSample worth 0.1 (hard gate) to 0.4 (softmax) nats of KL on SmolLM2-135M, fitted scales.
void make_relative(MatrixView<float> norms) {
  for (std::int64_t t = 0; t < norms.rows; ++t) {
    float* row = norms.row(t);
    const double sum = std::accumulate(row, row + norms.cols, 0.0);
    if (sum <= 0.0) continue;
    for (std::int64_t e = 0; e < norms.cols; ++e)
      row[e] = static_cast<float>(row[e] * static_cast<double>(norms.cols) / sum);
  }
}

/// @param what    the values are    first  position in the window of the first row
void check_finite(MatrixView<const float> values, const char* what, std::int64_t layer,
                  std::int64_t window, std::int64_t first) {
  for (std::int64_t t = 0; t < values.rows; ++t)
    for (std::int64_t c = 0; c < values.cols; ++c)
      if (!std::isfinite(values(t, c)))
        throw FileError(
            fmt::format("convert: layer {}: {} is {} at token {} of calibration window {}; is the "
                        "model broken, "
                        "or in a type too small for it?",
                        layer, what, values(t, c), first + t, window));
}

/// Runs the calibration windows through the dense model and collects what the FFNs see. The first
/// token of a window is left out: it is an attention sink whose size drowns all others.
std::vector<LayerStatistics> observe_calibration(Model& model, const std::vector<MoeLayer>& layers,
                                                 const TokenWindows& windows,
                                                 const Progress& progress) {
  const std::int64_t D = model.config().hidden_size;
  const std::int64_t expected = windows.count() * (windows.context - 1);
  std::vector<LayerStatistics> statistics;
  for (const MoeLayer& layer : layers)
    statistics.push_back({RouterFit(D, layer.experts.num_experts()), {}, 0});

  std::vector<float> buffer;
  std::int64_t window = 0;
  ForwardHooks hooks;
  hooks.ffn_input = [&](std::int64_t l, MatrixView<const float> all) {
    check_finite(all, "the input of the FFN", l, window, 0);
    const auto input = all.slice_rows(1, all.rows - 1);
    const ExpertBank& bank = layers[l].experts;
    buffer.resize(static_cast<std::size_t>(input.rows * bank.num_experts()));
    const MatrixView<float> norms(buffer.data(), input.rows, bank.num_experts());
    expert_output_norms(bank, input, norms, model.parallel());
    check_finite(norms, "an expert's output norm", l, window, 1);
    make_relative(norms);
    statistics[l].fit.observe(input, norms);
    statistics[l].sample_from(input, expected);
  };
  KvCache cache(model.config(), windows.context);
  std::vector<float> hidden(static_cast<std::size_t>(windows.context * D));
  for (; window < windows.count(); ++window) {
    cache.clear();
    model.forward(windows.window(window), cache, {hidden.data(), windows.context, D}, hooks);
    if (progress) progress("calibrate", window + 1, windows.count());
  }
  return statistics;
}

void attach_fitted_routers(const ConvertSpec& spec, std::vector<LayerStatistics>& statistics,
                           const ParallelFor& parallel, const Progress& progress,
                           Conversion& conversion) {
  conversion.router = "ridge";
  conversion.scale = spec.scale;
  conversion.calibration_tokens = statistics.front().fit.num_tokens();
  for (std::size_t l = 0; l < conversion.layers.size(); ++l) {
    MoeLayer& layer = conversion.layers[l];
    const std::int64_t D = layer.experts.d_model;
    layer.router = statistics[l].fit.solve(spec.router);
    const OutputSample sample(layer.experts, layer.router, layer.experts_per_token,
                              {statistics[l].sample.data(),
                               static_cast<std::int64_t>(statistics[l].sample.size()) / D, D},
                              parallel);
    std::optional<double> scale;
    if (spec.scale != ScalePolicy::kFitted)
      scale = fixed_scale(spec.scale, spec.gate, static_cast<double>(layer.experts.num_experts()),
                          static_cast<double>(layer.experts_per_token));
    const OutputFit fit = sample.fit(spec.gate, scale);
    for (float& w : layer.router.weight) w = static_cast<float>(w * fit.temperature);
    layer.scale = static_cast<float>(fit.scale);
    conversion.layer_error.push_back(fit.relative_error);
    if (progress)
      progress("fit", static_cast<std::int64_t>(l) + 1,
               static_cast<std::int64_t>(conversion.layers.size()));
  }
}

nlohmann::json allocation_json(const AllocationChoice& choice) {
  nlohmann::json candidates = nlohmann::json::array();
  for (const AllocationCandidate& candidate : choice.candidates) {
    candidates.push_back(
        {{"shared_widths", candidate.shared_widths}, {"screening_kl", candidate.screening_kl}});
    if (candidate.kl) candidates.back()["kl"] = *candidate.kl;
  }
  return {{"windows", choice.windows},
          {"layer_kl", choice.layer_kl},
          {"layer_slope", choice.layer_slope},
          {"candidates", candidates},
          {"chosen", choice.chosen}};
}

nlohmann::json settings_of(const std::string& spec_json, const Conversion& conversion) {
  nlohmann::json settings =
      spec_json.empty() ? nlohmann::json::object()
                        : nlohmann::json::parse(spec_json, nullptr, /*allow_exceptions=*/false);
  if (!settings.is_object())
    throw InvalidArgument("write_conversion: spec_json is not a JSON object");
  settings["scale"] = scale_policy_name(conversion.scale);
  settings["calibration_tokens"] = conversion.calibration_tokens;
  std::vector<double> scales;
  for (const MoeLayer& layer : conversion.layers) scales.push_back(folded_scale(layer));
  settings["layer_folded_scale"] = scales;
  if (!conversion.layer_error.empty()) settings["layer_error"] = conversion.layer_error;
  if (!conversion.notices.empty()) settings["notices"] = conversion.notices;
  if (conversion.allocation)
    settings["allocation_choice"] = allocation_json(*conversion.allocation);
  return settings;
}

Provenance provenance_of(const Checkpoint& source, const Conversion& conversion) {
  Provenance provenance;
  provenance.tool_version = kVersion;
  const auto path = std::filesystem::absolute(source.path()).lexically_normal();
  provenance.source = (path.has_filename() ? path : path.parent_path()).filename().string();
  provenance.source_sha256 = source.sha256();
  provenance.partition = conversion.partition;
  provenance.seed = conversion.seed;
  provenance.router = conversion.router;
  return provenance;
}

/// One expert's rows as a dense FFN.
DenseFfn as_dense(const ExpertBank& bank) {
  const std::int64_t H = bank.rows(), D = bank.d_model;
  DenseFfn ffn;
  ffn.hidden = H;
  ffn.d_model = D;
  ffn.activation = bank.activation;
  ffn.gate = bank.gate;
  ffn.up = bank.up;
  ffn.gate_bias = bank.gate_bias;
  ffn.up_bias = bank.up_bias;
  ffn.down_bias = bank.down_bias;
  ffn.down.resize(static_cast<std::size_t>(D * H));
  for (std::int64_t j = 0; j < H; ++j)
    for (std::int64_t d = 0; d < D; ++d) ffn.down[d * H + j] = bank.down_t[j * D + d];
  return ffn;
}

}  // namespace

const char* allocation_name(Allocation allocation) {
  return allocation == Allocation::kKl ? "kl" : "uniform";
}

const char* calibration_mode_name(CalibrationMode mode) {
  return mode == CalibrationMode::kParallel ? "parallel" : "sequential";
}

const char* scale_policy_name(ScalePolicy policy) {
  switch (policy) {
    case ScalePolicy::kFitted:
      return "fitted";
    case ScalePolicy::kExperts:
      return "experts";
    case ScalePolicy::kActive:
      return "active";
  }
  return "unknown";
}

Conversion convert(const Checkpoint& source, const ConvertSpec& spec,
                   const TokenWindows* calibration, const Progress& progress) {
  check_spec(source, spec, calibration);
  const bool all_active = spec.experts_per_token == spec.partition.num_experts;
  Conversion conversion;
  conversion.partition = partition_method_name(spec.partition.method);
  conversion.seed = spec.partition.seed;
  if (calibration == nullptr || all_active) {
    ThreadPool pool(spec.threads);
    conversion.layers = split_layers(source.config(), spec, pool.parallel_for(), pool.threads(),
                                     progress, [&](std::int64_t l) {
                                       const DenseFfn ffn = read_ffn(source, l);
                                       return split_ffn(ffn.view(), spec.partition, l);
                                     });
    attach_blind_routers(spec, conversion);
    return conversion;
  }
  Model model = Model::load(source, {.threads = spec.threads});
  conversion.layers = split_layers(
      source.config(), spec, model.parallel(), model.threads(), progress,
      [&](std::int64_t l) { return split_ffn(model.dense_ffn(l).view(), spec.partition, l); });
  auto statistics = observe_calibration(model, conversion.layers, *calibration, progress);
  attach_fitted_routers(spec, statistics, model.parallel(), progress, conversion);
  return conversion;
}

void write_conversion(const std::filesystem::path& out, const Checkpoint& source,
                      const Conversion& conversion, const std::string& spec_json,
                      const WriteSpec& write) {
  Provenance provenance = provenance_of(source, conversion);
  provenance.spec_json = settings_of(spec_json, conversion).dump();
  if (!conversion.pruned.empty()) {
    std::vector<DenseFfn> ffns;
    for (const ExpertBank& bank : conversion.pruned) {
      ffns.push_back(as_dense(bank));
      provenance.neuron_order.push_back(bank.neuron_order);
    }
    if (is_bert(source.config().family))
      write_bert_dense(out, source, ffns, provenance, write);
    else
      write_llama_dense(out, source, ffns, provenance, write);
    return;
  }
  if (conversion.layers.empty())
    throw InvalidArgument("write_conversion: the conversion has no layers; call convert() first");
  const MoeLayer& first = conversion.layers.front();
  provenance.num_experts = first.experts.num_experts();
  provenance.experts_per_token = first.experts_per_token;
  provenance.gate = first.gate;
  provenance.folded_scale = folded_scale(first);
  provenance.router_epsilon = first.gate == GateMode::kHard ? kHardGateEpsilon : 1.0;
  const std::int64_t E = first.experts.num_experts(), I = first.experts.width(0);
  const std::int64_t shared = widest_shared(conversion.layers);
  provenance.shared_width = shared;
  provenance.shared_experts = shared % I == 0 ? shared / I : 0;
  for (const MoeLayer& layer : conversion.layers) {
    provenance.neuron_order.push_back(layer.experts.neuron_order);
    if (shared > 0) provenance.shared_neurons.push_back(layer.shared.neuron_order);
  }
  WriteSpec resolved = write;
  if (!write.dtype) resolved.dtype = default_write_dtype(source.config(), conversion.layers);
  if (is_bert(source.config().family))
    write_bert_moe(out, source, {E, first.experts_per_token, I, shared_widths(conversion.layers)},
                   bert_moe_tensors(source, conversion.layers), provenance, resolved);
  else if (shared > 0)
    write_granite_moe_shared(out, source, {E, first.experts_per_token, I, shared},
                             granite_moe_shared_tensors(source, conversion.layers), provenance,
                             resolved);
  else
    write_mixtral(out, source, {E, first.experts_per_token, I},
                  mixtral_tensors(source, conversion.layers), provenance, resolved);
}

}  // namespace cleave
