#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "cleave/expert.h"
#include "cleave/kernels.h"
#include "cleave/model.h"
#include "cleave/text.h"
#include "cleave/views.h"

namespace cleave {

/// What is counted, and for what shapes.
struct NeuronStatsSpec {
  std::int64_t num_layers = 0;  ///< L
  std::int64_t hidden = 0;      ///< H
  std::int64_t d_model = 0;     ///< D
  std::int64_t top = 10;        ///< Ka: how many neurons a token activates, by |h|; at most H
  bool input_moment = true;     ///< E[x x^T], [D, D]
  bool gram = false;            ///< E[h h^T], [H, H]
  bool coactivation = false;    ///< how often two neurons are both among the top Ka, [H, H]
};

/// Statistics of an FFN's hidden neurons over a calibration text, layer by layer: streamed, so a
/// text may be as long as one likes; mergeable, so several machines or texts may be added up; fed
/// by calibrate() or by any engine that calls observe().
///
/// Memory for each layer that was observed: 3 * H doubles, H floats a call of observe_gate(), and
/// D * (D + 64) / 2 floats with `input_moment`, H * (H + 64) / 2 floats with `gram` and as many
/// again with `coactivation`: symmetric matrices are kept as their lower triangle. For H = 14336 a
/// Gram matrix is 413 MB a layer, 13.2 GB for the 32 layers of a 7B model. Layers that are never
/// observed take nothing, so a caller with less memory goes over the text once per group of layers.
///
/// Sums over tokens are in double, those of the matrices in float (products of 512 tokens at a
/// time, then added up).
class NeuronStats {
 public:
  /// @throws InvalidArgument  a size below 1 or above 2^24, or Ka outside [1, H]
  explicit NeuronStats(const NeuronStatsSpec& spec);
  NeuronStats(NeuronStats&&) noexcept;
  NeuronStats& operator=(NeuronStats&&) noexcept;
  ~NeuronStats();

  /// Adds tokens of one layer.
  ///   hidden   [T, H], h = act(gate x) .* (up x), or act(up x) without a gate
  ///   input    [T, D], x
  ///   weights  [T], how often each token counts; empty: once each. 0 leaves a token out: the first
  ///            one of a window, say, an attention sink whose size drowns all others
  /// A call that throws has added nothing.
  /// @throws InvalidArgument  shapes disagree, a weight is negative, or a value is NaN or infinite
  ///                          (names layer and token)
  void observe(std::int64_t layer, MatrixView<const float> hidden, MatrixView<const float> input,
               std::span<const float> weights = {}, const ParallelFor& parallel = {});
  /// Adds one row to gate_means(): the weighted mean of act(gate x) over the tokens of one sample
  /// of the text (a window, a document).  gate [T, H]   weights as above, not all 0
  void observe_gate(std::int64_t layer, MatrixView<const float> gate,
                    std::span<const float> weights = {});
  /// Adds what another one has seen. @throws InvalidArgument  the specs differ
  void merge(const NeuronStats& other);

  /// One safetensors file, float32, written under a temporary name and renamed: means, the total
  /// weight they stand for, matrices as packed lower triangles [n (n + 1) / 2]. Layers that were
  /// never observed are absent.
  /// @throws FileError  the disk is full or the folder not writable
  void save(const std::filesystem::path& file) const;
  /// @throws FileError  not such a file, or damaged
  static NeuronStats load(const std::filesystem::path& file);

  const NeuronStatsSpec& spec() const;
  /// Tokens with a weight above 0. @throws InvalidArgument  (as all below) layer outside [0, L)
  std::int64_t num_tokens(std::int64_t layer) const;
  double total_weight(std::int64_t layer) const;

  // All below are weighted means over tokens.
  // @throws InvalidArgument  the layer has seen no token, or the statistic was not asked for
  std::vector<float> mean(std::int64_t layer) const;      ///< [H], E[h]
  std::vector<float> square(std::int64_t layer) const;    ///< [H], E[h^2]
  std::vector<float> variance(std::int64_t layer) const;  ///< [H], E[h^2] - E[h]^2
  /// [H], E[h^2] * |d|^2: what a neuron adds to the output.  down_norm [H], see down_norms()
  std::vector<float> energy(std::int64_t layer, std::span<const float> down_norm) const;
  /// [H], how often a neuron is among the Ka of largest |h| (ties: the lower id) and not 0. CMoE's
  /// activation rate, arXiv:2502.04416.
  std::vector<float> rate(std::int64_t layer) const;
  std::vector<float> input_moment(std::int64_t layer) const;  ///< [D, D]
  std::vector<float> gram(std::int64_t layer) const;          ///< [H, H]
  std::vector<float> coactivation(std::int64_t layer) const;  ///< [H, H]; the diagonal is rate()
  /// [samples, H], in the order of the calls; empty without any. Signed.
  std::vector<float> gate_means(std::int64_t layer) const;

  /// Of all observed layers, in bytes.
  std::int64_t memory_bytes() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// [H], Euclidean norms of the columns of `down`.
std::vector<float> down_norms(const FfnView& ffn);

/// What the neurons of an FFN do.
///   x [T, D]   hidden [T, H], written: what NeuronStats::observe takes
///   gate [T, H], written with act(gate x); or empty. Needs an FFN with a gate
/// @throws InvalidArgument  shapes disagree
void hidden_activations(const FfnView& ffn, MatrixView<const float> x, MatrixView<float> hidden,
                        MatrixView<float> gate, const ParallelFor& parallel);

/// A text and how much each of its tokens counts.
struct CalibrationText {
  TokenWindows windows;
  double weight = 1.0;
};

/// Runs texts through a dense model, layer by layer, and collects the statistics of its FFNs'
/// neurons. Every layer sees what the dense layers before it produce. The first token of a window
/// is left out of all statistics. Each window is a sample of gate_means() (models with a gate).
///
/// Memory: the activations [T, D] of all texts, one layer's FFN, the statistics.
///
/// @param spec      L, H and D may be 0: the model's
/// @param layers    which ones are observed; empty: all
/// @param progress  called with (layers done, all layers)
/// @throws InvalidArgument  no text, a weight that is not above 0, a layer outside [0, L), a layer
///                          that holds experts, or an activation that is NaN or infinite
NeuronStats calibrate(Model& model, std::span<const CalibrationText> texts, NeuronStatsSpec spec,
                      std::span<const std::int64_t> layers = {},
                      const std::function<void(std::int64_t, std::int64_t)>& progress = {});

}  // namespace cleave
