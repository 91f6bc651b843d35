#pragma once

#include <cstdint>

#include "cleave/kernels.h"

// What the machine can do at most, measured in the same process as what is compared with it.
namespace cleave::bench {

/// Bytes per second of one linear read per thread, over a buffer far larger than any cache.
class ReadProbe {
 public:
  explicit ReadProbe(std::int64_t bytes);
  ~ReadProbe();
  ReadProbe(const ReadProbe&) = delete;
  ReadProbe& operator=(const ReadProbe&) = delete;
  /// One pass. @returns bytes per second
  double run(const ParallelFor& parallel) const;

 private:
  std::int64_t bytes_;
  char* memory_;
};

/// Float32 operations per second (a multiply-add is two) of all threads, from registers.
double fma_probe(const ParallelFor& parallel);

}  // namespace cleave::bench
