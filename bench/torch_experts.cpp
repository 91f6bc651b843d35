// LibTorch's eager operators on the experts of a layer: the way of a model file without kernels.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <torch/version.h>

#include "baselines.h"

namespace cleave::bench {
namespace {

class TorchExperts : public SparseBaseline {
 public:
  TorchExperts(const BaselineShape& shape, std::int64_t experts, bool bf16)
      : shape_(shape), experts_(experts), bf16_(bf16) {
    at::set_num_threads(shape.threads);
    const c10::InferenceMode guard;
    const std::int64_t D = shape.d_model, I = shape.hidden / experts;
    for (std::int64_t l = 0; l < shape.layers; ++l)
      layers_.push_back({random(I, D), random(I, D), random(D, I)});
  }
  std::string name() const override { return bf16_ ? "LibTorch bf16" : "LibTorch f32"; }

  void run(std::int64_t layer, const Routing& routing, const float* x, float* y) override {
    const c10::InferenceMode guard;
    const std::int64_t T = routing.num_tokens, K = routing.experts_per_token, D = shape_.d_model;
    const at::Tensor in = wrap(x, T, D).to(dtype());
    const at::Tensor out = at::zeros({T, D}, dtype());
    const at::Tensor ids = at::from_blob(const_cast<std::int32_t*>(routing.ids.data()), {T, K},
                                         at::TensorOptions().dtype(at::kInt));
    const at::Tensor weights = wrap(routing.weights.data(), T, K).to(dtype());
    const Layer& w = layers_[layer];
    for (std::int64_t e = 0; e < experts_; ++e) {
      const std::vector<at::Tensor> where = at::where(ids.eq(e));  // token, slot
      const at::Tensor& tokens = where[0];
      if (tokens.numel() == 0) continue;
      const at::Tensor rows = in.index_select(0, tokens);
      const at::Tensor hidden = at::silu(at::linear(rows, w.gate[e])) * at::linear(rows, w.up[e]);
      const at::Tensor share = weights.index({tokens, where[1]}).unsqueeze(1);
      out.index_add_(0, tokens, at::linear(hidden, w.down[e]) * share);
    }
    wrap(y, T, D).copy_(out);
  }

 private:
  struct Layer {
    at::Tensor gate, up, down;  // [E, I, D], [E, I, D], [E, D, I]
  };
  at::ScalarType dtype() const { return bf16_ ? at::kBFloat16 : at::kFloat; }
  at::Tensor random(std::int64_t rows, std::int64_t cols) const {
    return (at::randn({experts_, rows, cols}) * 0.03).to(dtype());
  }
  static at::Tensor wrap(const float* data, std::int64_t rows, std::int64_t cols) {
    return at::from_blob(const_cast<float*>(data), {rows, cols}, at::kFloat);
  }

  BaselineShape shape_;
  std::int64_t experts_;
  bool bf16_;
  std::vector<Layer> layers_;
};

}  // namespace

std::string torch_version() { return TORCH_VERSION; }

std::unique_ptr<SparseBaseline> torch_baseline(const BaselineShape& shape, std::int64_t experts,
                                               bool bf16) {
  return std::make_unique<TorchExperts>(shape, experts, bf16);
}

}  // namespace cleave::bench
