#include "quants.h"

#include <bit>
#include <cassert>

#include "fail.h"

namespace cleave {
namespace {

constexpr std::size_t kBlock = 32;  // values per quantised block

template <typename T>
T load(const std::byte* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof value);
  return value;
}

template <typename T>
void decode_plain(const std::byte* bytes, std::span<float> out) {
  for (std::size_t i = 0; i < out.size(); ++i)
    out[i] = static_cast<float>(load<T>(bytes + i * sizeof(T)));
}

void decode_q8_0(const std::byte* bytes, std::span<float> out) {
  for (std::size_t i = 0; i < out.size(); i += kBlock, bytes += 2 + kBlock) {
    const float scale = half_to_float(load<std::uint16_t>(bytes));
    for (std::size_t j = 0; j < kBlock; ++j)
      out[i + j] = scale * static_cast<float>(load<std::int8_t>(bytes + 2 + j));
  }
}

void decode_q4_0(const std::byte* bytes, std::span<float> out) {
  for (std::size_t i = 0; i < out.size(); i += kBlock, bytes += 2 + kBlock / 2) {
    const float scale = half_to_float(load<std::uint16_t>(bytes));
    for (std::size_t j = 0; j < kBlock / 2; ++j) {
      const int packed = std::to_integer<int>(bytes[2 + j]);
      out[i + j] = scale * static_cast<float>((packed & 15) - 8);
      out[i + j + kBlock / 2] = scale * static_cast<float>((packed >> 4) - 8);
    }
  }
}

void decode_q4_1(const std::byte* bytes, std::span<float> out) {
  for (std::size_t i = 0; i < out.size(); i += kBlock, bytes += 4 + kBlock / 2) {
    const float scale = half_to_float(load<std::uint16_t>(bytes));
    const float minimum = half_to_float(load<std::uint16_t>(bytes + 2));
    for (std::size_t j = 0; j < kBlock / 2; ++j) {
      const int packed = std::to_integer<int>(bytes[4 + j]);
      out[i + j] = scale * static_cast<float>(packed & 15) + minimum;
      out[i + j + kBlock / 2] = scale * static_cast<float>(packed >> 4) + minimum;
    }
  }
}

}  // namespace

float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t rest = bits & 0x7fffu;
  if (rest >= 0x7c00u)  // infinity and NaN: the exponent is all ones in both formats
    return std::bit_cast<float>(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  // Exponent and fraction moved into a float32's place are off by the difference of the biases
  // (127 - 15 = 112); a multiplication by 2^112 repairs normal and subnormal numbers alike,
  // exactly.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
}

std::uint16_t float_to_bf16(float value) {
  const std::uint32_t word = std::bit_cast<std::uint32_t>(value);
  if ((word & 0x7fffffffu) > 0x7f800000u)
    return static_cast<std::uint16_t>((word >> 16) | 0x40u);  // a NaN whose low bits would vanish
  // Adding half of the last kept bit, less one unless that bit is set, rounds ties to even.
  return static_cast<std::uint16_t>((word + 0x7fffu + ((word >> 16) & 1u)) >> 16);
}

std::uint16_t float_to_half(float value) {
  const std::uint32_t word = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = (word >> 16) & 0x8000u;
  const std::uint32_t rest = word & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (rest >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // >= 65520
  if (rest < 0x38800000u) {  // below 2^-14: the result is subnormal, a multiple of 2^-24
    // Adding 0.5 leaves the multiple in the low fraction bits, rounded by the addition itself.
    const float shifted = std::bit_cast<float>(rest) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = rest + 0xfffu + ((rest >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

void decode(DType dtype, std::span<const std::byte> bytes, std::span<float> out) {
  assert(static_cast<std::int64_t>(bytes.size()) ==
         dtype_bytes(dtype, static_cast<std::int64_t>(out.size())));
  if (out.empty()) return;
  const std::byte* in = bytes.data();
  switch (dtype) {
    case DType::kF32:
      std::memcpy(out.data(), in, bytes.size());
      return;
    case DType::kF16:
      for (std::size_t i = 0; i < out.size(); ++i)
        out[i] = half_to_float(load<std::uint16_t>(in + 2 * i));
      return;
    case DType::kBF16:
      for (std::size_t i = 0; i < out.size(); ++i)
        out[i] = bf16_to_float(load<std::uint16_t>(in + 2 * i));
      return;
    case DType::kF64:
      return decode_plain<double>(in, out);
    case DType::kI8:
      return decode_plain<std::int8_t>(in, out);
    case DType::kU8:
    case DType::kBool:
      return decode_plain<std::uint8_t>(in, out);
    case DType::kI16:
      return decode_plain<std::int16_t>(in, out);
    case DType::kI32:
      return decode_plain<std::int32_t>(in, out);
    case DType::kI64:
      return decode_plain<std::int64_t>(in, out);
    case DType::kQ8_0:
      return decode_q8_0(in, out);
    case DType::kQ4_0:
      return decode_q4_0(in, out);
    case DType::kQ4_1:
      return decode_q4_1(in, out);
  }
}

void encode(DType dtype, std::span<const float> values, std::span<std::byte> bytes) {
  assert(static_cast<std::int64_t>(bytes.size()) ==
         dtype_bytes(dtype, static_cast<std::int64_t>(values.size())));
  if (values.empty()) return;
  if (dtype == DType::kF32) {
    std::memcpy(bytes.data(), values.data(), bytes.size());
    return;
  }
  if (dtype != DType::kF16 && dtype != DType::kBF16)
    fail_argument("encode: cannot write {}; expected F32, F16 or BF16", dtype_name(dtype));
  const auto convert = dtype == DType::kF16 ? float_to_half : float_to_bf16;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::uint16_t bits = convert(values[i]);
    std::memcpy(bytes.data() + 2 * i, &bits, sizeof bits);
  }
}

}  // namespace cleave
