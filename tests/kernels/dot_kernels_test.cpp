#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/dispatch.h"
#include "kernels/packed_format.h"
#include "quants.h"
#include "random_ffn.h"

// Products of bfloat16 pairs, against plain loops in double.
namespace cleave {
namespace {

using namespace testing;

/// One or two bfloat16 panels in pieces, some bytes apart, and what they hold.
struct PanelPieces {
  PanelPieces(std::mt19937& rng, std::int64_t panels, std::int64_t pieces, std::int64_t steps,
              std::int64_t gap)
      : bytes(panel_bytes(PanelFormat::kBF16, steps)), stride(panels * bytes + gap) {
    packed.resize(static_cast<std::size_t>(pieces * stride + 64));
    for (std::int64_t i = 0; i < pieces; ++i)
      for (std::int64_t p = 0; p < panels; ++p) {
        const OwnedMatrix w = random_bf16_matrix(rng, steps, kPanelWidth);
        encode_panel(PanelFormat::kBF16, w.values, nullptr, at(p) + i * stride);
        weights[p].insert(weights[p].end(), w.values.begin(), w.values.end());
      }
  }
  std::byte* at(std::int64_t panel) {
    const auto base = reinterpret_cast<std::uintptr_t>(packed.data());
    return packed.data() + (64 - base % 64) % 64 + panel * bytes;
  }
  std::int64_t bytes, stride;
  std::vector<std::byte> packed;
  std::vector<float> weights[2];  // [pieces * steps, 32]
};

std::vector<std::uint16_t> as_bf16(std::span<const float> values) {
  std::vector<std::uint16_t> halves;
  for (const float v : values) halves.push_back(float_to_bf16(v));
  return halves;
}

/// n different numbers below `of`, in any order.
std::vector<std::int32_t> some_rows(std::mt19937& rng, std::int64_t n, std::int64_t of) {
  std::vector<std::int32_t> rows(of);
  std::iota(rows.begin(), rows.end(), 0);
  std::shuffle(rows.begin(), rows.end(), rng);
  rows.resize(n);
  return rows;
}

// Rows of x and of y in any order.
TEST(DotKernels, MultiplyPanelsInPieces) {
  const PanelKernels* kernels = find_panel_kernels("avx512bf16");
  if (kernels == nullptr) GTEST_SKIP() << "this CPU has no AVX512-BF16";
  constexpr std::int64_t kProducts = 2, kRows = kProducts * kDotRows + 1;
  const DotKernels& dots = *kernels->dots;
  for (const DotKernel* blocks : {dots.multiply_block, dots.multiply_alone, dots.multiply_pair}) {
    const std::int64_t panels = blocks == dots.multiply_pair ? 2 : 1;
    for (std::int64_t rows = 1; rows <= (panels == 2 ? kPairRows : kDotRows); ++rows)
      for (const auto& [pieces, steps] :
           {std::pair<std::int64_t, std::int64_t>{1, 1}, {1, 7}, {1, 130}, {3, 16}, {5, 32}})
        for (const bool add : {false, true}) {
          std::mt19937 rng(static_cast<unsigned>(panels * 1000 + rows * 100 + pieces + steps));
          PanelPieces w(rng, panels, pieces, steps, 192);
          const std::int64_t all = pieces * steps, padded = (all + 1) / 2 * 2;
          OwnedMatrix x = random_bf16_matrix(rng, kRows, padded);
          for (std::int64_t r = 0; r < kRows && padded > all; ++r) x.view()(r, all) = 0.0f;
          const std::vector<std::uint16_t> halves = as_bf16(x.values);
          const OwnedMatrix start = random_matrix(rng, kRows, panels * kPanelWidth);
          OwnedMatrix y = start;
          const std::vector<std::int32_t> from = some_rows(rng, kProducts * rows, kRows);
          const std::vector<std::int32_t> to = some_rows(rng, kProducts * rows, kRows);
          std::vector<const std::uint16_t*> in;
          std::vector<float*> out;
          for (std::int64_t r = 0; r < kProducts * rows; ++r) {
            in.push_back(halves.data() + from[r] * padded);
            out.push_back(y.view().row(to[r]));
          }
          const std::int64_t piece = (steps + 1) / 2 * 128;
          blocks[rows - 1]({{w.at(0), w.at(panels - 1)},
                            in.data(),
                            out.data(),
                            kProducts,
                            padded * 2,
                            piece,
                            w.stride - piece,
                            kPanelWidth * static_cast<std::int64_t>(sizeof(float)),
                            add,
                            reinterpret_cast<const char*>(w.at(0)),
                            0,
                            64,
                            0,
                            0,
                            in[0],
                            0});
          std::vector<std::int64_t> source(kRows, -1);  // of each row of y
          for (std::int64_t r = 0; r < kProducts * rows; ++r) source[to[r]] = from[r];
          for (std::int64_t r = 0; r < kRows; ++r)
            for (std::int64_t i = 0; i < panels * kPanelWidth; ++i) {
              double sum = add || source[r] < 0 ? start.view()(r, i) : 0.0;
              double size = std::abs(sum);
              for (std::int64_t s = 0; source[r] >= 0 && s < all; ++s) {
                const double term = static_cast<double>(x.view()(source[r], s)) *
                                    w.weights[i / kPanelWidth][s * kPanelWidth + i % kPanelWidth];
                sum += term;
                size += std::abs(term);
              }
              ASSERT_NEAR(y.view()(r, i), sum, sum_bound(all + 2) * size)
                  << "panels " << panels << " rows " << rows << " pieces " << pieces << " steps "
                  << steps << " row " << r << " lane " << i;
            }
        }
  }
}

TEST(DotKernels, MultiplyShortPanelsIntoRowsOfTokens) {
  const PanelKernels* kernels = find_panel_kernels("avx512bf16");
  if (kernels == nullptr) GTEST_SKIP() << "this CPU has no AVX512-BF16";
  constexpr std::int64_t kTokens = 40, kStride = kPanelWidth + 5, kProducts = 3;
  for (std::int64_t rows = 1; rows <= kDotRows; ++rows)
    for (const std::int64_t steps : {kShortSteps, 2 * kShortSteps}) {
      std::mt19937 rng(static_cast<unsigned>(rows * 100 + steps));
      PanelPieces w(rng, 1, 1, steps, 0);
      const std::int64_t all = kProducts * rows;
      const OwnedMatrix x = random_bf16_matrix(rng, all, steps);
      const std::vector<std::uint16_t> halves = as_bf16(x.values);
      std::vector<std::int32_t> tokens(kTokens);
      std::iota(tokens.begin(), tokens.end(), 0);
      std::shuffle(tokens.begin(), tokens.end(), rng);
      const OwnedMatrix start = random_matrix(rng, kTokens, kStride);
      OwnedMatrix y = start;
      kernels->dots->multiply_short[rows - 1](
          {w.at(0), steps, halves.data(), tokens.data(), y.values.data(), kStride, kProducts});
      for (std::int64_t r = 0; r < kTokens; ++r)
        for (std::int64_t i = 0; i < kStride; ++i) {
          const std::int64_t token = tokens[r];
          double sum = start.view()(token, i), size = std::abs(sum);
          for (std::int64_t s = 0; r < all && i < kPanelWidth && s < steps; ++s) {
            const double term =
                static_cast<double>(x.view()(r, s)) * w.weights[0][s * kPanelWidth + i];
            sum += term;
            size += std::abs(term);
          }
          ASSERT_NEAR(y.view()(token, i), sum, sum_bound(steps + 2) * size)
              << "rows " << rows << " steps " << steps << " row " << r << " lane " << i;
        }
    }
}

TEST(DotKernels, RoundAsThePackedWeightsAre) {
  const PanelKernels* kernels = find_panel_kernels("avx512bf16");
  if (kernels == nullptr) GTEST_SKIP() << "this CPU has no AVX512-BF16";
  std::mt19937 rng(5);
  for (const std::int64_t n : {1, 15, 16, 17, 70}) {
    OwnedMatrix x = random_matrix(rng, 1, n);
    x.values[0] = std::bit_cast<float>(0x3f808000u);  // a tie: to the even 1
    std::vector<std::uint16_t> rounded(static_cast<std::size_t>(n));
    kernels->dots->round(x.values.data(), n, rounded.data());
    EXPECT_EQ(rounded, as_bf16(x.values)) << n;
  }
  for (const bool gated : {true, false}) {
    constexpr std::int64_t kRows = 3, kStride = 40;
    const OwnedMatrix in = random_matrix(rng, kRows, kPanelWidth);
    const std::vector<float> weight = draw_values(rng, kRows);
    std::vector<float> h(kRows * kStride, 7.0f);
    std::vector<std::uint16_t> rounded(h.size(), float_to_bf16(7.0f));
    kernels->activate(Activation::kSilu, gated, kRows, in.values.data(), weight.data(), nullptr,
                      h.data(), kStride);
    kernels->dots->activate(Activation::kSilu, gated, kRows, in.values.data(), weight.data(),
                            rounded.data(), kStride);
    for (std::size_t i = 0; i < h.size(); ++i)
      EXPECT_NEAR(bf16_to_float(rounded[i]), h[i], std::abs(h[i]) * kRoundedHidden) << gated;
  }
}

/// `activation` of x, in double.
double exact_activation(Activation activation, double x) {
  const double u =
      activation == Activation::kSilu ? x : 1.5957691216057308 * (x + 0.044715 * x * x * x);
  return x / (1.0 + std::exp(-u));
}

TEST(DotKernels, SigmoidsAreRoughButNeverWrong) {
  const PanelKernels* kernels = find_panel_kernels("avx512bf16");
  if (kernels == nullptr) GTEST_SKIP() << "this CPU has no AVX512-BF16";
  const float one = 1.0f, infinity = std::numeric_limits<float>::infinity();
  const auto run = [&](Activation activation, float x) {
    const std::vector<float> in(kPanelWidth, x);
    std::vector<std::uint16_t> h(kPanelWidth);
    kernels->dots->activate(activation, false, 1, in.data(), &one, h.data(), kPanelWidth);
    return bf16_to_float(h[7]);
  };
  for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
    for (float x = -300.0f; x <= 300.0f; x += 0.01171875f) {
      const double exact = exact_activation(activation, x);
      // What is tiny may become zero.
      ASSERT_NEAR(run(activation, x), exact, std::abs(exact) * kRoundedHidden + 1e-30) << x;
    }
    EXPECT_EQ(run(activation, 3e38f), bf16_to_float(float_to_bf16(3e38f)));
    EXPECT_EQ(run(activation, -3e38f), 0.0f);
    EXPECT_EQ(run(activation, infinity), infinity);
    EXPECT_FALSE(std::isfinite(run(activation, -infinity)));
    EXPECT_TRUE(std::isnan(run(activation, std::numeric_limits<float>::quiet_NaN())));
  }
}

}  // namespace
}  // namespace cleave
