#pragma once

#include "cleave/kernels.h"
#include "kernels/isa/gram_isa.h"
#include "kernels/isa/linear_isa.h"
#include "kernels/isa/panel_isa.h"
#include "kernels/isa/row_isa.h"

namespace cleave {

/// The kernels of the instruction set in use; chosen at the first call.
/// @throws InvalidArgument  see isa_name()
const IsaKernels& isa_kernels();

/// The same for packed weights.
const PanelKernels& panel_kernels();
/// The same for rows of numbers.
const RowKernels& row_kernels();
/// The same for closed-form fits.
const GramKernels& gram_kernels();

/// The kernels of a set by its name, or nullptr if this CPU or this build lacks it.
const IsaKernels* find_isa_kernels(const char* name);
const PanelKernels* find_panel_kernels(const char* name);
const RowKernels* find_row_kernels(const char* name);
const GramKernels* find_gram_kernels(const char* name);

inline ConstMatrix plain(MatrixView<const float> m) {
  return {m.data, m.rows, m.cols, m.row_stride};
}
inline MutableMatrix plain(MatrixView<float> m) { return {m.data, m.rows, m.cols, m.row_stride}; }

}  // namespace cleave
