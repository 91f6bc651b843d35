#include "exact_kmeans.h"

#include <algorithm>
#include <random>

#include "assignment.h"
#include "support/random.h"

namespace cleave {
namespace {

class ExactKMeans {
 public:
  ExactKMeans(MatrixView<const float> rows, const ExactKMeansSpec& spec,
              const ParallelFor& parallel)
      : rows_(rows), clusters_(spec.clusters), parallel_(parallel) {
    centroids_.resize(static_cast<std::size_t>(clusters_ * rows.cols));
    benefit_.resize(static_cast<std::size_t>(rows.rows * clusters_));
    for (std::int64_t i = 0; i < rows.rows; ++i) row_square_.push_back(square(rows.row(i)));
  }

  void choose_first(std::mt19937_64& rng) {
    std::vector<double> distance(row_square_.size(), 1e300);
    std::vector<float> product(row_square_.size());
    std::int64_t chosen =
        static_cast<std::int64_t>(bounded_draw(rng, static_cast<std::uint64_t>(rows_.rows)));
    for (std::int64_t c = 0; c < clusters_; ++c) {
      std::copy_n(rows_.row(chosen), rows_.cols, centroids_.data() + c * rows_.cols);
      linear(rows_, rows_.slice_rows(chosen, 1), {}, {product.data(), rows_.rows, 1}, parallel_);
      double total = 0.0;
      for (std::int64_t i = 0; i < rows_.rows; ++i) {
        const double apart = row_square_[i] + row_square_[chosen] - 2.0 * product[i];
        distance[i] = std::min(distance[i], i == chosen ? 0.0 : std::max(0.0, apart));
        total += distance[i];
      }
      chosen = draw(distance, total, rng);
    }
  }

  /// benefit = 2 <row, centroid> - |centroid|^2 = |row|^2 - |row - centroid|^2.
  std::vector<std::int32_t> assign() {
    const MatrixView<const float> centroids(centroids_.data(), clusters_, rows_.cols);
    linear(rows_, centroids, {}, {benefit_.data(), rows_.rows, clusters_}, parallel_);
    std::vector<float> of_centroid;
    for (std::int64_t c = 0; c < clusters_; ++c)
      of_centroid.push_back(static_cast<float>(square(centroids.row(c))));
    for (std::int64_t i = 0; i < rows_.rows; ++i)
      for (std::int64_t c = 0; c < clusters_; ++c)
        benefit_[i * clusters_ + c] = 2.0f * benefit_[i * clusters_ + c] - of_centroid[c];
    const std::vector<std::int64_t> capacity(static_cast<std::size_t>(clusters_),
                                             rows_.rows / clusters_);
    return assign_balanced({benefit_.data(), rows_.rows, clusters_}, capacity);
  }

  /// Centroids become means; returns the sum of squared distances to them.
  double update(const std::vector<std::int32_t>& cluster_of) {
    std::vector<double> sum(centroids_.size());
    double spread = 0.0;
    for (std::int64_t i = 0; i < rows_.rows; ++i) {
      double* to = sum.data() + cluster_of[i] * rows_.cols;
      for (std::int64_t d = 0; d < rows_.cols; ++d) to[d] += rows_(i, d);
      spread += row_square_[i];
    }
    const double size = static_cast<double>(rows_.rows / clusters_);
    for (std::size_t k = 0; k < sum.size(); ++k) {
      spread -= sum[k] * sum[k] / size;
      centroids_[k] = static_cast<float>(sum[k] / size);
    }
    return spread;
  }

 private:
  double square(const float* row) const {
    double sum = 0.0;
    for (std::int64_t d = 0; d < rows_.cols; ++d) sum += static_cast<double>(row[d]) * row[d];
    return sum;
  }
  /// A row with a probability in proportion to its distance; any where all distances are 0.
  std::int64_t draw(const std::vector<double>& distance, double total, std::mt19937_64& rng) const {
    if (total <= 0.0)
      return static_cast<std::int64_t>(bounded_draw(rng, static_cast<std::uint64_t>(rows_.rows)));
    double rest = unit_draw(rng) * total;
    std::int64_t chosen = 0;
    while (chosen + 1 < rows_.rows && (distance[chosen] <= 0.0 || rest >= distance[chosen]))
      rest -= distance[chosen++];
    return chosen;
  }

  MatrixView<const float> rows_;
  std::int64_t clusters_;
  ParallelFor parallel_;
  std::vector<float> centroids_;    // [clusters, dims]
  std::vector<float> benefit_;      // [rows, clusters]
  std::vector<double> row_square_;  // [rows]
};

}  // namespace

ExactKMeansResult exact_balanced_kmeans(MatrixView<const float> rows, const ExactKMeansSpec& spec,
                                        const ParallelFor& parallel) {
  ExactKMeans kmeans(rows, spec, parallel);
  std::mt19937_64 rng(spec.seed);
  kmeans.choose_first(rng);
  ExactKMeansResult result;
  for (std::int32_t round = 0; round < spec.iterations; ++round) {
    auto next = kmeans.assign();
    if (next == result.cluster_of_row) break;
    const double spread = kmeans.update(next);
    // Rounding alone could go back and forth.
    if (!result.spread.empty() && spread >= result.spread.back()) break;
    result.cluster_of_row = std::move(next);
    result.spread.push_back(spread);
  }
  return result;
}

}  // namespace cleave
