#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "cleave/views.h"

namespace cleave {

/// Gives every row a column, at most capacity[c] rows to column c, so that the sum of
/// benefit[row, column of row] is the largest there is (up to the rounding of sums in double). With
/// capacities that sum to H they are met exactly.
///
/// A min-cost flow between the C columns, never an H x H matrix: O(H * C) memory, at most H
/// augmentations of O(C^2 + C log H) each per column on the path. Ties go to the lower row and the
/// lower column, so the same input gives the same result on every machine.
///
/// @param benefit   [H, C], finite
/// @param capacity  [C], not negative, sums to H or more
/// @return          [H], in [0, C)
/// @throws InvalidArgument  a benefit is NaN or infinite (names row and column), a capacity is
///                          negative, or they sum to less than H
/// Source: successive shortest paths (Ahuja, Magnanti, Orlin, Network Flows, section 9.7).
std::vector<std::int32_t> assign_balanced(MatrixView<const float> benefit,
                                          std::span<const std::int64_t> capacity);

}  // namespace cleave
