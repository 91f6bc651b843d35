#include "decoder_tensors.h"

#include "cleave/export.h"
#include "fail.h"
#include "safetensors.h"

namespace cleave {
namespace {

using Shape = std::vector<std::int64_t>;

void add_attention(const ModelConfig& c, const std::string& prefix,
                   std::vector<ExpectedTensor>& out) {
  const std::int64_t q = c.num_heads * c.head_dim;
  const std::int64_t kv = c.num_kv_heads * c.head_dim;
  const auto add = [&](const char* name, std::int64_t rows, std::int64_t cols) {
    out.push_back({prefix + "self_attn." + name + ".weight", {rows, cols}});
    if (c.attention_bias) out.push_back({prefix + "self_attn." + name + ".bias", {rows}});
  };
  add("q_proj", q, c.hidden_size);
  add("k_proj", kv, c.hidden_size);
  add("v_proj", kv, c.hidden_size);
  add("o_proj", c.hidden_size, q);
}

void add_dense_ffn(const ModelConfig& c, const std::string& prefix,
                   std::vector<ExpectedTensor>& out) {
  const auto add = [&](const char* name, std::int64_t rows, std::int64_t cols) {
    out.push_back({prefix + "mlp." + name + ".weight", {rows, cols}});
    if (c.mlp_bias) out.push_back({prefix + "mlp." + name + ".bias", {rows}});
  };
  add("gate_proj", c.intermediate_size, c.hidden_size);
  add("up_proj", c.intermediate_size, c.hidden_size);
  add("down_proj", c.hidden_size, c.intermediate_size);
}

void add_experts(const ModelConfig& c, std::int64_t layer, std::vector<ExpectedTensor>& out) {
  out.push_back({MixtralNames::router(layer), {c.num_experts, c.hidden_size}});
  for (std::int64_t e = 0; e < c.num_experts; ++e) {
    out.push_back({MixtralNames::gate(layer, e), {c.intermediate_size, c.hidden_size}});
    out.push_back({MixtralNames::down(layer, e), {c.hidden_size, c.intermediate_size}});
    out.push_back({MixtralNames::up(layer, e), {c.intermediate_size, c.hidden_size}});
  }
}

std::string expert_name(std::int64_t layer, std::int64_t expert, const char* matrix) {
  return fmt::format("model.layers.{}.block_sparse_moe.experts.{}.{}.weight", layer, expert,
                     matrix);
}

}  // namespace

std::string MixtralNames::router(std::int64_t layer) {
  return fmt::format("model.layers.{}.block_sparse_moe.gate.weight", layer);
}
std::string MixtralNames::gate(std::int64_t layer, std::int64_t expert) {
  return expert_name(layer, expert, "w1");
}
std::string MixtralNames::down(std::int64_t layer, std::int64_t expert) {
  return expert_name(layer, expert, "w2");
}
std::string MixtralNames::up(std::int64_t layer, std::int64_t expert) {
  return expert_name(layer, expert, "w3");
}

std::vector<ExpectedTensor> decoder_tensors(const ModelConfig& c) {
  std::vector<ExpectedTensor> out;
  out.push_back({"model.embed_tokens.weight", {c.vocab_size, c.hidden_size}});
  for (std::int64_t layer = 0; layer < c.num_layers; ++layer) {
    const std::string prefix = fmt::format("model.layers.{}.", layer);
    out.push_back({prefix + "input_layernorm.weight", {c.hidden_size}});
    add_attention(c, prefix, out);
    out.push_back({prefix + "post_attention_layernorm.weight", {c.hidden_size}});
    if (c.is_moe())
      add_experts(c, layer, out);
    else
      add_dense_ffn(c, prefix, out);
  }
  out.push_back({"model.norm.weight", {c.hidden_size}});
  if (!c.tie_word_embeddings) out.push_back({"lm_head.weight", {c.vocab_size, c.hidden_size}});
  return out;
}

std::string shape_text(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

void check_decoder_tensors(const ModelConfig& config, const std::vector<TensorInfo>& tensors,
                           const std::string& origin) {
  for (const ExpectedTensor& expected : decoder_tensors(config)) {
    const auto found = find_tensor(tensors, expected.name);
    if (!found)
      fail_file("{}: tensor '{}' is missing; the configuration asks for it, of shape {}", origin,
                expected.name, shape_text(expected.shape));
    if (tensors[*found].shape != expected.shape)
      fail_file("{}: tensor '{}' has shape {}; the configuration asks for {}", origin,
                expected.name, shape_text(tensors[*found].shape), shape_text(expected.shape));
  }
}

}  // namespace cleave
