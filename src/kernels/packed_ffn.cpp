#include "kernels/packed_ffn.h"

#include <algorithm>

namespace cleave {

PairGroups carve_groups(Carver& from, std::int64_t num_experts, std::int64_t pairs) {
  PairGroups groups;
  groups.begin = from.take<std::int32_t>(num_experts + 1);
  groups.next = from.take<std::int32_t>(num_experts);
  groups.pair = from.take<std::int32_t>(pairs);
  groups.token = from.take<std::int32_t>(pairs);
  return groups;
}

void group_pairs(const FfnCall& call, std::int64_t first, std::int64_t count, PairGroups& groups) {
  const std::int64_t E = call.experts.num_experts();
  const auto k = static_cast<std::int32_t>(call.k);
  const auto begin = static_cast<std::int32_t>(first * call.k);
  const auto end = static_cast<std::int32_t>((first + count) * call.k);
  std::fill_n(groups.begin, E + 1, 0);
  for (std::int32_t p = begin; p < end; ++p)
    if (call.ids[p] >= 0) ++groups.begin[call.ids[p] + 1];
  for (std::int64_t e = 0; e < E; ++e) groups.begin[e + 1] += groups.begin[e];
  std::copy_n(groups.begin, E, groups.next);
  std::int32_t token_begin = begin;
  for (std::int32_t t = 0; t < count; ++t, token_begin += k)
    for (std::int32_t p = token_begin; p < token_begin + k; ++p) {
      const std::int32_t e = call.ids[p];
      if (e < 0) continue;
      const std::int32_t at = groups.next[e]++;
      // Pairs ascend within an expert, so a second one of the same token would be a neighbour. Both
      // would add to one row of y at once.
      if (at > groups.begin[e] && groups.pair[at - 1] >= token_begin)
        fail_argument("moe_ffn: token {} has expert {} twice; its ids must be distinct", first + t,
                      e);
      groups.pair[at] = p;
      groups.token[at] = t;
    }
}

}  // namespace cleave
