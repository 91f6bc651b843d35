#include "cleave/packed.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "cleave/error.h"
#include "ffn_cases.h"
#include "kernels/dispatch.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"
#include "quants.h"
#include "random_ffn.h"
#include "support/thread_pool.h"

namespace cleave {
namespace {

using namespace testing;

/// linear() against its reference. Of `type`; with a bias, added to y or not.
void expect_linear_is_right(std::mt19937& rng, std::int64_t T, std::int64_t K, std::int64_t N,
                            WeightType type, bool with_bias, bool add, const ParallelFor& parallel,
                            Workspace& workspace) {
  SCOPED_TRACE(fmt::format("T={} K={} N={} {}", T, K, N, weight_type_name(type)));
  const OwnedMatrix w = random_matrix(rng, N, K);
  const OwnedMatrix x =
      type == WeightType::kBF16 ? random_bf16_matrix(rng, T, K) : random_matrix(rng, T, K);
  const OwnedMatrix bias = random_matrix(rng, 1, N);
  const std::span<const float> b =
      with_bias ? std::span<const float>(bias.values) : std::span<const float>();
  const PackedLinear packed(w.view(), type);
  OwnedMatrix seen{N, K, std::vector<float>(N * K)};
  for (std::int64_t n = 0; n < N; ++n) packed.unpack_row(n, seen.values.data() + n * K);
  const OwnedMatrix start = random_matrix(rng, T, N);
  OwnedMatrix actual = start, expected = start, magnitude = start;
  linear_reference(x.view(), seen.view(), b, expected.view(), magnitude.view());
  for (std::size_t i = 0; add && i < expected.values.size(); ++i) {
    expected.values[i] += start.values[i];
    magnitude.values[i] += std::abs(start.values[i]);
  }
  linear(packed, x.view(), b, actual.view(), add, workspace, parallel);
  expect_near(actual, expected, magnitude, sum_bound(K + 2));
}

TEST(PackedLinear, MatchesReferenceOnRandomShapes) {
  Pools pools;
  Workspace workspace;
  unsigned seed = 0;
  for (const WeightType type : kWeightTypes)
    for (const bool bias : {true, false})
      for (const bool add : {true, false})
        for (int round = 0; round < 15; ++round) {
          std::mt19937 rng(++seed);
          const std::int64_t T = pick(rng, 0, pick(rng, 0, 7) == 0 ? 130 : 30);
          const std::int64_t K = pick(rng, 1, 130), N = pick(rng, 1, 130);
          const int threads = static_cast<int>(pick(rng, 0, 4));
          SCOPED_TRACE(fmt::format("seed={} bias={} add={} threads={}", seed, bias, add, threads));
          expect_linear_is_right(rng, T, K, N, type, bias, add, pools.of(threads), workspace);
        }
}

// Blocks of many rows hold some 500 or 1000 steps; and weights may have none.
TEST(PackedLinear, MatchesReferenceAroundTheEdgesOfBlocks) {
  ThreadPool pool(2);
  Workspace workspace;
  std::mt19937 rng(1);
  for (const WeightType type : kWeightTypes)
    for (const std::int64_t K : {0, 511, 512, 513, 1024, 1025, 2050})
      for (const std::int64_t N : {16, 17, 72})
        expect_linear_is_right(rng, /*T=*/21, K, N, type, /*with_bias=*/true, /*add=*/N == 17,
                               pool.parallel_for(), workspace);
}

// Bit for bit, but for the sign of a zero, which the kernels may lose.
TEST(PackedLinear, ARowIsUnpackedAsTheKernelsDoIt) {
  std::mt19937 rng(1);
  for (const WeightType type : kWeightTypes)
    for (const std::int64_t K : {1, 31, 32, 33, 97, 576}) {
      const std::int64_t N = 45;
      const OwnedMatrix w = random_matrix(rng, N, K);
      const PackedLinear packed(w.view(), type);
      const PanelFormat format = panel_format(type);
      std::vector<float> row(K), panel(K * kPanelWidth);
      for (std::int64_t n = 0; n < N; ++n) {
        const std::byte* data = packed.data() + n / kPanelWidth * packed.panel_bytes();
        panel_kernels().unpack[static_cast<int>(format)](
            data + scale_bytes(format), K, reinterpret_cast<const float*>(data), panel.data());
        packed.unpack_row(n, row.data());
        for (std::int64_t k = 0; k < K; ++k)
          ASSERT_EQ(row[k], panel[k * kPanelWidth + n % kPanelWidth])
              << weight_type_name(type) << " K " << K << " row " << n << " column " << k;
      }
    }
}

TEST(PackedExperts, RowsThatAreReadPackToTheSameBytes) {
  std::mt19937 rng(1);
  for (const WeightType type : kWeightTypes)
    for (const bool biases : {true, false}) {
      const DenseFfn dense = random_dense(rng, 37, 50, true, biases, Activation::kSilu);
      const FfnView view = dense.view();
      const PackedExperts expected(view, type);
      const auto rows_of = [](const MatrixView<const float>& from) {
        return [&from](std::int64_t first, MatrixView<float> out) {
          for (std::int64_t r = 0; r < out.rows; ++r)
            std::copy_n(from.row(first + r), out.cols, out.row(r));
        };
      };
      FfnRows rows{rows_of(view.gate), rows_of(view.up), view.down,
                   view.gate_bias,     view.up_bias,     view.down_bias};
      const PackedExperts packed(rows, type);
      ASSERT_EQ(packed.bytes(), expected.bytes());
      EXPECT_EQ(std::memcmp(packed.expert(0), expected.expert(0),
                            static_cast<std::size_t>(packed.bytes())),
                0)
          << weight_type_name(type);
      EXPECT_TRUE(std::ranges::equal(packed.lane_bias(), expected.lane_bias()));
      EXPECT_TRUE(std::ranges::equal(packed.down_bias(), expected.down_bias()));
      rows.up = [](std::int64_t, MatrixView<float> out) {
        std::fill_n(out.data, out.rows * out.cols, std::nanf(""));
      };
      EXPECT_THROW(PackedExperts(rows, type), InvalidArgument);
    }
}

TEST(PackedExperts, RefusesRowsThatNobodyReads) {
  std::mt19937 rng(1);
  const DenseFfn dense = random_dense(rng, 8, 32, true, false, Activation::kSilu);
  const ReadRows zeros = [](std::int64_t, MatrixView<float> out) {
    std::fill_n(out.data, out.rows * out.cols, 0.0f);
  };
  FfnRows rows;
  rows.down = dense.view().down;
  const auto expect_refusal = [&](const std::string& name) {
    try {
      PackedExperts(rows, WeightType::kF32);
      ADD_FAILURE() << name << " is empty, and nobody minds";
    } catch (const InvalidArgument& e) {
      EXPECT_NE(std::string(e.what()).find("FfnRows::" + name + " is empty"), std::string::npos)
          << e.what();
    }
  };
  rows.up = zeros;
  expect_refusal("gate");
  rows = {zeros, {}, rows.down, {}, {}, {}};
  expect_refusal("up");
}

// What a type may lose: a bound on |packed - exact| per weight, from its definition.
TEST(PackedLinear, LosesNoMoreThanItsTypeSays) {
  std::mt19937 rng(1);
  const std::int64_t N = 70, K = 100;
  const OwnedMatrix w = random_matrix(rng, N, K);
  for (const WeightType type : kWeightTypes) {
    const PackedLinear packed(w.view(), type);
    std::vector<float> row(K);
    for (std::int64_t n = 0; n < N; ++n) {
      packed.unpack_row(n, row.data());
      float largest = 0.0f;
      for (std::int64_t k = 0; k < K; ++k) largest = std::max(largest, std::abs(w.view()(n, k)));
      for (std::int64_t k = 0; k < K; ++k) {
        const float exact = w.view()(n, k);
        const double allowed = type == WeightType::kF32    ? 0.0
                               : type == WeightType::kBF16 ? std::abs(exact) * 0x1p-8
                               : type == WeightType::kF16  ? std::abs(exact) * 0x1p-11 + 0x1p-24
                               : type == WeightType::kInt8 ? largest / 127 * 0.5001
                                                           : 2 * largest / 15 * 0.56;
        ASSERT_NEAR(row[k], exact, allowed) << weight_type_name(type) << " row " << n;
      }
    }
  }
}

TEST(PackedLinear, RefusesWeightsItCannotHold) {
  std::vector<float> w(64, 1.0f);
  w[5] = 1e5f;
  EXPECT_THROW(PackedLinear({w.data(), 2, 32}, WeightType::kF16), InvalidArgument);
  w[5] = std::nanf("");
  EXPECT_THROW(PackedLinear({w.data(), 2, 32}, WeightType::kF32), InvalidArgument);
}

TEST(PanelKernels, EveryInstructionSetMultipliesTiles) {
  for (const char* isa : {"scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "neon"}) {
    const PanelKernels* kernels = find_panel_kernels(isa);
    if (kernels == nullptr) continue;
    for (const std::int64_t rows : {4, 8, 12})
      for (const std::int64_t steps : {1, 2, 16, 127, 128}) {
        std::mt19937 rng(static_cast<unsigned>(rows * 1000 + steps));
        const OwnedMatrix w = random_matrix(rng, steps, kPanelWidth);
        const OwnedMatrix x = random_matrix(rng, kTileRows, kTileStride);
        const OwnedMatrix start = random_matrix(rng, kTileRows, kPanelWidth);
        OwnedMatrix y = start;
        float* out[kTileRows];
        for (int r = 0; r < kTileRows; ++r) out[r] = y.values.data() + r * kPanelWidth;
        kernels->multiply_tile[rows / 4 - 1](
            {w.values.data(), steps, 1, x.values.data(), out, true, nullptr});
        for (std::int64_t r = 0; r < kTileRows; ++r)
          for (std::int64_t i = 0; i < kPanelWidth; ++i) {
            double sum = start.view()(r, i), size = std::abs(sum);
            for (std::int64_t s = 0; r < rows && s < steps; ++s) {
              const double term = static_cast<double>(x.view()(r, s)) * w.view()(s, i);
              sum += term;
              size += std::abs(term);
            }
            ASSERT_NEAR(y.view()(r, i), sum, sum_bound(steps + 2) * size)
                << isa << " rows " << rows << " steps " << steps << " row " << r << " lane " << i;
          }
      }
  }
}

TEST(PanelKernels, EveryInstructionSetMultipliesBlocks) {
  for (const char* isa : {"scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "neon"}) {
    const PanelKernels* kernels = find_panel_kernels(isa);
    if (kernels == nullptr) continue;
    for (const std::int64_t lanes : {kPanelWidth / 2, kPanelWidth, 2 * kPanelWidth}) {
      const std::int64_t panels = (lanes + kPanelWidth - 1) / kPanelWidth;
      for (std::int64_t rows = 1; rows <= (panels == 2 ? kPairRows : kBlockRows); ++rows)
        for (const std::int64_t steps : {1, 2, 16, 127, 512}) {
          std::mt19937 rng(static_cast<unsigned>(lanes * 10000 + rows * 1000 + steps));
          const OwnedMatrix w = random_matrix(rng, panels * steps, kPanelWidth);
          const OwnedMatrix x = random_matrix(rng, rows, steps);
          // A row more than asked for, and the lanes of a panel that are not: they must stay.
          const OwnedMatrix start = random_matrix(rng, rows + 1, panels * kPanelWidth);
          for (const bool add : {false, true}) {
            OwnedMatrix y = start;
            const float* in[kBlockRows];
            float* out[kBlockRows];
            for (std::int64_t r = 0; r < rows; ++r) {
              in[r] = x.view().row(r);
              out[r] = y.view().row(r);
            }
            const auto* blocks = panels == 2            ? kernels->multiply_pair
                                 : lanes == kPanelWidth ? kernels->multiply_block
                                                        : kernels->multiply_half;
            blocks[rows - 1]({{w.values.data(), w.values.data() + steps * kPanelWidth},
                              steps,
                              in,
                              out,
                              kPanelWidth,
                              add,
                              nullptr});
            for (std::int64_t r = 0; r <= rows; ++r)
              for (std::int64_t i = 0; i < panels * kPanelWidth; ++i) {
                const bool written = r < rows && i < lanes;
                double sum = add || !written ? start.view()(r, i) : 0.0, size = std::abs(sum);
                for (std::int64_t s = 0; written && s < steps; ++s) {
                  const double term = static_cast<double>(x.view()(r, s)) *
                                      w.view()(i / kPanelWidth * steps + s, i % kPanelWidth);
                  sum += term;
                  size += std::abs(term);
                }
                ASSERT_NEAR(y.view()(r, i), sum, sum_bound(steps + 2) * size)
                    << isa << " lanes " << lanes << " rows " << rows << " steps " << steps
                    << " row " << r << " lane " << i;
              }
          }
        }
    }
  }
}

// Unpacking on the way changes neither the product nor what is unpacked.
TEST(PanelKernels, UnpackAndMultiplyEqualsBoth) {
  for (const char* isa : {"scalar", "avx2", "avx512"}) {
    const PanelKernels* kernels = find_panel_kernels(isa);
    for (const PanelFormat format : {PanelFormat::kBF16, PanelFormat::kF16}) {
      const int f = static_cast<int>(format);
      if (kernels == nullptr || kernels->unpack_and_multiply[f] == nullptr) continue;
      for (const std::int64_t steps : {1, 16, 31, 64})
        for (const std::int64_t pieces : {1, 3}) {
          std::mt19937 rng(static_cast<unsigned>(f * 1000 + steps * 10 + pieces));
          const std::int64_t each = panel_bytes(format, steps), all = steps * pieces;
          const std::vector<float> no_scales(kMaxScales, 1.0f);
          std::vector<std::byte> packed(static_cast<std::size_t>(2 * pieces * each));
          std::vector<float> expected(2 * all * kPanelWidth), unpacked(expected.size(), -1.0f);
          for (std::int64_t i = 0; i < 2 * pieces; ++i) {
            const OwnedMatrix w = random_matrix(rng, steps, kPanelWidth);
            encode_panel(format, w.values, no_scales.data(), packed.data() + i * each);
            kernels->unpack[f](packed.data() + i * each, steps, no_scales.data(),
                               expected.data() + i * steps * kPanelWidth);
          }
          const OwnedMatrix x = random_matrix(rng, kPairRows, all);
          OwnedMatrix y = random_matrix(rng, kPairRows, 2 * kPanelWidth), other = y;
          const float* in[kPairRows];
          float *out[kPairRows], *other_out[kPairRows];
          for (int r = 0; r < kPairRows; ++r) {
            in[r] = x.view().row(r);
            out[r] = y.view().row(r);
            other_out[r] = other.view().row(r);
          }
          kernels->unpack_and_multiply[f]({{packed.data(), packed.data() + pieces * each},
                                           steps,
                                           pieces,
                                           each,
                                           unpacked.data(),
                                           in,
                                           out,
                                           kPanelWidth,
                                           true,
                                           nullptr});
          kernels->multiply_pair[kPairRows - 1](
              {{expected.data(), expected.data() + all * kPanelWidth},
               all,
               in,
               other_out,
               kPanelWidth,
               true,
               nullptr});
          ASSERT_EQ(unpacked, expected) << isa << " steps " << steps << " pieces " << pieces;
          ASSERT_EQ(y.values, other.values) << isa << " steps " << steps << " pieces " << pieces;
        }
    }
  }
}

// Every instruction set that this machine has, against plain loops; all formats, all row counts.
TEST(PanelKernels, EveryInstructionSetMultipliesAlike) {
  for (const char* isa : {"scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "neon"}) {
    const PanelKernels* kernels = find_panel_kernels(isa);
    if (kernels == nullptr) continue;
    for (int f = 0; f < kNumPanelFormats; ++f)
      for (const std::int64_t steps : {1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 97}) {
        const auto format = static_cast<PanelFormat>(f);
        std::mt19937 rng(static_cast<unsigned>(f * 1000 + steps));
        SCOPED_TRACE(fmt::format("{} format={} steps={}", isa, f, steps));
        const OwnedMatrix w = random_matrix(rng, steps, kPanelWidth);
        float scales[kMaxScales] = {};
        widen_scales(format, w.values, scales);
        std::vector<std::byte> panel(panel_bytes(format, steps));
        encode_panel(format, w.values, scales, panel.data());
        std::vector<float> seen(steps * kPanelWidth);
        kernels->unpack[f](panel.data(), steps, scales, seen.data());
        const OwnedMatrix x = random_matrix(rng, kMaxPanelRows, steps);
        for (int k = 0; k < kNumPanelRows; ++k) {
          if (kernels->multiply[f][k] == nullptr) continue;
          const OwnedMatrix start = random_matrix(rng, kMaxPanelRows, kPanelWidth);
          OwnedMatrix y = start;
          const float* rows[kMaxPanelRows];
          const InputBlock* blocks[kMaxPanelRows];
          std::vector<InputBlock> prepared(kMaxPanelRows * num_blocks(steps));
          float* out[kMaxPanelRows];
          for (int r = 0; r < kMaxPanelRows; ++r) {
            rows[r] = x.values.data() + r * steps;
            InputBlock* row_blocks = prepared.data() + r * num_blocks(steps);
            kernels->prepare(rows[r], steps, row_blocks);
            blocks[r] = row_blocks;
            out[r] = y.values.data() + r * kPanelWidth;
          }
          kernels->multiply[f][k](
              {panel.data(), scales, steps, 1, 0, rows, blocks, out, true, nullptr});
          for (int r = 0; r < kMaxPanelRows; ++r)
            for (std::int64_t i = 0; i < kPanelWidth; ++i) {
              double sum = start.values[r * kPanelWidth + i], size = std::abs(sum);
              for (std::int64_t s = 0; r < kPanelRows[k] && s < steps; ++s) {
                const double term = static_cast<double>(rows[r][s]) * seen[s * kPanelWidth + i];
                sum += term;
                size += std::abs(term);
              }
              ASSERT_NEAR(y.values[r * kPanelWidth + i], sum, sum_bound(steps + 2) * size)
                  << "rows " << kPanelRows[k] << " row " << r << " lane " << i;
            }
        }
      }
  }
}

}  // namespace
}  // namespace cleave
