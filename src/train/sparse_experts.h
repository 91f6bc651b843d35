#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "cleave/views.h"

namespace cleave::train {

/// The (token, slot) pairs of a routing, sorted by expert. Pair p is slot p % K of token p / K.
struct PairsByExpert {
  at::Tensor pair;      ///< int64 [T*K]: the pair at each sorted place; ascending in an expert
  at::Tensor token;     ///< int64 [T*K]: its token
  at::Tensor place_of;  ///< int64 [T*K]: the sorted place of each pair (inverse of `pair`)
  std::vector<std::int64_t> begin;  ///< [E + 1]; expert e has places [begin[e], begin[e + 1])
};

/// O(T*K log). ids int64 [T, K] in [0, num_experts). One device synchronisation (the counts).
PairsByExpert group_pairs(const at::Tensor& ids, std::int64_t num_experts);

/// Stacked expert weights: gate [E, I, D] (undefined: two-matrix FFN), up [E, I, D], down [E, D,
/// I].
struct ExpertTensors {
  at::Tensor gate, up, down;
  Activation activation = Activation::kSilu;
};

/// y[t] = sum_k weights[t, k] * expert_{ids[t, k]}(x[t]), with gradients to x, weights and experts.
///   x [T, D]   weights [T, K]   returns [T, D]
/// T*K rows run through each GEMM; an expert without tokens is not read. Gradients of tensors that
/// need none are neither computed nor allocated.
at::Tensor sparse_experts(const at::Tensor& x, const at::Tensor& weights,
                          const PairsByExpert& pairs, const ExpertTensors& experts);

}  // namespace cleave::train
