#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cleave/packed.h"
#include "kernels/isa/panel_isa.h"

// Where the bytes of packed weights are. One format for all instruction sets:
//
//   panel      [steps][32 lanes]: the weights that 32 outputs (lanes) have for each input (step).
//              bfloat16 keeps two steps of a lane side by side, int4 eight; every 32 steps of int4
//              begin with the lanes' scales and minima, a byte each.
//   scales     int8: a float per lane (of down: per step); int4: two floats, the units in which the
//              bytes of scales and minima count.
//   linear     [scales][panel] per 32 outputs, one after the other; steps are the K inputs.
//   expert     panels of neurons: [scales of gate|up][scales of down], a gate|up panel [D steps]
//              [16 gate, 16 up] (two-matrix FFNs: [D steps][32 up]), then the neurons' share of
//              down: ceil(D / 32) panels [16 or 32 neurons as steps][32 outputs]. So a neuron's
//              three rows lie together, an expert is a range of panels, and any share of the
//              experts' work is one stream of memory.
//
// Lanes beyond the last output or neuron hold zeros. Every panel starts on a cache line.
namespace cleave {

PanelFormat panel_format(WeightType type);

/// Bytes of one panel without its scales, a multiple of 64.
std::int64_t panel_bytes(PanelFormat format, std::int64_t steps);
/// Bytes of the scales that a panel (or the down panels of a group of neurons) needs: 0, 64 or 128.
std::int64_t scale_bytes(PanelFormat format);
inline constexpr std::int64_t kMaxScales = 32;

/// Enlarges `scales` [kMaxScales], zeros at first, to what these weights [steps, 32] need.
void widen_scales(PanelFormat format, std::span<const float> weights, float* scales);
/// Writes one panel. weights [steps, 32]
void encode_panel(PanelFormat format, std::span<const float> weights, const float* scales,
                  std::byte* panel);

/// The parts of an expert panel.
struct ExpertPanelLayout {
  ExpertPanelLayout(WeightType type, bool gated, std::int64_t d_model);

  PanelFormat format;
  std::int64_t neurons;        ///< per panel
  std::int64_t scale_bytes;    ///< of gate|up, at offset 0; those of down follow
  std::int64_t gate_up_bytes;  ///< then the gate|up panel
  std::int64_t down_panels;    ///< ceil(D / 32)
  std::int64_t down_panel_bytes;

  std::int64_t gate_up_offset() const { return 2 * scale_bytes; }
  static constexpr std::int64_t kAliasBytes = 16 << 10, kGapBytes = 2 << 10;
  std::int64_t down_offset() const { return gate_up_offset() + gate_up_bytes; }
  std::int64_t used_bytes() const { return down_offset() + down_panels * down_panel_bytes; }
  /// From one panel to the next. The same outputs' share of down of all panels is read at once;
  /// panels a multiple of a large power of two apart would put it into the same few sets of a
  /// cache, so such panels are followed by a gap, of zeros.
  std::int64_t bytes() const {
    return used_bytes() % kAliasBytes == 0 ? used_bytes() + kGapBytes : used_bytes();
  }
};

/// The lanes' scales where each step's scale is in its input already (down in int8).
extern const float kUnitScales[kMaxScales];

}  // namespace cleave
