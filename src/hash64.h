#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace cleave {

/// XXH64 with seed 0 (https://github.com/Cyan4973/xxHash, doc/xxhash_spec.md): a checksum at the
/// speed of memory, against accidents. It does not resist an attacker; for that there is sha256.h.
std::uint64_t hash64(std::span<const std::byte> bytes);

}  // namespace cleave
