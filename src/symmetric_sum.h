#pragma once

#include <cstdint>
#include <vector>

#include "cleave/kernels.h"

namespace cleave {

/// A sum of x x^T over rows x, kept as the lower triangle in panels of rows: panel p holds rows [p
/// * kPanel, ...) and the columns up to its last row, so each is one matrix for a product.
class SymmetricSum {
 public:
  static constexpr std::int64_t kPanel = 64;

  explicit SymmetricSum(std::int64_t n = 0);
  std::int64_t size() const { return n_; }
  bool empty() const { return n_ == 0; }
  std::int64_t bytes() const { return static_cast<std::int64_t>(values_.size() * sizeof(float)); }

  /// Adds x^T x.  x [T, n]
  void add_rows(MatrixView<const float> x, const ParallelFor& parallel);
  /// Adds a value at (i, j), i >= j.
  void add(std::int64_t i, std::int64_t j, float value) { at(i, j) += value; }
  void merge(const SymmetricSum& other);

  /// factor times the lower triangle, row after row: [n (n + 1) / 2].
  std::vector<float> packed(double factor) const;
  /// factor times the whole matrix [n, n].
  std::vector<float> full(double factor) const;
  /// From packed() with another factor.
  static SymmetricSum from_packed(std::int64_t n, const std::vector<float>& packed, double factor);

 private:
  std::int64_t panels() const { return (n_ + kPanel - 1) / kPanel; }
  std::int64_t rows_of(std::int64_t panel) const;
  /// The columns of a panel, which is also its stride.
  std::int64_t width_of(std::int64_t panel) const { return panel * kPanel + rows_of(panel); }
  /// Where the panel begins: those before it are full ones.
  static std::int64_t begin_of(std::int64_t panel) {
    return kPanel * kPanel * (panel * (panel + 1) / 2);
  }
  float& at(std::int64_t i, std::int64_t j) {
    const std::int64_t panel = i / kPanel;
    return values_[begin_of(panel) + (i - panel * kPanel) * width_of(panel) + j];
  }
  float at(std::int64_t i, std::int64_t j) const {
    return const_cast<SymmetricSum*>(this)->at(i, j);
  }

  std::int64_t n_ = 0;
  std::vector<float> values_;
};

}  // namespace cleave
