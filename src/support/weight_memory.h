#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace cleave {

/// Memory for packed weights, uninitialised, aligned to 64 bytes. Blocks of some size lie one after
/// the other in huge pages, in the order in which they are asked for: a decoder's weights are one
/// stream, and a matrix needs no huge page of its own. A stretch of memory is given back when the
/// last block in it is. Safe to call from several threads.
std::shared_ptr<std::byte[]> allocate_weights(std::int64_t bytes);

/// Gives the system back what lies between the last block and the end of its huge page. Blocks that
/// come later are placed there all the same. To be called when a model is complete.
void trim_weights();

}  // namespace cleave
