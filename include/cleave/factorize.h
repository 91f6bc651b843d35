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
/// @param partition  one entry per hidden neuron; every expert must get at least one. Dropped and
///                   shared neurons are in none
/// @return           owns 3*H*D floats (2*H*D without a gate), fewer when neurons are left out
/// @throws InvalidArgument  sizes disagree, an id is out of range, or an expert is empty
/// Source: FactorLLM, arXiv:2408.11855 (partition without changing weight values).
ExpertBank factorize(const FfnView& ffn, const NeuronPartition& partition);

/// The neurons that the partition marks as shared, as a bank of one expert that runs for every
/// token; num_experts() is 0 if there are none. Has no down_bias: that is in the bank of
/// factorize(), so that the two banks' outputs may be added.
/// @throws InvalidArgument  as factorize(), but experts may be empty and E may be 0
ExpertBank shared_slice(const FfnView& ffn, const NeuronPartition& partition);

/// The inverse: puts every row back where it came from. Bit-equal to the dense FFN that was
/// factorized as long as nothing changed the bank; rows of dropped neurons are zero.
DenseFfn to_dense(const ExpertBank& bank);

/// The same for the banks of factorize() and shared_slice() together.
/// @throws InvalidArgument  they are not of one FFN, or have a neuron in common
DenseFfn to_dense(const ExpertBank& bank, const ExpertBank& shared);

}  // namespace cleave
