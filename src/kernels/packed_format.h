#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cleave/packed.h"
#include "kernels/isa/panel_isa.h"

// Where the bytes of packed weights are. One format for all instruction sets:
//
//   panel      [steps][32 lanes]: the weights that 32 outputs (lanes) have for each input (step).
//              bfloat16 keeps two steps of a lane side by side; int8 and int4 carry their scales.
//   linear     panels of 32 outputs, one after the other; steps are the K inputs.
//   expert     panels of neurons; each is a gate|up panel [D steps][16 gate, 16 up] (two-matrix
//              FFNs: [D steps][32 up]), then the neurons' share of down: int8's scale per neuron
//              [16 or 32 floats], and ceil(D / 32) panels [16 or 32 neurons as steps][32 outputs].
//              So a neuron's three rows lie together, an expert is a range of panels, and any share
//              of the experts' work is one stream of memory.
//
// Lanes beyond the last output or neuron hold zeros. Every panel starts on a cache line.
namespace cleave {

/// How a type's panels are stored where lanes are rows of the matrix (gate, up, linear) ...
PanelFormat lane_format(WeightType type);
/// ... and where steps are (down).
PanelFormat step_format(WeightType type);

/// Bytes of one panel, a multiple of 64.
std::int64_t panel_bytes(PanelFormat format, std::int64_t steps);

/// Writes one panel. weights [steps, 32]   step_scale [steps], written, for kInt8Steps only
void encode_panel(PanelFormat format, std::span<const float> weights, std::byte* panel,
                  float* step_scale = nullptr);

/// The parts of an expert panel.
struct ExpertPanelLayout {
  ExpertPanelLayout(WeightType type, bool gated, std::int64_t d_model);

  PanelFormat gate_up_format, down_format;
  std::int64_t neurons;           ///< per panel
  std::int64_t gate_up_bytes;     ///< the gate|up panel, at offset 0
  std::int64_t step_scale_bytes;  ///< then kInt8's scales of the neurons, or 0
  std::int64_t down_panels;       ///< ceil(D / 32)
  std::int64_t down_panel_bytes;

  std::int64_t down_offset() const { return gate_up_bytes + step_scale_bytes; }
  std::int64_t bytes() const { return down_offset() + down_panels * down_panel_bytes; }
};

}  // namespace cleave
