// Reading a checkpoint into tensors and handing the tensors back under their stored names.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "cleave/error.h"
#include "cleave/train/transformer.h"
#include "train/named_tensor.h"
#include "train/require.h"

namespace cleave::train {
namespace {

/// Reads tensors as float32 and puts them where and how the model wants them.
struct Loader {
  const Checkpoint& checkpoint;
  at::ScalarType dtype;
  at::Device device;

  at::Tensor read_float(const std::string& name, std::initializer_list<std::int64_t> shape) const {
    std::vector<float> values = checkpoint.read(name, shape);
    return at::from_blob(values.data(), at::IntArrayRef(shape), at::kFloat).clone();
  }
  at::Tensor place(const at::Tensor& t) const { return t.to(device, dtype); }
  at::Tensor operator()(const std::string& name, std::initializer_list<std::int64_t> shape) const {
    return place(read_float(name, shape));
  }
  at::Tensor optional(bool present, const std::string& name, std::int64_t size) const {
    return present ? (*this)(name, {size}) : at::Tensor();
  }
  /// [E, rows, cols] from one 2-D tensor per expert, each divided by `factor`.
  at::Tensor stack(std::int64_t num_experts, std::int64_t rows, std::int64_t cols, double factor,
                   const std::function<std::string(std::int64_t)>& name) const {
    at::Tensor all = at::empty({num_experts, rows, cols}, at::kFloat);
    for (std::int64_t e = 0; e < num_experts; ++e) {
      all.select(0, e).copy_(read_float(name(e), {rows, cols}));
    }
    return place(factor == 1.0 ? all : all / factor);
  }
};

std::string layer_prefix(std::int64_t layer) { return fmt::format("model.layers.{}.", layer); }

void load_attention(const Loader& load, const ModelConfig& config, std::int64_t index,
                    DecoderLayer& layer) {
  const std::string prefix = layer_prefix(index), self = prefix + "self_attn.";
  const std::int64_t d = config.hidden_size, q = config.num_heads * config.head_dim,
                     kv = config.num_kv_heads * config.head_dim;
  layer.input_norm = load(prefix + "input_layernorm.weight", {d});
  layer.post_attention_norm = load(prefix + "post_attention_layernorm.weight", {d});
  layer.q = load(self + "q_proj.weight", {q, d});
  layer.k = load(self + "k_proj.weight", {kv, d});
  layer.v = load(self + "v_proj.weight", {kv, d});
  layer.o = load(self + "o_proj.weight", {d, q});
  layer.q_bias = load.optional(config.attention_bias, self + "q_proj.bias", q);
  layer.k_bias = load.optional(config.attention_bias, self + "k_proj.bias", kv);
  layer.v_bias = load.optional(config.attention_bias, self + "v_proj.bias", kv);
  layer.o_bias = load.optional(config.attention_bias, self + "o_proj.bias", d);
}

DenseFfn load_dense(const Loader& load, const ModelConfig& config, std::int64_t index) {
  const std::string mlp = layer_prefix(index) + "mlp.";
  const std::int64_t d = config.hidden_size, hidden = config.intermediate_size;
  FfnBiases biases{load.optional(config.mlp_bias, mlp + "gate_proj.bias", hidden),
                   load.optional(config.mlp_bias, mlp + "up_proj.bias", hidden),
                   load.optional(config.mlp_bias, mlp + "down_proj.bias", d)};
  return DenseFfn(load(mlp + "gate_proj.weight", {hidden, d}),
                  load(mlp + "up_proj.weight", {hidden, d}),
                  load(mlp + "down_proj.weight", {d, hidden}), config.activation, biases);
}

/// What was done to a layer's weights when the directory was written; nothing for a stock model.
struct Folding {
  GateMode gate = GateMode::kSoftmax;
  double scale = 1.0;    ///< `down` was multiplied by it
  double epsilon = 1.0;  ///< the router was
};

/// One per layer. The converter may fit the scale layer by layer; it then lists all of them in the
/// settings of cleave.json, and folded_scale is only the first.
std::vector<Folding> foldings(const std::optional<Provenance>& provenance, std::int64_t layers,
                              const std::string& origin) {
  if (!provenance) return std::vector<Folding>(layers);
  std::vector<Folding> all(
      layers, {provenance->gate, provenance->folded_scale, provenance->router_epsilon});
  const auto settings = nlohmann::json::parse(provenance->spec_json, nullptr, false);
  if (!settings.is_object() || !settings.contains("layer_folded_scale")) return all;
  const auto& scales = settings["layer_folded_scale"];
  const auto positive = [](const nlohmann::json& s) {
    return s.is_number() && s.get<double>() > 0.0;
  };
  if (!scales.is_array() || scales.size() != all.size() ||
      !std::all_of(scales.begin(), scales.end(), positive)) {
    throw FileError(fmt::format(
        "{}: 'layer_folded_scale' in cleave.json is {}; expected {} positive numbers, one a layer; "
        "convert the dense model again",
        origin, scales.dump(), layers));
  }
  for (std::size_t l = 0; l < all.size(); ++l) all[l].scale = scales[l].get<double>();
  return all;
}

MoeFfnImpl::Spec moe_spec(const ModelConfig& config, const Folding& folding) {
  MoeFfnImpl::Spec spec;
  spec.num_experts = config.num_experts;
  spec.experts_per_token = config.experts_per_token;
  spec.gate.mode = folding.gate;
  spec.activation = config.activation;
  spec.execution = choose_execution(config.intermediate_size);
  // Stored weights meet gate weights that sum to 1; hard ones sum to K.
  spec.scale = folding.gate == GateMode::kHard
                   ? folding.scale / static_cast<double>(config.experts_per_token)
                   : folding.scale;
  return spec;
}

MoeFfn load_moe(const Loader& load, const ModelConfig& config, const Folding& folding,
                std::int64_t index) {
  const std::int64_t d = config.hidden_size, width = config.intermediate_size,
                     num_experts = config.num_experts;
  const auto gate = [&](std::int64_t e) { return MixtralNames::gate(index, e); };
  const auto up = [&](std::int64_t e) { return MixtralNames::up(index, e); };
  const auto down = [&](std::int64_t e) { return MixtralNames::down(index, e); };
  const at::Tensor router = load.read_float(MixtralNames::router(index), {num_experts, d});
  return MoeFfn(moe_spec(config, folding), load.stack(num_experts, width, d, 1.0, gate),
                load.stack(num_experts, width, d, 1.0, up),
                load.stack(num_experts, d, width, folding.scale, down),
                load.place(router / folding.epsilon));
}

/// Granite's: one tensor each way, gate rows before up rows, and a slice whose weight is 1.
MoeFfn load_fused_moe(const Loader& load, const ModelConfig& config, const Folding& folding,
                      std::int64_t index) {
  const std::int64_t d = config.hidden_size, width = config.intermediate_size,
                     num_experts = config.num_experts, slice = config.shared_intermediate_size;
  const auto half = [](const at::Tensor& input, std::int64_t axis, std::int64_t which) {
    const std::int64_t rows = input.size(axis) / 2;
    return input.narrow(axis, which * rows, rows).clone(at::MemoryFormat::Contiguous);
  };
  DenseFfn shared(nullptr);
  if (slice > 0) {
    const at::Tensor input = load(GraniteMoeNames::shared_input(index), {2 * slice, d});
    shared = DenseFfn(half(input, 0, 0), half(input, 0, 1),
                      load(GraniteMoeNames::shared_output(index), {d, slice}), config.activation);
  }
  const at::Tensor input = load(GraniteMoeNames::input(index), {num_experts, 2 * width, d});
  const at::Tensor output =
      load.read_float(GraniteMoeNames::output(index), {num_experts, d, width});
  const at::Tensor router = load.read_float(GraniteMoeNames::router(index), {num_experts, d});
  return MoeFfn(moe_spec(config, folding), half(input, 1, 0), half(input, 1, 1),
                load.place(output / folding.scale), load.place(router / folding.epsilon), shared);
}

void add_if_defined(std::vector<NamedTensor>& all, std::string name, const at::Tensor& tensor) {
  if (tensor.defined()) all.push_back(named(std::move(name), tensor));
}

void add_attention(std::vector<NamedTensor>& all, const DecoderLayer& layer, std::int64_t index) {
  const std::string prefix = layer_prefix(index), self = prefix + "self_attn.";
  add_if_defined(all, prefix + "input_layernorm.weight", layer.input_norm);
  add_if_defined(all, prefix + "post_attention_layernorm.weight", layer.post_attention_norm);
  add_if_defined(all, self + "q_proj.weight", layer.q);
  add_if_defined(all, self + "k_proj.weight", layer.k);
  add_if_defined(all, self + "v_proj.weight", layer.v);
  add_if_defined(all, self + "o_proj.weight", layer.o);
  add_if_defined(all, self + "q_proj.bias", layer.q_bias);
  add_if_defined(all, self + "k_proj.bias", layer.k_bias);
  add_if_defined(all, self + "v_proj.bias", layer.v_bias);
  add_if_defined(all, self + "o_proj.bias", layer.o_bias);
}

void add_dense(std::vector<NamedTensor>& all, const DenseFfnImpl& ffn, std::int64_t index) {
  const std::string mlp = layer_prefix(index) + "mlp.";
  add_if_defined(all, mlp + "gate_proj.weight", ffn.gate);
  add_if_defined(all, mlp + "up_proj.weight", ffn.up);
  add_if_defined(all, mlp + "down_proj.weight", ffn.down);
  add_if_defined(all, mlp + "gate_proj.bias", ffn.biases.gate);
  add_if_defined(all, mlp + "up_proj.bias", ffn.biases.up);
  add_if_defined(all, mlp + "down_proj.bias", ffn.biases.down);
}

void add_moe(std::vector<NamedTensor>& all, const MoeFfnImpl& moe, bool fused, std::int64_t index) {
  // From the gate as it is now: training may have changed it since the model was read.
  const bool hard = moe.spec.gate.mode == GateMode::kHard;
  const auto k = static_cast<double>(moe.spec.experts_per_token);
  const double folded = hard ? moe.spec.scale * k : moe.spec.scale;
  const double epsilon = hard ? kHardGateEpsilon : 1.0;
  if (fused) {
    all.push_back(named(GraniteMoeNames::router(index), moe.w_router, epsilon));
    all.push_back(named_pair(GraniteMoeNames::input(index), moe.w_gate, moe.w_up, 1));
    all.push_back(named(GraniteMoeNames::output(index), moe.w_down, folded));
    if (moe.shared.is_empty()) return;
    const DenseFfnImpl& shared = *moe.shared;
    all.push_back(named_pair(GraniteMoeNames::shared_input(index), shared.gate, shared.up, 0));
    all.push_back(named(GraniteMoeNames::shared_output(index), shared.down));
    return;
  }
  all.push_back(named(MixtralNames::router(index), moe.w_router, epsilon));
  for (std::int64_t e = 0; e < moe.spec.num_experts; ++e) {
    all.push_back(named(MixtralNames::gate(index, e), moe.w_gate.select(0, e)));
    all.push_back(named(MixtralNames::up(index, e), moe.w_up.select(0, e)));
    all.push_back(named(MixtralNames::down(index, e), moe.w_down.select(0, e), folded));
  }
}

}  // namespace

std::shared_ptr<TransformerImpl> TransformerImpl::load(const Checkpoint& checkpoint,
                                                       at::ScalarType dtype, at::Device device) {
  require(at::isFloatingType(dtype), "Transformer: dtype is {}; expected a floating-point type",
          c10::toString(dtype));
  require(checkpoint.config().causal && checkpoint.config().has_head,
          "Transformer: {} is an encoder; only decoders are trained", checkpoint.path().string());
  const Loader load{checkpoint, dtype, device};
  std::shared_ptr<TransformerImpl> model(new TransformerImpl());
  model->config_ = checkpoint.config();
  const ModelConfig& config = model->config_;
  if (config.is_moe() && checkpoint.format() == Checkpoint::Format::kSafetensors) {
    model->provenance_ = read_provenance(checkpoint.directory());
  }
  const std::vector<Folding> folded =
      foldings(model->provenance_, config.num_layers, checkpoint.path().string());
  const std::int64_t vocab = config.vocab_size, d = config.hidden_size;
  model->embedding_ = load("model.embed_tokens.weight", {vocab, d});
  model->final_norm_ = load("model.norm.weight", {d});
  model->head_ =
      config.tie_word_embeddings ? model->embedding_ : load("lm_head.weight", {vocab, d});
  for (std::int64_t l = 0; l < config.num_layers; ++l) {
    DecoderLayer layer;
    load_attention(load, config, l, layer);
    if (config.is_moe()) {
      layer.moe = has_fused_experts(config.family) ? load_fused_moe(load, config, folded[l], l)
                                                   : load_moe(load, config, folded[l], l);
    } else {
      layer.dense = load_dense(load, config, l);
    }
    model->layers_.push_back(std::move(layer));
  }
  model->register_all();
  return model;
}

void TransformerImpl::register_all() {
  const auto frozen = [this](const std::string& name, at::Tensor& tensor) {
    if (tensor.defined()) register_parameter(name, tensor, /*requires_grad=*/false);
  };
  frozen("embedding", embedding_);
  frozen("final_norm", final_norm_);
  if (!config_.tie_word_embeddings) frozen("head", head_);
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    DecoderLayer& layer = layers_[l];
    const std::string prefix = fmt::format("layer_{}_", l);
    frozen(prefix + "input_norm", layer.input_norm);
    frozen(prefix + "post_attention_norm", layer.post_attention_norm);
    frozen(prefix + "q", layer.q);
    frozen(prefix + "k", layer.k);
    frozen(prefix + "v", layer.v);
    frozen(prefix + "o", layer.o);
    frozen(prefix + "q_bias", layer.q_bias);
    frozen(prefix + "k_bias", layer.k_bias);
    frozen(prefix + "v_bias", layer.v_bias);
    frozen(prefix + "o_bias", layer.o_bias);
    if (!layer.dense.is_empty()) register_module(prefix + "dense", layer.dense);
    if (!layer.moe.is_empty()) register_module(prefix + "moe", layer.moe);
  }
}

std::vector<NamedTensor> TransformerImpl::named_tensors() const {
  std::vector<NamedTensor> all;
  all.push_back(named("model.embed_tokens.weight", embedding_));
  all.push_back(named("model.norm.weight", final_norm_));
  // The directories with experts never tie; a dense model is written as it was read.
  if (config_.is_moe() || !config_.tie_word_embeddings) {
    all.push_back(named("lm_head.weight", head_));
  }
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const auto index = static_cast<std::int64_t>(l);
    add_attention(all, layers_[l], index);
    if (!layers_[l].dense.is_empty()) add_dense(all, *layers_[l].dense, index);
    if (!layers_[l].moe.is_empty())
      add_moe(all, *layers_[l].moe, has_fused_experts(config_.family), index);
  }
  return all;
}

}  // namespace cleave::train
