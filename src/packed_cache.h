#pragma once

#include <filesystem>

#include "cleave/checkpoint.h"
#include "decoder_weights.h"

// The file behind CacheSpec (docs/file_format.md, docs/decisions/0008-packed-cache.md): a
// safetensors file of byte tensors, one a part of the decoder, each on a page of its own, and the
// checksums of all.
namespace cleave {

/// To be raised whenever the bytes of packed weights change their meaning (packed_format.h) or the
/// file its layout: an older file is then made again. A test holds the bytes.
inline constexpr int kPackedCacheVersion = 5;

/// Maps the file. The weights keep the mapping alive.
/// @throws FileError  why the file is of no use: another version, type or source, cut short,
/// damaged
DecoderWeights read_packed_cache(const std::filesystem::path& file, const Checkpoint& checkpoint,
                                 WeightType type, const ParallelFor& parallel);

/// Packs and writes part by part; no more than one layer is in memory.
/// @throws FileError  the file cannot be written; nothing is left behind
void write_packed_cache(const std::filesystem::path& file, const Checkpoint& checkpoint,
                        WeightType type, const DecoderPacker& packer);

}  // namespace cleave
