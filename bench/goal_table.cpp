#include "goal_table.h"

#include <fmt/format.h>

#include <cstdio>

namespace cleave::bench {
namespace {

using Json = nlohmann::ordered_json;

Json to_json(const Measured& value) {
  Json json{{"median", value.median}};
  if (value.rounds > 0) json["quartiles"] = {value.low, value.high};
  return json;
}

}  // namespace

MachineLimits measure_limits(const ParallelFor& parallel) {
  constexpr int kPasses = 7;
  const ReadProbe memory(kProbeBytes);
  std::vector<double> bytes, operations;
  wait_for_quiet();
  for (int pass = 0; pass < kPasses; ++pass) {
    bytes.push_back(memory.run(parallel));
    operations.push_back(arithmetic_probe(WeightType::kBF16, parallel));
  }
  return {over_rounds(std::move(bytes)), over_rounds(std::move(operations))};
}

void GoalTable::print_heading() {
  fmt::print("{:<5}{:<54}{:>9}{:>10}{:>8}\n", "row", "regime and measure", "ours", "at least",
             "aim");
}

void GoalTable::add(const Goal& goal, const Measured& ours, const MachineLimits& limits) {
  const bool below = ours.median < goal.at_least;
  Json row{{"row", goal.row}, {"what", goal.what}, {"ours", ours.median}};
  if (ours.rounds > 0) row["quartiles"] = {ours.low, ours.high};
  if (ours.rounds > 0) row["rounds"] = ours.rounds;
  if (ours.ours_s > 0.0) row["ours_s"] = ours.ours_s;
  if (ours.ours_s > 0.0) row["compared_with_s"] = ours.other_s;
  row["at_least"] = goal.at_least;
  row["aim"] = goal.aim;
  row["below"] = below;
  row["read_bytes_per_s"] = to_json(limits.bytes_per_s);
  if (limits.operations_per_s.median > 0.0)
    row["operations_per_s"] = to_json(limits.operations_per_s);
  rows_.push_back(std::move(row));
  fmt::print("{:<5}{:<54}{:>9.3f}{:>10.2f}{:>8.2f}{}\n", goal.row, goal.what, ours.median,
             goal.at_least, goal.aim, below ? "  below" : "");
  std::fflush(stdout);
}

void GoalTable::add_not_measured(const Goal& goal, const std::string& why) {
  rows_.push_back({{"row", goal.row},
                   {"what", goal.what},
                   {"ours", nullptr},
                   {"at_least", goal.at_least},
                   {"aim", goal.aim},
                   {"not_measured", why}});
  fmt::print("{:<5}{:<54} not measured: {}\n", goal.row, goal.what, why);
  std::fflush(stdout);
}

}  // namespace cleave::bench
