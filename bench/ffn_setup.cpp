#include "ffn_setup.h"

#include <time.h>

#include <algorithm>
#include <numeric>
#include <random>
#include <thread>

namespace cleave::bench {

std::vector<float> random_values(std::int64_t n, unsigned seed) {
  // Uniform with the variance of trained weights; a linear congruence, since there are 10^8 of
  // them.
  std::uint64_t state = seed * 2654435761u + 1;
  std::vector<float> values(n);
  for (float& v : values) {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    v = (static_cast<float>(state >> 40) * 0x1p-24f - 0.5f) * 0.1f;
  }
  return values;
}

FfnSetup::FfnSetup(const FfnShape& shape, const ParallelFor& parallel) : shape_(shape) {
  ExpertBank bank;
  bank.d_model = shape.d_model;
  bank.dense_hidden = shape.hidden;
  for (std::int64_t e = 0; e <= shape.experts; ++e)
    bank.begin.push_back(shape.hidden * e / shape.experts);
  bank.neuron_order.resize(shape.hidden);
  bank.gate = random_values(shape.hidden * shape.d_model, 1);
  bank.up = random_values(shape.hidden * shape.d_model, 2);
  bank.down_t = random_values(shape.hidden * shape.d_model, 3);
  for (std::int64_t l = 0; l < shape.layers; ++l) layers_.emplace_back(bank, shape.type, parallel);
}

Routing random_routing(const FfnShape& shape, std::int64_t T, unsigned seed, double skew) {
  std::mt19937 rng(seed);
  const std::int64_t routed = shape.experts - shape.shared, k = shape.active - shape.shared;
  Routing routing{T, shape.active, {}, {}};
  std::vector<std::int32_t> all(routed);
  for (std::int64_t t = 0; t < T; ++t) {
    std::iota(all.begin(), all.end(), 0);
    for (std::int64_t i = 0; i < k; ++i) std::swap(all[i], all[i + rng() % (routed - i)]);
    if (skew > 0.0) {
      const bool wants = static_cast<double>(t % 100) < 100.0 * skew;
      const auto at = std::find(all.begin(), all.end(), 0) - all.begin();
      if (wants && at >= k) std::swap(all[0], all[at]);
      if (!wants && at < k) std::swap(all[at], all[k + rng() % (routed - k)]);
    }
    for (std::int64_t i = 0; i < k; ++i) routing.ids.push_back(all[i]);
    for (std::int64_t i = 0; i < shape.shared; ++i)
      routing.ids.push_back(static_cast<std::int32_t>(routed + i));
    for (std::int64_t i = 0; i < shape.active; ++i)
      routing.weights.push_back(1.0f / static_cast<float>(shape.active));
  }
  return routing;
}

double touched(const FfnShape& shape, const Routing& routing) {
  std::vector<bool> seen(shape.experts);
  for (const std::int32_t id : routing.ids) seen[id] = true;
  return static_cast<double>(std::count(seen.begin(), seen.end(), true)) /
         static_cast<double>(shape.experts);
}

Timing summary(std::vector<double> seconds) {
  const std::vector<double> in_order = seconds;
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double share) {
    return seconds[static_cast<std::size_t>(share * static_cast<double>(seconds.size() - 1) + 0.5)];
  };
  return {at(0.5), at(0.25), at(0.75), in_order};
}

void wait_for_quiet() {
  const auto cpu_seconds = [] {
    timespec t{};
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  // Of a thread that runs elsewhere the kernel counts the time at its ticks, 10 ms apart at most.
  constexpr std::chrono::milliseconds kLook(11);
  constexpr int kMostLooks = 20;
  for (int i = 0; i < kMostLooks; ++i) {
    const double before = cpu_seconds();
    std::this_thread::sleep_for(kLook);
    if (cpu_seconds() - before < 2e-4) return;
  }
}

Measured operator*(Measured value, double factor) {
  value.median *= factor;
  value.low *= factor;
  value.high *= factor;
  return value;
}

Measured over_rounds(std::vector<double> values) {
  const Timing t = summary(std::move(values));
  return {t.median_s, t.low_s, t.high_s, t.rounds_s.size(), 0.0, 0.0};
}

Measured paired_ratio(const Timing& a, const Timing& b) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < a.rounds_s.size(); ++i)
    ratios.push_back(a.rounds_s[i] / b.rounds_s[i]);
  Measured result = over_rounds(std::move(ratios));
  result.ours_s = b.median_s;
  result.other_s = a.median_s;
  return result;
}

std::vector<Timing> time_in_turn(const std::vector<std::function<void(std::int64_t)>>& tasks,
                                 int rounds) {
  std::vector<std::vector<double>> seconds(tasks.size());
  for (int round = -1; round < rounds; ++round)
    for (std::size_t i = 0; i < tasks.size(); ++i) {
      wait_for_quiet();
      tasks[i](2 * round + 2);
      const auto begin = std::chrono::steady_clock::now();
      tasks[i](2 * round + 3);
      const double s =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      if (round >= 0) seconds[i].push_back(s);
    }
  std::vector<Timing> result;
  for (auto& s : seconds) result.push_back(summary(std::move(s)));
  return result;
}

}  // namespace cleave::bench
