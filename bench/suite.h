#pragma once

#include <algorithm>
#include <string>
#include <vector>

namespace cleave::bench {

/// Of the table of goals, in docs/benchmarks.md.
inline const std::vector<std::string> kSuiteRows = {"C1", "C2", "C3", "C4",  "C5",
                                                    "C6", "C7", "C8", "any", "E1"};

struct SuiteOptions {
  int threads = 2;                ///< 0: as many as the machine has cores
  std::vector<std::string> only;  ///< of kSuiteRows; empty: all
  std::string model;              ///< dense; empty: SmolLM2 in models/, if it is there
  std::string converted;          ///< made of it; empty: it is converted for the run
  std::string json;               ///< file for the result, or ""

  bool wants(const std::string& row) const {
    return only.empty() || std::find(only.begin(), only.end(), row) != only.end();
  }
};

/// The table of goals, measured.
void run_suite(const SuiteOptions& options);

}  // namespace cleave::bench
