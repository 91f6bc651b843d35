#pragma once

#include <string>

namespace cleave::bench {

/// The table of goals (docs/benchmarks.md), measured. `only`: rows whose name begins so; "" for
/// all. `json_file`: written too, unless empty.
void run_suite(int threads, const std::string& only, const std::string& json_file);

}  // namespace cleave::bench
