#pragma once

#include <ATen/core/Tensor.h>

#include "train/sparse_experts.h"

namespace cleave::train {

struct MaskedHidden {
  at::Tensor y;       ///< [T, D], with gradients to x, mask and experts
  at::Tensor energy;  ///< [T, E], no gradient; undefined unless asked for
};

/// y[t] = sum_e mask[t, e] * expert_e(x[t]) as three large products over all E * I hidden values:
/// what gathering tokens per expert gives, at E / K times the multiply-adds but without its many
/// small products. For fine experts that is faster, and the gradient with respect to the mask
/// entries of experts that were not chosen comes with it.
///   x [T, D]   mask [T, E]
/// @param with_energy  also the squared size of what every expert would add unweighted, neuron by
///                     neuron: energy[t, e] = sum over j in e of h[t, j]^2 |down_j|^2
MaskedHidden masked_hidden(const at::Tensor& x, const at::Tensor& mask,
                           const ExpertTensors& experts, bool with_energy);

}  // namespace cleave::train
