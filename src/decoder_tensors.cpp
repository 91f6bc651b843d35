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

void visit_attention(const ModelConfig& c, const std::string& prefix, const Visit& visit) {
  const std::int64_t q = c.num_heads * c.head_dim;
  const std::int64_t kv = c.num_kv_heads * c.head_dim;
  const auto add = [&](const char* name, std::int64_t rows, std::int64_t cols) {
    visit({prefix + "self_attn." + name + ".weight", {rows, cols}});
    if (c.attention_bias) visit({prefix + "self_attn." + name + ".bias", {rows}});
  };
  add("q_proj", q, c.hidden_size);
  add("k_proj", kv, c.hidden_size);
  add("v_proj", kv, c.hidden_size);
  add("o_proj", c.hidden_size, q);
}

void visit_dense_ffn(const ModelConfig& c, const std::string& prefix, const Visit& visit) {
  const auto add = [&](const char* name, std::int64_t rows, std::int64_t cols) {
    visit({prefix + "mlp." + name + ".weight", {rows, cols}});
    if (c.mlp_bias) visit({prefix + "mlp." + name + ".bias", {rows}});
  };
  add("gate_proj", c.intermediate_size, c.hidden_size);
  add("up_proj", c.intermediate_size, c.hidden_size);
  add("down_proj", c.hidden_size, c.intermediate_size);
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

/// A visitor, so that a check can stop at the first fault: a forged layer count of 2^30 must not
/// become a list.
void visit_tensors(const ModelConfig& c, const Visit& visit) {
  visit({"model.embed_tokens.weight", {c.vocab_size, c.hidden_size}});
  for (std::int64_t layer = 0; layer < c.num_layers; ++layer) {
    const std::string prefix = fmt::format("model.layers.{}.", layer);
    visit({prefix + "input_layernorm.weight", {c.hidden_size}});
    visit_attention(c, prefix, visit);
    visit({prefix + "post_attention_layernorm.weight", {c.hidden_size}});
    if (!c.is_moe())
      visit_dense_ffn(c, prefix, visit);
    else if (has_fused_experts(c.family))
      visit_fused_experts(c, layer, visit);
    else
      visit_experts(c, layer, visit);
  }
  visit({"model.norm.weight", {c.hidden_size}});
  if (!c.tie_word_embeddings) visit({"lm_head.weight", {c.vocab_size, c.hidden_size}});
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
