#include "decoder_tensors.h"

#include <functional>
#include <utility>

#include "cleave/export.h"
#include "fail.h"
#include "safetensors.h"

namespace cleave {
namespace {

using Shape = std::vector<std::int64_t>;
using Visit = std::function<void(ExpectedTensor)>;

void visit_norm(const ModelConfig& c, const std::string& name, const Visit& visit) {
  visit({name + ".weight", {c.hidden_size}});
  if (c.layer_norm) visit({name + ".bias", {c.hidden_size}});
}

void visit_attention(const ModelConfig& c, const LayerNames& names, const Visit& visit) {
  const std::int64_t q = c.num_heads * c.head_dim;
  const std::int64_t kv = c.num_kv_heads * c.head_dim;
  const auto add = [&](const std::string& name, std::int64_t rows, std::int64_t cols) {
    visit({name + ".weight", {rows, cols}});
    if (c.attention_bias) visit({name + ".bias", {rows}});
  };
  add(names.q, q, c.hidden_size);
  add(names.k, kv, c.hidden_size);
  add(names.v, kv, c.hidden_size);
  add(names.output, c.hidden_size, q);
}

void visit_dense_ffn(const ModelConfig& c, const LayerNames& names, const Visit& visit) {
  const auto add = [&](const std::string& name, std::int64_t rows, std::int64_t cols) {
    visit({name + ".weight", {rows, cols}});
    if (c.mlp_bias) visit({name + ".bias", {rows}});
  };
  if (c.gated_ffn) add(names.gate, c.intermediate_size, c.hidden_size);
  add(names.up, c.intermediate_size, c.hidden_size);
  add(names.down, c.hidden_size, c.intermediate_size);
}

void visit_experts(const ModelConfig& c, std::int64_t layer, const Visit& visit) {
  visit({MixtralNames::router(layer), {c.num_experts, c.hidden_size}});
  for (std::int64_t e = 0; e < c.num_experts; ++e) {
    visit({MixtralNames::gate(layer, e), {c.intermediate_size, c.hidden_size}});
    visit({MixtralNames::down(layer, e), {c.hidden_size, c.intermediate_size}});
    visit({MixtralNames::up(layer, e), {c.intermediate_size, c.hidden_size}});
  }
}

void visit_fused_experts(const ModelConfig& c, std::int64_t layer, const Visit& visit) {
  const std::int64_t E = c.num_experts, D = c.hidden_size, I = c.intermediate_size;
  visit({GraniteMoeNames::router(layer), {E, D}});
  visit({GraniteMoeNames::input(layer), {E, 2 * I, D}});
  visit({GraniteMoeNames::output(layer), {E, D, I}});
  const std::int64_t shared = c.shared_intermediate_size;
  if (shared == 0) return;
  visit({GraniteMoeNames::shared_input(layer), {2 * shared, D}});
  visit({GraniteMoeNames::shared_output(layer), {D, shared}});
}

void visit_bert_experts(const ModelConfig& c, std::int64_t layer, const Visit& visit) {
  const std::int64_t E = c.num_experts, D = c.hidden_size, I = c.intermediate_size;
  visit({BertMoeNames::router(layer), {E, D}});
  visit({BertMoeNames::input(layer), {E, I, D}});
  visit({BertMoeNames::input_bias(layer), {E, I}});
  visit({BertMoeNames::output(layer), {E, D, I}});
  visit({BertMoeNames::output_bias(layer), {D}});
  const std::int64_t shared = c.shared_width(layer);
  if (shared == 0) return;
  visit({BertMoeNames::shared_input(layer), {shared, D}});
  visit({BertMoeNames::shared_input_bias(layer), {shared}});
  visit({BertMoeNames::shared_output(layer), {D, shared}});
}

/// A visitor, so that a check can stop at the first fault: a forged layer count of 2^30 must not
/// become a list.
void visit_tensors(const ModelConfig& c, const Visit& visit) {
  const ModelNames model(c);
  visit({model.embedding + ".weight", {c.vocab_size, c.hidden_size}});
  if (!c.rotary) visit({model.positions + ".weight", {c.max_position_embeddings, c.hidden_size}});
  if (c.type_vocab_size > 0)
    visit({model.token_types + ".weight", {c.type_vocab_size, c.hidden_size}});
  for (std::int64_t layer = 0; layer < c.num_layers; ++layer) {
    const LayerNames names(c, layer);
    visit_norm(c, names.input_norm, visit);
    visit_attention(c, names, visit);
    visit_norm(c, names.post_norm, visit);
    if (!c.is_moe())
      visit_dense_ffn(c, names, visit);
    else if (!c.gated_ffn)
      visit_bert_experts(c, layer, visit);
    else if (has_fused_experts(c.family))
      visit_fused_experts(c, layer, visit);
    else
      visit_experts(c, layer, visit);
  }
  visit_norm(c, model.final_norm, visit);
  if (c.has_head && !c.tie_word_embeddings)
    visit({model.head + ".weight", {c.vocab_size, c.hidden_size}});
}

std::string expert_name(std::int64_t layer, std::int64_t expert, const char* matrix) {
  return fmt::format("model.layers.{}.block_sparse_moe.experts.{}.{}.weight", layer, expert,
                     matrix);
}

std::string bert_name(std::int64_t layer, const char* part) {
  return fmt::format("encoder.layer.{}.{}", layer, part);
}

/// BERT counts a norm to the branch before it.
void name_bert_layer(std::int64_t layer, LayerNames& names) {
  names.input_norm = layer == 0 ? "embeddings.LayerNorm" : bert_name(layer - 1, "output.LayerNorm");
  names.q = bert_name(layer, "attention.self.query");
  names.k = bert_name(layer, "attention.self.key");
  names.v = bert_name(layer, "attention.self.value");
  names.output = bert_name(layer, "attention.output.dense");
  names.post_norm = bert_name(layer, "attention.output.LayerNorm");
  names.up = bert_name(layer, "intermediate.dense");
  names.down = bert_name(layer, "output.dense");
}

}  // namespace

LayerNames::LayerNames(const ModelConfig& config, std::int64_t layer) {
  if (is_bert(config.family)) {
    name_bert_layer(layer, *this);
    return;
  }
  const std::string prefix = fmt::format("model.layers.{}.", layer);
  input_norm = prefix + "input_layernorm";
  q = prefix + "self_attn.q_proj";
  k = prefix + "self_attn.k_proj";
  v = prefix + "self_attn.v_proj";
  output = prefix + "self_attn.o_proj";
  post_norm = prefix + "post_attention_layernorm";
  gate = prefix + "mlp.gate_proj";
  up = prefix + "mlp.up_proj";
  down = prefix + "mlp.down_proj";
}

ModelNames::ModelNames(const ModelConfig& config) {
  if (is_bert(config.family)) {
    embedding = "embeddings.word_embeddings";
    positions = "embeddings.position_embeddings";
    token_types = "embeddings.token_type_embeddings";
    final_norm = bert_name(config.num_layers - 1, "output.LayerNorm");
    return;
  }
  embedding = "model.embed_tokens";
  final_norm = "model.norm";
  head = "lm_head";
}

std::string BertMoeNames::router(std::int64_t layer) {
  return bert_name(layer, "block_sparse_moe.router.layer.weight");
}
std::string BertMoeNames::input(std::int64_t layer) {
  return bert_name(layer, "block_sparse_moe.input_linear.weight");
}
std::string BertMoeNames::input_bias(std::int64_t layer) {
  return bert_name(layer, "block_sparse_moe.input_linear.bias");
}
std::string BertMoeNames::output(std::int64_t layer) {
  return bert_name(layer, "block_sparse_moe.output_linear.weight");
}
std::string BertMoeNames::output_bias(std::int64_t layer) {
  return bert_name(layer, "block_sparse_moe.output_linear.bias");
}
std::string BertMoeNames::shared_input(std::int64_t layer) {
  return bert_name(layer, "shared_mlp.input_linear.weight");
}
std::string BertMoeNames::shared_input_bias(std::int64_t layer) {
  return bert_name(layer, "shared_mlp.input_linear.bias");
}
std::string BertMoeNames::shared_output(std::int64_t layer) {
  return bert_name(layer, "shared_mlp.output_linear.weight");
}

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

std::string GraniteMoeNames::router(std::int64_t layer) {
  return fmt::format("model.layers.{}.block_sparse_moe.router.layer.weight", layer);
}
std::string GraniteMoeNames::input(std::int64_t layer) {
  return fmt::format("model.layers.{}.block_sparse_moe.input_linear.weight", layer);
}
std::string GraniteMoeNames::output(std::int64_t layer) {
  return fmt::format("model.layers.{}.block_sparse_moe.output_linear.weight", layer);
}
std::string GraniteMoeNames::shared_input(std::int64_t layer) {
  return fmt::format("model.layers.{}.shared_mlp.input_linear.weight", layer);
}
std::string GraniteMoeNames::shared_output(std::int64_t layer) {
  return fmt::format("model.layers.{}.shared_mlp.output_linear.weight", layer);
}

std::vector<ExpectedTensor> decoder_tensors(const ModelConfig& config) {
  std::vector<ExpectedTensor> out;
  visit_tensors(config, [&](ExpectedTensor tensor) { out.push_back(std::move(tensor)); });
  return out;
}

std::string shape_text(const Shape& shape) { return fmt::format("[{}]", fmt::join(shape, ", ")); }

void check_decoder_tensors(const ModelConfig& config, const std::vector<TensorInfo>& tensors,
                           const std::string& origin) {
  visit_tensors(config, [&](const ExpectedTensor& expected) {
    const auto found = find_tensor(tensors, expected.name);
    if (!found)
      fail_file("{}: tensor '{}' is missing; the configuration asks for it, of shape {}", origin,
                expected.name, shape_text(expected.shape));
    if (tensors[*found].shape != expected.shape)
      fail_file("{}: tensor '{}' has shape {}; the configuration asks for {}", origin,
                expected.name, shape_text(tensors[*found].shape), shape_text(expected.shape));
  });
}

}  // namespace cleave
