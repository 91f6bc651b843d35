#include "cleave/kernels.h"
#include "kernels/check_routing.h"

namespace cleave {

TokenGroups group_tokens_reference(const Routing& routing, std::int64_t num_experts) {
  check_routing("group_tokens_reference", routing, num_experts);
  TokenGroups groups;
  groups.begin.push_back(0);
  for (std::int64_t e = 0; e < num_experts; ++e) {
    for (std::size_t pair = 0; pair < routing.ids.size(); ++pair)
      if (routing.ids[pair] == e) groups.pair.push_back(static_cast<std::int64_t>(pair));
    groups.begin.push_back(static_cast<std::int64_t>(groups.pair.size()));
  }
  return groups;
}

}  // namespace cleave
