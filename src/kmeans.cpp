#include "kmeans.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>

#include "support/random.h"

// With equal capacities, sum of |row - centroid|^2 = constant - 2 * sum of <row, centroid> for any
// fixed centroids, so assigning is a transportation problem on the affinities <row, centroid>. It
// is started greedily once, then improved by splitting the union of two clusters anew, which is
// exact for the pair (sort by the difference of the affinities, cut in the middle). Each step and
// each centroid update can only raise the objective, so the rounds converge.
//
// Every sum runs in one fixed order, whatever the vector width, the cache or the thread count: a
// library's matrix product would not promise that, and one flipped near-tie changes the partition.
// (The build turns floating-point contraction off for this file for the same reason.)
namespace cleave {
namespace {

constexpr std::int64_t kLanes = 8;   // centroids side by side: two registers of four
constexpr int kMaxSweeps = 50;       // over all pairs; some five are needed
constexpr double kLeastGain = 1e-6;  // of affinities up to 1; below it is rounding, not progress
constexpr std::int64_t kRowsTogether = 4;  // rows that share a load of the centroids

struct Clustering {
  std::int64_t count = 0;        // rows
  std::int64_t dims = 0;         // columns
  std::int64_t clusters = 0;     // E
  std::int64_t padded = 0;       // clusters rounded up to kLanes
  std::vector<float> points;     // [count, dims], unit rows (zero rows stay zero)
  std::vector<float> centroids;  // [dims, padded]: transposed, so that clusters are the lanes
  std::vector<float> affinity;   // [count, padded]
  std::vector<std::int32_t> cluster_of;            // [count]
  std::vector<std::vector<std::int32_t>> members;  // [clusters], ascending

  std::int64_t capacity() const { return count / clusters; }
  const float* point(std::int64_t i) const { return points.data() + i * dims; }
  double affinity_of(std::int32_t i, std::int64_t c) const { return affinity[i * padded + c]; }
};

/// Four floats that are added side by side: one register of every CPU, and never a sum across it.
typedef float Lanes __attribute__((vector_size(16)));

void normalise(MatrixView<const float> rows, std::vector<float>& points) {
  points.resize(static_cast<std::size_t>(rows.rows * rows.cols));
  for (std::int64_t i = 0; i < rows.rows; ++i) {
    const float* row = rows.row(i);
    double square = 0.0;
    for (std::int64_t d = 0; d < rows.cols; ++d) square += static_cast<double>(row[d]) * row[d];
    const double scale = square > 0.0 ? 1.0 / std::sqrt(square) : 0.0;
    for (std::int64_t d = 0; d < rows.cols; ++d)
      points[i * rows.cols + d] = static_cast<float>(row[d] * scale);
  }
}

/// affinity[i, begin..begin + kLanes) for `kRows` rows from i on.
template <int kRows>
void affinity_block(Clustering& c, std::int64_t i, std::int64_t begin) {
  Lanes sum[kRows][2] = {};
  for (std::int64_t d = 0; d < c.dims; ++d) {
    Lanes centroid[2];
    std::memcpy(centroid, c.centroids.data() + d * c.padded + begin, sizeof(centroid));
    for (int r = 0; r < kRows; ++r) {
      const float x = c.points[(i + r) * c.dims + d];
      sum[r][0] += x * centroid[0];
      sum[r][1] += x * centroid[1];
    }
  }
  for (int r = 0; r < kRows; ++r)
    std::memcpy(c.affinity.data() + (i + r) * c.padded + begin, sum[r], sizeof(sum[r]));
}

void update_affinity(Clustering& c) {
  for (std::int64_t begin = 0; begin < c.padded; begin += kLanes) {
    std::int64_t i = 0;
    for (; i + kRowsTogether <= c.count; i += kRowsTogether)
      affinity_block<kRowsTogether>(c, i, begin);
    for (; i < c.count; ++i) affinity_block<1>(c, i, begin);
  }
}

void set_centroid(Clustering& c, std::int64_t cluster, const float* row) {
  for (std::int64_t d = 0; d < c.dims; ++d) c.centroids[d * c.padded + cluster] = row[d];
}

/// |x - y|^2; exactly 0 for equal rows.
double squared_distance(const float* x, const float* y, std::int64_t dims) {
  Lanes sum[2] = {};
  std::int64_t d = 0;
  for (; d + kLanes <= dims; d += kLanes) {
    Lanes a[2], b[2];
    std::memcpy(a, x + d, sizeof(a));
    std::memcpy(b, y + d, sizeof(b));
    for (int half = 0; half < 2; ++half) sum[half] += (a[half] - b[half]) * (a[half] - b[half]);
  }
  double square = 0.0;
  for (int lane = 0; lane < 4; ++lane) square += sum[0][lane] + sum[1][lane];
  for (; d < dims; ++d) square += (x[d] - y[d]) * (x[d] - y[d]);
  return square;
}

/// k-means++: the next centroid is a row, drawn in proportion to its squared distance from the
/// nearest one so far (Arthur and Vassilvitskii, 2007).
void choose_first_centroids(Clustering& c, std::mt19937_64& rng) {
  std::vector<double> distance(static_cast<std::size_t>(c.count), 4.0);
  std::int64_t chosen = static_cast<std::int64_t>(bounded_draw(rng, c.count));
  for (std::int64_t cluster = 0;; ++cluster) {
    set_centroid(c, cluster, c.point(chosen));
    if (cluster + 1 == c.clusters) return;
    double total = 0.0;
    for (std::int64_t i = 0; i < c.count; ++i) {
      const double square = squared_distance(c.point(i), c.point(chosen), c.dims);
      distance[i] = std::min(distance[i], square);
      total += distance[i];
    }
    // All rows coincide with a centroid: any row serves.
    if (total <= 0.0) {
      chosen = static_cast<std::int64_t>(bounded_draw(rng, c.count));
      continue;
    }
    double rest = unit_draw(rng) * total;
    chosen = 0;
    while (chosen + 1 < c.count && (distance[chosen] <= 0.0 || rest >= distance[chosen]))
      rest -= distance[chosen++];
  }
}

/// Best pairs first, while the cluster has room.
void assign_greedily(Clustering& c) {
  std::vector<std::int64_t> pairs(static_cast<std::size_t>(c.count * c.clusters));
  std::iota(pairs.begin(), pairs.end(), std::int64_t{0});
  const auto value = [&](std::int64_t p) {
    return c.affinity[p / c.clusters * c.padded + p % c.clusters];
  };
  std::sort(pairs.begin(), pairs.end(), [&](std::int64_t a, std::int64_t b) {
    const float va = value(a), vb = value(b);
    return va != vb ? va > vb : a < b;
  });
  std::vector<std::int64_t> room(static_cast<std::size_t>(c.clusters), c.capacity());
  c.cluster_of.assign(static_cast<std::size_t>(c.count), -1);
  for (const std::int64_t p : pairs) {
    const std::int64_t i = p / c.clusters, cluster = p % c.clusters;
    if (c.cluster_of[i] >= 0 || room[cluster] == 0) continue;
    c.cluster_of[i] = static_cast<std::int32_t>(cluster);
    --room[cluster];
  }
  c.members.assign(static_cast<std::size_t>(c.clusters), {});
  for (std::int64_t i = 0; i < c.count; ++i)
    c.members[c.cluster_of[i]].push_back(static_cast<std::int32_t>(i));
}

/// Splits the union of two clusters in the best way; returns whether that gained anything.
bool split_anew(Clustering& c, std::int64_t a, std::int64_t b) {
  struct Candidate {
    double preference;  // for a over b
    std::int32_t row;
  };
  std::vector<Candidate> both;
  both.reserve(static_cast<std::size_t>(2 * c.capacity()));
  double least_in_a = 1e30, most_in_b = -1e30;
  for (const std::int64_t cluster : {a, b})
    for (const std::int32_t i : c.members[cluster]) {
      const double preference = c.affinity_of(i, a) - c.affinity_of(i, b);
      both.push_back({preference, i});
      if (cluster == a) least_in_a = std::min(least_in_a, preference);
      if (cluster == b) most_in_b = std::max(most_in_b, preference);
    }
  if (most_in_b - least_in_a <= kLeastGain) return false;
  const auto middle = both.begin() + c.capacity();
  std::nth_element(both.begin(), middle, both.end(), [](const Candidate& x, const Candidate& y) {
    return x.preference != y.preference ? x.preference > y.preference : x.row < y.row;
  });
  const auto fill = [&](std::int64_t cluster, auto begin, auto end) {
    auto& rows = c.members[cluster];
    rows.clear();
    for (auto it = begin; it != end; ++it) {
      rows.push_back(it->row);
      c.cluster_of[it->row] = static_cast<std::int32_t>(cluster);
    }
    std::sort(rows.begin(), rows.end());
  };
  fill(a, both.begin(), middle);
  fill(b, middle, both.end());
  return true;
}

/// Until no pair of clusters can gain; returns whether anything moved.
bool improve_pairs(Clustering& c) {
  bool moved = false;
  for (int sweep = 0; sweep < kMaxSweeps; ++sweep) {
    bool moved_now = false;
    for (std::int64_t a = 0; a < c.clusters; ++a)
      for (std::int64_t b = a + 1; b < c.clusters; ++b) moved_now |= split_anew(c, a, b);
    moved |= moved_now;
    if (!moved_now) break;
  }
  return moved;
}

void update_centroids(Clustering& c) {
  std::vector<float> sum(static_cast<std::size_t>(c.dims));
  for (std::int64_t cluster = 0; cluster < c.clusters; ++cluster) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (const std::int32_t i : c.members[cluster])
      for (std::int64_t d = 0; d < c.dims; ++d) sum[d] += c.point(i)[d];
    for (float& value : sum) value /= static_cast<float>(c.capacity());
    set_centroid(c, cluster, sum.data());
  }
}

double objective(const Clustering& c) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < c.count; ++i)
    sum += c.affinity_of(static_cast<std::int32_t>(i), c.cluster_of[i]);
  return sum;
}

}  // namespace

KMeansResult balanced_kmeans(MatrixView<const float> rows, const KMeansSpec& spec) {
  Clustering c;
  c.count = rows.rows;
  c.dims = rows.cols;
  c.clusters = spec.clusters;
  c.padded = (c.clusters + kLanes - 1) / kLanes * kLanes;
  normalise(rows, c.points);
  c.centroids.assign(static_cast<std::size_t>(c.dims * c.padded), 0.0f);
  c.affinity.resize(static_cast<std::size_t>(c.count * c.padded));

  std::mt19937_64 rng(spec.seed);
  choose_first_centroids(c, rng);
  update_affinity(c);
  assign_greedily(c);
  update_centroids(c);
  update_affinity(c);
  KMeansResult result;
  result.start_objective = objective(c);
  while (result.rounds < spec.iterations && improve_pairs(c)) {
    ++result.rounds;
    update_centroids(c);
    update_affinity(c);
  }
  result.objective = objective(c);
  result.cluster_of_row = std::move(c.cluster_of);
  return result;
}

}  // namespace cleave
