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
//   expert     P panels of neurons: scales [P][gate|up, down]; gate|up [P][D steps][16 gate, 16 up]
//              (two-matrix FFNs: [D steps][32 up]); down, ceil(D / 32) panels [all neurons as
//              steps][32 outputs]. So any share of an expert's neurons is a stretch of gate|up and
//              one of each column panel of down; all of them are one stream of memory.
//   in int4    an expert is P such experts of one panel each, for the scales of down count in units
//              of their own there.
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

/// Whether all neurons of an expert are one column panel of down; else each panel's are.
inline bool joins_down(PanelFormat format) { return format != PanelFormat::kInt4; }

/// Where the parts of an expert are. An expert of P panels begins with its first panel's byte
/// (P * bytes() in all); offsets are from there.
struct ExpertLayout {
  ExpertLayout(WeightType type, bool gated, std::int64_t d_model);

  PanelFormat format;
  std::int64_t neurons;        ///< per panel
  std::int64_t scale_bytes;    ///< of gate|up; those of down follow
  std::int64_t gate_up_bytes;  ///< of a panel
  std::int64_t down_panels;    ///< ceil(D / 32)
  std::int64_t down_panel_bytes;

  bool joins_down() const { return cleave::joins_down(format); }
  std::int64_t scales_at(std::int64_t panel) const {
    return panel * (joins_down() ? 2 * scale_bytes : bytes());
  }
  std::int64_t down_scales_at(std::int64_t panel) const { return scales_at(panel) + scale_bytes; }
  std::int64_t gate_up_at(std::int64_t panels, std::int64_t panel) const {
    return joins_down() ? scales_at(panels) + panel * gate_up_bytes
                        : scales_at(panel) + 2 * scale_bytes;
  }
  /// Panel d of down from neuron `panel * neurons` on.
  std::int64_t down_at(std::int64_t panels, std::int64_t panel, std::int64_t d) const {
    return joins_down() ? gate_up_at(panels, panels) + (d * panels + panel) * down_panel_bytes
                        : gate_up_at(panels, panel) + gate_up_bytes + d * down_panel_bytes;
  }
  /// From a panel of down to the next.
  std::int64_t down_stride(std::int64_t panels) const {
    return (joins_down() ? panels : 1) * down_panel_bytes;
  }
  /// Panels whose neurons are one piece of down, of an expert of so many.
  std::int64_t joined_panels(std::int64_t panels) const { return joins_down() ? panels : 1; }
  std::int64_t used_bytes() const {
    return 2 * scale_bytes + gate_up_bytes + down_panels * down_panel_bytes;
  }
  /// Room for a panel. The same outputs' share of down of all narrow experts is read at once;
  /// experts a multiple of a large power of two apart would put it into the same few sets of a
  /// cache, so there is a gap between such, of zeros.
  std::int64_t bytes() const { return used_bytes() + gap_bytes(); }
  std::int64_t gap_bytes() const { return used_bytes() % kAliasBytes == 0 ? kGapBytes : 0; }
  /// A panel's share of it.
  std::int64_t gap_at(std::int64_t panels, std::int64_t panel) const {
    return joins_down() ? panels * used_bytes() + panel * gap_bytes()
                        : scales_at(panel) + used_bytes();
  }

  static constexpr std::int64_t kAliasBytes = 16 << 10, kGapBytes = 2 << 10;
};

/// The lanes' scales where each step's scale is in its input already (down in int8).
extern const float kUnitScales[kMaxScales];

}  // namespace cleave
