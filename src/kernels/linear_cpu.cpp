// linear on the CPU: y[t] = W x[t] + bias. Definition: linear_reference.cpp.
//
// One range of rows per thread, cut along the longer of the two axes: a product repacks both of its
// operands, and the operand of the axis that is not cut is repacked by every thread.

#include <cassert>

#include "cleave/kernels.h"
#include "kernels/dispatch.h"
#include "kernels/product.h"

namespace cleave {
namespace {

void add_bias(std::span<const float> bias, MatrixView<float> y, std::int64_t begin,
              std::int64_t count) {
  if (bias.empty()) return;
  for (std::int64_t t = 0; t < y.rows; ++t) isa_kernels().add(bias.data() + begin, y.row(t), count);
}

void product(MatrixView<const float> x, MatrixView<const float> weight, std::span<const float> bias,
             MatrixView<float> y, Store store, const ParallelFor& parallel) {
  assert(x.cols == weight.cols && y.rows == x.rows && y.cols == weight.rows);
  assert(bias.empty() || static_cast<std::int64_t>(bias.size()) == weight.rows);
  if (x.rows == 0 || weight.rows == 0) return;
  const IsaKernels& isa = isa_kernels();
  const bool cut_tokens = x.rows > weight.rows;
  const std::int64_t macs_per_item = x.cols * (cut_tokens ? weight.rows : x.rows);
  // Multiples of 16 keep every range but the last on whole vector registers.
  const std::int64_t grain = 16 + kGrainMacs / (macs_per_item + 1) / 16 * 16;
  parallel(cut_tokens ? x.rows : weight.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::int64_t count = end - begin;
    if (cut_tokens) {
      const MatrixView<float> part = y.slice_rows(begin, count);
      isa.product_nt(plain(x.slice_rows(begin, count)), plain(weight), plain(part), store);
      add_bias(bias, part, 0, y.cols);
    } else {
      const MatrixView<float> part(y.data + begin, y.rows, count, y.row_stride);
      isa.product_nt(plain(x), plain(weight.slice_rows(begin, count)), plain(part), store);
      add_bias(bias, part, begin, count);
    }
  });
}

}  // namespace

void linear(MatrixView<const float> x, MatrixView<const float> weight, std::span<const float> bias,
            MatrixView<float> y, const ParallelFor& parallel) {
  product(x, weight, bias, y, Store::kOverwrite, parallel);
}

void linear_add(MatrixView<const float> x, MatrixView<const float> weight,
                std::span<const float> bias, MatrixView<float> y, const ParallelFor& parallel) {
  product(x, weight, bias, y, Store::kAdd, parallel);
}

}  // namespace cleave
