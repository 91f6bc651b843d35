#include "kernels/packed_format.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fail.h"
#include "quants.h"

namespace cleave {
namespace {

constexpr std::int64_t kLine = 64;
constexpr std::int64_t kLanes = kPanelWidth;

std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

void put(std::byte* to, std::uint16_t value) { std::memcpy(to, &value, sizeof value); }

void encode_bf16(std::span<const float> weights, std::byte* panel) {
  const auto steps = static_cast<std::int64_t>(weights.size()) / kLanes;
  for (std::int64_t s = 0; s < steps; ++s)
    for (std::int64_t lane = 0; lane < kLanes; ++lane)
      put(panel + (s / 2 * kLanes + lane) * 4 + s % 2 * 2,
          float_to_bf16(weights[s * kLanes + lane]));
}

void encode_f16(std::span<const float> weights, std::byte* panel) {
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (std::abs(weights[i]) > 65504.0f)
      fail_argument("pack: weight {} is beyond the range of f16 (65504); pack as bf16 or f32",
                    weights[i]);
    put(panel + 2 * i, float_to_half(weights[i]));
  }
}

void encode_int8(std::span<const float> weights, const float* scales, std::byte* panel) {
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const float scale = scales[i % kLanes];
    const long q = scale > 0.0f ? std::lround(weights[i] / scale) : 0;
    panel[i] = static_cast<std::byte>(static_cast<std::int8_t>(std::clamp(q, -127L, 127L)));
  }
}

/// Smallest and largest weight of each lane in steps [begin, end); zero counts as one of them.
struct Range {
  Range(std::span<const float> weights, std::int64_t lane, std::int64_t begin, std::int64_t end) {
    for (std::int64_t s = begin; s < end; ++s) {
      low = std::min(low, weights[s * kLanes + lane]);
      high = std::max(high, weights[s * kLanes + lane]);
    }
  }
  float low = 0.0f, high = 0.0f;
};

constexpr std::int64_t kBlock = 32;        // steps of int4 with one scale per lane
constexpr std::int64_t kBlockHeader = 64;  // bytes: 32 scales, 32 minima
constexpr std::int64_t kWordSteps = 8;     // steps whose nibbles share a lane's 32-bit word

std::uint8_t count_of(float value, float unit) {
  const float count = unit != 0.0f ? std::ceil(value / unit - 1e-3f) : 0.0f;
  return static_cast<std::uint8_t>(std::clamp(count, 0.0f, 255.0f));
}

void encode_int4(std::span<const float> weights, const float* units, std::byte* panel) {
  const auto steps = static_cast<std::int64_t>(weights.size()) / kLanes;
  for (std::int64_t begin = 0; begin < steps; begin += kBlock) {
    const std::int64_t end = std::min(begin + kBlock, steps);
    std::byte* words = panel + kBlockHeader;
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const Range range(weights, lane, begin, end);
      const std::uint8_t minimum_count = count_of(range.low, units[1]);
      const float minimum = minimum_count * units[1];
      const std::uint8_t scale_count = count_of((range.high - minimum) / 15.0f, units[0]);
      const float scale = scale_count * units[0];
      panel[lane] = static_cast<std::byte>(scale_count);
      panel[kLanes + lane] = static_cast<std::byte>(minimum_count);
      for (std::int64_t s = begin; s < end; ++s) {
        const long q =
            scale > 0.0f ? std::lround((weights[s * kLanes + lane] - minimum) / scale) : 0;
        const std::int64_t group = (s - begin) / kWordSteps, nibble = (s - begin) % kWordSteps;
        // Lanes 0 to 15 fill one line, 16 to 31 the next.
        std::byte& byte = words[group * 128 + lane / 16 * 64 + lane % 16 * 4 + nibble / 2];
        byte |= static_cast<std::byte>(std::clamp(q, 0L, 15L) << (nibble % 2 * 4));
      }
    }
    panel = words + (end - begin + kWordSteps - 1) / kWordSteps * 128;
  }
}

}  // namespace

const float kUnitScales[kMaxScales] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                       1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};

PanelFormat panel_format(WeightType type) {
  switch (type) {
    case WeightType::kF32:
      return PanelFormat::kF32;
    case WeightType::kBF16:
      return PanelFormat::kBF16;
    case WeightType::kF16:
      return PanelFormat::kF16;
    case WeightType::kInt8:
      return PanelFormat::kInt8;
    case WeightType::kInt4:
      return PanelFormat::kInt4;
  }
  fail_argument("pack: unknown weight type {}", static_cast<int>(type));
}

std::int64_t panel_bytes(PanelFormat format, std::int64_t steps) {
  switch (format) {
    case PanelFormat::kF32:
      return steps * 128;
    case PanelFormat::kBF16:
      return (steps + 1) / 2 * 128;
    case PanelFormat::kF16:
      return steps * 64;
    case PanelFormat::kInt8:
      return round_up(steps * 32, kLine);
    case PanelFormat::kInt4:
      return (steps + kBlock - 1) / kBlock * kBlockHeader +
             (steps + kWordSteps - 1) / kWordSteps * 128;
  }
  return 0;
}

std::int64_t scale_bytes(PanelFormat format) {
  if (format == PanelFormat::kInt8) return kMaxScales * 4;
  return format == PanelFormat::kInt4 ? kLine : 0;
}

void widen_scales(PanelFormat format, std::span<const float> weights, float* scales) {
  const auto steps = static_cast<std::int64_t>(weights.size()) / kLanes;
  if (format == PanelFormat::kInt8)
    for (std::size_t i = 0; i < weights.size(); ++i)
      scales[i % kLanes] = std::max(scales[i % kLanes], std::abs(weights[i]) / 127.0f);
  if (format == PanelFormat::kInt4)
    for (std::int64_t begin = 0; begin < steps; begin += kBlock)
      for (std::int64_t lane = 0; lane < kLanes; ++lane) {
        const Range range(weights, lane, begin, std::min(begin + kBlock, steps));
        scales[0] = std::max(scales[0], (range.high - range.low) / 15.0f / 255.0f);
        scales[1] = std::min(scales[1], range.low / 255.0f);
      }
}

void encode_panel(PanelFormat format, std::span<const float> weights, const float* scales,
                  std::byte* panel) {
  const auto steps = static_cast<std::int64_t>(weights.size()) / kLanes;
  std::memset(panel, 0, static_cast<std::size_t>(panel_bytes(format, steps)));
  switch (format) {
    case PanelFormat::kF32:
      std::memcpy(panel, weights.data(), weights.size_bytes());
      return;
    case PanelFormat::kBF16:
      return encode_bf16(weights, panel);
    case PanelFormat::kF16:
      return encode_f16(weights, panel);
    case PanelFormat::kInt8:
      return encode_int8(weights, scales, panel);
    case PanelFormat::kInt4:
      return encode_int4(weights, scales, panel);
  }
}

ExpertLayout::ExpertLayout(WeightType type, bool gated, std::int64_t d_model)
    : format(panel_format(type)),
      neurons(gated ? kLanes / 2 : kLanes),
      scale_bytes(cleave::scale_bytes(format)),
      gate_up_bytes(panel_bytes(format, d_model)),
      down_panels((d_model + kLanes - 1) / kLanes),
      down_panel_bytes(panel_bytes(format, neurons)) {}

}  // namespace cleave
