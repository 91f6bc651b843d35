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
      put(panel + (s / 2 * kLanes + lane) * 4 + s % 2 * 2, float_to_bf16(weights[s * kLanes + lane]));
}

void encode_f16(std::span<const float> weights, std::byte* panel) {
  for (std::size_t i = 0; i < weights.size(); ++i) {
    if (std::abs(weights[i]) > 65504.0f)
      fail_argument("pack: weight {} is beyond the range of f16 (65504); pack as bf16 or f32",
                    weights[i]);
    put(panel + 2 * i, float_to_half(weights[i]));
  }
}

std::int8_t quantised(float weight, float scale) {
  return static_cast<std::int8_t>(scale > 0.0f ? std::lround(weight / scale) : 0);
}

void encode_int8(std::span<const float> weights, std::byte* panel) {
  const auto steps = static_cast<std::int64_t>(weights.size()) / kLanes;
  for (std::int64_t lane = 0; lane < kLanes; ++lane) {
    float largest = 0.0f;
    for (std::int64_t s = 0; s < steps; ++s)
      largest = std::max(largest, std::abs(weights[s * kLanes + lane]));
    const float scale = largest / 127.0f;
    std::memcpy(panel + lane * 4, &scale, sizeof scale);
    for (std::int64_t s = 0; s < steps; ++s)
      panel[128 + s * kLanes + lane] =
          static_cast<std::byte>(quantised(weights[s * kLanes + lane], scale));
  }
}

void encode_int8_steps(std::span<const float> weights, std::byte* panel, float* step_scale) {
  const auto steps = static_cast<std::int64_t>(weights.size()) / kLanes;
  for (std::int64_t s = 0; s < steps; ++s)
    for (std::int64_t lane = 0; lane < kLanes; ++lane)
      panel[s * kLanes + lane] =
          static_cast<std::byte>(quantised(weights[s * kLanes + lane], step_scale[s]));
}

/// Scale and minimum of a group of weights, as the halves that will be stored, and the nibbles.
class Nibbles {
 public:
  void include(float weight) {
    low_ = std::min(low_, weight);
    high_ = std::max(high_, weight);
  }
  void fix() {
    minimum_bits = float_to_half(low_);
    scale_bits = float_to_half((high_ - half_to_float(minimum_bits)) / 15.0f);
  }
  int operator()(float weight) const {
    const float scale = half_to_float(scale_bits);
    if (!(scale > 0.0f)) return 0;
    const long q = std::lround((weight - half_to_float(minimum_bits)) / scale);
    return static_cast<int>(std::clamp(q, 0L, 15L));
  }
  std::uint16_t scale_bits = 0, minimum_bits = 0;

 private:
  float low_ = 0.0f, high_ = 0.0f;  // zero is among the weights of every group
};

void put_nibbles(const Nibbles& low, const Nibbles& high, const float* row, std::byte* bytes,
                 std::int64_t lane) {
  bytes[lane] = static_cast<std::byte>(low(row[lane]) | high(row[lane + 16]) << 4);
}

void encode_int4(std::span<const float> weights, std::byte* panel) {
  const auto steps = static_cast<std::int64_t>(weights.size()) / kLanes;
  for (std::int64_t begin = 0; begin < steps; begin += 32, panel += 128 + 32 * 16) {
    const std::int64_t end = std::min<std::int64_t>(begin + 32, steps);
    Nibbles lanes[kLanes];
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      for (std::int64_t s = begin; s < end; ++s) lanes[lane].include(weights[s * kLanes + lane]);
      lanes[lane].fix();
      put(panel + 2 * lane, lanes[lane].scale_bits);
      put(panel + 64 + 2 * lane, lanes[lane].minimum_bits);
    }
    for (std::int64_t s = begin; s < end; ++s)
      for (std::int64_t lane = 0; lane < 16; ++lane)
        put_nibbles(lanes[lane], lanes[lane + 16], &weights[s * kLanes],
                    panel + 128 + (s - begin) * 16, lane);
  }
}

void encode_int4_steps(std::span<const float> weights, std::byte* panel) {
  const auto steps = static_cast<std::int64_t>(weights.size()) / kLanes;
  for (std::int64_t begin = 0; begin < steps; begin += 16, panel += 64 + 16 * 16) {
    const std::int64_t end = std::min<std::int64_t>(begin + 16, steps);
    for (std::int64_t s = begin; s < end; ++s) {
      Nibbles step;
      for (std::int64_t lane = 0; lane < kLanes; ++lane) step.include(weights[s * kLanes + lane]);
      step.fix();
      put(panel + 2 * (s - begin), step.scale_bits);
      put(panel + 32 + 2 * (s - begin), step.minimum_bits);
      for (std::int64_t lane = 0; lane < 16; ++lane)
        put_nibbles(step, step, &weights[s * kLanes], panel + 64 + (s - begin) * 16, lane);
    }
  }
}

}  // namespace

PanelFormat lane_format(WeightType type) {
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

PanelFormat step_format(WeightType type) {
  if (type == WeightType::kInt8) return PanelFormat::kInt8Steps;
  if (type == WeightType::kInt4) return PanelFormat::kInt4Steps;
  return lane_format(type);
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
      return 128 + round_up(steps * 32, kLine);
    case PanelFormat::kInt8Steps:
      return round_up(steps * 32, kLine);
    case PanelFormat::kInt4:
      return (steps + 31) / 32 * (128 + 32 * 16);
    case PanelFormat::kInt4Steps:
      return (steps + 15) / 16 * (64 + 16 * 16);
  }
  return 0;
}

void encode_panel(PanelFormat format, std::span<const float> weights, std::byte* panel,
                  float* step_scale) {
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
      return encode_int8(weights, panel);
    case PanelFormat::kInt8Steps:
      return encode_int8_steps(weights, panel, step_scale);
    case PanelFormat::kInt4:
      return encode_int4(weights, panel);
    case PanelFormat::kInt4Steps:
      return encode_int4_steps(weights, panel);
  }
}

ExpertPanelLayout::ExpertPanelLayout(WeightType type, bool gated, std::int64_t d_model)
    : gate_up_format(lane_format(type)),
      down_format(step_format(type)),
      neurons(gated ? kLanes / 2 : kLanes),
      gate_up_bytes(panel_bytes(gate_up_format, d_model)),
      step_scale_bytes(type == WeightType::kInt8 ? kLanes * 4 : 0),
      down_panels((d_model + kLanes - 1) / kLanes),
      down_panel_bytes(panel_bytes(down_format, neurons)) {}

}  // namespace cleave
