#pragma once

#include <cmath>
#include <cstdint>

#include "cleave/expert.h"
#include "cleave/moe_layer.h"
#include "support/random_ffn.h"

// Layers with shared experts, cut without the converter.
namespace cleave::testing {

struct HandSplit {
  std::int64_t shared = 8;  ///< neurons of the shared slice; 0: none
  std::int64_t num_experts = 4;
  std::int64_t experts_per_token = 2;
  GateMode gate = GateMode::kSoftmax;
  std::uint64_t seed = 0;  ///< of the router, which is zero with all experts on
};

/// Neurons [begin, begin + E * width) of an FFN as E contiguous experts.
inline ExpertBank contiguous_bank(const FfnView& ffn, std::int64_t begin, std::int64_t E,
                                  std::int64_t width) {
  const std::int64_t D = ffn.up.cols;
  ExpertBank bank;
  bank.d_model = D;
  bank.dense_hidden = ffn.up.rows;
  bank.activation = ffn.activation;
  for (std::int64_t e = 0; e <= E; ++e) bank.begin.push_back(e * width);
  for (std::int64_t j = begin; j < begin + E * width; ++j) {
    bank.neuron_order.push_back(static_cast<std::int32_t>(j));
    if (!ffn.gate.empty()) bank.gate.insert(bank.gate.end(), ffn.gate.row(j), ffn.gate.row(j) + D);
    bank.up.insert(bank.up.end(), ffn.up.row(j), ffn.up.row(j) + D);
    if (!ffn.gate_bias.empty()) bank.gate_bias.push_back(ffn.gate_bias[j]);
    if (!ffn.up_bias.empty()) bank.up_bias.push_back(ffn.up_bias[j]);
    for (std::int64_t c = 0; c < D; ++c) bank.down_t.push_back(ffn.down(c, j));
  }
  return bank;
}

/// The first neurons are the shared slice, the others the experts. All of them on, it is the FFN.
inline MoeLayer split_by_hand(const FfnView& ffn, const HandSplit& s) {
  const std::int64_t E = s.num_experts, K = s.experts_per_token, D = ffn.up.cols;
  MoeLayer layer;
  layer.experts = contiguous_bank(ffn, s.shared, E, (ffn.up.rows - s.shared) / E);
  layer.experts.down_bias.assign(ffn.down_bias.begin(), ffn.down_bias.end());
  if (s.shared > 0) layer.shared = contiguous_bank(ffn, 0, 1, s.shared);
  layer.router = {E, D, std::vector<float>(static_cast<std::size_t>(E * D))};
  // Logits of about 1: a softmax that leaves all but one expert out would break a trained model.
  if (K < E)
    layer.router.weight =
        random_values(E * D, s.seed + 77, 1.0 / std::sqrt(static_cast<double>(D)));
  layer.experts_per_token = K;
  layer.gate = s.gate;
  layer.scale = s.gate == GateMode::kHard ? 1.0f : static_cast<float>(K);  // an average weight of 1
  return layer;
}

/// The first `hidden` neurons of an FFN, as an FFN of its own.
inline DenseFfn first_neurons(const DenseFfn& ffn, std::int64_t hidden) {
  DenseFfn kept = ffn;
  const std::int64_t D = ffn.d_model;
  kept.hidden = hidden;
  if (!kept.gate.empty()) kept.gate.resize(static_cast<std::size_t>(hidden * D));
  for (std::vector<float>* bias : {&kept.gate_bias, &kept.up_bias})
    if (!bias->empty()) bias->resize(static_cast<std::size_t>(hidden));
  kept.up.resize(static_cast<std::size_t>(hidden * D));
  kept.down.clear();
  for (std::int64_t c = 0; c < D; ++c)
    kept.down.insert(kept.down.end(), ffn.down.begin() + c * ffn.hidden,
                     ffn.down.begin() + c * ffn.hidden + hidden);
  return kept;
}

}  // namespace cleave::testing
