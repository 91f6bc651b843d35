#include <cmath>

#include "cleave/kernels.h"

namespace cleave {

void linear_reference(MatrixView<const float> x, MatrixView<const float> weight,
                      std::span<const float> bias, MatrixView<float> y,
                      MatrixView<float> magnitude) noexcept {
  for (std::int64_t t = 0; t < x.rows; ++t) {
    for (std::int64_t n = 0; n < weight.rows; ++n) {
      double sum = bias.empty() ? 0.0 : bias[n];
      double bound = std::abs(sum);
      for (std::int64_t k = 0; k < weight.cols; ++k) {
        const double term = static_cast<double>(x(t, k)) * weight(n, k);
        sum += term;
        bound += std::abs(term);
      }
      y(t, n) = static_cast<float>(sum);
      if (!magnitude.empty()) magnitude(t, n) = static_cast<float>(bound);
    }
  }
}

}  // namespace cleave
