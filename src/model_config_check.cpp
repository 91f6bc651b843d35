#include "model_config_check.h"

#include <cmath>
#include <utility>

#include "fail.h"

namespace cleave {
namespace {

void check_extents(const ModelConfig& c, const std::string& origin) {
  // Every extent below 2^31 keeps the products of two of them, and byte counts, inside int64.
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  const std::pair<const char*, std::int64_t> extents[] = {
      {"vocab_size", c.vocab_size},
      {"hidden_size", c.hidden_size},
      {"intermediate_size", c.intermediate_size},
      {"num_hidden_layers", c.num_layers},
      {"num_attention_heads", c.num_heads},
      {"num_key_value_heads", c.num_kv_heads},
      {"head_dim", c.head_dim},
      {"max_position_embeddings", c.max_position_embeddings},
  };
  for (const auto& [name, value] : extents)
    if (value < 1 || value >= kMost)
      fail_file("{}: {} is {}; expected a positive number below 2^31", origin, name, value);
}

void check_rope(const RopeConfig& rope, const std::string& origin) {
  if (!(rope.theta > 0.0) || !std::isfinite(rope.theta))
    fail_file("{}: rope_theta is {}; expected a positive number", origin, rope.theta);
  if (!(rope.factor > 0.0) || !std::isfinite(rope.factor))
    fail_file("{}: the rope scaling factor is {}; expected a positive number", origin, rope.factor);
  if (rope.type != RopeConfig::Type::kLlama3) return;
  if (!(rope.low_freq_factor > 0.0) || !(rope.high_freq_factor > rope.low_freq_factor))
    fail_file(
        "{}: rope scaling has low_freq_factor {} and high_freq_factor {}; expected 0 < low < "
        "high",
        origin, rope.low_freq_factor, rope.high_freq_factor);
  if (rope.original_max_position_embeddings < 1)
    fail_file(
        "{}: rope scaling has original_max_position_embeddings {}; expected a positive number",
        origin, rope.original_max_position_embeddings);
}

}  // namespace

void check_model_config(const ModelConfig& c, const std::string& origin) {
  check_extents(c, origin);
  if (c.num_heads % c.num_kv_heads != 0)
    fail_file("{}: num_attention_heads {} is not a multiple of num_key_value_heads {}", origin,
              c.num_heads, c.num_kv_heads);
  if (c.rotary && c.head_dim % 2 != 0)
    fail_file("{}: head_dim is {}; rotary embeddings need an even number", origin, c.head_dim);
  if (!(c.rms_norm_eps > 0.0) || !std::isfinite(c.rms_norm_eps))
    fail_file("{}: {} is {}; expected a positive number", origin,
              c.layer_norm ? "layer_norm_eps" : "rms_norm_eps", c.rms_norm_eps);
  if (c.type_vocab_size < 0 || c.type_vocab_size >= std::int64_t{1} << 31)
    fail_file("{}: type_vocab_size is {}; expected a number below 2^31", origin, c.type_vocab_size);
  if (c.sliding_window < 0)
    fail_file("{}: sliding_window is {}; expected null or a positive number", origin,
              c.sliding_window);
  check_rope(c.rope, origin);
  if (c.shared_intermediate_size < 0 || c.shared_intermediate_size >= std::int64_t{1} << 31)
    fail_file("{}: shared_intermediate_size is {}; expected 0 (none) or a number below 2^31",
              origin, c.shared_intermediate_size);
  if (c.num_experts >= std::int64_t{1} << 31)
    fail_file("{}: num_local_experts is {}; expected a number below 2^31", origin, c.num_experts);
  if (c.is_moe() && (c.experts_per_token < 1 || c.experts_per_token > c.num_experts))
    fail_file("{}: num_experts_per_tok is {} with {} experts; expected 1 to {}", origin,
              c.experts_per_token, c.num_experts, c.num_experts);
  const auto check_id = [&](const char* name, std::int32_t id) {
    if (id >= c.vocab_size)
      fail_file("{}: {} is {}, but vocab_size is {}", origin, name, id, c.vocab_size);
  };
  if (c.bos_token_id) check_id("bos_token_id", *c.bos_token_id);
  for (const std::int32_t id : c.eos_token_ids) check_id("eos_token_id", id);
}

}  // namespace cleave
