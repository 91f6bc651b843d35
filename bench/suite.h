#pragma once

#include <cstdint>

namespace cleave::bench {

/// The table of goals (docs/benchmarks.md), measured. `only`: rows whose name begins so; "" for
/// all.
void run_suite(int threads, const char* only, bool json);

}  // namespace cleave::bench
