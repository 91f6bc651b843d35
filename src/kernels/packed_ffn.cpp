#include "kernels/packed_ffn.h"

#include <algorithm>

namespace cleave {

PairGroups carve_groups(Carver& from, std::int64_t num_experts, std::int64_t pairs) {
  PairGroups groups;
  groups.begin = from.take<std::int32_t>(num_experts + 1);
  groups.next = from.take<std::int32_t>(num_experts);
  const std::int64_t room = PairGroups::size(num_experts, pairs);
  groups.pair = from.take<std::int32_t>(room);
  groups.token = from.take<std::int32_t>(room);
  return groups;
}

void PairSorter::count(std::int64_t part) const {
  std::int32_t* counts = this->counts(part);
  std::fill_n(counts, call_.experts.num_experts(), 0);
  const std::int64_t begin = (first_ + token_begin(part)) * call_.k;
  const std::int64_t end = (first_ + token_begin(part + 1)) * call_.k;
  for (std::int64_t p = begin; p < end; ++p)
    if (call_.ids[p] >= 0) ++counts[call_.ids[p]];
}

void PairSorter::sum_up() const {
  std::int32_t sum = 0;
  for (std::int64_t e = 0; e < call_.experts.num_experts(); ++e) {
    groups_.begin[e] = sum;
    for (std::int64_t part = 0; part < parts_; ++part) {
      const std::int32_t n = counts(part)[e];
      counts(part)[e] = sum;  // where the part's pairs begin
      sum += n;
    }
    sum += PairGroups::kGap;
  }
  groups_.begin[call_.experts.num_experts()] = sum;
}

void PairSorter::place(std::int64_t part) const {
  std::int32_t* next = counts(part);
  const auto k = static_cast<std::int32_t>(call_.k);
  const auto end = static_cast<std::int32_t>(token_begin(part + 1));
  std::int32_t twice = -1;  // pair
  for (auto t = static_cast<std::int32_t>(token_begin(part)); t < end; ++t) {
    const auto pairs = static_cast<std::int32_t>((first_ + t) * k);
    for (std::int32_t p = pairs; p < pairs + k; ++p) {
      const std::int32_t e = call_.ids[p];
      if (e < 0) continue;
      const std::int32_t at = next[e]++;
      groups_.pair[at] = p;
      groups_.token[at] = t;
      if (weights_ != nullptr) weights_[at] = call_.scale * call_.weights[p];
    }
    // Two pairs of a token with one expert are neighbours now. Both would add to one row of y at
    // once.
    for (std::int32_t p = pairs; p < pairs + k; ++p) {
      const std::int32_t e = call_.ids[p];
      if (e >= 0 && groups_.pair[next[e] - 1] != p && twice < 0) twice = p;
    }
  }
  // Only now, so that nobody finds pairs that were never placed.
  if (twice >= 0)
    fail_argument("moe_ffn: token {} has expert {} twice; its ids must be distinct", twice / k,
                  call_.ids[twice]);
}

void group_pairs(const FfnCall& call, std::int64_t first, std::int64_t count, PairGroups& groups) {
  const PairSorter sorter(call, first, count, groups, groups.next, 1);
  sorter.count(0);
  sorter.sum_up();
  sorter.place(0);
}

}  // namespace cleave
