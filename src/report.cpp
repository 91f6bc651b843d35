#include "cleave/report.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <system_error>

#include "atomic_file.h"
#include "fail.h"
#include "report_text.h"

namespace cleave {
namespace {

using OrderedJson = nlohmann::ordered_json;

// Budgets of the rows are rounded to whole experts; within so much they are the same.
constexpr double kSameBudget = 0.02;

bool is_pruning(const QualityRow& row) {
  return row.deployable && !row.routed && !row.ours && row.rho < 1.0;
}

/// The lowest KL among the rows that `wanted` picks and that run no more than `ours`.
template <typename Wanted>
const QualityRow* best_row(const TextReport& text, const QualityRow& ours, const Wanted& wanted) {
  const QualityRow* best = nullptr;
  for (const QualityRow& row : text.rows)
    if (wanted(row) && row.rho <= ours.rho + kSameBudget && (best == nullptr || row.kl < best->kl))
      best = &row;
  return best;
}

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : "; ") + part;
  return text;
}

OrderedJson row_json(const QualityRow& row) {
  OrderedJson json{{"method", row.method},
                   {"rho", row.rho},
                   {"active_share", row.active_share},
                   {"deployable", row.deployable},
                   {"stock", row.stock},
                   {"routed", row.routed},
                   {"ours", row.ours},
                   {"perplexity", row.perplexity},
                   {"kl", row.kl},
                   {"top1_agreement", row.top1_agreement}};
  if (row.router) {
    json["router_share"] = row.router_share;
    json["router_recall"] = row.router->recall;
    json["captured_energy"] = row.router->captured;
  }
  return json;
}

OrderedJson texts_json(const ConversionReport& report) {
  OrderedJson texts = OrderedJson::array();
  for (const TextReport& text : report.texts) {
    OrderedJson rows = OrderedJson::array();
    for (const QualityRow& row : text.rows) rows.push_back(row_json(row));
    texts.push_back({{"name", text.name},
                     {"windows", text.windows},
                     {"context", text.context},
                     {"tokens", text.tokens},
                     {"rows", rows}});
  }
  return texts;
}

OrderedJson layers_json(const ConversionReport& report) {
  OrderedJson layers = OrderedJson::array();
  for (const LayerReport& layer : report.layers)
    layers.push_back({{"layer", layer.layer},
                      {"relative_error", layer.relative_error},
                      {"router_recall", layer.router_recall},
                      {"captured_energy", layer.captured_energy},
                      {"load_entropy", layer.load_entropy},
                      {"load", layer.load}});
  return layers;
}

}  // namespace

std::string share_percent(double share) { return fmt::format("{:.4g} %", 100.0 * share); }

std::string short_number(double value) {
  return std::abs(value) < 100.0 ? fmt::format("{:.3f}", value) : fmt::format("{:.4g}", value);
}

std::string verdict(const ConversionReport& report) {
  std::vector<std::string> losses, wins, alone, better;
  for (const TextReport& text : report.texts)
    for (const QualityRow& ours : text.rows) {
      if (!ours.ours) continue;
      const auto against = [&](const QualityRow& row) {
        return fmt::format("{} against {} of {} on {}", short_number(ours.kl), short_number(row.kl),
                           row.method, text.name);
      };
      const QualityRow* pruning = best_row(text, ours, is_pruning);
      const QualityRow* routed = best_row(text, ours, [](const QualityRow& row) {
        return row.deployable && row.routed && !row.ours;
      });
      if (pruning == nullptr)
        alone.push_back(fmt::format("{} on {}", short_number(ours.kl), text.name));
      else
        (pruning->kl < ours.kl ? losses : wins).push_back(against(*pruning));
      if (routed != nullptr && routed->kl < ours.kl) better.push_back(against(*routed));
    }
  const std::string budget = share_percent(report.rho);
  std::string first;
  if (!losses.empty()) {
    first = fmt::format(
        "Static pruning wins: at {} of the FFN this conversion has KL {}; prune instead, or "
        "calibrate on text like this.",
        budget, joined(losses));
    if (!wins.empty()) first += fmt::format(" It loses elsewhere: {}.", joined(wins));
  } else if (!wins.empty()) {
    first = fmt::format(
        "This conversion beats static pruning on every text: at {} of the FFN its KL is {}.",
        budget, joined(wins));
  } else {
    first = fmt::format(
        "KL {} at {} of the FFN; no static pruning was measured beside it, so whether routing "
        "pays is open.",
        joined(alone), budget);
  }
  if (!better.empty()) first += fmt::format(" Another split does better: KL {}.", joined(better));
  return first;
}

std::string report_json(const ConversionReport& report) {
  auto settings = OrderedJson::parse(report.settings, nullptr, /*allow_exceptions=*/false);
  if (!settings.is_object())
    fail_argument("report: `settings` is not a JSON object: '{}'", report.settings);
  OrderedJson timings = OrderedJson::object();
  for (const auto& [what, seconds] : report.timings_s) timings[what] = seconds;
  const OrderedJson json{
      {"verdict", verdict(report)},
      {"model", report.model},
      {"dense", report.dense},
      {"tool_version", report.tool_version},
      {"convention",
       "disjoint windows, no BOS, every token but a window's first is predicted; KL(dense || row) "
       "in nats; rho: share of the FFN's neurons that runs per token; baselines are fitted on the "
       "dense model's stream"},
      {"notices", report.notices},
      {"rho", report.rho},
      {"seed", report.seed},
      {"calibration", {{"text", report.calibration}, {"tokens", report.calibration_tokens}}},
      {"macs_per_token",
       {{"dense", report.dense_macs_per_token},
        {"converted", report.macs_per_token},
        {"dense_ffn", report.dense_ffn_macs_per_token},
        {"converted_ffn", report.ffn_macs_per_token},
        {"routers", report.router_macs_per_token}}},
      {"texts", texts_json(report)},
      {"layers", layers_json(report)},
      {"timings_s", timings},
      {"threads", report.threads},
      {"instruction_set", report.instruction_set},
      {"settings", settings}};
  return json.dump(2, ' ', false, OrderedJson::error_handler_t::replace) + "\n";
}

void write_report(const std::filesystem::path& directory, const ConversionReport& report) {
  const std::string json = report_json(report), markdown = report_markdown(report),
                    html = report_html(report);
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  if (error)
    fail_file("{}: the folder for the report cannot be made: {}", directory.string(),
              error.message());
  write_file_atomically(directory / "report.json", json);
  write_file_atomically(directory / "report.md", markdown);
  write_file_atomically(directory / "report.html", html);
}

}  // namespace cleave
