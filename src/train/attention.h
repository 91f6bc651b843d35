#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cleave/model_config.h"
#include "cleave/train/transformer.h"
#include "train/rotary.h"

namespace cleave::train {

/// What all layers of one forward pass share.
struct AttentionContext {
  std::int64_t batch = 0, tokens = 0;  ///< B, T
  RotaryTable rotary;
  at::Tensor mask;  ///< bool [T, T], true where attention is allowed; undefined: plain causal
};

/// The context of a pass over [batch, tokens] ids.
AttentionContext attention_context(const ModelConfig& config, std::int64_t batch,
                                   std::int64_t tokens, const at::TensorOptions& options);

/// Causal grouped-query attention with its projections. x [B*T, D] -> [B*T, D].
at::Tensor attention(const ModelConfig& config, const DecoderLayer& layer, const at::Tensor& x,
                     const AttentionContext& context);

/// x / sqrt(mean(x^2) + epsilon) * weight, the mean in float32.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double epsilon);

}  // namespace cleave::train
