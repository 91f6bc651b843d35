#include "probes.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>

#include "cleave/kernels.h"

namespace cleave::bench {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef std::uint64_t Words __attribute__((vector_size(64)));

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::atomic<std::uint64_t> sink;  // so that nothing is left out for having no effect

#if defined(__x86_64__)
#define CLEAVE_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLEAVE_CLONES
#endif

CLEAVE_CLONES void read_all(const char* begin, const char* end, std::uint64_t* result) {
  Words s0{}, s1{}, s2{}, s3{};
  for (const char* p = begin; p + 256 <= end; p += 256) {
    for (int line = 0; line < 256; line += 64) __builtin_prefetch(p + 4096 + line, 0, 3);
    Words w[4];
    std::memcpy(w, p, sizeof w);
    s0 ^= w[0];
    s1 ^= w[1];
    s2 ^= w[2];
    s3 ^= w[3];
  }
  const Words all = s0 ^ s1 ^ s2 ^ s3;
  *result = all[0];
}

#if defined(__x86_64__)
// Ten or sixteen chains, more than two of these instructions a cycle take to come back. The
// registers are named: an array of accumulators would be kept in memory around each asm.
#define CLEAVE_OP(op, reg, last, i) op " %%" reg last ", %%" reg last ", %%" reg #i "\n"
#define CLEAVE_TEN(op, reg, last) \
  CLEAVE_OP(op, reg, last, 0)     \
  CLEAVE_OP(op, reg, last, 1)     \
  CLEAVE_OP(op, reg, last, 2)     \
  CLEAVE_OP(op, reg, last, 3)     \
  CLEAVE_OP(op, reg, last, 4)     \
  CLEAVE_OP(op, reg, last, 5)     \
  CLEAVE_OP(op, reg, last, 6)     \
  CLEAVE_OP(op, reg, last, 7) CLEAVE_OP(op, reg, last, 8) CLEAVE_OP(op, reg, last, 9)
#define CLEAVE_SIXTEEN(op, reg, last) \
  CLEAVE_TEN(op, reg, last)           \
  CLEAVE_OP(op, reg, last, 10)        \
  CLEAVE_OP(op, reg, last, 11)        \
  CLEAVE_OP(op, reg, last, 12)        \
  CLEAVE_OP(op, reg, last, 13) CLEAVE_OP(op, reg, last, 14) CLEAVE_OP(op, reg, last, 15)
#define CLEAVE_CLOBBERED                                                                   \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", \
      "xmm11", "xmm12", "xmm13", "xmm14", "xmm15"

// 2^-20 in every float, and in every other bfloat16.
constexpr std::uint32_t kOperand = 0x35800000;

__attribute__((target("avx512f"))) void dots_avx512(std::int64_t rounds) {
  asm volatile("vzeroall\n vpbroadcastd %0, %%zmm31" ::"r"(kOperand) : CLEAVE_CLOBBERED, "xmm31");
  for (std::int64_t r = 0; r < rounds; ++r)
    asm volatile(CLEAVE_SIXTEEN("vdpbf16ps", "zmm", "31")::: CLEAVE_CLOBBERED);
}
__attribute__((target("avx512f"))) void fma_avx512(std::int64_t rounds) {
  asm volatile("vzeroall\n vpbroadcastd %0, %%zmm31" ::"r"(kOperand) : CLEAVE_CLOBBERED, "xmm31");
  for (std::int64_t r = 0; r < rounds; ++r)
    asm volatile(CLEAVE_SIXTEEN("vfmadd231ps", "zmm", "31")::: CLEAVE_CLOBBERED);
}
__attribute__((target("avx2,fma"))) void fma_avx2(std::int64_t rounds) {
  asm volatile("vzeroall\n vmovd %0, %%xmm15\n vpbroadcastd %%xmm15, %%ymm15" ::"r"(kOperand)
               : CLEAVE_CLOBBERED);
  for (std::int64_t r = 0; r < rounds; ++r)
    asm volatile(CLEAVE_TEN("vfmadd231ps", "ymm", "15")::: CLEAVE_CLOBBERED);
}

struct Peak {
  void (*run)(std::int64_t rounds);
  int operations;  ///< per round; a multiply-add is two
};
Peak peak_of_this_isa(WeightType weights) {
  const std::string isa = isa_name();
  if (isa == "avx512bf16" && weights == WeightType::kBF16) return {dots_avx512, 16 * 16 * 4};
  if (isa.rfind("avx512", 0) == 0) return {fma_avx512, 16 * 16 * 2};
  return {fma_avx2, 10 * 8 * 2};
}
#endif

}  // namespace

ReadProbe::ReadProbe(std::int64_t bytes)
    : bytes_(bytes), memory_(static_cast<char*>(std::aligned_alloc(2 << 20, bytes))) {
  madvise(memory_, bytes, MADV_HUGEPAGE);
  std::memset(memory_, 1, bytes);
}

ReadProbe::~ReadProbe() { std::free(memory_); }

double ReadProbe::run(const ParallelFor& parallel) const {
  const double begin = now();
  parallel(bytes_ / 256, 1, [&](std::int64_t from, std::int64_t to) {
    std::uint64_t result = 0;
    read_all(memory_ + from * 256, memory_ + to * 256, &result);
    sink += result;
  });
  return static_cast<double>(bytes_) / (now() - begin);
}

double arithmetic_probe(WeightType weights, const ParallelFor& parallel) {
#if defined(__x86_64__)
  constexpr std::int64_t kRounds = 1'500'000;
  const Peak peak = peak_of_this_isa(weights);
  const double begin = now();
  parallel(parallel.threads, 1, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t i = from; i < to; ++i) peak.run(kRounds);
  });
  return static_cast<double>(peak.operations) * kRounds * parallel.threads / (now() - begin);
#else
  static_cast<void>(weights);
  static_cast<void>(parallel);
  return 0.0;
#endif
}

}  // namespace cleave::bench
