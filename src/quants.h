#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "cleave/views.h"

namespace cleave {

/// bfloat16 is the upper half of a float32.
inline float bf16_to_float(std::uint16_t bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

/// IEEE 754 binary16 to float32, exact, subnormals included.
float half_to_float(std::uint16_t bits);

/// To nearest, ties to even. Beyond the range: infinity. NaN stays NaN.
std::uint16_t float_to_bf16(float value);
std::uint16_t float_to_half(float value);

/// Stored elements as float32. `bytes` need no alignment and must hold
/// dtype_bytes(dtype, out.size()). GGUF blocks of 32 (Q8_0, Q4_0, Q4_1) are dequantised:
///   Q8_0  d * q          Q4_0  d * (q - 8)          Q4_1  d * q + m
/// where nibble i of a block is value i (low half of byte i) and value i + 16 (high half).
void decode(DType dtype, std::span<const std::byte> bytes, std::span<float> out);

/// float32 as stored elements of F32, F16 or BF16; `bytes` holds dtype_bytes(dtype, values.size()).
void encode(DType dtype, std::span<const float> values, std::span<std::byte> bytes);

}  // namespace cleave
