#include "assignment.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "fail.h"

// Rows of one column are alike to the flow but for what a move would cost, so the graph has the C
// columns for nodes, and the edge a -> b costs the least that any row of a loses by moving to b.
// Every row starts at its best column, where no edge costs less than 0. Then one row at a time
// leaves the overfull columns along the cheapest path to one with room: each row on the path moves
// one edge on. Potentials keep all edges at 0 or more, so Dijkstra finds the path.
namespace cleave {
namespace {

constexpr double kNoEdge = std::numeric_limits<double>::infinity();

/// A row that may leave its column, and what it loses by that.
struct Move {
  double cost;
  std::int32_t row;
};

/// For heaps with the cheapest on top; lower rows first among equals.
bool dearer(const Move& x, const Move& y) {
  return x.cost != y.cost ? x.cost > y.cost : x.row > y.row;
}

class ColumnFlow {
 public:
  ColumnFlow(MatrixView<const float> benefit, std::span<const std::int64_t> capacity)
      : benefit_(benefit), columns_(benefit.cols), room_(capacity.begin(), capacity.end()) {}

  std::vector<std::int32_t> solve() {
    start_at_best();
    while (find_path()) apply_path();
    return std::move(column_of_);
  }

 private:
  std::vector<Move>& moves(std::int64_t a, std::int64_t b) { return moves_[a * columns_ + b]; }
  double& edge(std::int64_t a, std::int64_t b) { return edge_[a * columns_ + b]; }
  Move move_of(std::int32_t row, std::int64_t a, std::int64_t b) const {
    return {static_cast<double>(benefit_(row, a)) - static_cast<double>(benefit_(row, b)), row};
  }

  void start_at_best() {
    const std::size_t count = static_cast<std::size_t>(columns_);
    column_of_.resize(static_cast<std::size_t>(benefit_.rows));
    size_.assign(count, 0);
    potential_.assign(count, 0.0);
    moves_.resize(count * count);
    edge_.assign(count * count, kNoEdge);
    for (std::int64_t j = 0; j < benefit_.rows; ++j) {
      const float* row = benefit_.row(j);
      const std::int64_t a = std::max_element(row, row + columns_) - row;
      column_of_[j] = static_cast<std::int32_t>(a);
      ++size_[a];
      --room_[a];
      for (std::int64_t b = 0; b < columns_; ++b)
        if (b != a) moves(a, b).push_back(move_of(static_cast<std::int32_t>(j), a, b));
    }
    for (std::int64_t a = 0; a < columns_; ++a)
      for (std::int64_t b = 0; b < columns_; ++b) {
        std::make_heap(moves(a, b).begin(), moves(a, b).end(), dearer);
        if (!moves(a, b).empty()) edge(a, b) = moves(a, b).front().cost;
      }
  }

  /// The cheapest path from an overfull column to one with room, in from_ and end_; false if no
  /// column is overfull.
  bool find_path() {
    distance_.assign(static_cast<std::size_t>(columns_), kNoEdge);
    from_.assign(static_cast<std::size_t>(columns_), -1);
    std::vector<char> done(static_cast<std::size_t>(columns_), 0);
    bool overfull = false;
    for (std::int64_t c = 0; c < columns_; ++c)
      if (room_[c] < 0) {
        distance_[c] = 0.0;
        overfull = true;
      }
    if (!overfull) return false;
    for (;;) {
      // There is always a next one: the capacities suffice, and a full column has edges to all.
      std::int64_t a = -1;
      for (std::int64_t c = 0; c < columns_; ++c)
        if (!done[c] && (a < 0 || distance_[c] < distance_[a])) a = c;
      done[a] = 1;
      if (room_[a] > 0) {
        end_ = a;
        break;
      }
      relax(a);
    }
    const double length = distance_[end_];
    for (std::int64_t c = 0; c < columns_; ++c) potential_[c] += std::min(distance_[c], length);
    return true;
  }

  void relax(std::int64_t a) {
    for (std::int64_t b = 0; b < columns_; ++b) {
      const double cost = edge(a, b);
      if (cost == kNoEdge) continue;
      // Less than 0 only by rounding.
      const double reduced = std::max(0.0, cost + potential_[a] - potential_[b]);
      if (distance_[a] + reduced < distance_[b]) {
        distance_[b] = distance_[a] + reduced;
        from_[b] = static_cast<std::int32_t>(a);
      }
    }
  }

  void apply_path() {
    std::vector<std::int64_t> path{end_};
    while (from_[path.back()] >= 0) path.push_back(from_[path.back()]);
    --room_[path.front()];
    ++size_[path.front()];
    ++room_[path.back()];
    --size_[path.back()];
    // All rows that move are chosen before any does: the path was found for these.
    std::vector<std::int32_t> rows;
    for (std::size_t i = 1; i < path.size(); ++i)
      rows.push_back(moves(path[i], path[i - 1]).front().row);
    for (std::size_t i = 1; i < path.size(); ++i)
      column_of_[rows[i - 1]] = static_cast<std::int32_t>(path[i - 1]);
    for (std::size_t i = 1; i < path.size(); ++i) enter(rows[i - 1], path[i - 1]);
    for (const std::int64_t a : path) refresh_edges(a);
  }

  void enter(std::int32_t row, std::int64_t a) {
    for (std::int64_t b = 0; b < columns_; ++b) {
      if (b == a) continue;
      moves(a, b).push_back(move_of(row, a, b));
      std::push_heap(moves(a, b).begin(), moves(a, b).end(), dearer);
    }
  }

  /// Entries of rows that left stay in the heaps until they come up or are too many. One of a row
  /// that came back is right again, and may be there twice.
  void refresh_edges(std::int64_t a) {
    const auto left = [&](const Move& move) { return column_of_[move.row] != a; };
    for (std::int64_t b = 0; b < columns_; ++b) {
      auto& heap = moves(a, b);
      if (heap.size() > 2 * static_cast<std::size_t>(size_[a]) + 16) {
        std::erase_if(heap, left);
        std::sort(heap.begin(), heap.end(),
                  [](const Move& x, const Move& y) { return dearer(y, x); });
        heap.erase(std::unique(heap.begin(), heap.end(),
                               [](const Move& x, const Move& y) { return x.row == y.row; }),
                   heap.end());
      }
      while (!heap.empty() && left(heap.front())) {
        std::pop_heap(heap.begin(), heap.end(), dearer);
        heap.pop_back();
      }
      edge(a, b) = heap.empty() ? kNoEdge : heap.front().cost;
    }
  }

  MatrixView<const float> benefit_;       // [H, C]
  std::int64_t columns_ = 0;              // C
  std::vector<std::int64_t> room_;        // [C], negative: overfull
  std::vector<std::int64_t> size_;        // [C], rows that are there
  std::vector<std::int32_t> column_of_;   // [H]
  std::vector<std::vector<Move>> moves_;  // [C, C] heaps
  std::vector<double> edge_;              // [C, C], cost of the top of each heap
  std::vector<double> potential_;         // [C]
  std::vector<double> distance_;          // [C], of the last search
  std::vector<std::int32_t> from_;        // [C], the column before on the path, -1 at its start
  std::int64_t end_ = 0;                  // where the path ends
};

void check_problem(MatrixView<const float> benefit, std::span<const std::int64_t> capacity) {
  if (benefit.cols < 1 || static_cast<std::int64_t>(capacity.size()) != benefit.cols)
    fail_argument(
        "assign_balanced: benefit is [{}, {}] but there are {} capacities; expected one a column, "
        "at least one",
        benefit.rows, benefit.cols, capacity.size());
  std::int64_t places = 0;
  for (std::size_t c = 0; c < capacity.size(); ++c) {
    if (capacity[c] < 0)
      fail_argument("assign_balanced: capacity {} of column {}; must not be negative", capacity[c],
                    c);
    // More than H places in a column are as good as H, and the sum cannot overflow.
    places += std::min(capacity[c], benefit.rows);
  }
  if (places < benefit.rows)
    fail_argument("assign_balanced: {} places for {} rows; capacities must sum to at least as many",
                  places, benefit.rows);
  for (std::int64_t j = 0; j < benefit.rows; ++j)
    for (std::int64_t c = 0; c < benefit.cols; ++c)
      if (!std::isfinite(benefit(j, c)))
        fail_argument("assign_balanced: benefit of row {} in column {} is {}; must be finite", j, c,
                      benefit(j, c));
}

}  // namespace

std::vector<std::int32_t> assign_balanced(MatrixView<const float> benefit,
                                          std::span<const std::int64_t> capacity) {
  check_problem(benefit, capacity);
  return ColumnFlow(benefit, capacity).solve();
}

}  // namespace cleave
