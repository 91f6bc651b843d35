#pragma once

#include "cleave/expert.h"
#include "cleave/partition.h"

namespace cleave {

/// Splits a dense FFN into experts that hold disjoint sets of its hidden neurons.
///
/// Weights are permuted, never changed: if no neuron is dropped, the experts' outputs summed with
/// weight 1, plus down_bias, equal the dense FFN's up to float rounding (test:
/// Factorize.AllExpertsEqualDense). Inside an expert the dense order of neurons is kept.
///
/// @param ffn        read during the call only; may be memory-mapped
/// @param partition  one entry per hidden neuron; every expert must get at least one
/// @return           owns 3*H*D floats (2*H*D without a gate), fewer when neurons are dropped
/// @throws InvalidArgument  sizes disagree, an id is out of range, or an expert is empty
/// Source: FactorLLM, arXiv:2408.11855 (partition without changing weight values).
ExpertBank factorize(const FfnView& ffn, const NeuronPartition& partition);

/// The inverse: puts every row back where it came from. Bit-equal to the dense FFN that was
/// factorized as long as nothing changed the bank; rows of dropped neurons are zero.
DenseFfn to_dense(const ExpertBank& bank);

}  // namespace cleave
