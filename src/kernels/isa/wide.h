#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// A vector of 16 numbers, compiled once per instruction set in an unnamed namespace of each file.
//
// With AVX-512 that is one register and the compiler's own vector type. Of a type wider than its
// registers GCC 12 keeps whatever lives across a loop's iterations in memory, a load and a store
// for each addition; so elsewhere it is a struct of several native vectors, which it splits.
namespace cleave::CLEAVE_ISA {
namespace {

#define CLEAVE_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)

constexpr int kParts = 1, kRegisters = 32;
typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));

CLEAVE_INLINE Floats to_floats(const Ints& v) { return __builtin_convertvector(v, Floats); }

#else

#if defined(__AVX2__)
constexpr int kPartBytes = 32, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kPartBytes = 16, kRegisters = 32;
#else
constexpr int kPartBytes = 16, kRegisters = 16;
#endif
constexpr int kParts = 64 / kPartBytes;  ///< registers that a vector of 16 takes

template <typename T>
struct Wide {
  typedef T Part __attribute__((vector_size(kPartBytes)));
  Part part[kParts];

  CLEAVE_INLINE T operator[](int i) const {
    constexpr int kLanes = kPartBytes / sizeof(T);
    return part[i / kLanes][i % kLanes];
  }
};
using Floats = Wide<float>;
using Ints = Wide<std::int32_t>;
using Words = Wide<std::uint32_t>;

// A scalar operand stands for 16 of it.
#define CLEAVE_WIDE_OPERATOR(op)                                                                 \
  template <typename T>                                                                          \
  CLEAVE_INLINE Wide<T> operator op(const Wide<T>& a, const Wide<T>& b) {                        \
    Wide<T> c;                                                                                   \
    _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i) c.part[i] = a.part[i] op b.part[i]; \
    return c;                                                                                    \
  }                                                                                              \
  template <typename T>                                                                          \
  CLEAVE_INLINE Wide<T> operator op(const Wide<T>& a, std::type_identity_t<T> b) {               \
    Wide<T> c;                                                                                   \
    _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i) c.part[i] = a.part[i] op b;         \
    return c;                                                                                    \
  }                                                                                              \
  template <typename T>                                                                          \
  CLEAVE_INLINE Wide<T> operator op(std::type_identity_t<T> a, const Wide<T>& b) {               \
    Wide<T> c;                                                                                   \
    _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i) c.part[i] = a op b.part[i];         \
    return c;                                                                                    \
  }
CLEAVE_WIDE_OPERATOR(+)
CLEAVE_WIDE_OPERATOR(-)
CLEAVE_WIDE_OPERATOR(*)
CLEAVE_WIDE_OPERATOR(/)
CLEAVE_WIDE_OPERATOR(&)
CLEAVE_WIDE_OPERATOR(|)
CLEAVE_WIDE_OPERATOR(<<)
CLEAVE_WIDE_OPERATOR(>>)
#undef CLEAVE_WIDE_OPERATOR

template <typename T>
CLEAVE_INLINE Wide<T> operator-(const Wide<T>& a) {
  Wide<T> c;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) c.part[i] = -a.part[i];
  return c;
}
template <typename T>
CLEAVE_INLINE Wide<T> operator~(const Wide<T>& a) {
  Wide<T> c;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) c.part[i] = ~a.part[i];
  return c;
}
template <typename T, typename U>
CLEAVE_INLINE Wide<T>& operator+=(Wide<T>& a, const U& b) {
  return a = a + b;
}
template <typename T, typename U>
CLEAVE_INLINE Wide<T>& operator*=(Wide<T>& a, const U& b) {
  return a = a * b;
}

#define CLEAVE_WIDE_COMPARISON(op)                                                               \
  CLEAVE_INLINE Ints operator op(const Floats& a, const Floats& b) {                             \
    Ints c;                                                                                      \
    _Pragma("GCC unroll 4") for (int i = 0; i < kParts; ++i) c.part[i] = a.part[i] op b.part[i]; \
    return c;                                                                                    \
  }
CLEAVE_WIDE_COMPARISON(<)
CLEAVE_WIDE_COMPARISON(>)
CLEAVE_WIDE_COMPARISON(==)
#undef CLEAVE_WIDE_COMPARISON

CLEAVE_INLINE Floats to_floats(const Ints& v) {
  Floats f;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) f.part[i] = __builtin_convertvector(v.part[i], Floats::Part);
  return f;
}

#endif

template <typename Vector>
CLEAVE_INLINE Vector load(const void* from) {
  Vector v;
#if defined(__AVX512F__)
  std::memcpy(&v, from, sizeof v);
#else  // a copy of the whole struct would be a call on its address, and keep it in memory
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i)
    std::memcpy(&v.part[i], static_cast<const char*>(from) + i * kPartBytes, kPartBytes);
#endif
  return v;
}
template <typename Vector>
CLEAVE_INLINE void store(const Vector& v, void* to) {
#if defined(__AVX512F__)
  std::memcpy(to, &v, sizeof v);
#else
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i)
    std::memcpy(static_cast<char*>(to) + i * kPartBytes, &v.part[i], kPartBytes);
#endif
}
CLEAVE_INLINE Floats splat(float v) { return v - Floats{}; }  // folded: v - 0 is v
CLEAVE_INLINE Floats as_floats(const Words& w) { return load<Floats>(&w); }
CLEAVE_INLINE Words as_words(const Floats& f) { return load<Words>(&f); }
CLEAVE_INLINE Words as_words(const Ints& i) { return load<Words>(&i); }
/// Lane by lane; a mask's lanes are all ones or zero.
CLEAVE_INLINE Floats select(const Ints& mask, const Floats& yes, const Floats& no) {
#if defined(__AVX512F__)
  return mask ? yes : no;
#else
  const Words m = as_words(mask);
  return as_floats((as_words(yes) & m) | (as_words(no) & ~m));
#endif
}

/// count + 1 where the mask is set.
CLEAVE_INLINE Ints add_one_where(const Ints& mask, const Ints& count) {
#if defined(__AVX512F__)
  return mask ? count + 1 : count;
#else
  return count - mask;
#endif
}

/// exp(x) for -87.3 <= x <= 88.3, relative error below 2e-7: x = n ln 2 + r, |r| <= ln 2 / 2, a
/// polynomial in r (Cephes' coefficients), and n into the exponent. NaN stays NaN.
CLEAVE_INLINE Floats exp_in_range(const Floats& x) {
  const Floats biased = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Floats n = biased - 12582912.0f;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Floats p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * as_floats((as_words(biased) + 127u) << 23);
}

}  // namespace
}  // namespace cleave::CLEAVE_ISA
