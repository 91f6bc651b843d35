#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cleave/cleave.h"

// Random FFNs of a given shape, dense and cut into experts, and the timing of several ways to run
// them in turn.
namespace cleave::bench {

struct FfnShape {
  std::int64_t d_model = 2048;
  std::int64_t hidden = 5632;
  std::int64_t experts = 8;
  std::int64_t active = 2;
  std::int64_t shared = 0;  ///< of the active ones, on for every token: the last of the experts
  std::int64_t layers = 1;  ///< copies, run in rotation: so that weights come from memory
  WeightType type = WeightType::kBF16;
};

/// Experts [E of width H / E] of random weights; with `experts` = 1 the dense FFN.
class FfnSetup {
 public:
  FfnSetup(const FfnShape& shape, const ParallelFor& parallel);
  const FfnShape& shape() const { return shape_; }
  const PackedExperts& layer(std::int64_t i) const { return layers_[i % shape_.layers]; }

 private:
  FfnShape shape_;
  std::vector<PackedExperts> layers_;
};

/// Uniform independent routings; `skew`: this share of the tokens has expert 0 among theirs.
Routing random_routing(const FfnShape& shape, std::int64_t T, unsigned seed, double skew = 0.0);
/// Share of the weights that a routing touches.
double touched(const FfnShape& shape, const Routing& routing);
std::vector<float> random_values(std::int64_t n, unsigned seed);

struct Timing {
  double median_s = 0.0, low_s = 0.0, high_s = 0.0;  ///< low, high: the quartiles
  std::vector<double> rounds_s;                      ///< in the order they ran
};
Timing summary(std::vector<double> seconds);
/// Returns when no thread of this process uses a core any more: another library's threads may spin
/// for a while after its call, on a core that ours would lack.
void wait_for_quiet();

/// A figure that every round gave once: a ratio, a share, a rate.
struct Measured {
  double median = 0.0, low = 0.0, high = 0.0;  ///< low, high: the quartiles
  std::size_t rounds = 0;                      ///< 0: no quartiles are known
  double ours_s = 0.0,
         other_s = 0.0;  ///< medians of the times of a ratio; 0: it is of no two times
  operator double() const { return median; }
};
Measured operator*(Measured value, double factor);
inline Measured operator/(const Measured& value, double by) { return value * (1.0 / by); }
Measured over_rounds(std::vector<double> values);
/// Over the rounds, a's time by b's (`ours_s`). Other work on the machine comes and goes in
/// seconds, so what ran in the same round compares better than two medians do.
Measured paired_ratio(const Timing& a, const Timing& b);
/// Runs all in turn, `rounds` times after one round of warming up. Each runs twice, and the second
/// time counts: the first wakes the threads and drives what others left from the caches. task(run)
/// gets run numbers that go up by one, so a task of two sets of layers or more never times those
/// that it has just read.
std::vector<Timing> time_in_turn(const std::vector<std::function<void(std::int64_t)>>& tasks,
                                 int rounds);

}  // namespace cleave::bench
