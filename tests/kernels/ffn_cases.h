#pragma once

#include <fmt/format.h>

#include <string>
#include <vector>

#include "kernels/random_ffn.h"
#include "support/thread_pool.h"

// Cases for tests of FFNs on random shapes: every kind of FFN, and shapes that depend on nothing
// else.
namespace cleave::testing {

inline constexpr WeightType kWeightTypes[] = {WeightType::kF32, WeightType::kBF16, WeightType::kF16,
                                              WeightType::kInt8, WeightType::kInt4};

struct FfnKind {
  Activation activation = Activation::kSilu;
  bool gated = true, biases = false;
};

inline std::vector<FfnKind> all_ffn_kinds() {
  std::vector<FfnKind> kinds;
  for (const Activation activation : kActivations)
    for (const bool gated : {true, false})
      for (const bool biases : {true, false}) kinds.push_back({activation, gated, biases});
  return kinds;
}

/// A routed FFN's shapes and how it is run, each drawn by itself.
struct FfnShape {
  std::int64_t T = 0, D = 0, I = 0, E = 0, K = 0;  ///< I: an expert's neurons, on average
  int threads = 0;                                 ///< 0: without a ParallelFor
  bool drops = false;                              ///< some slots without an expert
};

/// D and I from 1 to 130, E to 64, K to E, T from 0 to 70 and now and then to 300. Drawn anew where
/// the reference would take more than some 50 ms.
inline FfnShape draw_shape(std::mt19937& rng) {
  constexpr std::int64_t kMostProducts = 20'000'000, kMostTokens[] = {8, 70, 70, 300};
  FfnShape s;
  do {
    s.T = pick(rng, 0, kMostTokens[pick(rng, 0, 3)]);
    s.D = pick(rng, 1, 130);
    s.I = pick(rng, 1, 130);
    s.E = pick(rng, 1, pick(rng, 0, 1) == 0 ? 8 : 64);
    s.K = pick(rng, 1, s.E);
  } while (s.T * s.K * s.D * s.I > kMostProducts);
  s.threads = static_cast<int>(pick(rng, 0, 4));
  s.drops = pick(rng, 0, 4) == 0;
  return s;
}

inline std::string describe(const FfnKind& kind, const FfnShape& s) {
  return fmt::format("T={} D={} I={} E={} K={} {} gated={} biases={} threads={} drops={}", s.T, s.D,
                     s.I, s.E, s.K, activation_name(kind.activation), kind.gated, kind.biases,
                     s.threads, s.drops);
}

inline ExpertBank random_bank(std::mt19937& rng, const FfnKind& kind, const FfnShape& s) {
  return random_bank(rng, s.D, s.E * s.I, s.E, kind.gated, kind.biases, kind.activation);
}

inline Routing random_routing(std::mt19937& rng, const FfnShape& s) {
  Routing routing = random_routing(rng, s.T, s.E, s.K);
  if (s.drops) drop_slots(rng, routing);
  return routing;
}

/// The neurons of the K widest experts: more terms than these no sum has.
inline std::int64_t most_neurons(const ExpertBank& bank, std::int64_t K) {
  std::vector<std::int64_t> widths;
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) widths.push_back(bank.width(e));
  std::sort(widths.rbegin(), widths.rend());
  return std::accumulate(widths.begin(), widths.begin() + K, std::int64_t{0});
}

/// Threads to draw from.
class Pools {
 public:
  ParallelFor of(int threads) {
    ThreadPool* pools[] = {nullptr, &one_, &two_, &three_, &four_};
    return threads == 0 ? ParallelFor() : pools[threads]->parallel_for();
  }

 private:
  ThreadPool one_{1}, two_{2}, three_{3}, four_{4};
};

}  // namespace cleave::testing
