#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/export.h"
#include "cleave/model_config.h"
#include "cleave/train/moe_ffn.h"

namespace cleave::train {

/// One decoder layer's weights: attention, norms, and a dense or MoE FFN (one of the two is empty).
struct DecoderLayer {
  at::Tensor input_norm, post_attention_norm;  ///< [D]
  at::Tensor q, k, v, o;                       ///< [out, in]
  at::Tensor q_bias, k_bias, v_bias, o_bias;   ///< undefined where the family has none
  DenseFfn dense{nullptr};
  MoeFfn moe{nullptr};
};

/// A decoder-only transformer with gradients (LibTorch); families are configurations, not classes.
/// A test holds it equal to cleave::Model, the LibTorch-free forward pass.
class TransformerImpl : public torch::nn::Module {
 public:
  /// Reads every weight as float32 and then converts to `dtype` on `device`. All of them are frozen
  /// at first: the caller sets requires_grad on what is to be trained. A directory written by
  /// convert carries cleave.json: each layer's folded scale is undone, so that experts are slices
  /// of the dense FFN again, and with gate = hard its router epsilon too, so that training sees the
  /// mask and not its approximation.
  /// @throws FileError  a tensor is missing or has the wrong shape
  /// @throws InvalidArgument  the model is an encoder, or `dtype` no floating-point type
  static std::shared_ptr<TransformerImpl> load(const Checkpoint& checkpoint,
                                               at::ScalarType dtype = at::kFloat,
                                               at::Device device = at::kCPU);

  /// tokens int64 [B, T] -> logits [B, T, V]. Causal, positions from 0.
  at::Tensor forward(const at::Tensor& tokens);

  const ModelConfig& config() const { return config_; }
  const std::optional<Provenance>& provenance() const { return provenance_; }
  std::vector<DecoderLayer>& layers() { return layers_; }
  const at::Tensor& embedding() const { return embedding_; }    ///< [V, D]
  const at::Tensor& final_norm() const { return final_norm_; }  ///< [D]
  /// The layers that hold experts, in order; empty for a dense model.
  std::vector<MoeFfn> moe_layers() const;

  /// Every weight under its HuggingFace name, as written by write_mixtral or, for a model that was
  /// read as GraniteMoeShared, by write_granite_moe_shared: gate scale folded into down, hard
  /// gates' routers scaled by kHardGateEpsilon. Loads (copies to CPU float32) lazily, one tensor at
  /// a time.
  std::vector<NamedTensor> named_tensors() const;

 private:
  TransformerImpl() = default;
  /// Makes every tensor known to torch::nn::Module (parameters(), to()).
  void register_all();
  ModelConfig config_;
  std::optional<Provenance> provenance_;
  std::vector<DecoderLayer> layers_;
  at::Tensor embedding_, final_norm_, head_;  ///< head_ is embedding_ where tied
};
TORCH_MODULE(Transformer);

}  // namespace cleave::train
