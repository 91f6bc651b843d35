#include "decoder_weights.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <string>

#include "cleave/export.h"
#include "decoder_tensors.h"

namespace cleave {
namespace {

class Loader {
 public:
  Loader(const Checkpoint& checkpoint, WeightType type, const ParallelFor& parallel)
      : source_(checkpoint), c_(checkpoint.config()), type_(type), parallel_(parallel) {}

  DecoderWeights load() const {
    check_decoder_tensors(c_, source_.tensors(), source_.path().string());
    DecoderWeights weights;
    weights.embedding = linear("model.embed_tokens.weight", vocabulary_type());
    for (std::int64_t l = 0; l < c_.num_layers; ++l) weights.layers.push_back(layer(l));
    weights.final_norm = source_.read("model.norm.weight");
    weights.head =
        c_.tie_word_embeddings ? weights.embedding : linear("lm_head.weight", vocabulary_type());
    return weights;
  }

 private:
  // A token has one row of the vocabulary's matrices to itself, and no other weight repairs it:
  // 4 bits cost more there than they save.
  WeightType vocabulary_type() const {
    return type_ == WeightType::kInt4 ? WeightType::kInt8 : type_;
  }

  PackedLinear linear(const std::string& name, WeightType type) const {
    const std::vector<float> weight = source_.read(name);
    const auto& shape = source_.info(name).shape;
    return PackedLinear({weight.data(), shape[0], shape[1]}, type, parallel_);
  }

  LayerWeights layer(std::int64_t l) const {
    const std::string prefix = fmt::format("model.layers.{}.", l);
    const std::string attention = prefix + "self_attn.";
    LayerWeights w;
    w.input_norm = source_.read(prefix + "input_layernorm.weight");
    w.post_norm = source_.read(prefix + "post_attention_layernorm.weight");
    // One matrix: q, k and v are products of the same input.
    std::vector<float> qkv;
    for (const char* name : {"q_proj", "k_proj", "v_proj"}) {
      append(attention + name + ".weight", qkv);
      if (c_.attention_bias) append(attention + name + ".bias", w.qkv_bias);
    }
    const auto rows = static_cast<std::int64_t>(qkv.size()) / c_.hidden_size;
    w.qkv = PackedLinear({qkv.data(), rows, c_.hidden_size}, type_, parallel_);
    w.output = linear(attention + "o_proj.weight", type_);
    if (c_.attention_bias) w.output_bias = source_.read(attention + "o_proj.bias");
    if (c_.is_moe())
      w.ffn = pack(moe_layer(l), type_, parallel_);
    else
      w.ffn = PackedExperts(dense_ffn(prefix + "mlp.").view(), type_, parallel_);
    return w;
  }

  DenseFfn dense_ffn(const std::string& prefix) const {
    DenseFfn ffn;
    ffn.hidden = c_.intermediate_size;
    ffn.d_model = c_.hidden_size;
    ffn.activation = c_.activation;
    ffn.gate = source_.read(prefix + "gate_proj.weight");
    ffn.up = source_.read(prefix + "up_proj.weight");
    ffn.down = source_.read(prefix + "down_proj.weight");
    if (!c_.mlp_bias) return ffn;
    ffn.gate_bias = source_.read(prefix + "gate_proj.bias");
    ffn.up_bias = source_.read(prefix + "up_proj.bias");
    ffn.down_bias = source_.read(prefix + "down_proj.bias");
    return ffn;
  }

  // The checkpoint does not tell which dense neuron a row came from (cleave.json may): the order of
  // its own rows is the dense order of what it says.
  MoeLayer moe_layer(std::int64_t l) const {
    const std::int64_t E = c_.num_experts, I = c_.intermediate_size, D = c_.hidden_size;
    MoeLayer layer;
    ExpertBank& bank = layer.experts;
    bank.d_model = D;
    bank.dense_hidden = E * I;
    bank.activation = c_.activation;
    bank.neuron_order.resize(E * I);
    std::iota(bank.neuron_order.begin(), bank.neuron_order.end(), 0);
    bank.down_t.resize(E * I * D);
    for (std::int64_t e = 0; e < E; ++e) {
      bank.begin.push_back(e * I);
      append(MixtralNames::gate(l, e), bank.gate);
      append(MixtralNames::up(l, e), bank.up);
      const std::vector<float> down = source_.read(MixtralNames::down(l, e));
      float* rows = bank.down_t.data() + e * I * D;
      for (std::int64_t c = 0; c < D; ++c)
        for (std::int64_t j = 0; j < I; ++j) rows[j * D + c] = down[c * I + j];
    }
    bank.begin.push_back(E * I);
    layer.router = {E, D, source_.read(MixtralNames::router(l))};
    layer.experts_per_token = c_.experts_per_token;
    return layer;
  }

  void append(const std::string& name, std::vector<float>& to) const {
    const std::size_t before = to.size();
    to.resize(before + source_.info(name).num_elements());
    source_.read(name, std::span(to).subspan(before));
  }

  const Checkpoint& source_;
  const ModelConfig& c_;
  WeightType type_;
  const ParallelFor& parallel_;
};

}  // namespace

PackedMoe pack(const MoeLayer& layer, WeightType type, const ParallelFor& parallel) {
  return {PackedExperts(layer.experts, type, parallel),
          PackedLinear(layer.router.view(), WeightType::kF32, parallel), layer.experts_per_token,
          layer.gate, layer.scale};
}

DecoderWeights load_decoder(const Checkpoint& checkpoint, WeightType type,
                            const ParallelFor& parallel) {
  return Loader(checkpoint, type, parallel).load();
}

}  // namespace cleave
