#include "symmetric_sum.h"

#include <algorithm>

#include "kernels/dispatch.h"

namespace cleave {

SymmetricSum::SymmetricSum(std::int64_t n) : n_(n) {
  if (n == 0) return;
  const std::int64_t last = panels() - 1;
  values_.assign(static_cast<std::size_t>(begin_of(last) + rows_of(last) * width_of(last)), 0.0f);
}

std::int64_t SymmetricSum::rows_of(std::int64_t panel) const {
  return std::min(kPanel, n_ - panel * kPanel);
}

void SymmetricSum::add_rows(MatrixView<const float> x, const ParallelFor& parallel) {
  if (x.rows == 0) return;
  const std::int64_t count = panels();
  const auto add_panel = [&](std::int64_t p) {
    const MatrixView<const float> rows(x.data + p * kPanel, x.rows, rows_of(p), x.row_stride);
    const MatrixView<const float> columns(x.data, x.rows, width_of(p), x.row_stride);
    gram_kernels().product_tn(plain(rows), plain(columns),
                              {values_.data() + begin_of(p), rows_of(p), width_of(p), width_of(p)});
  };
  // A long panel goes with a short one, so that equal ranges are equal work.
  parallel((count + 1) / 2, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      add_panel(p);
      if (count - 1 - p != p) add_panel(count - 1 - p);
    }
  });
}

void SymmetricSum::merge(const SymmetricSum& other) {
  for (std::size_t i = 0; i < values_.size(); ++i) values_[i] += other.values_[i];
}

std::vector<float> SymmetricSum::packed(double factor) const {
  std::vector<float> out;
  out.reserve(static_cast<std::size_t>(n_ * (n_ + 1) / 2));
  for (std::int64_t i = 0; i < n_; ++i)
    for (std::int64_t j = 0; j <= i; ++j) out.push_back(static_cast<float>(factor * at(i, j)));
  return out;
}

std::vector<float> SymmetricSum::full(double factor) const {
  std::vector<float> out(static_cast<std::size_t>(n_ * n_));
  for (std::int64_t i = 0; i < n_; ++i)
    for (std::int64_t j = 0; j <= i; ++j)
      out[i * n_ + j] = out[j * n_ + i] = static_cast<float>(factor * at(i, j));
  return out;
}

SymmetricSum SymmetricSum::from_packed(std::int64_t n, const std::vector<float>& packed,
                                       double factor) {
  SymmetricSum sum(n);
  std::size_t next = 0;
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j <= i; ++j)
      sum.at(i, j) = static_cast<float>(factor * packed[next++]);
  return sum;
}

}  // namespace cleave
