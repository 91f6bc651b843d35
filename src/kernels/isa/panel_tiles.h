#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/isa/panel_formats.h"

// Many rows of x times panels of floats: prefill. And unpacking to such panels.
namespace cleave::CLEAVE_ISA {
namespace {

constexpr std::int64_t kFewSteps = 32;

template <int kRows>
CLEAVE_INLINE void tile_rows(const TileProduct& product, int first_row) {
  const float* w = product.panel;
  float* const* y = product.y + first_row;
  const char* prefetch =
      product.prefetch != nullptr ? product.prefetch : reinterpret_cast<const char*>(w);
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 64 : 0;
  for (std::int64_t i = 0; i < product.panels; ++i) {
    const float* x = product.x + first_row * kTileStride;
    const std::int64_t column = i * kPanelWidth;
    // A long sum is added to y at its end, which rounds less than going on from y; a short one
    // begins with y, which costs no addition of its own.
    const bool add_first = product.add && product.steps <= kFewSteps;
    const bool add_last = product.add && !add_first;
    Floats sum[kRows][2];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half)
        sum[r][half] = add_first ? load<Floats>(y[r] + column + 16 * half) : Floats{};
    const auto step = [&](std::int64_t s) __attribute__((always_inline)) {
      const Floats w0 = load<Floats>(w + s * kPanelWidth);
      const Floats w1 = load<Floats>(w + s * kPanelWidth + 16);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Floats value = splat(x[r * kTileStride + s]);
        sum[r][0] += value * w0;
        sum[r][1] += value * w1;
      }
    };
    // One line at a time: a burst would wait for the few that a core can have on their way.
    std::int64_t left = product.steps;
    for (; left >= 2; left -= 2, w += 2 * kPanelWidth, x += 2) {
      __builtin_prefetch(prefetch, 0, 2);
      prefetch += prefetch_stride;
      step(0);
      step(1);
    }
    if (left > 0) {
      step(0);
      w += kPanelWidth;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half) {
        float* to = y[r] + column + 16 * half;
        if (add_last) sum[r][half] += load<Floats>(to);
        store(sum[r][half], to);
      }
  }
}

// Three rows leave NEON no register for the four of a weight vector.
template <int kRows>
constexpr int kTilePart = kRows % 3 == 0 && kParts < 4 ? 3 : 2;

template <int kRows>
void multiply_tile(const TileProduct& product) {
  if constexpr (kRows <= kRegisterRows)
    tile_rows<kRows>(product, 0);
  else
    for (int r = 0; r < kRows; r += kTilePart<kRows>) tile_rows<kTilePart<kRows>>(product, r);
}

/// sum += a * b. In so many words, because the compiler, free to choose between three forms of the
/// instruction, otherwise moves sums from register to register and into memory.
CLEAVE_INLINE void multiply_add(Floats& sum, const Floats& a, const Floats& b) {
#if defined(__AVX512F__)
  asm("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
#else
  sum += a * b;
#endif
}

/// Vectors [first_vector, first_vector + kVectors) of the 32 or 64 lanes, rows [first_row,
/// first_row + kRows).
template <int kRows, int kVectors>
CLEAVE_INLINE void block_part(const BlockProduct& product, int first_row, int first_vector) {
  // Vectors 0, 1 are of the first panel, 2, 3 of the second.
  const float* w[kVectors];
  for (int v = 0; v < kVectors; ++v)
    w[v] = product.panel[(first_vector + v) / 2] + (first_vector + v) % 2 * 16;
  const float* x[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) x[r] = product.x[first_row + r];
  const char* prefetch = product.prefetch != nullptr
                             ? product.prefetch
                             : reinterpret_cast<const char*>(product.panel[0]);
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 64 : 0;
  Floats sum[kRows][kVectors] = {};
  const auto step = [&](std::int64_t s) __attribute__((always_inline)) {
    Floats weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) weights[v] = load<Floats>(w[v] + s * kPanelWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats value = splat(x[r][s]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) multiply_add(sum[r][v], value, weights[v]);
    }
  };
  // One line at a time: a burst would wait for the few that a core can have on their way.
  std::int64_t s = 0;
  for (; s + 2 <= product.steps; s += 2) {
    __builtin_prefetch(prefetch, 0, 2);
    prefetch += prefetch_stride;
    step(s);
    step(s + 1);
  }
  if (s < product.steps) step(s);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = product.y[first_row + r] + (first_vector + v) / 2 * product.panel_offset +
                  (first_vector + v) % 2 * 16;
      if (product.add) sum[r][v] += load<Floats>(to);
      store(sum[r][v], to);
    }
}

template <int kRows, int kVectors>
CLEAVE_INLINE void multiply_vectors(const BlockProduct& product) {
#if defined(__AVX512F__)
  block_part<kRows, kVectors>(product, 0, 0);
#else
  // Registers for one vector of 16 floats and six rows, with NEON five.
  constexpr int kPart = kRows > (kParts < 4 ? 6 : 5) ? 4 : kRows;
  for (int v = 0; v < kVectors; ++v) {
    block_part<kPart, 1>(product, 0, v);
    if constexpr (kRows > kPart) block_part<kRows - kPart, 1>(product, kPart, v);
  }
#endif
}

template <int kRows, int kPanels>
void multiply_block(const BlockProduct& product) {
  multiply_vectors<kRows, 2 * kPanels>(product);
}
template <int kRows>
void multiply_half(const BlockProduct& product) {
  multiply_vectors<kRows, 1>(product);
}

#if defined(__AVX512F__)
template <typename Format>
void unpack_and_multiply(const UnpackProduct& product) {
  constexpr int kRows = kPairRows;
  const float* x[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) x[r] = product.x[r];
  const char* prefetch = product.prefetch != nullptr
                             ? product.prefetch
                             : reinterpret_cast<const char*>(product.unpacked);
  const std::int64_t prefetch_stride = product.prefetch != nullptr ? 64 : 0;
  const auto* p0 = static_cast<const char*>(product.panel[0]);
  const auto* p1 = static_cast<const char*>(product.panel[1]);
  float* out0 = product.unpacked;
  float* out1 = out0 + product.pieces * product.piece_steps * kPanelWidth;
  Floats sum[kRows][4] = {};
  std::int64_t at = 0;  // step of x
  const auto step = [&](std::int64_t s, std::int64_t k) __attribute__((always_inline)) {
    Floats w[4];
    const std::int64_t group = (s + k) / Format::kGroup * Format::kGroupBytes;
    Format::step(p0 + group, k % Format::kGroup, w[0], w[1]);
    Format::step(p1 + group, k % Format::kGroup, w[2], w[3]);
    store(w[0], out0 + k * kPanelWidth);
    store(w[1], out0 + k * kPanelWidth + 16);
    store(w[2], out1 + k * kPanelWidth);
    store(w[3], out1 + k * kPanelWidth + 16);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats value = splat(x[r][at + k]);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) multiply_add(sum[r][v], value, w[v]);
    }
  };
  const auto advance = [&](std::int64_t steps) __attribute__((always_inline)) {
    at += steps;
    out0 += steps * kPanelWidth;
    out1 += steps * kPanelWidth;
  };
  for (std::int64_t i = 0; i < product.pieces; ++i) {
    std::int64_t s = 0;
    for (; s + 2 <= product.piece_steps; s += 2) {
      __builtin_prefetch(prefetch, 0, 2);
      prefetch += prefetch_stride;
      step(s, 0);
      step(s, 1);
      advance(2);
    }
    if (s < product.piece_steps) {
      step(s, 0);
      advance(1);
    }
    p0 += product.piece_stride;
    p1 += product.piece_stride;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      float* to = product.y[r] + v / 2 * product.panel_offset + v % 2 * 16;
      if (product.add) sum[r][v] += load<Floats>(to);
      store(sum[r][v], to);
    }
}
#define CLEAVE_UNPACK_AND_MULTIPLY(format) unpack_and_multiply<format>
#else
// Too few registers for it to pay.
#define CLEAVE_UNPACK_AND_MULTIPLY(format) nullptr
#endif

template <typename Format>
void unpack(const void* panel_in, std::int64_t steps, const float* scales, float* out) {
  const auto* panel = static_cast<const char*>(panel_in);
  constexpr std::int64_t kBlock = std::is_same_v<Format, Int4> ? Int4Block::kSteps : 1 << 30;
  for (std::int64_t begin = 0; begin < steps; begin += kBlock) {
    const std::int64_t end = begin + kBlock < steps ? begin + kBlock : steps;
    Floats scale[2] = {splat(1.0f), splat(1.0f)}, offset[2] = {};
    if constexpr (std::is_same_v<Format, Int4>) {
      const Int4Block block(panel, scales);
      panel += Int4Block::kHeader;
      for (int half = 0; half < 2; ++half) {
        scale[half] = block.scale[half];
        offset[half] = block.offset[half];
      }
    } else if constexpr (std::is_same_v<Format, Int8>) {
      for (int half = 0; half < 2; ++half) scale[half] = load<Floats>(scales + 16 * half);
    }
    for (std::int64_t group = begin; group < end; group += Format::kGroup) {
      __builtin_prefetch(panel + 1024, 0, 3);
#pragma GCC unroll 8
      for (std::int64_t s = 0; s < Format::kGroup; ++s) {
        if (group + s >= end) break;
        Floats w[2];
        Format::step(panel, s, w[0], w[1]);
        for (int half = 0; half < 2; ++half) {
          if constexpr (std::is_same_v<Format, Int4> || std::is_same_v<Format, Int8>)
            w[half] = w[half] * scale[half] + offset[half];
          store(w[half], out + (group + s) * kPanelWidth + 16 * half);
        }
      }
      panel += Format::kGroupBytes;
    }
  }
}

}  // namespace
}  // namespace cleave::CLEAVE_ISA
