#include <fmt/format.h>

#include <chrono>

#include "cli/cli.h"

namespace cleave::cli {
namespace {

struct CalibrateOptions {
  CommonOptions common;
  std::string model, out;
  std::vector<std::string> text;
  std::vector<double> text_weights;
  std::vector<std::int64_t> layers;
  std::int64_t calibration_tokens = 32768;
  std::int64_t context = 1024;
  NeuronStatsSpec spec;
  bool overwrite = false;
};

/// Each text gives an equal share of the tokens.
std::vector<CalibrationText> load_texts(const CalibrateOptions& options, const ModelConfig& config,
                                        const Tokenizer& tokenizer) {
  const auto count = static_cast<std::int64_t>(options.text.size());
  check_text_weights("--text-weights", options.text_weights, options.text.size());
  const std::int64_t share = options.calibration_tokens / count;
  if (options.calibration_tokens > 0 && share < options.context)
    throw InvalidArgument(fmt::format(
        "--calibration-tokens {} is {} for each of {} texts, less than one window of --context {}",
        options.calibration_tokens, share, count, options.context));
  std::vector<CalibrationText> texts;
  for (std::size_t i = 0; i < options.text.size(); ++i)
    texts.push_back({load_windows(config, tokenizer, {options.text[i]}, options.context, share),
                     options.text_weights.empty() ? 1.0 : options.text_weights[i]});
  return texts;
}

Json result_json(const CalibrateOptions& options, const NeuronStats& stats, std::int64_t windows,
                 double elapsed_s) {
  Json layers = Json::array();
  std::int64_t tokens = 0;
  for (std::int64_t l = 0; l < stats.spec().num_layers; ++l) {
    if (stats.num_tokens(l) == 0) continue;
    layers.push_back(l);
    tokens = stats.num_tokens(l);
  }
  return {{"model", options.model},
          {"out", options.out},
          {"text", options.text},
          {"windows", windows},
          {"context", options.context},
          {"tokens", tokens},
          {"layers", layers},
          {"hidden", stats.spec().hidden},
          {"d_model", stats.spec().d_model},
          {"top", stats.spec().top},
          {"gram", stats.spec().gram},
          {"coactivation", stats.spec().coactivation},
          {"statistics_bytes", stats.memory_bytes()},
          {"elapsed_s", elapsed_s}};
}

void check_free(const std::string& out, bool overwrite) {
  const std::filesystem::path path(out);
  if (std::filesystem::is_directory(path))
    throw InvalidArgument(fmt::format("{}: is a directory; OUT is one file", out));
  if (!overwrite && std::filesystem::exists(path))
    throw InvalidArgument(fmt::format("{}: exists; use --overwrite or another name", out));
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  if (!std::filesystem::is_directory(folder))
    throw InvalidArgument(fmt::format("{}: its folder does not exist", out));
}

void run_calibrate(CalibrateOptions options, const CLI::App& command) {
  const auto begin = std::chrono::steady_clock::now();
  check_free(options.out, options.overwrite);
  const Checkpoint source = Checkpoint::open(options.model);
  if (command.count("--context") == 0)
    options.context = default_context(options.context, source.config());
  const std::vector<CalibrationText> texts =
      load_texts(options, source.config(), Tokenizer::from_checkpoint(source));
  std::int64_t windows = 0;
  for (const CalibrationText& text : texts) windows += text.windows.count();

  Progress progress(options.common.quiet);
  progress.update("loading " + options.model);
  Model model = Model::load(source, {.threads = options.common.threads});
  const NeuronStats stats = calibrate(
      model, texts, options.spec, options.layers, [&](std::int64_t done, std::int64_t all) {
        progress.update(fmt::format("calibrate: layer {}/{}", done, all), done == all);
      });
  progress.update("writing " + options.out);
  stats.save(options.out);

  const double elapsed_s =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  const Json result = result_json(options, stats, windows, elapsed_s);
  print_result(options.common, result,
               fmt::format("{}: {} of {} layers, H = {}, {} tokens in {} windows; {} in {}\n",
                           options.out, result["layers"].size(), stats.spec().num_layers,
                           stats.spec().hidden, result["tokens"].get<std::int64_t>(), windows,
                           human_bytes(static_cast<double>(stats.memory_bytes())),
                           human_seconds(elapsed_s)));
}

}  // namespace

void add_calibrate_command(CLI::App& app) {
  auto options = std::make_shared<CalibrateOptions>();
  CLI::App* command = app.add_subcommand(
      "calibrate", "Statistics of a dense model's neurons over texts, as one safetensors file");
  command->add_option("MODEL", options->model, "Dense model: directory or GGUF file")->required();
  command->add_option("OUT", options->out, "File to write")->required();
  command->add_option("--text", options->text, "Text file(s), UTF-8")->required();
  add_text_weights_option(*command, "--text-weights", options->text_weights,
                          "How much a token of each text counts; without: all the same");
  command
      ->add_option("--calibration-tokens", options->calibration_tokens,
                   "Use at most N tokens, an equal share of each text; 0: all")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--context", options->context, "Window length, tokens")
      ->capture_default_str()
      ->check(CLI::Range(2, 1 << 24));
  command->add_option("--layers", options->layers, "Only these layers, from 0; without: all")
      ->delimiter(',');
  command
      ->add_option("--top", options->spec.top,
                   "Ka: neurons of largest |h| that count as active, a token (at most H)")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 24));
  command->add_flag("--gram", options->spec.gram,
                    "Also E[h h^T]: about 2 * H * H bytes a layer, in memory and in the file");
  command->add_flag("--coactivation", options->spec.coactivation,
                    "Also how often two neurons are active together; as large");
  command->add_flag("--overwrite", options->overwrite, "Replace OUT if it exists");
  add_common_options(*command, options->common);
  command->callback([options, command] { run_calibrate(*options, *command); });
}

}  // namespace cleave::cli
