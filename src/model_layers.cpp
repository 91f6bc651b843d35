// What a model's layers hold, and what may change about them while it runs.

#include <algorithm>
#include <utility>

#include "cleave/export.h"
#include "fail.h"
#include "model_impl.h"
#include "moe_layer_check.h"

namespace cleave {

DenseFfn Model::dense_ffn(std::int64_t layer) const {
  const auto* dense = std::get_if<PackedExperts>(&impl_->layer("Model::dense_ffn", layer).ffn);
  if (dense == nullptr) fail_argument("Model::dense_ffn: layer {} holds experts", layer);
  ExpertBank bank = dense->unpack();
  DenseFfn ffn;
  ffn.hidden = bank.dense_hidden;
  ffn.d_model = bank.d_model;
  ffn.gate = std::move(bank.gate);
  ffn.up = std::move(bank.up);
  const std::int64_t H = ffn.hidden, D = ffn.d_model;
  ffn.down.resize(D * H);
  for (std::int64_t j = 0; j < H; ++j)
    for (std::int64_t c = 0; c < D; ++c) ffn.down[c * H + j] = bank.down_t[j * D + c];
  ffn.gate_bias = std::move(bank.gate_bias);
  ffn.up_bias = std::move(bank.up_bias);
  ffn.down_bias = std::move(bank.down_bias);
  ffn.activation = bank.activation;
  return ffn;
}

MoeLayer Model::moe_layer(std::int64_t layer) const {
  const auto* moe = std::get_if<PackedMoe>(&impl_->layer("Model::moe_layer", layer).ffn);
  if (moe == nullptr) fail_argument("Model::moe_layer: layer {} is dense", layer);
  MoeLayer result;
  result.experts = moe->experts.unpack();
  const std::int64_t E = result.experts.num_experts(), D = result.experts.d_model;
  result.router = {E, D, std::vector<float>(static_cast<std::size_t>(E * D))};
  for (std::int64_t e = 0; e < E; ++e)
    moe->router.unpack_row(e, result.router.weight.data() + e * D);
  result.experts_per_token = moe->experts_per_token;
  result.gate = moe->gate;
  result.scale = moe->scale;
  if (moe->shared.num_experts() > 0) result.shared = moe->shared.unpack();
  return result;
}

std::int64_t Model::num_experts(std::int64_t layer) const {
  const auto* moe = std::get_if<PackedMoe>(&impl_->layer("Model::num_experts", layer).ffn);
  return moe != nullptr ? moe->experts.num_experts() : 0;
}

std::int64_t Model::weight_bytes() const {
  const DecoderWeights& w = impl_->weights;
  std::int64_t bytes = w.embedding.bytes();
  if (w.head.data() != w.embedding.data()) bytes += w.head.bytes();
  for (const LayerWeights& layer : w.layers) {
    bytes += layer.qkv.bytes() + layer.output.bytes();
    if (const auto* moe = std::get_if<PackedMoe>(&layer.ffn))
      bytes += moe->experts.bytes() + moe->shared.bytes() + moe->router.bytes();
    else
      bytes += std::get<PackedExperts>(layer.ffn).bytes();
  }
  return bytes;
}

void Model::Impl::restore_hard_gates() {
  if (directory.empty()) return;
  const auto provenance = read_provenance(directory);
  directory.clear();  // once
  if (!provenance || provenance->gate != GateMode::kHard ||
      provenance->experts_per_token != config.experts_per_token)
    return;
  for (std::size_t l = 0; l < weights.layers.size(); ++l) {
    auto* moe = std::get_if<PackedMoe>(&weights.layers[l].ffn);
    if (moe == nullptr || replaced[l] != 0) continue;
    moe->gate = GateMode::kHard;
    moe->scale /= static_cast<float>(moe->experts_per_token);
  }
}

void Model::set_active_experts(std::int64_t experts_per_token) {
  const std::int64_t E = impl_->config.num_experts;
  if (!impl_->config.is_moe())
    fail_argument("Model::set_active_experts: the model has no experts; convert it first");
  if (experts_per_token < 1 || experts_per_token > E)
    fail_argument("Model::set_active_experts: K = {}; must be in [1, E = {}]", experts_per_token,
                  E);
  impl_->restore_hard_gates();
  impl_->config.experts_per_token = experts_per_token;
  for (LayerWeights& layer : impl_->weights.layers)
    if (auto* moe = std::get_if<PackedMoe>(&layer.ffn))
      moe->experts_per_token = std::min(experts_per_token, moe->experts.num_experts());
}

void Model::set_router_threshold(std::int64_t layer, float threshold) {
  if (num_experts(layer) == 0)
    fail_argument("Model::set_router_threshold: layer {} has no experts", layer);
  if (!(threshold >= 0.0f && threshold <= 1.0f))
    fail_argument("Model::set_router_threshold: {}; must be in [0, 1]", threshold);
  impl_->restore_hard_gates();
  impl_->thresholds[layer] = threshold;
}

void Model::set_moe(std::int64_t layer, const MoeLayer& moe) {
  impl_->layer("Model::set_moe", layer);
  if (moe.experts.d_model != impl_->config.hidden_size)
    fail_argument("Model::set_moe: the experts have width D = {}, the model {}",
                  moe.experts.d_model, impl_->config.hidden_size);
  check_shared("Model::set_moe", moe);
  impl_->weights.layers[layer].ffn = pack(moe, impl_->type, parallel());
  impl_->replaced[layer] = 1;
}

}  // namespace cleave
