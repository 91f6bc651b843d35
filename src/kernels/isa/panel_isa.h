#pragma once

#include <cstdint>

#include "cleave/views.h"

// Products with packed weights, compiled once per instruction set. Plain structs only, as in
// linear_isa.h. The format is described in packed_format.h.
namespace cleave {

/// Outputs of one panel: two vectors of 16 floats. In a gated FFN the first half are gate rows and
/// the second half the up rows of the same 16 neurons.
inline constexpr std::int64_t kPanelWidth = 32;

/// How a panel's weights are stored. The last two serve the down projection, whose scales belong to
/// the steps (hidden neurons), not to the lanes.
enum class PanelFormat {
  kF32,
  kBF16,
  kF16,
  kInt8,       ///< a scale per lane
  kInt4,       ///< scale and minimum per lane and 32 steps
  kInt8Steps,  ///< the scale of a step is the caller's to apply, to its input
  kInt4Steps,  ///< scale and minimum per step and 32 lanes
};
inline constexpr int kNumPanelFormats = 7;

/// Rows of x that one call takes, by index into PanelKernels. More rows share each weight that is
/// read; what takes long to decode, or serves more rows than that, is unpacked first.
inline constexpr int kPanelRows[] = {1, 2, 4, 6, 8, 12};
inline constexpr int kNumPanelRows = 6;
inline constexpr int kMaxPanelRows = 12;

/// y[r][32 i + lane] (+)= sum over s < steps of x[r][s] * weight_i(s)[lane], for panels i.
struct PanelProduct {
  const void* panel;  ///< the first
  std::int64_t steps;
  std::int64_t panels;       ///< how many, side by side in y
  std::int64_t panel_bytes;  ///< between two of them
  const float* const* x;     ///< a pointer per row, to `steps` floats
  float* const* y;           ///< a pointer per row, to 32 * panels floats
  bool add;                  ///< to y; otherwise y is overwritten
  const char* prefetch;      ///< one cache line from here per step, for a later call; or nullptr
};

struct PanelKernels {
  /// Indexed by format and row count; nullptr where the format is to be unpacked first.
  void (*multiply[kNumPanelFormats][kNumPanelRows])(const PanelProduct& product);
  /// out [steps, 32] = the panel's weights (of kInt8Steps: without the scales).
  void (*unpack[kNumPanelFormats])(const void* panel, std::int64_t steps, float* out);
  /// h[r][j] = weight[r] * act(in[r][j]) * in[r][16 + j] for j < 16; without a gate
  /// h[r][j] = weight[r] * act(in[r][j]) for j < 32. Times step_scale[j] unless that is nullptr.
  void (*activate)(Activation activation, bool gated, std::int64_t rows, const float* const* in,
                   const float* weight, const float* step_scale, float* const* h);
};

namespace scalar {
const PanelKernels& panel_kernels();
}
namespace avx2 {
const PanelKernels& panel_kernels();
}
namespace avx512 {
const PanelKernels& panel_kernels();
}

}  // namespace cleave
