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

/// Takes both limits in a few passes, after whatever was measured.
class MachineProbe {
 public:
  explicit MachineProbe(const ParallelFor& parallel)
      : parallel_(parallel), memory_(std::int64_t{384} << 20) {}  // beyond any cache
  const ReadProbe& memory() const { return memory_; }
  MachineLimits limits() const;

 private:
  ParallelFor parallel_;
  ReadProbe memory_;
};

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
