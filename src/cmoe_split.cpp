#include "cmoe_split.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace cleave {
namespace {

constexpr int kMostSweeps = 50;         // over all pairs of columns; a few are needed
constexpr double kSmallestGain = 1e-6;  // below it is rounding, not progress

/// Cheapest pairs first, while the column has room.
std::vector<std::int32_t> assign_cheapest(MatrixView<const float> cost) {
  std::vector<std::int64_t> pairs(static_cast<std::size_t>(cost.rows * cost.cols));
  std::iota(pairs.begin(), pairs.end(), std::int64_t{0});
  std::sort(pairs.begin(), pairs.end(), [&](std::int64_t a, std::int64_t b) {
    const float x = cost(a / cost.cols, a % cost.cols), y = cost(b / cost.cols, b % cost.cols);
    return x != y ? x < y : a < b;
  });
  std::vector<std::int64_t> room(static_cast<std::size_t>(cost.cols), cost.rows / cost.cols);
  std::vector<std::int32_t> column(static_cast<std::size_t>(cost.rows), -1);
  for (const std::int64_t p : pairs) {
    const std::int64_t i = p / cost.cols, e = p % cost.cols;
    if (column[i] >= 0 || room[e] == 0) continue;
    column[i] = static_cast<std::int32_t>(e);
    --room[e];
  }
  return column;
}

/// Divides the rows of columns a and b anew; returns whether that gained anything.
bool divide_anew(MatrixView<const float> cost, std::int32_t a, std::int32_t b,
                 std::vector<std::int32_t>& column) {
  std::vector<std::pair<double, std::int64_t>> rows;  // what a costs more than b
  double before = 0.0;
  for (std::int64_t i = 0; i < cost.rows; ++i) {
    if (column[i] != a && column[i] != b) continue;
    rows.emplace_back(static_cast<double>(cost(i, a)) - cost(i, b), i);
    if (column[i] == a) before += rows.back().first;
  }
  std::sort(rows.begin(), rows.end());
  const std::size_t half = rows.size() / 2;
  double after = 0.0;
  for (std::size_t i = 0; i < half; ++i) after += rows[i].first;
  if (before - after <= kSmallestGain) return false;
  for (std::size_t i = 0; i < rows.size(); ++i) column[rows[i].second] = i < half ? a : b;
  return true;
}

/// Weight of every token in every expert's mean column: [E, tokens].
std::vector<float> mean_columns(const ActivationColumns& columns,
                                std::span<const std::int32_t> neurons,
                                const std::vector<std::int32_t>& expert, std::int64_t E) {
  std::vector<float> mean(static_cast<std::size_t>(E * columns.num_tokens));
  const float one =
      static_cast<float>(E) / static_cast<float>(std::max<std::size_t>(1, neurons.size()));
  for (std::size_t i = 0; i < neurons.size(); ++i)
    for (const std::int32_t t : columns.tokens[neurons[i]])
      mean[expert[i] * columns.num_tokens + t] += one;
  return mean;
}

}  // namespace

void add_activations(MatrixView<const float> h, ActivationColumns& columns) {
  const std::int64_t H = h.cols, kept = std::min(kCmoeTopNeurons, H);
  columns.tokens.resize(static_cast<std::size_t>(H));
  std::vector<std::int32_t> ids(static_cast<std::size_t>(H));
  for (std::int64_t t = 0; t < h.rows; ++t) {
    std::iota(ids.begin(), ids.end(), 0);
    const float* row = h.row(t);
    std::nth_element(ids.begin(), ids.begin() + (kept - 1), ids.end(),
                     [row](std::int32_t a, std::int32_t b) {
                       const float x = std::abs(row[a]), y = std::abs(row[b]);
                       return x != y ? x > y : a < b;
                     });
    const auto token = static_cast<std::int32_t>(columns.num_tokens++);
    for (std::int64_t k = 0; k < kept; ++k) columns.tokens[ids[k]].push_back(token);
  }
}

std::vector<std::int32_t> assign_evenly(MatrixView<const float> cost) {
  std::vector<std::int32_t> column = assign_cheapest(cost);
  const auto E = static_cast<std::int32_t>(cost.cols);
  for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
    bool gained = false;
    for (std::int32_t a = 0; a < E; ++a)
      for (std::int32_t b = a + 1; b < E; ++b) gained |= divide_anew(cost, a, b, column);
    if (!gained) break;
  }
  return column;
}

CmoeSplit cmoe_split(const ActivationColumns& columns, std::span<const std::int32_t> neurons,
                     std::int64_t num_experts) {
  const std::int64_t E = num_experts, n = static_cast<std::int64_t>(neurons.size());
  const auto activations = [&](std::int32_t j) { return columns.tokens[j].size(); };
  std::vector<std::int32_t> centers(neurons.begin(), neurons.end());
  std::stable_sort(centers.begin(), centers.end(),
                   [&](std::int32_t a, std::int32_t b) { return activations(a) > activations(b); });
  centers.resize(static_cast<std::size_t>(E));

  std::vector<float> cost(static_cast<std::size_t>(n * E));
  std::vector<std::uint8_t> active(static_cast<std::size_t>(columns.num_tokens));
  for (std::int64_t e = 0; e < E; ++e) {
    std::fill(active.begin(), active.end(), std::uint8_t{0});
    for (const std::int32_t t : columns.tokens[centers[e]]) active[t] = 1;
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t both = 0;
      for (const std::int32_t t : columns.tokens[neurons[i]]) both += active[t];
      cost[i * E + e] = static_cast<float>(activations(neurons[i]) + activations(centers[e])) -
                        2.0f * static_cast<float>(both);
    }
  }
  CmoeSplit split{assign_evenly({cost.data(), n, E}), std::vector<std::int32_t>(E, -1)};

  const std::vector<float> mean = mean_columns(columns, neurons, split.expert, E);
  std::vector<double> nearest(static_cast<std::size_t>(E));
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int32_t e = split.expert[i];
    double distance = 0.0;  // without the sum over the mean, which is the same for all members
    for (const std::int32_t t : columns.tokens[neurons[i]])
      distance += 1.0 - 2.0 * mean[e * columns.num_tokens + t];
    if (split.representatives[e] >= 0 && distance >= nearest[e]) continue;
    split.representatives[e] = neurons[i];
    nearest[e] = distance;
  }
  return split;
}

}  // namespace cleave
