// Routers that are read off the weights of the dense FFN.

#include <algorithm>
#include <string>
#include <utility>

#include "cleave/fit_router.h"
#include "fail.h"
#include "opening_rows.h"

namespace cleave {
namespace {

constexpr std::pair<RouterMethod, const char*> kRouterNames[] = {
    {RouterMethod::kTrained, "trained"},    {RouterMethod::kRidge, "ridge"},
    {RouterMethod::kLogistic, "logistic"},  {RouterMethod::kLowRank, "low-rank"},
    {RouterMethod::kMeanGate, "mean-gate"}, {RouterMethod::kRepresentative, "representative"}};

}  // namespace

const char* router_method_name(RouterMethod method) {
  for (const auto& [value, name] : kRouterNames)
    if (value == method) return name;
  return "unknown";
}

std::optional<RouterMethod> parse_router_method(const std::string& name) {
  for (const auto& [value, own] : kRouterNames)
    if (name == own) return value;
  return std::nullopt;
}

LinearRouter mean_gate_router(const FfnView& ffn, const NeuronPartition& partition) {
  const MatrixView<const float> rows = opening_rows(ffn);
  if (static_cast<std::int64_t>(partition.expert_of_neuron.size()) != rows.rows)
    fail_argument("mean_gate_router: the partition has {} neurons, the FFN {}",
                  partition.expert_of_neuron.size(), rows.rows);
  const std::int64_t E = partition.num_experts, D = rows.cols;
  LinearRouter router = zero_router(E, D);
  std::vector<double> sum(static_cast<std::size_t>(E * D), 0.0);
  std::vector<std::int64_t> members(static_cast<std::size_t>(E), 0);
  for (std::int64_t j = 0; j < rows.rows; ++j) {
    const std::int32_t e = partition.expert_of_neuron[j];
    if (e < 0) continue;
    if (e >= E) fail_argument("mean_gate_router: neuron {} is in expert {} of E = {}", j, e, E);
    ++members[e];
    for (std::int64_t d = 0; d < D; ++d) sum[e * D + d] += rows(j, d);
  }
  for (std::int64_t e = 0; e < E; ++e) {
    if (members[e] == 0) fail_argument("mean_gate_router: expert {} of {} has no neuron", e, E);
    for (std::int64_t d = 0; d < D; ++d)
      router.weight[e * D + d] =
          static_cast<float>(sum[e * D + d] / static_cast<double>(members[e]));
  }
  return router;
}

LinearRouter representative_router(const FfnView& ffn,
                                   std::span<const std::int32_t> representative) {
  const MatrixView<const float> rows = opening_rows(ffn);
  LinearRouter router = zero_router(static_cast<std::int64_t>(representative.size()), rows.cols);
  for (std::size_t e = 0; e < representative.size(); ++e) {
    const std::int32_t j = representative[e];
    if (j < 0 || j >= rows.rows)
      fail_argument("representative_router: neuron {} for expert {}; must be in [0, H = {})", j, e,
                    rows.rows);
    std::copy_n(rows.row(j), rows.cols,
                router.weight.data() + static_cast<std::int64_t>(e) * rows.cols);
  }
  return router;
}

}  // namespace cleave
