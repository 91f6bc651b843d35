#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/shared_step.h"

// What the ways to run experts on packed weights share.
namespace cleave {

/// Operands of moe_ffn().
struct FfnCall {
  const PackedExperts& experts;
  const std::int32_t* ids;  // [T, K]
  const float* weights;     // [T, K]
  std::int64_t k;           // K
  float scale;
  MatrixView<const float> x;
  MatrixView<float> y;
  SharedStep* routing = nullptr;  // what writes ids and weights in the phase that runs the call
};

/// Experts of a panel or two, on average.
inline bool is_narrow(const PackedExperts& experts) {
  const std::int64_t E = experts.num_experts();
  return experts.panel_begin(E) <= 2 * E;
}

/// Whether x and hidden values are rounded to bfloat16 and multiplied as pairs.
bool uses_dots(const PackedExperts& experts);

/// moe_ffn() but for its checks: ids are in range, and no token has one twice. Several calls are of
/// the same x and y.
void run_checked(std::span<const FfnCall> calls, Workspace& workspace, const ParallelFor& parallel);

/// The ways of few rows, where weights are read once, as they are stored: all parts run a share of
/// each call's panels into a sum of their own. So several calls wait for each other once; and those
/// that are routed meanwhile come last.
void run_few(std::span<const FfnCall> calls, Workspace& workspace, const ParallelFor& parallel);
void run_prefill(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel);

/// Experts, and how many of them each token has.
struct ActiveExperts {
  const PackedExperts& experts;
  std::int64_t k;
};
/// What they need of a workspace for up to `tokens` tokens.
std::size_t few_bytes(std::span<const ActiveExperts> all, std::int64_t tokens, std::int64_t parts);
std::size_t prefill_bytes(const PackedExperts& experts, std::int64_t tokens, std::int64_t k,
                          std::int64_t parts);

/// Workspace that linear() takes on one thread.
std::size_t linear_bytes(const PackedLinear& weight, std::int64_t rows);

/// sum [T, D] += part `part` of `parts` of the call. `scratch`: as many bytes as the next function
/// says.
void decode_share(const FfnCall& call, std::byte* scratch, MatrixView<float> sum, std::int64_t part,
                  std::int64_t parts);
std::size_t decode_scratch(const PackedExperts& experts, std::int64_t tokens, std::int64_t k);
/// The same; writes whole panels.
void dot_decode_share(const FfnCall& call, std::byte* scratch, MatrixView<float> sum,
                      std::int64_t part, std::int64_t parts);
std::size_t dot_decode_scratch(const PackedExperts& experts, std::int64_t tokens, std::int64_t k);

/// Cuts a piece of memory into arrays; with nullptr it only adds up what they need.
class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(std::int64_t count) {
    auto* here = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return here;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

/// The (token, slot) pairs of some tokens, by expert. An id of -1 is a slot that is not used.
struct PairGroups {
  /// Between the pairs of two experts: a cache line. Those that all of 512 tokens share would lie
  /// 2 kB apart without it, in two sets of a first-level cache, and each store would wait.
  static constexpr std::int32_t kGap = 16;
  static std::int64_t size(std::int64_t num_experts, std::int64_t pairs) {
    return pairs + kGap * num_experts;
  }

  std::int32_t* begin;  // [E + 1] pairs of expert e are [begin[e], begin[e] + rows(e))
  std::int32_t* next;   // [E] scratch
  std::int32_t* pair;   // [size(E, tokens * K)] t * K + k, ascending within an expert
  std::int32_t* token;  // [size(E, tokens * K)] their t, counted from the first

  std::int64_t rows(std::int64_t e) const { return begin[e + 1] - begin[e] - kGap; }
};
PairGroups carve_groups(Carver& from, std::int64_t num_experts, std::int64_t pairs);
/// Of tokens [first, first + count).
/// @throws InvalidArgument  a token has an expert twice
void group_pairs(const FfnCall& call, std::int64_t first, std::int64_t count, PairGroups& groups);

/// The same by several parts, each with a share of the tokens, in three steps: all count, one sums
/// up, all place.
class PairSorter {
 public:
  /// @param counts   [parts, E]
  /// @param weights  [PairGroups::size()] gets the call's weight of each, times its scale; or
  /// nullptr
  PairSorter(const FfnCall& call, std::int64_t first, std::int64_t count, const PairGroups& groups,
             std::int32_t* counts, std::int64_t parts, float* weights = nullptr)
      : call_(call),
        first_(first),
        count_(count),
        groups_(groups),
        counts_(counts),
        parts_(parts),
        weights_(weights) {}

  std::int64_t token_begin(std::int64_t part) const { return count_ * part / parts_; }
  void count(std::int64_t part) const;
  void sum_up() const;
  /// @throws InvalidArgument  a token has an expert twice
  void place(std::int64_t part) const;

 private:
  std::int32_t* counts(std::int64_t part) const {
    return counts_ + part * call_.experts.num_experts();
  }

  const FfnCall& call_;
  std::int64_t first_, count_;
  PairGroups groups_;
  std::int32_t* counts_;
  std::int64_t parts_;
  float* weights_;
};

/// Calls body(e, panel_begin, panel_end) for part `part` of `parts` equal shares of all experts'
/// panels; a panel of expert e costs cost(e), and one that costs nothing is left out.
template <typename Cost, typename Body>
void for_share_of_panels(const PackedExperts& experts, std::int64_t part, std::int64_t parts,
                         const Cost& cost, const Body& body) {
  const std::int64_t E = experts.num_experts();
  const auto panels = [&](std::int64_t e) {
    return experts.panel_begin(e + 1) - experts.panel_begin(e);
  };
  std::int64_t total = 0;
  for (std::int64_t e = 0; e < E; ++e) total += panels(e) * cost(e);
  const std::int64_t from = total * part / parts, to = total * (part + 1) / parts;
  std::int64_t before = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t each = cost(e);
    if (each == 0) continue;
    // The panel that holds a boundary belongs to the part that the boundary begins.
    const auto index = [&](std::int64_t at) {
      const std::int64_t offset = at - before;
      if (offset <= 0) return std::int64_t{0};
      return offset >= panels(e) * each ? panels(e) : (offset + each - 1) / each;
    };
    const std::int64_t begin = index(from), end = part + 1 == parts ? panels(e) : index(to);
    if (begin < end) body(e, experts.panel_begin(e) + begin, experts.panel_begin(e) + end);
    before += panels(e) * each;
  }
}

}  // namespace cleave
