// group_tokens on the CPU: a counting sort. Definition: group_tokens_reference.cpp.

#include <fmt/format.h>

#include <algorithm>

#include "cleave/error.h"
#include "cleave/kernels.h"
#include "kernels/check_routing.h"

namespace cleave {

std::int64_t find_foreign_id(const RoutingView& routing, std::int64_t num_experts) {
  const std::int64_t pairs = routing.num_tokens * routing.experts_per_token;
  // Without a way out, so that it runs by vectors.
  std::int32_t least = 0, most = 0;
  for (std::int64_t i = 0; i < pairs; ++i) {
    least = std::min(least, routing.ids[i]);
    most = std::max(most, routing.ids[i]);
  }
  if (least >= Routing::kUnused && most < num_experts) return -1;
  for (std::int64_t i = 0; i < pairs; ++i)
    if (routing.ids[i] < Routing::kUnused || routing.ids[i] >= num_experts) return i;
  return -1;
}

std::int64_t find_repeated_id(const RoutingView& routing, std::int64_t num_experts) {
  constexpr std::int64_t kWindow = 4096;  // experts that are looked at together: 16 kB
  std::int32_t last[kWindow];             // token that had this expert
  const std::int64_t K = routing.experts_per_token;
  for (std::int64_t first = 0; first < num_experts; first += kWindow) {
    const auto count = static_cast<std::uint64_t>(std::min(kWindow, num_experts - first));
    std::fill_n(last, count, -1);
    const std::int32_t* ids = routing.ids;
    for (std::int32_t t = 0; t < routing.num_tokens; ++t, ids += K)
      for (std::int64_t k = 0; k < K; ++k) {
        const auto e = static_cast<std::uint64_t>(ids[k] - first);
        if (e >= count) continue;  // unused, or of another window
        if (last[e] == t) return t * K + k;
        last[e] = t;
      }
  }
  return -1;
}

void check_routing(const char* function, const RoutingView& routing, std::int64_t num_experts) {
  const std::int64_t i = find_foreign_id(routing, num_experts);
  if (i < 0) return;
  throw InvalidArgument(fmt::format(
      "{}: token {} is routed to expert {}, but there are {} experts (0 to {}); was the routing "
      "made for another layer?",
      function, i / routing.experts_per_token, routing.ids[i], num_experts, num_experts - 1));
}

RoutingView checked_view(const char* function, const Routing& routing) {
  const auto pairs = static_cast<std::size_t>(routing.num_tokens * routing.experts_per_token);
  if (routing.ids.size() != pairs || routing.weights.size() != pairs)
    throw InvalidArgument(fmt::format(
        "{}: routing of {} tokens x {} experts has {} ids and {} weights; both must be {}",
        function, routing.num_tokens, routing.experts_per_token, routing.ids.size(),
        routing.weights.size(), pairs));
  return {routing.num_tokens, routing.experts_per_token, routing.ids.data(),
          routing.weights.data()};
}

void check_routing(const char* function, const Routing& routing, std::int64_t num_experts) {
  check_routing(function, checked_view(function, routing), num_experts);
}

TokenGroups group_tokens(const Routing& routing, std::int64_t num_experts) {
  check_routing("group_tokens", routing, num_experts);
  TokenGroups groups;
  groups.begin.assign(num_experts + 1, 0);
  std::int64_t unused = 0;
  for (const std::int32_t id : routing.ids)
    if (id == Routing::kUnused)
      ++unused;
    else
      ++groups.begin[id + 1];
  groups.pair.resize(routing.ids.size() - unused);
  for (std::int64_t e = 0; e < num_experts; ++e) groups.begin[e + 1] += groups.begin[e];
  std::vector<std::int64_t> next(groups.begin.begin(), groups.begin.end() - 1);
  for (std::size_t pair = 0; pair < routing.ids.size(); ++pair)
    if (routing.ids[pair] != Routing::kUnused)
      groups.pair[next[routing.ids[pair]]++] = static_cast<std::int64_t>(pair);
  return groups;
}

}  // namespace cleave
