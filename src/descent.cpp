#include "descent.h"

#include <algorithm>
#include <cmath>

#include "kernels/dispatch.h"
#include "support/random.h"

namespace cleave {

void Adam::step(std::span<const float> gradient, double rate, std::span<float> parameters) {
  constexpr double kMomentum = 0.9, kSquareMomentum = 0.99, kEpsilon = 1e-8;
  ++steps_;
  const double first = 1.0 - std::pow(kMomentum, static_cast<double>(steps_));
  const double second = 1.0 - std::pow(kSquareMomentum, static_cast<double>(steps_));
  for (std::size_t i = 0; i < mean_.size(); ++i) {
    const double g = gradient[i];
    mean_[i] = static_cast<float>(kMomentum * mean_[i] + (1.0 - kMomentum) * g);
    square_[i] = static_cast<float>(kSquareMomentum * square_[i] + (1.0 - kSquareMomentum) * g * g);
    parameters[i] -=
        static_cast<float>(rate * (mean_[i] / first) / (std::sqrt(square_[i] / second) + kEpsilon));
  }
}

TokenBatch::TokenBatch(std::int64_t size, std::int64_t columns)
    : size_(size),
      columns_(columns),
      tokens_(static_cast<std::size_t>(size)),
      rows_(static_cast<std::size_t>(size * columns)) {}

void TokenBatch::draw(MatrixView<const float> x, std::mt19937_64& rng) {
  for (std::int64_t& t : tokens_)
    t = static_cast<std::int64_t>(bounded_draw(rng, static_cast<std::uint64_t>(x.rows)));
  for (std::int64_t i = 0; i < size_; ++i)
    std::copy_n(x.row(tokens_[i]), columns_, rows_.data() + i * columns_);
}

void weight_gradient(MatrixView<const float> slope, MatrixView<const float> input,
                     std::span<float> gradient, const ParallelFor& parallel) {
  std::fill(gradient.begin(), gradient.end(), 0.0f);
  parallel(input.cols, 64, [&](std::int64_t begin, std::int64_t end) {
    gram_kernels().product_tn(plain(slope),
                              {input.data + begin, input.rows, end - begin, input.row_stride},
                              {gradient.data() + begin, slope.cols, end - begin, input.cols});
  });
}

}  // namespace cleave
