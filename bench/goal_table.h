#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "ffn_setup.h"
#include "probes.h"

namespace cleave::bench {

/// A row of the table of goals (docs/benchmarks.md).
struct Goal {
  std::string row;   ///< "C1", ...
  std::string what;  ///< regime and measure
  double at_least, aim;
};

/// What the machine gave while a row was measured (probes.h).
struct MachineLimits {
  Measured bytes_per_s;  ///< of reading memory
  Measured
      operations_per_s;  ///< of multiply-adds from registers, two each; 0: no probe for it here
};

/// Both limits in a few passes, after whatever was measured. The memory that is read is there for
/// the call only: beside weights it might take huge pages from them.
MachineLimits measure_limits(const ParallelFor& parallel);
/// Bytes that the read probe takes: beyond any cache.
inline constexpr std::int64_t kProbeBytes = std::int64_t{384} << 20;

/// Prints rows as they are measured, and keeps them.
class GoalTable {
 public:
  static void print_heading();
  /// A row short of `at_least` ends with "below".
  void add(const Goal& goal, const Measured& ours, const MachineLimits& limits);
  /// @param why  what is missing and how to get it
  void add_not_measured(const Goal& goal, const std::string& why);
  const nlohmann::ordered_json& rows() const { return rows_; }

 private:
  nlohmann::ordered_json rows_ = nlohmann::ordered_json::array();
};

}  // namespace cleave::bench
