#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cleave/baselines.h"
#include "cleave/evaluate.h"
#include "cleave/model.h"
#include "cleave/text.h"

namespace cleave {

/// A text that models are measured on.
struct NamedText {
  std::string name;
  TokenWindows windows;
};

/// The conversion with another K: see Model::set_active_experts(). `down` was repaired for its own.
struct ActivePoint : Quality {
  std::int64_t experts_per_token = 0;  ///< K
  double rho = 1.0, active_share = 1.0;
};

/// All rows of one text. The first is the dense model, the next the conversion.
struct TextReport {
  std::string name;
  std::int64_t windows = 0, context = 0, tokens = 0;
  std::vector<QualityRow> rows;
  /// By rising K, the conversion's own among them; empty where nothing is routed or it was not
  /// asked for.
  std::vector<ActivePoint> sweep = {};
};

/// One converted layer on a sample of a text, on the converted model's own stream. The oracle picks
/// the K routed experts with the largest |expert_e(x)|. The first token of each window is left out.
/// Of a layer that has no experts and fewer neurons than the dense one, only the error says
/// something: `load` is empty, recall and captured energy are 1.
struct LayerReport {
  std::int64_t layer = 0;
  double relative_error = 0.0;  ///< mean of |MoE(x) - FFN(x)|^2 / |FFN(x)|^2
  std::vector<double> load;     ///< [E], share of the (token, expert) pairs; sums to 1
  double load_entropy = 0.0;    ///< in nats; log(E) when the load is even
  double router_recall = 0.0;   ///< mean share of the oracle's experts that the router chose
  /// Energy sum |expert_e(x)|^2 of the chosen experts over that of the oracle's.
  double captured_energy = 0.0;
};

/// What a conversion is, and how it stands beside what it has to beat.
struct ConversionReport {
  std::string model, dense;  ///< names, without folders
  std::string tool_version;
  std::string settings = "{}";       ///< a JSON object: how the model was made
  std::vector<std::string> notices;  ///< of the conversion: what a reader should know
  std::uint64_t seed = 0;            ///< of the baselines
  std::string calibration;           ///< what the baselines were calibrated on
  std::int64_t calibration_tokens = 0;
  bool has_head = true;  ///< false: rows are compared by their cosine distance
  double rho = 1.0;      ///< multiply-adds of the FFN over the dense FFN's, routers not counted
  std::int64_t dense_macs_per_token = 0, macs_per_token = 0;
  std::int64_t dense_ffn_macs_per_token = 0, ffn_macs_per_token = 0, router_macs_per_token = 0;
  int threads = 0;
  std::string instruction_set;
  std::vector<TextReport> texts;
  std::vector<LayerReport> layers;  ///< only those with experts or fewer neurons than before
  std::vector<std::pair<std::string, double>> timings_s;  ///< what took how long, seconds
};

struct ReportSpec {
  BaselineSet baselines = BaselineSet::kQuick;
  std::int64_t layer_tokens = 4096;  ///< of the first text, that the layers are measured on
  std::uint64_t seed = 0;
};

/// Measures a converted model, its layers and the baselines at its budget.
///
/// Costs one forward pass of both models a text, one a baseline and text, with baselines four more
/// for other K, the preparation of the baselines (see prepare_baselines()) and a few passes over
/// `layer_tokens` tokens. Holds the dense model's hidden states, 4 D bytes a token of the texts.
/// Names, settings and calibration are left for the caller to fill in.
///
/// @param converted    its K is the same again at the end; its gates may be exactly hard from then
///                     on (see Model::set_active_experts())
/// @param calibration  nullptr: no baseline that is fitted, whatever the spec says; the router
///                     oracle of the conversion and other K need none
/// @throws InvalidArgument  the models' D, L or V differ, or `converted` has neither experts nor
///                          fewer neurons than `dense`
ConversionReport make_report(Model& converted, Model& dense, std::span<const NamedText> texts,
                             const TokenWindows* calibration, const ReportSpec& spec,
                             const BaselineProgress& progress = {});

/// Layer by layer; layers of the same shape as the dense model's are left out. @param text  at most
/// a few thousand tokens
std::vector<LayerReport> measure_layers(Model& converted, Model& dense, const TokenWindows& text);

/// Final norm outputs of a converted model whose routers are oracles: each token gets the K experts
/// of most energy, sum over the expert's neurons of h_j^2 |d_j|^2, on the stream that results; all
/// else is as the model has it, the weights of chosen experts too. What the routers still cost.
HiddenStates oracle_states(Model& converted, const TokenWindows& text);

/// The first line of a report. If a static mask or pruning of at most the same budget has lower KL
/// (without a head: cosine distance) than the conversion on any text, it says so.
std::string verdict(const ConversionReport& report);

/// The report as JSON, Markdown, and one HTML page that needs no script, no network and no other
/// file; its colours follow the reader's light or dark setting.
std::string report_json(const ConversionReport& report);
std::string report_markdown(const ConversionReport& report);
std::string report_html(const ConversionReport& report);

/// Writes report.json, report.md and report.html into a directory, which is made if it is missing.
/// Each file appears under its name only when it is whole.
/// @throws FileError  the directory cannot be written
void write_report(const std::filesystem::path& directory, const ConversionReport& report);

}  // namespace cleave
