#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <optional>

#include "cli/calibration_text.h"
#include "cli/convert_options.h"
#include "cli/report_command.h"

namespace cleave::cli {
namespace {

/// The report beside the model.
WrittenReport report_on(const ConvertOptions& options, const Checkpoint& written,
                        const TokenWindows& calibration, Progress& progress) {
  ReportOptions report;
  report.common = options.common;
  report.model = options.out;
  report.dense = options.model;
  report.text = options.text;
  report.calibration = options.calibration;
  if (self_calibration_tokens(options) > 0) report.calibration.push_back(kSelfTextName);
  report.baselines = options.baselines;
  report.out = options.report.empty() ? (std::filesystem::path(options.out) / "report").string()
                                      : options.report;
  report.context = options.context;
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(written);
  return measure_and_write(report, written, tokenizer, &calibration, progress);
}

/// @param text  receives the calibration text, if there is one
Conversion run_conversion(const Checkpoint& source, const ConvertOptions& options,
                          std::optional<TokenWindows>& text, Progress& progress) {
  const auto report = [&](const std::string& what, std::int64_t done, std::int64_t all) {
    progress.update(fmt::format("{} {}/{}", what, done, all), done == all);
  };
  // What can be refused is refused before the text is read.
  std::vector<std::string> notices;
  Conversion conversion;
  if (options.active_share > 0.0) {
    const BudgetSpec budget = make_budget(options, source.config().intermediate_size);
    text = calibration_text(source, options, progress, notices);
    conversion = convert_to_budget(source, budget, *text, report);
  } else {
    const ConvertSpec spec = make_spec(options);
    if (is_calibrated(options)) text = calibration_text(source, options, progress, notices);
    conversion = convert(source, spec, text ? &*text : nullptr, report);
  }
  conversion.notices.insert(conversion.notices.begin(), notices.begin(), notices.end());
  return conversion;
}

/// "72 experts of 16 neurons, 24 active per token, 384 always on; router: trained".
std::string describe(const ModelConfig& config, const Conversion& conversion) {
  if (!config.is_moe())
    return fmt::format("{} neurons an FFN are left, nothing is routed", config.intermediate_size);
  return fmt::format("{} experts of {} neurons, {} active per token{}; router: {}",
                     config.num_experts, config.intermediate_size, config.experts_per_token,
                     config.shared_intermediate_size > 0
                         ? fmt::format(", {} neurons always on", shared_text(config))
                         : "",
                     conversion.router);
}

double mean_of(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) /
         static_cast<double>(std::max<std::size_t>(values.size(), 1));
}

/// The router's multiply-adds per token over those of the dense FFN.
double router_share(const ModelCost& dense, const ModelCost& written) {
  return static_cast<double>(written.router_macs_per_token) /
         static_cast<double>(dense.ffn_macs_per_token);
}

/// What the routers of a budget catch and cost: a line, means over layers; empty without a budget.
std::string routing_text(const Conversion& conversion, double router_share) {
  if (conversion.captured_energy.empty()) return {};
  const std::string energy =
      fmt::format("{:.1f} % of the energy captured", 100.0 * mean_of(conversion.captured_energy));
  if (conversion.layers.empty()) return energy + "\n";
  return fmt::format(
      "{} (oracle {:.1f} %), router recall {:.1f} %; the router costs {:.2f} % of the dense FFN\n",
      energy, 100.0 * mean_of(conversion.oracle_energy), 100.0 * mean_of(conversion.router_recall),
      100.0 * router_share);
}

/// What a stock loader computes beyond `cost`: the rows that pad shared slices.
std::int64_t padding_macs(const ModelConfig& config) {
  ModelConfig stock = config;
  stock.shared_widths.clear();
  return model_cost(stock).macs_per_token - model_cost(config).macs_per_token;
}

/// How the shared neurons were divided: a line; empty where they were not.
std::string allocation_text(const Conversion& conversion, const ModelConfig& written) {
  if (!conversion.allocation) return {};
  const AllocationChoice& choice = *conversion.allocation;
  const AllocationCandidate &uniform = choice.candidates.front(),
                            &chosen = choice.candidates[choice.chosen];
  const std::string measured =
      fmt::format("{} {:.4f} on {} calibration windows held apart",
                  divergence_name(written.has_head), *chosen.kl, choice.windows);
  if (choice.chosen == 0)
    return fmt::format(
        "allocation kl: {}; none of {} other divisions beats the uniform one on each of them\n",
        measured, choice.candidates.size() - 1);
  return fmt::format(
      "allocation kl: {}, uniform {:.4f}; the padding costs a stock loader {:.1f} % more "
      "multiply-adds, cleave none\n",
      measured, *uniform.kl,
      100.0 * static_cast<double>(padding_macs(written)) /
          static_cast<double>(model_cost(written).macs_per_token));
}

void add_allocation(const Conversion& conversion, const ModelConfig& written, Json& json) {
  if (!conversion.allocation) return;
  const AllocationChoice& choice = *conversion.allocation;
  Json candidates = Json::array();
  for (const AllocationCandidate& candidate : choice.candidates) {
    Json entry{{"shared_widths", candidate.shared_widths},
               {"screening_kl", candidate.screening_kl},
               {"kl", nullptr}};
    if (candidate.kl) entry["kl"] = *candidate.kl;
    candidates.push_back(std::move(entry));
  }
  json["allocation"] = {{"measure", divergence_name(written.has_head)},
                        {"windows", choice.windows},
                        {"layer_kl", choice.layer_kl},
                        {"layer_slope", choice.layer_slope},
                        {"candidates", candidates},
                        {"chosen", choice.chosen}};
  json["shared_widths"] = choice.candidates[choice.chosen].shared_widths;
  json["stock_macs_per_token"] = model_cost(written).macs_per_token + padding_macs(written);
}

/// What routing_text says, by layer.
void add_routing(const Conversion& conversion, double router_share, Json& json) {
  if (conversion.captured_energy.empty()) return;
  json["captured_energy"] = conversion.captured_energy;
  json["oracle_energy"] = conversion.oracle_energy;
  if (conversion.layers.empty()) return;
  json["router_recall"] = conversion.router_recall;
  json["router_share"] = router_share;
}

Json conversion_json(const ConvertOptions& options, const ModelConfig& source,
                     const ModelConfig& written, const Conversion& conversion) {
  const ModelCost before = model_cost(source), after = model_cost(written);
  Json json{{"model", options.model},
            {"out", options.out},
            {"experts", written.num_experts},
            {"active", written.experts_per_token},
            {"expert_width", written.intermediate_size},
            {"shared_width", written.shared_intermediate_size},
            {"partition", conversion.partition},
            {"router", conversion.router},
            {"scale", scale_policy_name(conversion.scale)},
            {"calibration_tokens", conversion.calibration_tokens},
            {"dtype", dtype_name(written.dtype)},
            {"layer_error", conversion.layer_error},
            {"notices", conversion.notices}};
  add_routing(conversion, router_share(before, after), json);
  add_allocation(conversion, written, json);
  json["macs_per_token_before"] = before.macs_per_token;
  json["macs_per_token"] = after.macs_per_token;
  return json;
}

std::string conversion_text(const ConvertOptions& options, const ModelConfig& source,
                            const ModelConfig& written, const Conversion& conversion) {
  const ModelCost before = model_cost(source), after = model_cost(written);
  return fmt::format("{}: {}\n{}{}multiply-adds per token {} -> {}; {}", options.out,
                     describe(written, conversion),
                     routing_text(conversion, router_share(before, after)),
                     allocation_text(conversion, written), human_count(before.macs_per_token),
                     human_count(after.macs_per_token), dtype_name(written.dtype));
}

void run_convert(ConvertOptions options, const CLI::App& command) {
  const auto begin = std::chrono::steady_clock::now();
  const bool budget = options.active_share > 0.0;
  if (command.count("--calibration-tokens") == 0)
    options.calibration_tokens = budget ? kBudgetCalibrationTokens : 16384;
  if (command.count("--context") == 0) options.context = budget ? 1024 : 512;
  check_combination(options, command);
  const WriteSpec write{.dtype = parse_dtype(options.dtype), .overwrite = options.overwrite};
  check_output(options.out, options.overwrite);
  const Checkpoint source = Checkpoint::open(options.model);
  settle_text(source.config(), command, options);
  check_report(options, command, source);

  Progress progress(options.common.quiet);
  std::optional<TokenWindows> calibration;
  Conversion conversion = run_conversion(source, options, calibration, progress);
  for (const std::string& notice : conversion.notices) progress.note("note: " + notice);
  progress.update("writing " + options.out);
  write_conversion(options.out, source, conversion, settings_json(options).dump(), write);

  const Checkpoint written = Checkpoint::open(options.out);
  const double elapsed_s =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  Json json = conversion_json(options, source.config(), written.config(), conversion);
  json["elapsed_s"] = elapsed_s;
  std::string text = fmt::format(
      "{} in {}\n", conversion_text(options, source.config(), written.config(), conversion),
      human_seconds(elapsed_s));
  if (options.baselines != "none") {
    conversion = {};  // its memory
    const WrittenReport report = report_on(options, written, *calibration, progress);
    json["report"] = report.json;
    text += "\n" + report.text;
  }
  print_result(options.common, json, text);
}

}  // namespace

void add_convert_command(CLI::App& app) {
  auto options = std::make_shared<ConvertOptions>();
  CLI::App* command =
      app.add_subcommand("convert",
                         "Split every FFN into experts, attach routers, write a stock Mixtral or "
                         "Granite directory; of an encoder a cleave_bert_moe directory, which "
                         "cleave alone opens");
  command->add_option("MODEL", options->model, "Dense model: directory or GGUF file")->required();
  command->add_option("OUT", options->out, "Directory to write")->required();
  command
      ->add_option("--active-share", options->active_share,
                   "Convert to a budget: the share of the FFN neurons that run per token. The rest "
                   "is chosen for the best result known")
      ->check(CLI::Range(1e-6, 1.0));
  command
      ->add_option("-e,--experts", options->experts,
                   "Experts per layer, E; divides H. auto: 8; with --active-share experts of 16 "
                   "neurons, shared ones included")
      ->capture_default_str();
  command
      ->add_option("--shared", options->shared,
                   "With --active-share: how many of the experts always run. auto: half of those "
                   "that run; all of those that run: nothing is routed (static pruning)")
      ->capture_default_str();
  command->add_option("-k,--active", options->active, "Experts that run per token, K <= E")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  command
      ->add_option("--partition", options->partition,
                   "How neurons are grouped: contiguous, random or kmeans (auto); with "
                   "--active-share captured (auto), profiles, kmeans, coactivation, cmoe, "
                   "expertweaver, importance, contiguous or random")
      ->capture_default_str();
  command
      ->add_option("--router", options->router,
                   "With --active-share: trained (on the experts' energies), ridge, logistic, "
                   "low-rank[:R], mean-gate or representative")
      ->capture_default_str();
  command
      ->add_option("--refit", options->refit,
                   "With --active-share: on or off; repairs `down` under the routing that happens")
      ->capture_default_str();
  command
      ->add_option("--refit-rounds", options->refit_rounds,
                   "With --active-share: how often `down` is refitted, with the router fitted to "
                   "the repaired experts in between")
      ->capture_default_str()
      ->check(CLI::Range(1, 100));
  command
      ->add_option(
          "--allocation", options->allocation,
          "With --active-share: uniform, or kl: the always-on neurons divided among the "
          "layers by the KL (of an encoder: cosine distance) that each costs. Four times as "
          "long")
      ->capture_default_str();
  command
      ->add_option("--penalty", options->penalty,
                   "With --active-share: ridge penalty of the refit, relative")
      ->capture_default_str()
      ->check(CLI::Range(1e-9, 1e9));
  command
      ->add_option("--correction", options->correction,
                   "With --active-share: part of what earlier layers lost that the refit aims to "
                   "give back, 0 to 1")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
  command
      ->add_option("--rare-tokens", options->rare_tokens,
                   "With --active-share: calibration windows for the first eighth of the layers, "
                   "with tokens "
                   "that the text lacks, as a share of the text's windows, 0.4 say; 0: none")
      ->capture_default_str()
      ->check(CLI::Range(0.0, 1.0));
  command
      ->add_option("--calibration-mode", options->calibration_mode,
                   "With --active-share: sequential (each layer is fitted on what the converted "
                   "layers before it give) or parallel (on what the dense ones give)")
      ->capture_default_str();
  command
      ->add_option("--gate", options->gate,
                   "Expert weights: softmax (over the selected) or hard (the same for each). auto: "
                   "softmax; with --active-share hard")
      ->capture_default_str();
  command
      ->add_option("--scale", options->scale,
                   "Output scale folded into down: fitted (needs a calibration text), experts "
                   "(E with a softmax gate, E/K with a hard one) or active (K, 1)")
      ->capture_default_str();
  command->add_option("--calibration", options->calibration,
                      "Text file(s) to fit the routers on, equal parts of each with "
                      "--active-share; without: random routers, to be trained");
  add_text_weights_option(*command, "--calibration-weights", options->calibration_weights,
                          "With --active-share: the parts of --calibration-tokens that the texts "
                          "get, 3,1 say; without: equal");
  command
      ->add_option("--calibration-tokens", options->calibration_tokens,
                   "Use at most N tokens of it; 0: all. Default 16384, with --active-share 32768")
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option(
          "--self-calibration", options->self_calibration,
          "Tokens of text that MODEL writes itself, to calibrate on after --calibration. "
          "auto: 0; with --active-share a quarter of --calibration-tokens, and all of them "
          "where no --calibration is given; always 0 of an encoder, which writes none")
      ->capture_default_str();
  command
      ->add_option("--context", options->context,
                   "Calibration window, tokens. Default 512, with --active-share 1024")
      ->check(CLI::Range(2, 1 << 24));
  command
      ->add_option("--dtype", options->dtype,
                   "Stored type: f32, bf16, f16, or auto: the source's where that is exact")
      ->capture_default_str();
  command
      ->add_option("--baselines", options->baselines,
                   "After writing, measure the model beside pruning, published splits and oracles "
                   "as `cleave report` does: none, quick or all; needs --text")
      ->capture_default_str();
  command->add_option("--text", options->text,
                      "Text file(s) of that report, which the calibration text does not hold");
  command->add_option("--report", options->report, "Directory of that report; default: OUT/report");
  command->add_flag("--overwrite", options->overwrite, "Replace OUT if it exists");
  add_seed_option(*command, options->common, "partition and random routers");
  add_common_options(*command, options->common);
  command->callback([options, command] { run_convert(*options, *command); });
}

}  // namespace cleave::cli
