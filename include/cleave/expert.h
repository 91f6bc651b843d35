#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/views.h"

namespace cleave {

/// One expert: y += scale * down^T (act(gate x + gate_bias) .* (up x + up_bias)), or
/// down^T act(up x + up_bias) if `gate` is empty.
///
/// An FFN slice, a bottleneck adapter and a LoRA pair are all this struct:
///   FFN slice    hidden = neurons kept   activation = the FFN's    scale = 1
///   adapter      hidden = bottleneck     activation = GELU/ReLU    scale = 1
///   LoRA pair    hidden = rank           activation = identity     scale = alpha / rank
///
/// Weights are neuron-major: row j of every matrix belongs to hidden neuron j, so once rows are
/// grouped by expert, an expert is a row range. Views do not own; ExpertBank does. The output bias
/// of a dense FFN belongs to no expert: the host adds it once.
struct ExpertView {
  MatrixView<const float> gate;      ///< [hidden, d_in], or empty
  MatrixView<const float> up;        ///< [hidden, d_in]
  MatrixView<const float> down_t;    ///< [hidden, d_out]; transposed from the checkpoint's layout
  std::span<const float> gate_bias;  ///< [hidden], or empty
  std::span<const float> up_bias;    ///< [hidden], or empty
  Activation activation = Activation::kSilu;
  float scale = 1.0f;
};

/// A dense FFN as a checkpoint holds it: y = down (act(gate x + gate_bias) .* (up x + up_bias)) +
/// down_bias, or down act(up x + up_bias) + down_bias without `gate`. Views only.
struct FfnView {
  MatrixView<const float> gate;      ///< [H, D], or empty (two-matrix FFN)
  MatrixView<const float> up;        ///< [H, D]
  MatrixView<const float> down;      ///< [D, H]
  std::span<const float> gate_bias;  ///< [H], or empty
  std::span<const float> up_bias;    ///< [H], or empty
  std::span<const float> down_bias;  ///< [D], or empty
  Activation activation = Activation::kSilu;
};

/// A dense FFN that owns its weights; same meaning as FfnView.
struct DenseFfn {
  std::int64_t hidden = 0;   ///< H
  std::int64_t d_model = 0;  ///< D
  std::vector<float> gate, up, down, gate_bias, up_bias, down_bias;
  Activation activation = Activation::kSilu;
  FfnView view() const;
};

/// The experts of one layer, in one block of memory: neuron-major rows grouped by expert.
///
/// neuron_order[r] tells which neuron of the dense FFN row r came from, so that to_dense() can put
/// it back; expert e owns rows [begin[e], begin[e + 1]).
struct ExpertBank {
  /// In neuron_order: a row of zeros, behind which is no neuron.
  static constexpr std::int32_t kPadding = -1;
  std::int64_t d_model = 0;                ///< D
  std::int64_t dense_hidden = 0;           ///< H of the FFN it was cut from
  std::vector<std::int64_t> begin;         ///< [E + 1], rows; begin[0] = 0
  std::vector<std::int32_t> neuron_order;  ///< [rows], the dense neuron each row came from
  std::vector<float> gate;                 ///< [rows, D], or empty
  std::vector<float> up;                   ///< [rows, D]
  std::vector<float> down_t;               ///< [rows, D]
  std::vector<float> gate_bias;            ///< [rows], or empty
  std::vector<float> up_bias;              ///< [rows], or empty
  std::vector<float> down_bias;  ///< [D], or empty; added once per token, never per expert
  Activation activation = Activation::kSilu;

  std::int64_t num_experts() const { return static_cast<std::int64_t>(begin.size()) - 1; }
  std::int64_t rows() const { return begin.empty() ? 0 : begin.back(); }
  std::int64_t width(std::int64_t e) const { return begin[e + 1] - begin[e]; }
  /// Valid while the bank lives and is not resized.
  ExpertView expert(std::int64_t e) const;
};

}  // namespace cleave
