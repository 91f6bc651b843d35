#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "capture.h"
#include "cleave/convert.h"
#include "cleave/factorize.h"
#include "cleave/kernels.h"
#include "cleave/model.h"
#include "cleave/moe_layer.h"

// One layer of a conversion to a budget: its neurons, its rows as they will be stored, and the
// arithmetic on all tokens.
namespace cleave {

using BudgetProgress = std::function<void(const std::string&, std::int64_t, std::int64_t)>;

/// What capture_energy() needs for a layer with a shared slice of that width.
CaptureSpec capture_spec(const BudgetSpec& spec, const BudgetShares& shares,
                         std::int64_t shared_width, std::int64_t layer);

/// A dense FFN with the layout that the work on it wants.
struct SplitSource {
  DenseFfn ffn;
  std::vector<float> down_t;       ///< [H, D]
  std::vector<float> down_square;  ///< [H]

  explicit SplitSource(DenseFfn dense);
  /// hidden [T, H] of inputs x [T, D], in blocks, so that the gate's values need little room.
  void hidden_values(MatrixView<const float> x, MatrixView<float> hidden,
                     const ParallelFor& parallel) const;
};

/// A layer of H' neurons in place of the dense FFN's H. Fewer: those of least energy are left out.
/// More: neurons that are zero follow, so that the experts' capacities can be met; they go where
/// they do least harm, which is into experts of their own, which no token chooses.
struct ResizedLayer {
  SplitSource source;
  std::vector<std::int32_t> neuron;  ///< [H'], of the dense FFN, or ExpertBank::kPadding
  double energy = 1.0;               ///< share of the dense FFN's that is left
};
/// @param tokens  by whose energies neurons are left out
/// @param hidden  [T, max(H, H')] of all tokens: the first H columns become those of the H' neurons
/// @param size    H'
ResizedLayer resize_layer(SplitSource source, const LayerTokens& tokens, MatrixView<float> hidden,
                          std::int64_t size, const ParallelFor& parallel);

/// A layer's rows as they will be stored: the experts one after the other, then the shared slice.
struct BudgetRows {
  ExpertBank experts, shared;
  std::vector<std::int32_t> neuron;  ///< [rows], column of the layer's hidden values

  BudgetRows(const FfnView& ffn, const NeuronPartition& partition);
  std::int64_t size() const { return static_cast<std::int64_t>(neuron.size()); }
  std::int64_t routed() const { return static_cast<std::int64_t>(experts.neuron_order.size()); }
  std::vector<float> down_t() const;  ///< [rows, D]
  /// [rows], by column of the hidden values: LayerTokens::down_square of these rows. None is
  /// dropped.
  std::vector<float> down_square() const;
  void set_down_t(const std::vector<float>& down);
  /// neuron_order in terms of the dense FFN. @param dense  ResizedLayer::neuron
  void name_neurons(const std::vector<std::int32_t>& dense, std::int64_t dense_hidden);
};

/// What the weights of a token's chosen experts are multiplied by, so that they are 1 on average.
inline float gate_scale(GateMode gate, std::int64_t active) {
  return gate == GateMode::kSoftmax ? static_cast<float>(active) : 1.0f;
}

/// features [T, rows] = the hidden values that run, times what their experts weigh: of the shared
/// slice (weight 1), and of the token's experts (`scale` times the routing's weight). Both may be
/// the same memory, row by row.
void mask_features(const BudgetRows& rows, const Routing& routing, float scale,
                   MatrixView<const float> hidden, MatrixView<float> features,
                   const ParallelFor& parallel);

/// `down` [rows, D] by ridge regression of target [T, D] on features [T, rows], drawn to the dense
/// one.
std::vector<float> repaired_down(const std::vector<float>& dense_down,
                                 MatrixView<const float> features, MatrixView<const float> target,
                                 std::span<const float> weight, const RefitSpec& spec,
                                 const ParallelFor& parallel);

/// The layer that these rows and this router are.
MoeLayer make_budget_layer(BudgetRows rows, const LinearRouter& router, std::int64_t active,
                           GateMode gate);

/// y [T, D] = h [T, H] down_t [H, D], plus a bias if there is one.
void down_product(MatrixView<const float> h, const std::vector<float>& down_t,
                  std::span<const float> bias, MatrixView<float> y, const ParallelFor& parallel);

/// Weight [T] of each token, of mean 1: by the error relative to the residual stream after the
/// layer, by which the next norm divides.
/// @param stream  [T, D] before the layer    y [T, D] the layer's output; conversions leave its
///                output bias out, the same for every token
/// @throws FileError  a value is not finite (names the token)
std::vector<float> token_weights(MatrixView<const float> stream, MatrixView<const float> y,
                                 std::int64_t context, double first_token_weight,
                                 std::int64_t layer);

/// [D], the weighted mean of target - y: what an output bias has to give for y [T, D].
/// @param weight  [T] or more, of mean 1
std::vector<float> mean_difference(MatrixView<const float> target, MatrixView<const float> y,
                                   std::span<const float> weight);

/// a + b, element by element; b may be empty: zeros.
std::vector<float> summed(std::vector<float> a, std::span<const float> b);

/// sum_t weight_t |y_t - target_t|^2 / sum_t weight_t |target_t|^2.
double relative_error(MatrixView<const float> y, MatrixView<const float> target,
                      std::span<const float> weight);

/// Converts all layers in order.
/// @param shared_widths  [L], neurons of each shared slice
/// @param score          by which neurons are kept where nothing is routed
Conversion convert_layers(Model& model, const BudgetSpec& spec,
                          const std::vector<std::int64_t>& shared_widths,
                          const TokenWindows& windows, const BudgetProgress& progress,
                          StaticScore score = StaticScore::kEnergy);

}  // namespace cleave
