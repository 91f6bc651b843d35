#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "cleave/report.h"
#include "report_text.h"

namespace cleave {
namespace {

/// A cell of a table: a bar would end it.
std::string cell(std::string text) {
  std::string result;
  for (const char c : text) {
    if (c == '|') result += '\\';
    result += c == '\n' ? ' ' : c;
  }
  return result;
}

std::string notice_list(const ConversionReport& report) {
  std::string out;
  for (const std::string& notice : report.notices) out += fmt::format("- {}\n", cell(notice));
  return out.empty() ? out : "Notices of the conversion:\n\n" + out + "\n";
}

/// The head of a table of `names` and the quality columns.
std::string table_head(const std::string& names, const ConversionReport& report) {
  std::string head = "| " + names, line = "|";
  for (const QualityColumn& column : quality_columns(report.has_head))
    head += fmt::format(" | {}", column.heading);
  for (const char c : head) line += c == '|' ? "---|" : "";
  return head + " |\n" + line + "\n";
}

/// The quality columns of a row, what decides between `mark`.
std::string quality_cells(const Quality& row, const ConversionReport& report,
                          const char* mark = "") {
  std::string cells;
  for (const QualityColumn& column : quality_columns(report.has_head)) {
    const char* around = column.decides ? mark : "";
    cells += fmt::format(" {}{}{} |", around, column.text(row.*column.value), around);
  }
  return cells;
}

std::string quality_table(const TextReport& text, const ConversionReport& report) {
  std::string out = fmt::format("## {}\n\n{} windows of {} tokens.\n\n", cell(text.name),
                                text.windows, text.context) +
                    table_head("method | kind | rho | FFN multiply-adds", report);
  for (const QualityRow& row : text.rows) {
    const char* mark = row.ours ? "**" : "";
    out += fmt::format("| {}{}{} | {} | {:.3g} | {} |{}\n", mark, cell(row.method), mark,
                       row_kind(row), row.rho, share_percent(row.active_share),
                       quality_cells(row, report, mark));
  }
  return out + "\n";
}

/// The conversion at other K.
std::string sweep_table(const TextReport& text, const ConversionReport& report) {
  if (text.sweep.empty()) return {};
  std::string out =
      "Other numbers of experts, set at run time; `down` was repaired for the conversion's own."
      "\n\n" +
      table_head("K | rho | FFN multiply-adds", report);
  for (const ActivePoint& point : text.sweep)
    out += fmt::format("| {} | {:.3g} | {} |{}\n", point.experts_per_token, point.rho,
                       share_percent(point.active_share), quality_cells(point, report));
  return out + "\n";
}

std::string layer_table(const ConversionReport& report) {
  if (report.layers.empty()) return {};
  std::string out =
      "## Layers\n\n"
      "Relative error: mean of |MoE(x) - FFN(x)|^2 / |FFN(x)|^2. Recall: share of the oracle's "
      "experts that the router chose;\ncaptured: the energy of the chosen experts over that of the "
      "oracle's. Load: entropy over that of an even load, least and\nmost used expert (1 = "
      "even).\n\n"
      "| layer | error | recall | captured | load entropy | least | most |\n"
      "|---|---|---|---|---|---|---|\n";
  for (const LayerReport& layer : report.layers) {
    if (layer.load.empty()) {
      out +=
          fmt::format("| {} | {:.3f} | - | - | - | - | - |\n", layer.layer, layer.relative_error);
      continue;
    }
    const auto E = static_cast<double>(layer.load.size());
    const auto [least, most] = std::minmax_element(layer.load.begin(), layer.load.end());
    out +=
        fmt::format("| {} | {:.3f} | {:.3f} | {:.3f} | {:.3f} | {:.2f} | {:.2f} |\n", layer.layer,
                    layer.relative_error, layer.router_recall, layer.captured_energy,
                    E > 1.0 ? layer.load_entropy / std::log(E) : 1.0, *least * E, *most * E);
  }
  return out + "\n";
}

std::string router_table(const ConversionReport& report) {
  const std::vector<const QualityRow*> rows = router_rows(report);
  if (rows.empty()) return {};
  std::string out =
      "## Routers\n\n"
      "On the calibration text, mean over layers. Recall and captured energy as below, 1 for an "
      "oracle of the largest outputs\nor energies; multiply-adds of the router over the dense "
      "FFN's.\n\n"
      "| method | kind | multiply-adds | recall | captured |\n"
      "|---|---|---|---|---|\n";
  for (const QualityRow* row : rows)
    out += fmt::format("| {} | {} | {} | {:.3f} | {:.3f} |\n", cell(row->method), row_kind(*row),
                       router_cost(*row), row->router->recall, row->router->captured);
  return out + "\n";
}

}  // namespace

std::string report_markdown(const ConversionReport& report) {
  std::string out = fmt::format(
      "{}\n\n# {}\n\nMade of {} by cleave {}. Baselines: {} tokens of {}, seed {}.\n"
      "Multiply-adds per token: {} dense, {} converted (FFN {} -> {}, routers {}).\n\n"
      "{}. rho is the share\nof the FFN's neurons that runs per token. An oracle sees "
      "the experts' outputs and cannot be deployed;\nneither can a row of the kind \"no stock "
      "class\", whose router is more than one matrix.\n\n",
      verdict(report), cell(report.model), cell(report.dense), report.tool_version,
      report.calibration_tokens, report.calibration.empty() ? "no text" : cell(report.calibration),
      report.seed, report.dense_macs_per_token, report.macs_per_token,
      report.dense_ffn_macs_per_token, report.ffn_macs_per_token, report.router_macs_per_token,
      capitalised(quality_convention(report.has_head)));
  out += notice_list(report);
  for (const TextReport& text : report.texts)
    out += quality_table(text, report) + sweep_table(text, report);
  out += router_table(report) + layer_table(report);
  if (!report.timings_s.empty()) out += "## Time\n\n| what | seconds |\n|---|---|\n";
  for (const auto& [what, seconds] : report.timings_s)
    out += fmt::format("| {} | {:.1f} |\n", cell(what), seconds);
  out += fmt::format("\n{} threads, {}.\n", report.threads, report.instruction_set);
  return out;
}

}  // namespace cleave
