#pragma once

#include <cstdint>

#include "cleave/kernels.h"
#include "cleave/packed.h"

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

/// Operations per second (a multiply-add is two) of all threads, from registers: float32, or pairs
/// of bfloat16 where the instruction set in use multiplies such weights so.
double arithmetic_probe(WeightType weights, const ParallelFor& parallel);

}  // namespace cleave::bench
