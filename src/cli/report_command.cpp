#include <fmt/format.h>

#include <memory>

#include "cli/calibration_text.h"
#include "cli/report_command.h"

namespace cleave::cli {
namespace {

std::string name_of(const std::filesystem::path& path) {
  const auto normal = std::filesystem::absolute(path).lexically_normal();
  return (normal.has_filename() ? normal : normal.parent_path()).filename().string();
}

std::vector<NamedText> load_texts(const ReportOptions& options, const ModelConfig& config,
                                  const Tokenizer& tokenizer) {
  std::vector<NamedText> texts;
  for (const std::string& file : options.text)
    texts.push_back({name_of(file), load_windows(config, tokenizer, {file}, options.context,
                                                 options.limit_tokens)});
  return texts;
}

std::string calibration_name(const ReportOptions& options) {
  std::string names;
  for (const std::string& file : options.calibration)
    names += (names.empty() ? "" : ", ") + name_of(file);
  return names;
}

/// What the conversion had to say, of cleave.json's settings.
std::vector<std::string> notices_of(const std::string& settings) {
  const Json json = Json::parse(settings, nullptr, /*allow_exceptions=*/false);
  std::vector<std::string> notices;
  if (!json.is_object() || !json.contains("notices") || !json["notices"].is_array()) return notices;
  for (const Json& notice : json["notices"])
    if (notice.is_string()) notices.push_back(notice.get<std::string>());
  return notices;
}

/// The method, and why it cannot be deployed.
std::string marked(const QualityRow& row) {
  if (row.deployable) return row.method;
  return row.method + (row.stock ? " (oracle)" : " (no stock class)");
}

std::string head_text(const TextReport& of, bool has_head) {
  const std::string names = fmt::format("\n{} ({} windows of {})\n{:<70} {:>5}", of.name,
                                        of.windows, of.context, "method", "rho");
  if (!has_head) return names + fmt::format(" {:>15} {:>9}\n", "cosine distance", "pooled");
  return names + fmt::format(" {:>10} {:>9} {:>6}\n", "perplexity", "KL", "top-1");
}

std::string row_text(const QualityRow& row) {
  const std::string name = fmt::format("{:<70} {:5.3g}", marked(row), row.rho);
  if (!row.has_head)
    return name + fmt::format(" {:15.4f} {:9.4f}\n", row.cosine_distance, row.pooled_distance);
  return name +
         fmt::format(" {:10.4g} {:9.4f} {:6.3f}\n", row.perplexity, row.kl, row.top1_agreement);
}

std::string table_text(const ConversionReport& report) {
  std::string text;
  for (const TextReport& of : report.texts) {
    text += head_text(of, report.has_head);
    for (const QualityRow& row : of.rows) text += row_text(row);
  }
  return text;
}

FileShares file_shares(const ReportOptions& options) {
  return {.files = options.calibration,
          .weights = options.calibration_weights,
          .tokens = options.calibration_tokens,
          .context = options.context};
}

/// Refuses options that do not go together, before any work.
void check_calibration(const ReportOptions& options, BaselineSet set) {
  if (set == BaselineSet::kNone) {
    if (options.self_calibration > 0)
      throw InvalidArgument(
          "--self-calibration: the model writes text for the baselines; give --baselines quick or "
          "all, or leave it out");
    return;
  }
  if (options.calibration.empty() && options.self_calibration == 0)
    throw InvalidArgument(
        "--baselines: they are fitted on text; give --calibration FILE, the one the model was "
        "converted with, or --self-calibration N where it wrote its own, or --baselines none");
  check_file_shares(file_shares(options));
}

/// The text that a conversion to a budget with the same options learns from.
TokenWindows calibration_text(const ReportOptions& options, const ModelConfig& config,
                              const Tokenizer& tokenizer, Progress& progress) {
  std::vector<std::string> notices;
  TokenWindows text = text_of_files(config, tokenizer, file_shares(options), notices);
  for (const std::string& notice : notices) progress.note("note: " + notice);
  add_self_text(Checkpoint::open(options.dense), options.common, options.self_calibration, progress,
                text);
  return text;
}

/// An encoder has no text of its own, and as many positions as it learned.
void settle_options(const ModelConfig& config, const CLI::App& command, ReportOptions& options) {
  if (options.self_calibration > 0 && !writes_text(config))
    throw InvalidArgument(
        "--self-calibration: DENSE is an encoder, which writes no text; give --calibration alone");
  if (command.count("--context") == 0) options.context = default_context(options.context, config);
  check_self_text(options.self_calibration, options.context);
}

void run_report(ReportOptions options, const CLI::App& command) {
  const BaselineSet set = baseline_set(options.baselines);
  check_calibration(options, set);
  const Checkpoint converted = Checkpoint::open(options.model);
  settle_options(converted.config(), command, options);
  if (options.out.empty()) options.out = converted.directory().string();
  const Tokenizer tokenizer = Tokenizer::from_checkpoint(converted);
  Progress progress(options.common.quiet);
  std::optional<TokenWindows> calibration;
  if (set != BaselineSet::kNone)
    calibration = calibration_text(options, converted.config(), tokenizer, progress);
  if (options.self_calibration > 0) options.calibration.push_back(kSelfTextName);
  const WrittenReport report = measure_and_write(options, converted, tokenizer,
                                                 calibration ? &*calibration : nullptr, progress);
  print_result(options.common, report.json, report.text);
}

}  // namespace

BaselineSet baseline_set(const std::string& value) {
  if (const auto set = parse_baseline_set(value)) return *set;
  throw InvalidArgument(
      fmt::format("--baselines: unknown value '{}'; choose one of none, quick, all", value));
}

WrittenReport measure_and_write(const ReportOptions& options, const Checkpoint& converted,
                                const Tokenizer& tokenizer, const TokenWindows* calibration,
                                Progress& progress) {
  const ReportSpec spec{.baselines = baseline_set(options.baselines), .seed = options.common.seed};
  const Checkpoint source = Checkpoint::open(options.dense);
  const std::vector<NamedText> texts = load_texts(options, source.config(), tokenizer);
  Model model = Model::load(converted, {.threads = options.common.threads});
  Model dense = Model::load(source, {.threads = options.common.threads});
  ConversionReport report =
      make_report(model, dense, texts, calibration, spec,
                  [&](const std::string& what, std::int64_t done, std::int64_t all) {
                    progress.update(fmt::format("{} {}/{}", what, done, all), done == all);
                  });
  report.model = name_of(options.model);
  report.dense = name_of(options.dense);
  report.calibration = calibration_name(options);
  if (const auto provenance = read_provenance(converted.directory()))
    if (!provenance->spec_json.empty()) {
      report.settings = provenance->spec_json;
      report.notices = notices_of(report.settings);
    }
  const std::filesystem::path out = options.out;
  write_report(out, report);
  return {Json::parse(report_json(report)),
          fmt::format("{}\n{}\n{}\n", verdict(report), table_text(report),
                      (out / "report.html").string())};
}

void add_report_command(CLI::App& app) {
  auto options = std::make_shared<ReportOptions>();
  CLI::App* command = app.add_subcommand(
      "report", "A converted model beside pruning, published splits and oracles at its budget");
  command->add_option("MODEL", options->model, "Converted model directory")->required();
  command->add_option("DENSE", options->dense, "The dense model it was made of")->required();
  command->add_option("--text", options->text, "Text file(s), UTF-8; each is measured by itself")
      ->required();
  command->add_option("--calibration", options->calibration,
                      "Text file(s) that the baselines are fitted on, equal parts of each");
  add_text_weights_option(*command, "--calibration-weights", options->calibration_weights,
                          "The parts of --calibration-tokens that they get, 3,1 say; without: "
                          "equal");
  command
      ->add_option("--baselines", options->baselines,
                   "What to measure beside the model: none, quick or all")
      ->capture_default_str();
  command->add_option("--out", options->out,
                      "Directory for report.json, .md and .html; default: MODEL");
  command->add_option("--context", options->context, "Window length, tokens")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
  command
      ->add_option("--limit-tokens", options->limit_tokens,
                   "Use only the first N tokens of each text; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option("--calibration-tokens", options->calibration_tokens,
                   "Use at most N tokens of the calibration text; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command
      ->add_option("--self-calibration", options->self_calibration,
                   "Tokens of text that DENSE writes itself, for the baselines after "
                   "--calibration: what a conversion to a budget has by default is a quarter of "
                   "that")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  add_seed_option(*command, options->common,
                  "the baselines' random splits and clusterings, and of text that DENSE writes");
  add_common_options(*command, options->common);
  command->callback([options, command] { run_report(*options, *command); });
}

}  // namespace cleave::cli
