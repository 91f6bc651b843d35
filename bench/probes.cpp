#include "probes.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>

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
// Twelve chains, by name: an array of accumulators would be kept in memory around each asm.
#define CLEAVE_FMA_CHAINS(constraint)                                                  \
  "vfmadd231ps %12, %12, %0\n vfmadd231ps %12, %12, %1\n vfmadd231ps %12, %12, %2\n"   \
  "vfmadd231ps %12, %12, %3\n vfmadd231ps %12, %12, %4\n vfmadd231ps %12, %12, %5\n"   \
  "vfmadd231ps %12, %12, %6\n vfmadd231ps %12, %12, %7\n vfmadd231ps %12, %12, %8\n"   \
  "vfmadd231ps %12, %12, %9\n vfmadd231ps %12, %12, %10\n vfmadd231ps %12, %12, %11\n" \
      : constraint(s0),                                                                \
        constraint(s1),                                                                \
        constraint(s2),                                                                \
        constraint(s3),                                                                \
        constraint(s4),                                                                \
        constraint(s5),                                                                \
        constraint(s6),                                                                \
        constraint(s7),                                                                \
        constraint(s8),                                                                \
        constraint(s9),                                                                \
        constraint(s10),                                                               \
        constraint(s11)

template <typename Vector>
struct Chains {
  Vector s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
};
__attribute__((target("avx512f"))) void fma_avx512(std::int64_t rounds, float* result) {
  auto [s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11] = Chains<Floats>();
  const Floats a = Floats{} + 1e-6f;
  for (std::int64_t r = 0; r < rounds; ++r) asm volatile(CLEAVE_FMA_CHAINS("+v") : "v"(a));
  *result = s0[0] + s5[0] + s11[0];
}
typedef float Half __attribute__((vector_size(32)));
__attribute__((target("avx2,fma"))) void fma_avx2(std::int64_t rounds, float* result) {
  auto [s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11] = Chains<Half>();
  const Half a = Half{} + 1e-6f;
  for (std::int64_t r = 0; r < rounds; ++r) asm volatile(CLEAVE_FMA_CHAINS("+x") : "x"(a));
  *result = s0[0] + s5[0] + s11[0];
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

double fma_probe(const ParallelFor& parallel) {
#if defined(__x86_64__)
  constexpr std::int64_t kRounds = 2'000'000;
  const bool wide = std::strncmp(isa_name(), "avx512", 6) == 0;
  const double begin = now();
  parallel(parallel.threads, 1, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t i = from; i < to; ++i) {
      float result = 0.0f;
      wide ? fma_avx512(kRounds, &result) : fma_avx2(kRounds, &result);
      sink += static_cast<std::uint64_t>(result);
    }
  });
  return 2.0 * 12 * (wide ? 16 : 8) * kRounds * parallel.threads / (now() - begin);
#else
  static_cast<void>(parallel);
  return 0.0;
#endif
}

}  // namespace cleave::bench
