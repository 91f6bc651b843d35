#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/export.h"

// What the targets with experts share: checks of the layers, and their matrices as checkpoints
// hold them.
namespace cleave {

/// In whose name errors are thrown, and the class that they speak of.
struct MoeTarget {
  const char* function;
  const char* name;
  bool gated = true;  ///< three matrices and no bias; false: two, and biases
};

/// As many layers as the model has, all alike in E, K, I, gate and activation, of width D, of the
/// target's matrices. The shared slice is the target's own affair.
/// @throws InvalidArgument
void check_moe_layers(const MoeTarget& target, const ModelConfig& source,
                      std::span<const MoeLayer> layers);
/// @throws InvalidArgument  not 1 <= K <= E
void check_experts_per_token(const char* function, std::int64_t experts_per_token,
                             std::int64_t num_experts);
/// The matrices and biases in `bank` that the target holds, and the model's own activation. `what`:
/// of layer `index`.
void check_bank(const MoeTarget& target, const ModelConfig& source, const ExpertBank& bank,
                const char* what, std::size_t index);

/// Rows [begin, begin + rows) of a matrix of `cols` columns, appended.
void append_rows(const std::vector<float>& matrix, std::int64_t begin, std::int64_t rows,
                 std::int64_t cols, std::vector<float>& to);
/// Rows [begin, begin + width) of down_t as [D, width], times `scale`, appended; rounded once, when
/// it is written.
void append_down(const ExpertBank& bank, std::int64_t begin, std::int64_t width, float scale,
                 std::vector<float>& to);
/// All experts' `down`, one behind the other: [E, D, I], or [D, I] of a bank of one.
std::vector<float> fused_down(const ExpertBank& bank, float scale);
/// [E, D], scaled by kHardGateEpsilon for a hard gate.
std::vector<float> stored_router(const MoeLayer& layer);

/// Whether rounding `values` to `dtype` changes none of them.
bool holds_exactly(DType dtype, std::span<const float> values);

}  // namespace cleave
