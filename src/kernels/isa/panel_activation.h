#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

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

/// The share of a normal distribution beyond |x|: exp(-x^2 / 2) times a polynomial in
/// 1 / (1 + 0.28 |x|), fitted for the least largest error: 1.4e-8, and 2e-7 in float32 steps. Of
/// the tail itself that is 1e-5 at 4, 5e-4 at 8 and 2e-3 at 12, beyond which it is what it is
/// there.
CLEAVE_INLINE Floats upper_tail(const Floats& x) {
  const Floats size = select(x < Floats{}, -x, x), most = splat(12.0f);
  const Floats a = select(size > most, most, size);
  const Floats t = 1.0f / (1.0f + 0.28f * a);
  Floats p = splat(-0.10580825f);
  p = p * t + 0.38987404f;
  p = p * t + -0.23699350f;
  p = p * t + 0.26891018f;
  p = p * t + 0.067496746f;
  p = p * t + 0.11652078f;
  return p * t * exp_in_range(-0.5f * a * a);
}

/// x sigmoid(u).
struct ExactSigmoid {
  CLEAVE_INLINE static Floats times(const Floats& x, const Floats& u) {
    return x / (1.0f + exp(-u));
  }
};

template <Activation kActivation, typename Sigmoid>
CLEAVE_INLINE Floats act(const Floats& x) {
  if constexpr (kActivation == Activation::kSilu) {
    return Sigmoid::times(x, x);
  } else if constexpr (kActivation == Activation::kGelu) {
    const Floats q = upper_tail(x);
    return x * select(x > Floats{}, 1.0f - q, q);
  } else if constexpr (kActivation == Activation::kGeluTanh) {  // 0.5 (1 + tanh(u)) = sigmoid(2 u)
    return Sigmoid::times(x, 1.5957691216f * (x + 0.044715f * x * x * x));
  } else if constexpr (kActivation == Activation::kRelu) {
    return select(x > Floats{}, x, Floats{});
  } else if constexpr (kActivation == Activation::kRelu2) {
    const Floats positive = select(x > Floats{}, x, Floats{});
    return positive * positive;
  } else {
    static_assert(kActivation == Activation::kIdentity);
    return x;
  }
}

template <Activation kActivation, bool kGated, typename Sigmoid, typename Value, typename Put>
void activate_rows_by(std::int64_t rows, const float* in, const float* weight,
                      const float* step_scale, Value* h, std::int64_t stride, const Put& put) {
  for (std::int64_t r = 0; r < rows; ++r, in += kPanelWidth, h += stride) {
    const Floats first = load<Floats>(in), second = load<Floats>(in + 16);
    const Floats scale = splat(weight[r]);
    Floats out[2] = {act<kActivation, Sigmoid>(first) * scale, {}};
    if constexpr (kGated)
      out[0] *= second;
    else
      out[1] = act<kActivation, Sigmoid>(second) * scale;
#pragma GCC unroll 2
    for (int half = 0; half < (kGated ? 1 : 2); ++half) {
      if (step_scale != nullptr) out[half] *= load<Floats>(step_scale + half * 16);
      put(out[half], h + half * 16);
    }
  }
}

/// `put` stores 16 values of h. A loop per activation: with the choice inside it, constants are
/// loaded and x goes through memory for every row.
template <typename Sigmoid, typename Value, typename Put>
CLEAVE_INLINE void activate_rows(Activation activation, bool gated, std::int64_t rows,
                                 const float* in, const float* weight, const float* step_scale,
                                 Value* h, std::int64_t stride, const Put& put) {
  const auto run = [&](auto constant) {
    constexpr Activation kActivation = decltype(constant)::value;
    if (gated)
      activate_rows_by<kActivation, true, Sigmoid>(rows, in, weight, step_scale, h, stride, put);
    else
      activate_rows_by<kActivation, false, Sigmoid>(rows, in, weight, step_scale, h, stride, put);
  };
  switch (activation) {
    case Activation::kSilu:
      return run(std::integral_constant<Activation, Activation::kSilu>());
    case Activation::kGelu:
      return run(std::integral_constant<Activation, Activation::kGelu>());
    case Activation::kGeluTanh:
      return run(std::integral_constant<Activation, Activation::kGeluTanh>());
    case Activation::kRelu:
      return run(std::integral_constant<Activation, Activation::kRelu>());
    case Activation::kRelu2:
      return run(std::integral_constant<Activation, Activation::kRelu2>());
    case Activation::kIdentity:
      return run(std::integral_constant<Activation, Activation::kIdentity>());
  }
}

void activate(Activation activation, bool gated, std::int64_t rows, const float* in,
              const float* weight, const float* step_scale, float* h, std::int64_t stride) {
  activate_rows<ExactSigmoid>(
      activation, gated, rows, in, weight, step_scale, h, stride,
      [](const Floats& v, float* to) __attribute__((always_inline)) { store(v, to); });
}

}  // namespace
}  // namespace cleave::CLEAVE_ISA
