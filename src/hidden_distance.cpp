#include "hidden_distance.h"

#include <cmath>
#include <vector>

namespace cleave {
namespace {

template <typename T>
double distance(const T* a, const T* b, std::int64_t n) {
  double product = 0.0, square_a = 0.0, square_b = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    const double x = a[i], y = b[i];
    product += x * y;
    square_a += x * x;
    square_b += y * y;
  }
  if (square_a == 0.0 || square_b == 0.0) return square_a == square_b ? 0.0 : 1.0;
  // The root of a square is exact, so equal vectors give exactly 0; squares of floats leave room.
  const double distance = 1.0 - product / std::sqrt(square_a * square_b);
  return distance < 0.0 ? 0.0 : distance;  // by rounding; NaN stays
}

std::vector<double> summed_rows(MatrixView<const float> rows) {
  std::vector<double> sum(static_cast<std::size_t>(rows.cols));
  for (std::int64_t t = 0; t < rows.rows; ++t)
    for (std::int64_t d = 0; d < rows.cols; ++d) sum[d] += rows(t, d);
  return sum;
}

}  // namespace

double cosine_distance(const float* a, const float* b, std::int64_t n) { return distance(a, b, n); }

double summed_distance(MatrixView<const float> reference, MatrixView<const float> states) {
  double sum = 0.0;
  for (std::int64_t t = 0; t < reference.rows; ++t)
    sum += distance(reference.row(t), states.row(t), reference.cols);
  return sum;
}

double pooled_distance(MatrixView<const float> reference, MatrixView<const float> states) {
  // The direction of the sum is that of the mean.
  return distance(summed_rows(reference).data(), summed_rows(states).data(), reference.cols);
}

}  // namespace cleave
