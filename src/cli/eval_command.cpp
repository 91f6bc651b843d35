#include <fmt/format.h>

#include <memory>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

struct EvalOptions {
  CommonOptions common;
  ModelOptions loading{.weights = "f32"};
  std::string model;
  std::vector<std::string> text;
  std::string against;
  std::int64_t context = 1024;
  std::int64_t limit_tokens = 0;
  double average_active = 0.0;  // 0: no calibrated thresholds
  std::vector<std::string> calibration;
};

constexpr std::int64_t kThresholdTokens = 4096;  // that thresholds are calibrated on

/// Share of the dense FFN's multiply-adds that ran per token, shared slice and router included; 1
/// for a dense model.
double active_share(const ModelConfig& config, const EvalResult& result) {
  if (!config.is_moe()) return 1.0;
  const ModelCost cost = model_cost(config);
  const auto always = static_cast<double>(cost.shared_macs_per_token + cost.router_macs_per_token);
  const double one_expert =
      static_cast<double>(cost.ffn_macs_per_token - cost.shared_macs_per_token) /
      static_cast<double>(config.experts_per_token);
  return (one_expert * result.active_experts + always) / static_cast<double>(cost.whole_ffn_macs);
}

std::string experts_text(const ModelConfig& config, const EvalResult& result) {
  if (!config.is_moe()) return {};
  std::string text = fmt::format("active experts    {:.4g} of {} per token and layer",
                                 result.active_experts, config.num_experts);
  if (config.shared_intermediate_size > 0)
    text += fmt::format(", and {} shared neurons", shared_text(config));
  return text + "\n";
}

Json load_json(const EvalResult& result) {
  Json layers = Json::array();
  for (std::size_t l = 0; l < result.load.size(); ++l) {
    if (result.load[l].share.empty()) continue;
    layers.push_back(
        {{"layer", l}, {"entropy", result.load[l].entropy}, {"share", result.load[l].share}});
  }
  return layers;
}

void add_predictions(const EvalOptions& options, const EvalResult& result, Json& json) {
  json["predicted_tokens"] = result.predicted_tokens;
  json["perplexity"] = result.perplexity;
  json["mean_nll"] = result.mean_nll;
  if (result.has_reference) {
    json["against"] = options.against;
    json["kl"] = result.kl;
    json["top1_agreement"] = result.top1_agreement;
    json["reference_tokens_per_s"] = result.reference_tokens_per_s;
  } else {
    json["kl"] = nullptr;
    json["top1_agreement"] = nullptr;
  }
}

/// Of a model without a head, which is always compared.
void add_distances(const EvalOptions& options, const EvalResult& result, Json& json) {
  json["against"] = options.against;
  json["cosine_distance"] = result.cosine_distance;
  json["pooled_distance"] = result.pooled_distance;
  json["reference_tokens_per_s"] = result.reference_tokens_per_s;
}

Json to_json(const EvalOptions& options, const Model& model, const EvalResult& result) {
  const ModelCost cost = model_cost(model.config());
  Json json{{"model", options.model},
            {"text", options.text},
            {"convention",
             result.has_head
                 ? "disjoint windows, no BOS, every token but a window's first is predicted; nats"
                 : "disjoint windows with their special tokens; 1 - cos of final hidden states, "
                   "mean over all tokens; pooled: of their means over a window"},
            {"context", options.context},
            {"windows", result.windows},
            {"tokens", result.tokens}};
  if (result.has_head)
    add_predictions(options, result, json);
  else
    add_distances(options, result, json);
  json["tokens_per_s"] = result.tokens_per_s;
  json["elapsed_s"] = result.elapsed_s;
  json["threads"] = model.threads();
  json["instruction_set"] = isa_name();
  json["parameters"] = cost.parameters;
  json["active_parameters"] = cost.active_parameters;
  json["macs_per_token"] = cost.macs_per_token;
  json["ffn_macs_per_token"] = cost.ffn_macs_per_token;
  json["router_macs_per_token"] = cost.router_macs_per_token;
  json["active_share"] = active_share(model.config(), result);
  if (model.config().is_moe()) {
    json["experts_per_token"] = model.config().experts_per_token;
    json["router_threshold"] = options.loading.router_threshold;
    if (options.average_active > 0.0) json["average_active"] = options.average_active;
    json["active_experts"] = result.active_experts;
  }
  json["expert_load"] = load_json(result);
  return json;
}

std::string load_text(const EvalResult& result) {
  std::string text;
  for (std::size_t l = 0; l < result.load.size(); ++l) {
    const LayerLoad& load = result.load[l];
    if (load.share.empty()) continue;
    if (text.empty()) text = "\nlayer  entropy/max  load per expert (percent)\n";
    text += fmt::format("{:5}  {:11.3f} ", l,
                        load.entropy / std::log(std::max<double>(2.0, load.share.size())));
    for (double share : load.share) text += fmt::format(" {:4.1f}", 100.0 * share);
    text += '\n';
  }
  return text;
}

std::string quality_text(const EvalResult& result) {
  if (!result.has_head)
    return fmt::format(
        "cosine_distance   {:.6g}\npooled_distance   {:.6g}\n"
        "tokens            {} ({} windows; disjoint, with their special tokens)\n",
        result.cosine_distance, result.pooled_distance, result.tokens, result.windows);
  std::string text = fmt::format("perplexity        {:.4f}\n", result.perplexity);
  if (result.has_reference)
    text += fmt::format("kl                {:.6g} nats\ntop1_agreement    {:.4f}\n", result.kl,
                        result.top1_agreement);
  return text + fmt::format("tokens            {} ({} windows, {} predicted; disjoint, no BOS)\n",
                            result.tokens, result.windows, result.predicted_tokens);
}

std::string to_text(const Model& model, const EvalResult& result) {
  const ModelCost cost = model_cost(model.config());
  std::string text = quality_text(result);
  text += fmt::format("tokens_per_s      {:.1f} ({} threads, {})\n", result.tokens_per_s,
                      model.threads(), isa_name());
  if (result.has_reference)
    text += fmt::format("reference         {:.1f} tokens/s\n", result.reference_tokens_per_s);
  text += fmt::format(
      "parameters        {} ({} active per token)\n"
      "multiply-adds     {} per token, FFN {} (active share of the FFN {:.3f})\n",
      human_count(cost.parameters), human_count(cost.active_parameters),
      human_count(cost.macs_per_token), human_count(cost.ffn_macs_per_token),
      active_share(model.config(), result));
  return text + experts_text(model.config(), result) + load_text(result);
}

/// The dense model, with the same weights; what is said of the router and of a cache file's name is
/// said of MODEL alone.
std::unique_ptr<Model> load_reference(const EvalOptions& options, WeightType weights) {
  const Checkpoint checkpoint = Checkpoint::open(options.against);
  ModelOptions loading{.weights = weight_type_name(weights)};
  if (options.loading.cache == "on" || options.loading.cache == "off")
    loading.cache = options.loading.cache;
  return std::make_unique<Model>(
      Model::load(checkpoint, model_spec(loading, options.common, checkpoint)));
}

void check_thresholds(const EvalOptions& options) {
  if (options.average_active == 0.0) {
    if (!options.calibration.empty())
      throw InvalidArgument(
          "--calibration: the thresholds of --average-active are fitted on it; give that as well");
    return;
  }
  if (options.calibration.empty())
    throw InvalidArgument(
        "--average-active: thresholds are fitted on a text; give --calibration FILE");
  if (options.loading.router_threshold > 0.0f)
    throw InvalidArgument("--average-active and --router-threshold exclude each other");
}

/// A threshold for each layer, so that tokens use so many experts on average, and up to all.
void set_average(const EvalOptions& options, const Tokenizer& tokenizer, Model& model) {
  if (options.average_active == 0.0) return;
  const bool chosen = options.loading.active > 0 || options.loading.active_share > 0.0;
  if (!chosen) model.set_active_experts(model.config().num_experts);
  const TokenWindows text =
      load_windows(model.config(), tokenizer, options.calibration, options.context,
                   std::max(kThresholdTokens, options.context));
  calibrate_thresholds(model, text, options.average_active);
}

/// Without a head there is nothing to measure but the distance from another model.
void check_head(const EvalOptions& options, const ModelConfig& config) {
  if (!config.has_head && options.against.empty())
    throw InvalidArgument(fmt::format(
        "eval: {} has no head, so there is no perplexity; give --against DENSE, the model it was "
        "made of, to compare hidden states",
        options.model));
}

void run_eval(EvalOptions options, const CLI::App& command) {
  check_thresholds(options);
  const Checkpoint checkpoint = Checkpoint::open(options.model);
  check_head(options, checkpoint.config());
  if (command.count("--context") == 0)
    options.context = default_context(options.context, checkpoint.config());
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(checkpoint);
  const TokenWindows text = load_windows(checkpoint.config(), tokenizer, options.text,
                                         options.context, options.limit_tokens);

  Progress progress(options.common.quiet);
  progress.note(
      fmt::format("{}: {} windows of {} tokens", options.model, text.count(), options.context));
  const ModelSpec spec = model_spec(options.loading, options.common, checkpoint);
  Model model = Model::load(checkpoint, spec);
  set_average(options, tokenizer, model);
  std::unique_ptr<Model> dense;
  if (!options.against.empty()) dense = load_reference(options, spec.weights);

  const EvalResult result =
      evaluate(model, text, dense.get(), [&](std::int64_t done, std::int64_t all, double so_far) {
        progress.update(
            model.config().has_head
                ? fmt::format("window {}/{}  perplexity {:.3f}", done, all, so_far)
                : fmt::format("window {}/{}  cosine distance {:.4f}", done, all, so_far),
            done == all);
      });
  print_result(options.common, to_json(options, model, result), to_text(model, result));
}

}  // namespace

void add_eval_command(CLI::App& app) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* command = app.add_subcommand(
      "eval",
      "Quality of a model on a text: perplexity, and KL against a dense model; of an encoder the "
      "cosine distance from one");
  command->add_option("MODEL", options->model, "Model directory or GGUF file")->required();
  command->add_option("--text", options->text, "Text file(s), UTF-8")->required();
  command->add_option(
      "--against", options->against,
      "Dense model to compare with (KL, top-1; of an encoder the distance of hidden states)");
  command->add_option("--context", options->context, "Window length, tokens")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
  command
      ->add_option("--limit-tokens", options->limit_tokens, "Use only the first N tokens; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  add_model_options(*command, options->loading);
  command
      ->add_option("--average-active", options->average_active,
                   "Experts per token on average: easy tokens use fewer, hard ones up to --active "
                   "(all if not given), by a threshold for each layer; needs --calibration")
      ->check(CLI::PositiveNumber);
  command->add_option("--calibration", options->calibration,
                      "Text file(s) that the thresholds are fitted on (4096 tokens)");
  add_common_options(*command, options->common);
  command->callback([options, command] { run_eval(*options, *command); });
}

}  // namespace cleave::cli
