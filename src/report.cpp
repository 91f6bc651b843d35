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
// A conversion that routes nothing may be one of the rows; then they differ by rounding.
constexpr double kSameDivergence = 1e-3;

bool is_pruning(const QualityRow& row) {
  return row.deployable && !row.routed && !row.ours && row.rho < 1.0;
}

/// The least divergence among the rows that `wanted` picks and that run no more than `ours`.
template <typename Wanted>
const QualityRow* best_row(const TextReport& text, const QualityRow& ours, const Wanted& wanted) {
  const QualityRow* best = nullptr;
  for (const QualityRow& row : text.rows)
    if (wanted(row) && row.rho <= ours.rho + kSameBudget &&
        (best == nullptr || row.divergence() < best->divergence()))
      best = &row;
  return best;
}

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : "; ") + part;
  return text;
}

/// The conversion against what it has to beat, a phrase for each text.
struct Comparisons {
  std::string measure;                     // by which
  bool routed = true;                      // whether the conversion is
  std::vector<std::string> losses, wins;   // against the best pruning
  std::vector<std::string> alone, better;  // without any; the best split that is better
};

Comparisons compare(const ConversionReport& report) {
  Comparisons found;
  found.measure = divergence_name(report.has_head);
  for (const TextReport& text : report.texts)
    for (const QualityRow& ours : text.rows) {
      if (!ours.ours) continue;
      found.routed = ours.routed;
      const auto against = [&](const QualityRow& row) {
        return fmt::format("{} against {} of {} on {}", short_number(ours.divergence()),
                           short_number(row.divergence()), row.method, text.name);
      };
      const QualityRow* pruning = best_row(text, ours, is_pruning);
      const QualityRow* routed = best_row(text, ours, [](const QualityRow& row) {
        return row.deployable && row.routed && !row.ours;
      });
      const double own = ours.divergence();
      const double beaten_below = ours.routed ? own : own * (1.0 - kSameDivergence);
      if (pruning == nullptr)
        found.alone.push_back(fmt::format("{} on {}", short_number(own), text.name));
      else
        (pruning->divergence() < beaten_below ? found.losses : found.wins)
            .push_back(against(*pruning));
      if (routed != nullptr && routed->divergence() < own) found.better.push_back(against(*routed));
    }
  return found;
}

std::string routed_verdict(const Comparisons& found, const std::string& budget) {
  if (!found.losses.empty()) {
    std::string text = fmt::format(
        "Static pruning wins: at {} of the FFN this conversion has {} {}; prune instead, or "
        "calibrate on text like this.",
        budget, found.measure, joined(found.losses));
    if (!found.wins.empty()) text += fmt::format(" It loses elsewhere: {}.", joined(found.wins));
    return text;
  }
  if (!found.wins.empty())
    return fmt::format(
        "This conversion beats static pruning on every text: at {} of the FFN its {} is {}.",
        budget, found.measure, joined(found.wins));
  return capitalised(fmt::format(
      "{} {} at {} of the FFN; no static pruning was measured beside it, so whether routing pays "
      "is open.",
      found.measure, joined(found.alone), budget));
}

std::string pruned_verdict(const Comparisons& found, const std::string& budget) {
  if (!found.losses.empty())
    return fmt::format(
        "Other pruning wins: at {} of the FFN this conversion, which routes nothing, has {} {}.",
        budget, found.measure, joined(found.losses));
  if (!found.wins.empty())
    return fmt::format(
        "No other pruning does better: at {} of the FFN this conversion, which routes nothing, has "
        "{} {}.",
        budget, found.measure, joined(found.wins));
  return capitalised(fmt::format(
      "{} {} at {} of the FFN, where nothing is routed; no other pruning was measured beside it.",
      found.measure, joined(found.alone), budget));
}

void add_quality(const Quality& quality, OrderedJson& json) {
  if (!quality.has_head) {
    json["cosine_distance"] = quality.cosine_distance;
    json["pooled_distance"] = quality.pooled_distance;
    return;
  }
  json["perplexity"] = quality.perplexity;
  json["kl"] = quality.kl;
  json["top1_agreement"] = quality.top1_agreement;
}

OrderedJson row_json(const QualityRow& row) {
  OrderedJson json{{"method", row.method},
                   {"rho", row.rho},
                   {"active_share", row.active_share},
                   {"deployable", row.deployable},
                   {"stock", row.stock},
                   {"routed", row.routed},
                   {"ours", row.ours}};
  add_quality(row, json);
  if (row.router) {
    json["router_share"] = row.router_share;
    json["router_recall"] = row.router->recall;
    json["captured_energy"] = row.router->captured;
  }
  return json;
}

OrderedJson sweep_json(const TextReport& text) {
  OrderedJson points = OrderedJson::array();
  for (const ActivePoint& point : text.sweep) {
    points.push_back({{"experts_per_token", point.experts_per_token},
                      {"rho", point.rho},
                      {"active_share", point.active_share}});
    add_quality(point, points.back());
  }
  return points;
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
                     {"rows", rows},
                     {"sweep", sweep_json(text)}});
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

std::string capitalised(std::string text) {
  if (text[0] >= 'a' && text[0] <= 'z') text[0] = static_cast<char>(text[0] - 'a' + 'A');
  return text;
}

std::string quality_convention(bool has_head) {
  return has_head ? "disjoint windows, no BOS, every token but a window's first is predicted; "
                    "KL(dense || row) in nats"
                  : "disjoint windows with their special tokens; cosine distance: mean over all "
                    "tokens of 1 - cos of the dense model's and the row's final hidden states; "
                    "pooled: of their means over a window";
}

std::vector<QualityColumn> quality_columns(bool has_head) {
  const auto top1 = [](double value) { return fmt::format("{:.3f}", value); };
  const auto distance = [](double value) { return fmt::format("{:.4f}", value); };
  if (!has_head)
    return {{"cosine distance", &Quality::cosine_distance, true, distance},
            {"pooled", &Quality::pooled_distance, false, distance}};
  return {{"perplexity", &Quality::perplexity, false, short_number},
          {"KL", &Quality::kl, true, short_number},
          {"top-1", &Quality::top1_agreement, false, top1}};
}

std::string share_percent(double share) { return fmt::format("{:.4g} %", 100.0 * share); }

std::string short_number(double value) {
  const double size = std::abs(value);
  if (size > 0.0 && size < 0.01) return fmt::format("{:.2g}", value);
  return size < 100.0 ? fmt::format("{:.3f}", value) : fmt::format("{:.4g}", value);
}

std::string verdict(const ConversionReport& report) {
  const Comparisons found = compare(report);
  std::string first = found.routed ? routed_verdict(found, share_percent(report.rho))
                                   : pruned_verdict(found, share_percent(report.rho));
  if (!found.better.empty())
    first += fmt::format(" Another split does better: {} {}.", found.measure, joined(found.better));
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
      {"convention", quality_convention(report.has_head) +
                         "; rho: share of the FFN's neurons that runs per token; baselines are "
                         "fitted on the dense model's stream"},
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
