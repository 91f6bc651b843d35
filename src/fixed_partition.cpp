// The splits of a conversion to a budget that do not depend on a router.

#include <algorithm>
#include <cmath>
#include <utility>

#include "capture.h"
#include "cleave/calibrate.h"
#include "fail.h"
#include "partition_cmoe.h"
#include "support/buffer.h"

namespace cleave {
namespace {

constexpr std::pair<BudgetPartition, const char*> kBudgetPartitions[] = {
    {BudgetPartition::kCaptured, "captured"},
    {BudgetPartition::kProfiles, "profiles"},
    {BudgetPartition::kKMeans, "kmeans"},
    {BudgetPartition::kCoactivation, "coactivation"},
    {BudgetPartition::kCmoe, "cmoe"},
    {BudgetPartition::kExpertWeaver, "expertweaver"},
    {BudgetPartition::kImportance, "importance"},
    {BudgetPartition::kContiguous, "contiguous"},
    {BudgetPartition::kRandom, "random"}};

/// [H, H], how often two neurons are both among the most active of a token.
std::vector<float> coactivation_of(const LayerTokens& tokens, const ParallelFor& parallel) {
  const std::int64_t H = tokens.hidden.cols;
  NeuronStats stats({.num_layers = 1,
                     .hidden = H,
                     .d_model = tokens.input.cols,
                     .top = std::min(kCmoeTopNeurons, H),
                     .input_moment = false,
                     .coactivation = true});
  stats.observe(0, tokens.hidden, tokens.input, {}, parallel);
  return stats.coactivation(0);
}

/// [windows, H], mean of act(gate x), or act(up x) without a gate, over each window but its first
/// token, an attention sink.
std::vector<float> window_gate_means(const LayerTokens& tokens, const ParallelFor& parallel) {
  const std::int64_t H = tokens.hidden.cols, context = tokens.context;
  const bool gated = !tokens.ffn.gate.empty();
  Buffer hidden(context * H), gate(gated ? context * H : 0);
  const MatrixView<float> h(hidden.data(), context, H);
  const MatrixView<float> of_gate =
      gated ? MatrixView<float>(gate.data(), context, H) : MatrixView<float>();
  const MatrixView<float> g = gated ? of_gate : h;
  std::vector<float> means;
  for (std::int64_t first = 0; first + context <= tokens.input.rows; first += context) {
    hidden_activations(tokens.ffn, tokens.input.slice_rows(first, context), h, of_gate, parallel);
    std::vector<double> sum(static_cast<std::size_t>(H), 0.0);
    for (std::int64_t t = 1; t < context; ++t)
      for (std::int64_t j = 0; j < H; ++j) sum[j] += g(t, j);
    for (const double s : sum)
      means.push_back(static_cast<float>(s / static_cast<double>(context - 1)));
  }
  return means;
}

double row_norm(MatrixView<const float> rows, std::int64_t j) {
  double square = 0.0;
  for (std::int64_t d = 0; d < rows.cols; ++d)
    square += static_cast<double>(rows(j, d)) * rows(j, d);
  return std::sqrt(square);
}

/// [H], |gate row| |up row| |down column|.
std::vector<float> weight_importance(const LayerTokens& tokens) {
  std::vector<float> importance;
  for (std::int64_t j = 0; j < tokens.hidden.cols; ++j) {
    const double gate = tokens.ffn.gate.empty() ? 1.0 : row_norm(tokens.ffn.gate, j);
    importance.push_back(
        static_cast<float>(gate * row_norm(tokens.ffn.up, j) * std::sqrt(tokens.down_square[j])));
  }
  return importance;
}

NeuronPartition expert_weaver(const LayerTokens& tokens, const CaptureSpec& spec,
                              const ParallelFor& parallel) {
  const std::vector<float> means = window_gate_means(tokens, parallel);
  const std::int64_t H = tokens.hidden.cols, shared = spec.shared / spec.width;
  return partition_expert_weaver({means.data(), static_cast<std::int64_t>(means.size()) / H, H},
                                 {.num_experts = static_cast<std::int32_t>(spec.experts + shared),
                                  .shared_experts = static_cast<std::int32_t>(shared),
                                  .seed = spec.seed},
                                 parallel)
      .partition;
}

}  // namespace

const char* budget_partition_name(BudgetPartition partition) {
  for (const auto& [value, name] : kBudgetPartitions)
    if (value == partition) return name;
  return "unknown";
}

std::optional<BudgetPartition> parse_budget_partition(const std::string& name) {
  for (const auto& [value, own] : kBudgetPartitions)
    if (name == own) return value;
  return std::nullopt;
}

HiddenSample::HiddenSample(const LayerTokens& tokens)
    : rows(std::min(kSampleRows, tokens.hidden.rows)), neurons(tokens.hidden.cols) {
  hidden.reserve(static_cast<std::size_t>(rows * neurons));
  for (std::int64_t s = 0; s < rows; ++s) {
    // From the middle of its stretch: windows start at even places.
    const std::int64_t t = (2 * s + 1) * tokens.hidden.rows / (2 * rows);
    const float root = std::sqrt(tokens.weight[t]);
    for (std::int64_t j = 0; j < neurons; ++j) hidden.push_back(root * tokens.hidden(t, j));
  }
  for (const float square : tokens.down_square) down_norm.push_back(std::sqrt(square));
}

NeuronSample HiddenSample::view() const { return {{hidden.data(), rows, neurons}, down_norm}; }

NeuronPartition fixed_partition(const LayerTokens& tokens, const CaptureSpec& spec,
                                std::span<const std::int32_t> shared, const ParallelFor& parallel) {
  const RoutedSpec routed{.num_experts = static_cast<std::int32_t>(spec.experts),
                          .shared = {shared.begin(), shared.end()},
                          .seed = spec.seed};
  switch (spec.partition) {
    case BudgetPartition::kProfiles:
      return partition_profiles(HiddenSample(tokens).view(), routed, parallel);
    case BudgetPartition::kKMeans:
      return partition_neurons(tokens.ffn, PartitionMethod::kKMeans, routed);
    case BudgetPartition::kContiguous:
      return partition_neurons(tokens.ffn, PartitionMethod::kContiguous, routed);
    case BudgetPartition::kRandom:
      return partition_neurons(tokens.ffn, PartitionMethod::kRandom, routed);
    case BudgetPartition::kCoactivation: {
      const std::vector<float> counts = coactivation_of(tokens, parallel);
      const std::int64_t H = tokens.hidden.cols;
      return partition_coactivation({counts.data(), H, H}, routed);
    }
    case BudgetPartition::kCmoe:
      return partition_cmoe({HiddenSample(tokens).view().hidden},
                            {.num_experts = routed.num_experts,
                             .shared_neurons = spec.shared,
                             .top = std::min(kCmoeTopNeurons, tokens.hidden.cols)})
          .partition;
    case BudgetPartition::kExpertWeaver:
      return expert_weaver(tokens, spec, parallel);
    case BudgetPartition::kImportance:
      return partition_importance_spread(weight_importance(tokens), routed);
    case BudgetPartition::kCaptured:
      break;
  }
  fail_argument("fixed_partition: 'captured' depends on a router; use capture_energy()");
}

}  // namespace cleave
