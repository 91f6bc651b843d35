#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "cleave/report.h"
#include "report_text.h"
#include "svg_plot.h"

namespace cleave {
namespace {

constexpr int kPlotWidth = 920, kNameWidth = 340;
constexpr double kLabelHeight = 13.0;  // pixels
constexpr double kDarkestLoad = 3.0;   // times an even load; more looks the same

constexpr const char* kStyle = R"(
:root{color-scheme:light dark;--bg:#fff;--ink:#1b2130;--soft:#5c6575;--grid:#dfe3ea;--ours:#c2410c;
--base:#1d5fd0;--oracle:#8b94a3;--second:#15803d}
@media(prefers-color-scheme:dark){:root{--bg:#14171d;--ink:#e6e9ef;--soft:#9aa4b5;--grid:#2c323d;
--ours:#fb923c;--base:#6ea8fe;--oracle:#7a8494;--second:#4ade80}}
body{background:var(--bg);color:var(--ink);font:15px/1.45 system-ui,sans-serif;max-width:60rem;
margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
.verdict{font-size:1.1rem;border-left:4px solid var(--ours);padding:.4rem .8rem}
.soft,caption{color:var(--soft)}caption{text-align:left;padding-bottom:.3rem}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .5rem;text-align:right;border-bottom:1px solid var(--grid)}
th.name,td.name{text-align:left}td.name+td.name{white-space:nowrap}tr.ours td{color:var(--ours);font-weight:600}
td.bar{background:linear-gradient(90deg,var(--grid) var(--w),transparent var(--w))}
.scroll{overflow-x:auto}svg{max-width:100%;height:auto;display:block}
.grid{stroke:var(--grid);fill:none}.note{fill:var(--soft);font-size:11px;paint-order:stroke;
stroke:var(--bg);stroke-width:3px;stroke-linejoin:round}
.line{fill:none;stroke-width:2}.line.ours{stroke:var(--ours)}.line.second{stroke:var(--second)}
circle.ours{fill:var(--ours)}circle.base{fill:var(--base)}circle.second{fill:var(--second)}
circle.oracle{fill:var(--bg);stroke:var(--oracle);stroke-width:1.5}
.cell{fill:var(--ours)}.key{display:inline-block;margin-right:1.2em}
)";

const char* css_of(const QualityRow& row) {
  return row.ours ? "ours" : row.deployable ? "base" : "oracle";
}

std::string table_of(const TextReport& text, const ConversionReport& report) {
  const std::vector<QualityColumn> columns = quality_columns(report.has_head);
  double worst = 0.0;
  for (const QualityRow& row : text.rows) worst = std::max(worst, row.divergence());
  std::string out =
      R"(<div class="scroll"><table><tr><th>#</th><th class="name">method</th><th class="name">kind</th>)"
      "<th>rho</th><th>FFN multiply-adds</th>";
  for (const QualityColumn& column : columns) out += fmt::format("<th>{}</th>", column.heading);
  out += "</tr>\n";
  for (std::size_t i = 0; i < text.rows.size(); ++i) {
    const QualityRow& row = text.rows[i];
    out += fmt::format(
        R"(<tr{}><td>{}</td><td class="name">{}</td><td class="name">{}</td><td>{:.3g}</td><td>{}</td>)",
        row.ours ? R"( class="ours")" : "", i, escape_markup(row.method), row_kind(row), row.rho,
        share_percent(row.active_share));
    for (const QualityColumn& column : columns) {
      const std::string bar = fmt::format(R"( class="bar" style="--w:{:.1f}%")",
                                          worst > 0.0 ? 100.0 * row.divergence() / worst : 0.0);
      out +=
          fmt::format("<td{}>{}</td>", column.decides ? bar : "", column.text(row.*column.value));
    }
    out += "</tr>\n";
  }
  return out + "</table></div>\n";
}

bool can_be_drawn(const Quality& row) {
  return row.divergence() > 0.0 && std::isfinite(row.divergence());
}

/// Heights of labels that want to stand at `wanted` (ascending): moved down until none touches the
/// one above, then up where they have left the plot.
std::vector<double> spread(std::vector<double> wanted, double bottom) {
  for (std::size_t i = 1; i < wanted.size(); ++i)
    wanted[i] = std::max(wanted[i], wanted[i - 1] + kLabelHeight);
  double limit = bottom;
  for (std::size_t i = wanted.size(); i > 0; --i, limit -= kLabelHeight)
    wanted[i - 1] = std::min(wanted[i - 1], limit);
  return wanted;
}

/// Of a plot where every row has a line for its name.
int plot_height(std::size_t rows) {
  return std::max(360, static_cast<int>(kLabelHeight * static_cast<double>(rows)) + 70);
}

/// Names in the margin, each with a line to its point.
void label_points(const std::vector<const QualityRow*>& rows, SvgPlot& plot) {
  std::vector<double> heights;
  for (const QualityRow* row : rows) heights.push_back(plot.y(row->divergence()));
  heights = spread(std::move(heights), plot_height(rows.size()) - 46.0);
  const double at = kPlotWidth - kNameWidth + 6;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    plot.leader(plot.x(rows[i]->active_share), plot.y(rows[i]->divergence()), at, heights[i]);
    plot.text(at + 4, heights[i] + 4, rows[i]->method, "start");
  }
}

/// The conversion over its active share, one point for each K.
void draw_sweep(const TextReport& text, const char* measure, SvgPlot& plot) {
  std::vector<std::pair<double, double>> points;
  for (const ActivePoint& point : text.sweep)
    if (can_be_drawn(point)) points.emplace_back(point.active_share, point.divergence());
  if (points.size() < 2) return;
  plot.line(points, "ours");
  for (const ActivePoint& point : text.sweep) {
    if (!can_be_drawn(point)) continue;
    const std::string name = fmt::format("K = {}", point.experts_per_token);
    plot.point(point.active_share, point.divergence(), "ours",
               fmt::format("{}: {} {}", name, measure, short_number(point.divergence())));
    if (std::none_of(text.rows.begin(), text.rows.end(), [&](const QualityRow& row) {
          return row.ours && row.active_share == point.active_share;
        }))
      plot.text(plot.x(point.active_share) - 8, plot.y(point.divergence()) + 16, name, "end");
  }
}

/// KL, or the cosine distance, over the active share.
std::string quality_plot(const TextReport& text, bool has_head) {
  const char* measure = divergence_name(has_head);
  std::vector<const QualityRow*> rows;
  for (const QualityRow& row : text.rows)
    if (can_be_drawn(row)) rows.push_back(&row);
  if (rows.empty()) return {};  // nothing but the dense model
  std::stable_sort(rows.begin(), rows.end(),
                   [](auto* a, auto* b) { return a->divergence() > b->divergence(); });
  double least = rows.back()->divergence(), most = rows.front()->divergence();
  for (const ActivePoint& point : text.sweep)
    if (can_be_drawn(point)) {
      least = std::min(least, point.divergence());
      most = std::max(most, point.divergence());
    }
  SvgPlot plot({"share of the dense FFN's multiply-adds, routers included", 0.0, 1.1},
               {fmt::format("{} to the dense model{}", measure, has_head ? ", nats" : ""),
                least / 1.6, most * 1.6, true},
               kPlotWidth, plot_height(rows.size()), kNameWidth);
  label_points(rows, plot);
  draw_sweep(text, measure, plot);
  for (const bool ours : {false, true})  // ours on top
    for (const QualityRow* row : rows)
      if (row->ours == ours)
        plot.point(row->active_share, row->divergence(), css_of(*row),
                   fmt::format("{}: {} {}", row->method, measure, short_number(row->divergence())));
  return plot.str();
}

std::string line_plot(const ConversionReport& report, const char* label, double to,
                      double LayerReport::*first, double LayerReport::*second) {
  const double last = static_cast<double>(report.layers.back().layer);
  SvgPlot plot({"layer", 0.0, std::max(last, 1.0), false, true}, {label, 0.0, to}, kPlotWidth, 240);
  const auto draw = [&](double LayerReport::*value, const char* css) {
    std::vector<std::pair<double, double>> points;
    for (const LayerReport& layer : report.layers)
      if (value == &LayerReport::relative_error || !layer.load.empty())
        points.emplace_back(static_cast<double>(layer.layer), layer.*value);
    plot.line(points, css);
    for (const auto& [x, y] : points)
      plot.point(x, y, css, fmt::format("layer {:.0f}: {:.3f}", x, y));
  };
  draw(first, "ours");
  if (second != nullptr) draw(second, "second");
  return plot.str();
}

std::string error_plot(const ConversionReport& report) {
  double most = 0.0;
  for (const LayerReport& layer : report.layers) most = std::max(most, layer.relative_error);
  return line_plot(report, "relative error", most > 0.0 ? 1.1 * most : 1.0,
                   &LayerReport::relative_error, nullptr);
}

std::string load_map(const ConversionReport& report) {
  std::size_t experts = 1;
  for (const LayerReport& layer : report.layers) experts = std::max(experts, layer.load.size());
  const auto rows = static_cast<double>(report.layers.size());
  const int height = static_cast<int>(52 + 14 * rows);
  const auto E = static_cast<double>(experts);
  SvgPlot plot({"expert", -0.5, E - 0.5, false, true}, {"layer", -0.5, rows - 0.5, false, true},
               kPlotWidth, height);
  for (std::size_t l = 0; l < report.layers.size(); ++l) {
    const LayerReport& layer = report.layers[l];
    const auto own = static_cast<double>(layer.load.size());
    for (std::size_t e = 0; e < layer.load.size(); ++e) {
      const double times_even = layer.load[e] * own;
      const double column = static_cast<double>(e), line = static_cast<double>(l);
      const double left = plot.x(column - 0.5), top = plot.y(line + 0.5);
      plot.cell(left, top, plot.x(column + 0.5) - left, plot.y(line - 0.5) - top,
                std::min(times_even / kDarkestLoad, 1.0),
                fmt::format("layer {}, expert {}: {:.2f} times an even load", layer.layer, e,
                            times_even));
    }
  }
  return plot.str();
}

std::string layers_part(const ConversionReport& report) {
  if (report.layers.empty()) return {};
  const std::string errors = fmt::format(
      "<h2>Error of each layer</h2><p class=\"soft\">Mean of |converted(x) - FFN(x)|&sup2; / "
      "|FFN(x)|&sup2;, on the converted model's own stream.</p>{}\n",
      error_plot(report));
  if (std::all_of(report.layers.begin(), report.layers.end(),
                  [](const LayerReport& layer) { return layer.load.empty(); }))
    return errors;
  return errors + fmt::format(
                      "<h2>Router against oracle</h2><p class=\"soft\">The oracle takes the "
                      "experts with the "
                      "largest output. <span class=\"key\" style=\"color:var(--ours)\">share of "
                      "its experts that "
                      "the router chose</span><span class=\"key\" "
                      "style=\"color:var(--second)\">energy of the "
                      "chosen over the oracle's</span></p>{}\n"
                      "<h2>Load of the experts</h2><p class=\"soft\">Share of the tokens; full "
                      "colour: {} times an "
                      "even load or more.</p>{}\n",
                      line_plot(report, "share", 1.0, &LayerReport::router_recall,
                                &LayerReport::captured_energy),
                      kDarkestLoad, load_map(report));
}

std::string routers_part(const ConversionReport& report) {
  const std::vector<const QualityRow*> rows = router_rows(report);
  if (rows.empty()) return {};
  std::string out =
      "<h2>Routers</h2><p class=\"soft\">On the calibration text, mean over layers: "
      "multiply-adds over the dense FFN's, share of the oracle's experts that are chosen, their "
      "energy over the oracle's; 1 for an oracle of the largest outputs or energies.</p>\n<div "
      "class=\"scroll\"><table><tr><th "
      "class=\"name\">method</th>"
      "<th class=\"name\">kind</th><th>multiply-adds</th><th>recall</th><th>captured</th></tr>\n";
  for (const QualityRow* row : rows)
    out += fmt::format(
        R"(<tr{}><td class="name">{}</td><td class="name">{}</td><td>{}</td><td>{:.3f}</td><td>{:.3f}</td></tr>)"
        "\n",
        row->ours ? R"( class="ours")" : "", escape_markup(row->method), row_kind(*row),
        router_cost(*row), row->router->recall, row->router->captured);
  return out + "</table></div>\n";
}

std::string facts(const ConversionReport& report) {
  std::string timings;
  for (const auto& [what, seconds] : report.timings_s)
    timings += fmt::format("<tr><td class=\"name\">{}</td><td>{:.1f} s</td></tr>\n",
                           escape_markup(what), seconds);
  return fmt::format(
      "<h2>Cost and settings</h2><table>\n"
      "<tr><td class=\"name\">multiply-adds per token, dense</td><td>{}</td></tr>\n"
      "<tr><td class=\"name\">converted</td><td>{}</td></tr>\n"
      "<tr><td class=\"name\">FFN, dense / converted / routers</td><td>{} / {} / {}</td></tr>\n"
      "<tr><td class=\"name\">calibration of the baselines</td><td>{} tokens, {}</td></tr>\n"
      "<tr><td class=\"name\">seed</td><td>{}</td></tr>\n"
      "<tr><td class=\"name\">machine</td><td>{} threads, {}</td></tr>\n{}</table>\n"
      "<details><summary>How the model was made</summary><pre>{}</pre></details>\n",
      report.dense_macs_per_token, report.macs_per_token, report.dense_ffn_macs_per_token,
      report.ffn_macs_per_token, report.router_macs_per_token, report.calibration_tokens,
      report.calibration.empty() ? "no text" : escape_markup(report.calibration), report.seed,
      report.threads, report.instruction_set, timings, escape_markup(report.settings));
}

}  // namespace

std::string report_html(const ConversionReport& report) {
  std::string notices;
  for (const std::string& notice : report.notices)
    notices +=
        fmt::format("<p class=\"soft\">Notice of the conversion: {}</p>\n", escape_markup(notice));
  std::string texts;
  for (const TextReport& text : report.texts)
    texts += fmt::format(
        "<h2>{}</h2><p class=\"soft\">{} windows of {} tokens. Hollow points cannot be "
        "deployed: oracles, and routers that no stock class holds.{}</p>\n{}{}",
        escape_markup(text.name), text.windows, text.context,
        text.sweep.size() < 2 ? ""
                              : " The line is this conversion with other numbers of experts, set "
                                "at run time; it was repaired for its own.",
        quality_plot(text, report.has_head), table_of(text, report));
  return fmt::format(
      "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
      "<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">"
      "<title>{0}: conversion report</title><style>{1}</style></head><body>\n"
      "<p class=\"verdict\">{2}</p>\n<h1>{0}</h1>\n"
      "<p class=\"soft\">Made of {3} by cleave {4}; {5} of the FFN's neurons run per token. "
      "{10}.</p>\n{6}{7}{8}{9}</body></html>\n",
      escape_markup(report.model), kStyle, escape_markup(verdict(report)),
      escape_markup(report.dense), escape_markup(report.tool_version), share_percent(report.rho),
      notices, texts, routers_part(report) + layers_part(report), facts(report),
      capitalised(quality_convention(report.has_head)));
}

}  // namespace cleave
