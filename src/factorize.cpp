#include "cleave/factorize.h"

#include <fmt/format.h>

#include <algorithm>

#include "cleave/error.h"

namespace cleave {
namespace {

void check_bias(const char* name, std::size_t size, std::int64_t expected) {
  if (size != 0 && size != static_cast<std::size_t>(expected))
    throw InvalidArgument(
        fmt::format("factorize: {} has {} entries; must be empty or {}", name, size, expected));
}

void check_shapes(const FfnView& ffn, const NeuronPartition& partition) {
  const std::int64_t hidden = ffn.up.rows, d_model = ffn.up.cols;
  if (ffn.up.empty()) throw InvalidArgument("factorize: the FFN has no `up` matrix [H, D]");
  if (!ffn.gate.empty() && (ffn.gate.rows != hidden || ffn.gate.cols != d_model))
    throw InvalidArgument(fmt::format("factorize: gate is [{}, {}] but up is [{}, {}]; must agree",
                                      ffn.gate.rows, ffn.gate.cols, hidden, d_model));
  if (ffn.down.rows != d_model || ffn.down.cols != hidden)
    throw InvalidArgument(fmt::format(
        "factorize: down is [{}, {}] but up is [{}, {}]; down must be [D, H] = [{}, {}]",
        ffn.down.rows, ffn.down.cols, hidden, d_model, d_model, hidden));
  check_bias("gate_bias", ffn.gate_bias.size(), hidden);
  check_bias("up_bias", ffn.up_bias.size(), hidden);
  check_bias("down_bias", ffn.down_bias.size(), d_model);
  if (ffn.gate.empty() && !ffn.gate_bias.empty())
    throw InvalidArgument("factorize: gate_bias without a gate; leave it empty");
  if (partition.expert_of_neuron.size() != static_cast<std::size_t>(hidden))
    throw InvalidArgument(
        fmt::format("factorize: partition has {} entries but the FFN has {} hidden neurons; was it "
                    "computed for another layer?",
                    partition.expert_of_neuron.size(), hidden));
}

/// The neurons of every expert, ascending.
std::vector<std::vector<std::int32_t>> members_of(const NeuronPartition& partition) {
  if (partition.num_experts < 1)
    throw InvalidArgument(
        fmt::format("factorize: partition has E = {}; must be at least 1", partition.num_experts));
  std::vector<std::vector<std::int32_t>> members(static_cast<std::size_t>(partition.num_experts));
  for (std::size_t j = 0; j < partition.expert_of_neuron.size(); ++j) {
    const std::int32_t e = partition.expert_of_neuron[j];
    if (e == NeuronPartition::kDropped || e == NeuronPartition::kShared) continue;
    if (e < 0 || e >= partition.num_experts)
      throw InvalidArgument(fmt::format(
          "factorize: neuron {} belongs to expert {}; must be in [0, {}), kDropped or kShared", j,
          e, partition.num_experts));
    members[e].push_back(static_cast<std::int32_t>(j));
  }
  for (std::size_t e = 0; e < members.size(); ++e)
    if (members[e].empty())
      throw InvalidArgument(fmt::format(
          "factorize: expert {} of {} received no neuron (H = {}); use fewer experts or the "
          "balanced partitioner",
          e, partition.num_experts, partition.expert_of_neuron.size()));
  return members;
}

std::vector<float> gather_rows(MatrixView<const float> matrix,
                               const std::vector<std::int32_t>& order) {
  std::vector<float> rows(order.size() * static_cast<std::size_t>(matrix.cols));
  for (std::size_t r = 0; r < order.size(); ++r)
    std::copy_n(matrix.row(order[r]), matrix.cols, rows.data() + r * matrix.cols);
  return rows;
}

std::vector<float> gather_columns(MatrixView<const float> matrix,
                                  const std::vector<std::int32_t>& order) {
  std::vector<float> rows(order.size() * static_cast<std::size_t>(matrix.rows));
  // Row by row of `matrix`: it is the larger stride of the two and may be memory-mapped.
  for (std::int64_t d = 0; d < matrix.rows; ++d) {
    const float* row = matrix.row(d);
    for (std::size_t r = 0; r < order.size(); ++r) rows[r * matrix.rows + d] = row[order[r]];
  }
  return rows;
}

std::vector<float> gather(std::span<const float> values, const std::vector<std::int32_t>& order) {
  if (values.empty()) return {};
  std::vector<float> gathered(order.size());
  for (std::size_t r = 0; r < order.size(); ++r) gathered[r] = values[order[r]];
  return gathered;
}

/// The bank of these neurons, all in one expert; without down_bias.
ExpertBank bank_of(const FfnView& ffn, std::vector<std::int32_t> order) {
  ExpertBank bank;
  bank.d_model = ffn.up.cols;
  bank.dense_hidden = ffn.up.rows;
  bank.activation = ffn.activation;
  bank.begin = {0};
  if (!order.empty()) bank.begin.push_back(static_cast<std::int64_t>(order.size()));
  bank.neuron_order = std::move(order);
  if (!ffn.gate.empty()) bank.gate = gather_rows(ffn.gate, bank.neuron_order);
  bank.up = gather_rows(ffn.up, bank.neuron_order);
  bank.down_t = gather_columns(ffn.down, bank.neuron_order);
  bank.gate_bias = gather(ffn.gate_bias, bank.neuron_order);
  bank.up_bias = gather(ffn.up_bias, bank.neuron_order);
  return bank;
}

/// Into `dense`, which becomes [hidden, cols] zeros if it is empty.
void scatter_rows(const std::vector<float>& rows, const std::vector<std::int32_t>& order,
                  std::int64_t cols, std::int64_t hidden, std::vector<float>& dense) {
  if (rows.empty()) return;
  dense.resize(static_cast<std::size_t>(hidden * cols), 0.0f);
  for (std::size_t r = 0; r < order.size(); ++r)
    if (order[r] != ExpertBank::kPadding)
      std::copy_n(rows.data() + r * cols, cols, dense.data() + order[r] * cols);
}

void scatter_bank(const ExpertBank& bank, DenseFfn& ffn) {
  const std::int64_t hidden = ffn.hidden, d_model = ffn.d_model;
  scatter_rows(bank.gate, bank.neuron_order, d_model, hidden, ffn.gate);
  scatter_rows(bank.up, bank.neuron_order, d_model, hidden, ffn.up);
  scatter_rows(bank.gate_bias, bank.neuron_order, 1, hidden, ffn.gate_bias);
  scatter_rows(bank.up_bias, bank.neuron_order, 1, hidden, ffn.up_bias);
  for (std::size_t r = 0; r < bank.neuron_order.size(); ++r)
    for (std::int64_t d = 0; d < d_model && bank.neuron_order[r] != ExpertBank::kPadding; ++d)
      ffn.down[d * hidden + bank.neuron_order[r]] = bank.down_t[r * d_model + d];
}

}  // namespace

ExpertBank factorize(const FfnView& ffn, const NeuronPartition& partition) {
  check_shapes(ffn, partition);
  std::vector<std::int32_t> order;
  std::vector<std::int64_t> begin = {0};
  for (const auto& neurons : members_of(partition)) {
    order.insert(order.end(), neurons.begin(), neurons.end());
    begin.push_back(static_cast<std::int64_t>(order.size()));
  }
  ExpertBank bank = bank_of(ffn, std::move(order));
  bank.begin = std::move(begin);
  bank.down_bias.assign(ffn.down_bias.begin(), ffn.down_bias.end());
  return bank;
}

ExpertBank shared_slice(const FfnView& ffn, const NeuronPartition& partition) {
  check_shapes(ffn, partition);
  std::vector<std::int32_t> order;
  for (std::size_t j = 0; j < partition.expert_of_neuron.size(); ++j)
    if (partition.expert_of_neuron[j] == NeuronPartition::kShared)
      order.push_back(static_cast<std::int32_t>(j));
  return bank_of(ffn, std::move(order));
}

DenseFfn to_dense(const ExpertBank& bank) {
  DenseFfn ffn;
  ffn.hidden = bank.dense_hidden;
  ffn.d_model = bank.d_model;
  ffn.activation = bank.activation;
  ffn.down.assign(static_cast<std::size_t>(ffn.d_model * ffn.hidden), 0.0f);
  scatter_bank(bank, ffn);
  ffn.down_bias = bank.down_bias;
  return ffn;
}

DenseFfn to_dense(const ExpertBank& bank, const ExpertBank& shared) {
  if (bank.dense_hidden != shared.dense_hidden || bank.d_model != shared.d_model ||
      bank.activation != shared.activation ||
      (shared.rows() > 0 && bank.gate.empty() != shared.gate.empty()))
    throw InvalidArgument(fmt::format(
        "to_dense: the routed bank was cut from an FFN of H = {}, D = {}, the shared one from H = "
        "{}, D = {}, or from another kind; give both parts of one FFN",
        bank.dense_hidden, bank.d_model, shared.dense_hidden, shared.d_model));
  std::vector<char> taken(static_cast<std::size_t>(bank.dense_hidden), 0);
  for (const std::int32_t j : bank.neuron_order)
    if (j != ExpertBank::kPadding) taken[j] = 1;
  for (const std::int32_t j : shared.neuron_order)
    if (taken[j] != 0)
      throw InvalidArgument(
          fmt::format("to_dense: neuron {} is in the routed and in the shared bank", j));
  DenseFfn ffn = to_dense(bank);
  scatter_bank(shared, ffn);
  return ffn;
}

}  // namespace cleave
