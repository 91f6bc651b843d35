#pragma once

#include <cstdint>

#include "cleave/views.h"

// Products with packed weights, compiled once per instruction set. Plain structs only, as in
// linear_isa.h. The format is described in packed_format.h.
namespace cleave {

/// Outputs of one panel: two vectors of 16 floats. In a gated FFN the first half are gate rows and
/// the second half the up rows of the same 16 neurons.
inline constexpr std::int64_t kPanelWidth = 32;

/// How a panel's weights are stored.
enum class PanelFormat { kF32, kBF16, kF16, kInt8, kInt4 };
inline constexpr int kNumPanelFormats = 5;

/// Rows of x that one call of multiply() takes, by index into PanelKernels: more rows share each
/// weight that is read. More rows than these go in blocks (BlockProduct).
inline constexpr int kPanelRows[] = {1, 2, 4, 8};
inline constexpr int kNumPanelRows = 4;
inline constexpr int kMaxPanelRows = 8;

/// Attention takes many rows in tiles of 12, against float32 keys and values, 128 steps at a time:
/// 16 kB of weights and 7 kB of x stay in a first-level cache. Rows of a tile lie kTileStride
/// floats apart: a constant, so that 12 rows need one address register; and no power of two, so
/// that they do not fall into the same cache set.
inline constexpr int kTileRows = 12;
inline constexpr std::int64_t kTileSteps = 128;
inline constexpr std::int64_t kTileStride = kTileSteps + 16;

/// Steps of kInt4 that share a lane's scale.
inline constexpr std::int64_t kInt4Block = 32;

/// A block of x for kInt4. Beside the floats, x in fixed point: so a lane's nibbles are multiplied
/// by bytes, two products an addition, and need not become floats first. 24 bits of the block's
/// largest value: what is rounded off is at most 2^-24 of that, as in a sum of floats.
struct InputBlock {
  float sum;                          ///< of the x
  float scale;                        ///< x = scale * (digits[0] + 2^8 digits[1] + 2^16 digits[2])
  std::int8_t digits[3][kInt4Block];  ///< of eight steps the even ones, then the odd ones
  float padding[6];                   ///< to two cache lines
};

/// y[r][32 i + lane] (+)= sum over s < steps of x[r][s] * weight_i(s)[lane], for panels i.
struct PanelProduct {
  const void* panel;    ///< the first
  const float* scales;  ///< kInt8: of each lane [32]. kInt4: units of scales and minima [2]
  std::int64_t steps;
  std::int64_t panels;              ///< how many, side by side in y
  std::int64_t panel_bytes;         ///< between two of them
  const float* const* x;            ///< a pointer per row, to `steps` floats
  const InputBlock* const* blocks;  ///< kInt4: a pointer per row, to x as prepare() gives it
  float* const* y;                  ///< a pointer per row, to 32 * panels floats
  bool add;                         ///< to y; otherwise y is overwritten
  /// What to fetch from memory under the first panel, as many bytes as it has; under others what is
  /// as far behind that as they are; or nullptr.
  const char* prefetch;
};

/// y[r][32 i + lane] (+)= sum over s < steps of x[r * kTileStride + s] * panel[i][s][lane].
struct TileProduct {
  const float* panel;  ///< [panels, steps, 32]
  std::int64_t steps;  ///< at most kTileSteps
  std::int64_t panels;
  const float* x;   ///< [rows, kTileStride]
  float* const* y;  ///< a pointer per row, to 32 * panels floats
  bool add;
  const char* prefetch;  ///< what to fetch from memory meanwhile: 32 bytes per step; or nullptr
};

/// y[r][i * panel_offset + lane] (+)= sum over s < steps of x[r][s] * panel[i][s][lane], for one
/// panel or two: rows wherever they lie.
struct BlockProduct {
  const float* panel[2];  ///< [steps, 32] each; should fit a second-level cache
  std::int64_t steps;
  const float* const* x;      ///< a pointer per row, to `steps` floats
  float* const* y;            ///< a pointer per row, to 32 floats per panel
  std::int64_t panel_offset;  ///< in y, floats
  bool add;
  const char* prefetch;  ///< what to fetch from memory meanwhile: 32 bytes per step; or nullptr
};
/// Rows that one call takes at most. Two panels share each value of x, which leaves registers
/// for 6.
inline constexpr int kBlockRows = 8, kPairRows = 6;

/// As a BlockProduct of kPairRows rows and two panels that are still packed: unpacks them on the
/// way, which costs next to nothing there.
struct UnpackProduct {
  const void* panel[2];  ///< the first piece of each: all steps, or as many as a panel of down has
  std::int64_t piece_steps;
  std::int64_t pieces;
  std::int64_t piece_stride;  ///< bytes
  float* unpacked;            ///< [2, pieces * piece_steps, 32], written
  const float* const* x;
  float* const* y;
  std::int64_t panel_offset;
  bool add;
  const char* prefetch;
};

/// y[r][i * panel_offset + lane] (+)= sum over s of x[r][s] * panel[i][s][lane] for one bfloat16
/// panel or two, as they are packed, and rows of bfloat16. dot_products.S knows the order.
struct DotProduct {
  const void* panel[2];           ///< the first piece of each, as in UnpackProduct
  const std::uint16_t* const* x;  ///< a pointer per row, to all steps, made even by a zero
  float* const* y;                ///< a pointer per row, to 32 floats per panel; different ones
  std::int64_t products;          ///< that many times the rows that the kernel takes at once
  std::int64_t row_bytes;         ///< of a row of x
  std::int64_t piece_bytes;       ///< of a panel's piece
  std::int64_t piece_gap;         ///< bytes, from a piece's end to the next
  std::int64_t panel_offset;      ///< in y, bytes
  std::int64_t add;               ///< or 0
  /// What to fetch from memory meanwhile: in every two steps the line `prefetch_rate` bytes behind
  /// the last one, from `prefetch` on; with two panels also the one `prefetch_panel` bytes behind
  /// it.
  const char* prefetch;
  std::int64_t prefetch_panel;
  std::int64_t prefetch_rate;   ///< bytes: a line at most, or two with multiply_alone
  std::int64_t prefetch_bytes;  ///< per piece and product
  std::int64_t prefetch_gap;    ///< bytes, from what one piece fetches to what the next does
  /// But for 12 rows also, in every two steps, what lies `x_rate` bytes behind the last such.
  const std::uint16_t* prefetch_x;
  std::int64_t x_rate;
};
using DotKernel = void (*)(const DotProduct& product);

/// y[token[r] * y_stride + lane] += sum over s < steps of x[r * steps + s] * panel[s][lane],
/// for a bfloat16 panel of few steps: of down of a narrow expert.
struct ShortDotProduct {
  const void* panel;          ///< [steps / 2, 32 lanes, 2]
  std::int64_t steps;         ///< kShortSteps or twice as many
  const std::uint16_t* x;     ///< [rows, steps]
  const std::int32_t* token;  ///< [rows], different ones
  float* y;
  std::int64_t y_stride;  ///< floats
  std::int64_t products;  ///< that many times the rows that the kernel takes at once
};
/// Rows of one panel that a call takes at most; of two it takes kPairRows.
inline constexpr int kDotRows = 12;
inline constexpr std::int64_t kShortSteps = 16;

/// What a set with dot products of bfloat16 pairs has (AVX512-BF16). Sums are float32; a pair is
/// added at once, and subnormal numbers count as zero.
struct DotKernels {
  /// Indexed by rows - 1.
  const DotKernel* multiply_block;  ///< [kDotRows]
  const DotKernel* multiply_alone;  ///< [kDotRows], fetches a second line behind each
  const DotKernel* multiply_pair;   ///< [kPairRows], of two panels
  void (*multiply_short[kDotRows])(const ShortDotProduct& product);
  /// out [n] = x [n], rounded to the nearest, ties to even.
  void (*round)(const float* x, std::int64_t n, std::uint16_t* out);
  /// As in PanelKernels, rounded; sigmoids to 7e-5 before that.
  void (*activate)(Activation activation, bool gated, std::int64_t rows, const float* in,
                   const float* weight, std::uint16_t* h, std::int64_t stride);
};

struct PanelKernels {
  /// Indexed by format and row count; nullptr where the format is to be unpacked first.
  void (*multiply[kNumPanelFormats][kNumPanelRows])(const PanelProduct& product);
  /// blocks [ceil(steps / 32)] = x [steps] for kInt4.
  void (*prepare)(const float* x, std::int64_t steps, InputBlock* blocks);
  /// Indexed by (rows + 3) / 4 - 1: for tiles of at most 4, 8 and 12 rows; writes that many.
  void (*multiply_tile[kTileRows / 4])(const TileProduct& product);
  /// Indexed by rows - 1.
  void (*multiply_block[kBlockRows])(const BlockProduct& product);
  void (*multiply_pair[kPairRows])(const BlockProduct& product);   ///< of two panels
  void (*multiply_half[kBlockRows])(const BlockProduct& product);  ///< lanes 0 to 15 of one panel
  /// Indexed by format; nullptr where it is better unpacked first.
  void (*unpack_and_multiply[kNumPanelFormats])(const UnpackProduct& product);
  /// out [steps, 32] = the panel's weights.
  void (*unpack[kNumPanelFormats])(const void* panel, std::int64_t steps, const float* scales,
                                   float* out);
  /// h[r][j] = weight[r] * act(in[r][j]) * in[r][16 + j] for j < 16; without a gate
  /// h[r][j] = weight[r] * act(in[r][j]) for j < 32. Times step_scale[j] unless that is nullptr.
  ///   in [rows, 32]   h: rows `stride` apart
  void (*activate)(Activation activation, bool gated, std::int64_t rows, const float* in,
                   const float* weight, const float* step_scale, float* h, std::int64_t stride);
  const DotKernels* dots;  ///< or nullptr
};

namespace scalar {
const PanelKernels& panel_kernels();
}
namespace avx2 {
const PanelKernels& panel_kernels();
}
namespace avx512 {
const PanelKernels& panel_kernels();
const PanelKernels& vnni_panel_kernels();  ///< needs AVX512-VNNI as well
const PanelKernels& bf16_panel_kernels();  ///< needs AVX512-VNNI and AVX512-BF16
}  // namespace avx512
namespace neon {
const PanelKernels& panel_kernels();
}

}  // namespace cleave
