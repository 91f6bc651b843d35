#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "cleave/text.h"
#include "cleave/train/transformer.h"

namespace cleave::train {

/// The residual stream of all tokens of a text, on its way through a model's layers.
class ResidualStream {
 public:
  /// Starts at the embeddings. Keeps a reference to the text.
  /// @param batch  windows per forward pass
  ResidualStream(Transformer model, const TokenWindows& text, std::int64_t batch);

  /// rows += attention of the layer.
  void attend(std::int64_t layer);
  /// What the layer's FFN sees of `count` rows from `first` on: normed, [count, D].
  at::Tensor ffn_input(std::int64_t layer, std::int64_t first, std::int64_t count) const;
  /// [N, D], N = windows * context, window after window.
  at::Tensor& rows() { return rows_; }
  const at::Tensor& rows() const { return rows_; }

 private:
  Transformer model_;
  std::int64_t windows_, context_, batch_;
  at::Tensor rows_;
};

}  // namespace cleave::train
