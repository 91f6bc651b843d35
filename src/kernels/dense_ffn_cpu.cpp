// dense_ffn on the CPU: two or three products over all tokens. Definition: moe_ffn_reference.cpp.

#include <fmt/format.h>

#include <vector>

#include "cleave/error.h"
#include "cleave/kernels.h"
#include "kernels/dispatch.h"
#include "kernels/product.h"
#include "support/buffer.h"

namespace cleave {
namespace {

// So many tokens at a time: the two hidden matrices stay within tens of megabytes however long the
// input is, and the products are as fast as they get.
constexpr std::int64_t kTokensPerPiece = 1024;
constexpr std::int64_t kActivationGrain = 8 * 1024;  // elements worth a thread

void check_shapes(const FfnView& ffn, MatrixView<const float> x, MatrixView<float> y) {
  const std::int64_t D = ffn.up.cols, H = ffn.up.rows;
  if (x.cols != D || y.cols != ffn.down.rows || ffn.down.cols != H || x.rows != y.rows ||
      (!ffn.gate.empty() && (ffn.gate.rows != H || ffn.gate.cols != D)))
    throw InvalidArgument(fmt::format(
        "dense_ffn: x [{}, {}] and y [{}, {}] do not fit an FFN with gate [{}, {}], up [{}, {}], "
        "down [{}, {}]; expected x [T, D], y [T, D], gate and up [H, D], down [D, H]",
        x.rows, x.cols, y.rows, y.cols, ffn.gate.rows, ffn.gate.cols, H, D, ffn.down.rows,
        ffn.down.cols));
}

}  // namespace

void dense_ffn(const FfnView& ffn, MatrixView<const float> x, MatrixView<float> y,
               const ParallelFor& parallel) {
  check_shapes(ffn, x, y);
  const std::int64_t H = ffn.up.rows;
  const std::int64_t piece = x.rows < kTokensPerPiece ? x.rows : kTokensPerPiece;
  Buffer up(piece * H), gate(ffn.gate.empty() ? 0 : piece * H);
  for (std::int64_t begin = 0; begin < x.rows; begin += piece) {
    const std::int64_t count = begin + piece < x.rows ? piece : x.rows - begin;
    const MatrixView<const float> in = x.slice_rows(begin, count);
    const MatrixView<float> hidden(up.data(), count, H);
    linear(in, ffn.up, ffn.up_bias, hidden, parallel);
    if (!ffn.gate.empty()) linear(in, ffn.gate, ffn.gate_bias, {gate.data(), count, H}, parallel);
    parallel(count * H, kActivationGrain, [&](std::int64_t from, std::int64_t to) {
      isa_kernels().activate(ffn.activation, ffn.gate.empty() ? nullptr : gate.data() + from,
                             up.data() + from, up.data() + from, to - from);
    });
    linear_add(hidden, ffn.down, ffn.down_bias, y.slice_rows(begin, count), parallel);
  }
}

}  // namespace cleave
