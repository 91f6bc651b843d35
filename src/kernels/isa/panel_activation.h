#pragma once

#include <cmath>
#include <cstdint>

#include "kernels/isa/panel_isa.h"
#include "kernels/isa/wide.h"

// What stands between the two products of an FFN.
namespace cleave::CLEAVE_ISA {
namespace {

CLEAVE_INLINE Floats clamp(const Floats& x, float low, float high) {
  const Floats l = splat(low), h = splat(high);
  const Floats above = select(x < l, l, x);
  return select(above > h, h, above);
}

CLEAVE_INLINE Floats exp(const Floats& x) { return exp_in_range(clamp(x, -87.3f, 88.3f)); }

CLEAVE_INLINE Floats act(Activation activation, const Floats& x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0f + exp(-x));
    case Activation::kGelu: {
      float y[16];
      store(x, y);
      for (float& v : y) v = 0.5f * v * (1.0f + ::erff(v * 0.70710678f));
      return load<Floats>(y);
    }
    case Activation::kGeluTanh:  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
      return x / (1.0f + exp(-1.5957691216f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu:
      return select(x > Floats{}, x, Floats{});
    case Activation::kRelu2: {
      const Floats positive = select(x > Floats{}, x, Floats{});
      return positive * positive;
    }
    case Activation::kIdentity:
      break;
  }
  return x;
}

/// `put` stores 16 values of h.
template <typename Value, typename Put>
CLEAVE_INLINE void activate_rows(Activation activation, bool gated, std::int64_t rows,
                                 const float* in, const float* weight, const float* step_scale,
                                 Value* h, std::int64_t stride, const Put& put) {
  for (std::int64_t r = 0; r < rows; ++r, in += kPanelWidth, h += stride) {
    const Floats first = load<Floats>(in), second = load<Floats>(in + 16);
    const Floats scale = splat(weight[r]);
    Floats out[2] = {act(activation, first) * scale, {}};
    if (gated)
      out[0] *= second;
    else
      out[1] = act(activation, second) * scale;
    for (int half = 0; half < (gated ? 1 : 2); ++half) {
      if (step_scale != nullptr) out[half] *= load<Floats>(step_scale + half * 16);
      put(out[half], h + half * 16);
    }
  }
}

void activate(Activation activation, bool gated, std::int64_t rows, const float* in,
              const float* weight, const float* step_scale, float* h, std::int64_t stride) {
  activate_rows(
      activation, gated, rows, in, weight, step_scale, h, stride,
      [](const Floats& v, float* to) __attribute__((always_inline)) { store(v, to); });
}

}  // namespace
}  // namespace cleave::CLEAVE_ISA
