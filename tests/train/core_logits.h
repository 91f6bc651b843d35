#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/model.h"

namespace cleave::testing {

/// Logits [T, V] of the LibTorch-free forward pass. tokens int64 [1, T].
inline at::Tensor core_logits(const Checkpoint& checkpoint, const at::Tensor& tokens) {
  Model model = Model::load(checkpoint, {.threads = 2});
  std::vector<std::int32_t> ids;
  for (std::int64_t t = 0; t < tokens.size(1); ++t) {
    ids.push_back(static_cast<std::int32_t>(tokens[0][t].item<std::int64_t>()));
  }
  const auto count = static_cast<std::int64_t>(ids.size());
  KvCache cache(model.config(), count);
  at::Tensor hidden = torch::zeros({count, model.config().hidden_size});
  at::Tensor logits = torch::zeros({count, model.config().vocab_size});
  const MatrixView<float> view(hidden.data_ptr<float>(), count, hidden.size(1));
  model.forward(ids, cache, view);
  model.logits(view, {logits.data_ptr<float>(), count, logits.size(1)});
  return logits;
}

}  // namespace cleave::testing
