#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <random>
#include <utility>
#include <vector>

// Random draws that are the same on every machine. std::mt19937_64's stream is fixed by the
// standard; std::shuffle and the std distributions are not, so what turns the stream into numbers
// is written out here.
namespace cleave {

/// Uniform in [0, bound); bound >= 1. Rejects the incomplete last interval, so it has no bias.
inline std::uint64_t bounded_draw(std::mt19937_64& rng, std::uint64_t bound) {
  const std::uint64_t limit =
      std::numeric_limits<std::uint64_t>::max() - std::numeric_limits<std::uint64_t>::max() % bound;
  std::uint64_t draw = rng();
  while (draw >= limit) draw = rng();
  return draw % bound;
}

/// Uniform in [0, 1) with 53 random bits.
inline double unit_draw(std::mt19937_64& rng) { return static_cast<double>(rng() >> 11) * 0x1p-53; }

/// Standard normal (Box-Muller). One value of the pair is dropped: no state beside `rng`.
inline double normal_draw(std::mt19937_64& rng) {
  const double radius = std::sqrt(-2.0 * std::log(1.0 - unit_draw(rng)));
  return radius * std::cos(2.0 * std::numbers::pi * unit_draw(rng));
}

/// Fisher-Yates.
template <typename T>
void shuffle(std::vector<T>& values, std::mt19937_64& rng) {
  for (std::size_t i = values.size(); i > 1; --i)
    std::swap(values[i - 1], values[bounded_draw(rng, i)]);
}

}  // namespace cleave
