#include <algorithm>
#include <type_traits>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"
#include "kernels/prefill_blocks.h"

namespace cleave {
namespace {

// Rows of x of one pass: they should stay in a second-level cache while all panels go by.
constexpr std::int64_t kRowBytes = 768 << 10;
constexpr std::int64_t kMinPassRows = 48;
// Passes, and parts where rows are shared, are cut at multiples of so many rows: whole products.
constexpr std::int64_t kRowUnit = 12;
// Rows that are still multiplied as floats where dot products would do: they wait for memory, and
// more of them for arithmetic.
constexpr std::int64_t kDirectDotRows = 4;
// Below so many multiply-adds a part is not worth waking a thread (a few microseconds).
constexpr std::int64_t kPartMacs = 64 * 1024;

/// Where the products of a panel go.
struct Output {
  MatrixView<float> y;
  std::span<const float> bias;
  bool add;

  /// results [rows, 32] of panel p.
  void store(const float* results, std::int64_t p, std::int64_t row_begin,
             std::int64_t rows) const {
    const std::int64_t column = p * kPanelWidth;
    const std::int64_t columns = std::min(kPanelWidth, y.cols - column);
    for (std::int64_t r = 0; r < rows; ++r, results += kPanelWidth) {
      float* to = y.row(row_begin + r) + column;
      if (add)
        for (std::int64_t c = 0; c < columns; ++c) to[c] += results[c];
      else
        std::copy_n(results, columns, to);
      if (!bias.empty())
        for (std::int64_t c = 0; c < columns; ++c) to[c] += bias[column + c];
    }
  }
};

/// Runs panels of one weight over a few rows of x. One object per part.
class DirectLoop {
 public:
  DirectLoop(const PackedLinear& weight, MatrixView<const float> x, const Output& output,
             std::int64_t, float* scratch)
      : weight_(weight),
        x_(x),
        output_(output),
        format_(panel_format(weight.type())),
        kernels_(panel_kernels()),
        results_(scratch),
        blocks_(reinterpret_cast<InputBlock*>(results_ + kMaxPanelRows * kPanelWidth)) {}

  static std::int64_t scratch_size(std::int64_t, std::int64_t K) {
    constexpr std::int64_t kBlockFloats = sizeof(InputBlock) / sizeof(float);
    return kMaxPanelRows * (kPanelWidth + num_blocks(K) * kBlockFloats);
  }

  void run(std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
           std::int64_t rows) const {
    const std::int64_t K = x_.cols;
    if (format_ == PanelFormat::kInt4)
      for (std::int64_t r = 0; r < rows; ++r)
        kernels_.prepare(x_.row(row_begin + r), K, blocks_ + r * num_blocks(K));
    const int kernel = panel_rows_index(rows);
    const float* x[kMaxPanelRows];
    const InputBlock* blocks[kMaxPanelRows];
    float* out[kMaxPanelRows];
    for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) {
      const std::int64_t real = std::min(r, rows - 1);
      x[r] = x_.row(row_begin + real);
      blocks[r] = blocks_ + real * num_blocks(K);
      out[r] = results_ + r * kPanelWidth;
    }
    for (std::int64_t p = panel_begin; p < panel_end; ++p) {
      const std::byte* packed = weight_.data() + p * weight_.panel_bytes();
      const std::byte* panel = packed + scale_bytes(format_);
      kernels_.multiply[static_cast<int>(format_)][kernel](
          {panel, reinterpret_cast<const float*>(packed), K, 1, 0, x, blocks, out, false,
           reinterpret_cast<const char*>(panel) + kPrefetchBytes});
      output_.store(results_, p, row_begin, rows);
    }
  }

 private:
  const PackedLinear& weight_;
  MatrixView<const float> x_;
  Output output_;
  PanelFormat format_;
  const PanelKernels& kernels_;
  float* results_;      // [8, 32]
  InputBlock* blocks_;  // [8, ceil(K / 32)] x, for kInt4
};

/// The same over more rows than are multiplied directly. Blocks: how weights are multiplied.
template <typename Blocks>
class BlockLoop {
 public:
  using Value = typename Blocks::Value;
  BlockLoop(const PackedLinear& weight, MatrixView<const float> x, const Output& output,
            std::int64_t pass, float* scratch)
      : weight_(weight),
        x_(x),
        output_(output),
        format_(panel_format(weight.type())),
        pass_(pass),
        results_(scratch),
        blocks_(format_, reinterpret_cast<std::byte*>(results_ + 2 * pass * kPanelWidth)),
        rounded_(reinterpret_cast<Value*>(results_ + 2 * pass * kPanelWidth +
                                          Blocks::kScratchBytes / sizeof(float))) {
    const std::int64_t K = std::max<std::int64_t>(1, x.cols);
    const std::int64_t blocks = (K + Blocks::kBlockSteps - 1) / Blocks::kBlockSteps;
    block_steps_ = std::min(Blocks::kBlockSteps, ((K + blocks - 1) / blocks + 31) / 32 * 32);
  }

  static std::int64_t scratch_size(std::int64_t pass, std::int64_t K) {
    return 2 * pass * kPanelWidth +
           static_cast<std::int64_t>(Blocks::kScratchBytes / sizeof(float)) +
           (kRounds ? pass * stride(K) / 2 : 0);
  }

  void run(std::int64_t panel_begin, std::int64_t panel_end, std::int64_t row_begin,
           std::int64_t rows) const {
    const std::int64_t K = x_.cols;
    if (K == 0) std::fill_n(results_, 2 * pass_ * kPanelWidth, 0.0f);
    if constexpr (kRounds)
      for (std::int64_t r = 0; r < rows; ++r)
        Blocks::set_row(x_.row(row_begin + r), K, rounded_ + r * stride(K));
    const RowList<const Value> x = rows_of_x(row_begin);
    const std::int64_t together = Blocks::panels(rows);
    for (std::int64_t p = panel_begin; p < panel_end; p += together) {
      const std::int64_t panels = std::min(together, panel_end - p);
      for (std::int64_t s = 0; s < K; s += block_steps_) {
        const std::int64_t steps = std::min(block_steps_, K - s);
        const bool same = s + steps < K;
        const std::int64_t next = same ? p : std::min(p + together, panel_end - panels);
        blocks_.multiply(
            {{at(p, s), at(p + panels - 1, s)},
             {scales(p), scales(p + panels - 1)},
             panels,
             steps,
             1,
             0,
             0,
             output_.y.cols - p * kPanelWidth <= kPanelWidth / 2},
            {at(next, same ? s + steps : 0), kRounds ? 0 : panel_bytes(format_, block_steps_),
             panels, weight_.panel_bytes()},
            rows, s > 0, pass_ * kPanelWidth, {x.begin + s, x.stride, nullptr},
            {results_, kPanelWidth, nullptr});
      }
      for (std::int64_t i = 0; i < panels; ++i)
        output_.store(results_ + i * pass_ * kPanelWidth, p + i, row_begin, rows);
    }
  }

 private:
  static constexpr bool kRounds = !std::is_same_v<Value, float>;
  /// Values from row to row, an odd number of lines.
  static std::int64_t stride(std::int64_t K) { return ((K + 1 + 31) / 32 | 1) * 32; }
  RowList<const Value> rows_of_x(std::int64_t row_begin) const {
    if constexpr (kRounds)
      return {rounded_, stride(x_.cols), nullptr};
    else
      return {x_.row(row_begin), x_.row_stride, nullptr};
  }
  const std::byte* at(std::int64_t p, std::int64_t step) const {
    return weight_.data() + p * weight_.panel_bytes() + scale_bytes(format_) +
           panel_bytes(format_, step);
  }
  const float* scales(std::int64_t p) const {
    return reinterpret_cast<const float*>(weight_.data() + p * weight_.panel_bytes());
  }

  const PackedLinear& weight_;
  MatrixView<const float> x_;
  Output output_;
  PanelFormat format_;
  std::int64_t pass_, block_steps_;
  float* results_;  // [2, rows of a pass, 32]
  Blocks blocks_;
  Value* rounded_;  // [rows of a pass, stride] x, where it is rounded
};

/// How a product is cut, for a way to run it.
template <typename Loop>
struct Cut {
  Cut(const PackedLinear& weight, std::int64_t rows) {
    const std::int64_t in_cache = kRowBytes / (4 * std::max<std::int64_t>(1, weight.cols()));
    pass = std::min(rows, std::max(kMinPassRows, in_cache / kRowUnit * kRowUnit));
    room = (Loop::scratch_size(pass, weight.cols()) + 15) / 16 * 16;
  }
  std::int64_t pass;  // rows at a time
  std::int64_t room;  // floats of workspace for each part
};

/// Runs Loop over equal shares of the panels; of the rows where there are too few panels to share.
template <typename Loop>
void run_shares(const PackedLinear& weight, MatrixView<const float> x, const Output& output,
                Workspace& workspace, const ParallelFor& parallel) {
  const Cut<Loop> cut(weight, x.rows);
  const std::int64_t T = x.rows, K = weight.cols(), pass = cut.pass;
  const std::int64_t panels = (weight.rows() + kPanelWidth - 1) / kPanelWidth;
  const std::int64_t parts = std::max(1, parallel.threads);
  const bool cut_rows = panels < 4 * parts && T >= kRowUnit * parts;
  const std::int64_t n = cut_rows ? (T + kRowUnit - 1) / kRowUnit : panels;
  const std::int64_t macs = kPanelWidth * K * (cut_rows ? kRowUnit * panels : T);
  const std::int64_t wanted = std::clamp<std::int64_t>(n * macs / kPartMacs, 1, std::min(parts, n));
  auto* memory = reinterpret_cast<float*>(
      workspace.get(static_cast<std::size_t>(cut.room * wanted) * sizeof(float)));
  parallel(wanted, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
    for (std::int64_t part = part_begin; part < part_end; ++part) {
      const Loop loop(weight, x, output, pass, memory + cut.room * part);
      const std::int64_t begin = n * part / wanted, end = n * (part + 1) / wanted;
      const std::int64_t first = cut_rows ? begin * kRowUnit : 0;
      const std::int64_t last = cut_rows ? std::min(T, end * kRowUnit) : T;
      for (std::int64_t row = first; row < last; row += pass)
        loop.run(cut_rows ? 0 : begin, cut_rows ? panels : end, row, std::min(pass, last - row));
    }
  });
}

/// body(std::type_identity<the way to run so many rows>)
template <typename Body>
auto with_loop(const PackedLinear& weight, std::int64_t rows, const Body& body) {
  const PanelFormat format = panel_format(weight.type());
  const bool dots = format == PanelFormat::kBF16 && panel_kernels().dots != nullptr;
  const std::int64_t most = direct_panel_rows(panel_kernels(), format);
  if (rows <= (dots ? std::min(most, kDirectDotRows) : most))
    return body(std::type_identity<DirectLoop>());
  return dots ? body(std::type_identity<BlockLoop<DotBlocks>>())
              : body(std::type_identity<BlockLoop<UnpackedBlocks>>());
}

}  // namespace

std::size_t linear_bytes(const PackedLinear& weight, std::int64_t rows) {
  return with_loop(weight, rows, [&](auto loop) {
    return static_cast<std::size_t>(Cut<typename decltype(loop)::type>(weight, rows).room) *
           sizeof(float);
  });
}

void linear(const PackedLinear& weight, MatrixView<const float> x, std::span<const float> bias,
            MatrixView<float> y, bool add, Workspace& workspace, const ParallelFor& parallel) {
  if (x.cols != weight.cols() || y.cols != weight.rows() || x.rows != y.rows ||
      (!bias.empty() && static_cast<std::int64_t>(bias.size()) != weight.rows()))
    fail_argument(
        "linear: x is [{}, {}], y [{}, {}] and bias [{}]; a weight [{}, {}] takes x [T, "
        "{}] and y [T, {}]",
        x.rows, x.cols, y.rows, y.cols, bias.size(), weight.rows(), weight.cols(), weight.cols(),
        weight.rows());
  if (x.rows == 0 || weight.rows() == 0) return;
  with_loop(weight, x.rows, [&](auto loop) {
    run_shares<typename decltype(loop)::type>(weight, x, {y, bias, add}, workspace, parallel);
  });
}

}  // namespace cleave
