#pragma once

#include <cstdint>
#include <vector>

namespace cleave {

/// Moves rows between clusters of equal size until neither an exact assignment nor a swap of two
/// rows raises the sum over clusters of the edges between all pairs in it (a row with itself
/// included), or `rounds` are over. The sum never falls.
///
/// @param edges   [n, n], symmetric and positive semidefinite: then the sum is a convex function of
///                the assignment, and assigning each row by its edges into the present clusters -
///                the linearisation, a lower bound that touches it there - cannot lower it
/// @param start   [n], in [0, clusters), n / clusters of each
std::vector<std::int32_t> improve_clusters(std::vector<float> edges, std::int32_t clusters,
                                           std::vector<std::int32_t> start, std::int32_t rounds);

}  // namespace cleave
