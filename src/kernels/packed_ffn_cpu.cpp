// moe_ffn and dense_ffn on packed weights.
//
// Work is cut in one of two ways, whichever reads less memory per multiplication:
//   by neurons  every part takes a share of the active experts' panels, balanced by cost, and runs
//               all tokens through it into a sum of its own; the sums are added at the end. Each
//               weight is read once in all: right for few tokens per expert.
//   by tokens   every part takes a share of the tokens and runs them through all their experts,
//               straight into y. No two parts write the same row, however skewed the routing.
// Within a part, experts come one after the other, and panels in groups: for a group, first the
// hidden values of all its tokens, then down, so that a row of y is loaded and stored once per group
// and not once per panel.

#include <algorithm>
#include <cstring>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/check_routing.h"
#include "kernels/dispatch.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"

namespace cleave {
namespace {

// Neurons of a group of panels. 128 steps make the traffic of y a hundredth of the arithmetic.
constexpr std::int64_t kGroupNeurons = 128;
// Tokens of one pass: the rows of x and y should stay in a second-level cache, but every pass reads
// the weights again.
constexpr std::int64_t kMinPassTokens = 128, kMaxPassTokens = 1024;
constexpr std::int64_t kPassBytes = 1 << 20;
// From so many rows per expert and part on, reading the weights once per part is paid for.
constexpr std::int64_t kRowsToCutTokens = 24;

struct Call {
  const PackedExperts& experts;
  const std::int32_t* ids;  // [T, K]
  const float* weights;     // [T, K]
  std::int64_t k;           // K
  float scale;
  MatrixView<const float> x;
  MatrixView<float> y;
};

/// What one part writes beside its sum. Lives in the workspace.
struct PartScratch {
  std::int32_t* begin;     // [E + 1] pairs per expert
  std::int32_t* pair;      // [tokens * K] t * K + k, by expert
  float* gate_up;          // [D, 32] an unpacked panel
  float* down;             // [kGroupNeurons, 32] unpacked panels of down, one below the other
  float* products;         // [12, 32]
  float* hidden;           // [tokens, kGroupNeurons]
  float* tail;             // [12, 32] the last outputs where 32 does not divide D
  const float** x;         // [tokens] rows of the expert's tokens
  float** y;               // [tokens]
  float* row_weight;       // [tokens]
};

class Carver {
 public:
  explicit Carver(std::byte* base) : base_(base) {}
  template <typename T>
  T* take(std::int64_t count) {
    auto* here = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return here;
  }
  std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

PartScratch carve(Carver& from, const PackedExperts& experts, std::int64_t tokens, std::int64_t k) {
  PartScratch s;
  s.begin = from.take<std::int32_t>(experts.num_experts() + 1);
  s.pair = from.take<std::int32_t>(tokens * k);
  s.gate_up = from.take<float>(experts.d_model() * kPanelWidth);
  s.down = from.take<float>(kGroupNeurons * kPanelWidth);
  s.products = from.take<float>(kMaxPanelRows * kPanelWidth);
  s.hidden = from.take<float>(tokens * kGroupNeurons);
  s.tail = from.take<float>(kMaxPanelRows * kPanelWidth);
  s.x = from.take<const float*>(tokens);
  s.y = from.take<float*>(tokens);
  s.row_weight = from.take<float>(tokens);
  return s;
}

/// Runs tokens through ranges of expert panels. One object per part.
class PartRunner {
 public:
  PartRunner(const Call& call, const PartScratch& scratch)
      : call_(call),
        s_(scratch),
        layout_(call.experts.type(), call.experts.gated(), call.experts.d_model()),
        kernels_(panel_kernels()) {}

  /// Sorts the pairs of tokens [first, first + count) by expert.
  void group(std::int64_t first, std::int64_t count) {
    const std::int64_t E = call_.experts.num_experts();
    std::fill_n(s_.begin, E + 1, 0);
    const auto pairs_begin = static_cast<std::int32_t>(first * call_.k);
    const auto pairs_end = static_cast<std::int32_t>((first + count) * call_.k);
    for (std::int32_t p = pairs_begin; p < pairs_end; ++p) ++s_.begin[call_.ids[p] + 1];
    for (std::int64_t e = 0; e < E; ++e) s_.begin[e + 1] += s_.begin[e];
    for (std::int32_t p = pairs_begin; p < pairs_end; ++p) s_.pair[s_.begin[call_.ids[p]]++] = p;
    for (std::int64_t e = E; e > 0; --e) s_.begin[e] = s_.begin[e - 1];
    s_.begin[0] = 0;
  }
  std::int64_t rows(std::int64_t e) const { return s_.begin[e + 1] - s_.begin[e]; }

  /// Panels [begin, end) of expert e, for the tokens that group() found, added to rows of `y`, the
  /// first of which belongs to token `first`.
  void run_expert(std::int64_t e, std::int64_t begin, std::int64_t end, MatrixView<float> y,
                  std::int64_t first) {
    const std::int64_t m = rows(e);
    if (m == 0 || begin >= end) return;
    for (std::int64_t r = 0; r < m; ++r) {
      const std::int32_t pair = s_.pair[s_.begin[e] + r];
      const std::int64_t t = pair / call_.k;
      s_.x[r] = call_.x.row(t);
      s_.y[r] = y.row(t - first);
      s_.row_weight[r] = call_.scale * call_.weights[pair];
    }
    const std::int64_t group = kGroupNeurons / layout_.neurons;
    const std::int64_t base = call_.experts.panel_begin(e);
    for (std::int64_t p = begin; p < end; p += group) {
      const std::int64_t count = std::min(group, end - p);
      hidden_of(base + p, count, m);
      down_of(base + p, count, m);
    }
  }

 private:
  bool unpacks(PanelFormat format, std::int64_t m) const {
    return m > direct_panel_rows(kernels_, format);
  }

  void hidden_of(std::int64_t panel, std::int64_t count, std::int64_t m) {
    const bool unpack = unpacks(layout_.gate_up_format, m);
    const std::span<const float> bias = call_.experts.lane_bias();
    for (std::int64_t i = 0; i < count; ++i) {
      const std::byte* weights = call_.experts.panel(panel + i);
      PanelFormat format = layout_.gate_up_format;
      PanelProduct product{weights, layout_.gate_up_bytes > 0 ? call_.experts.d_model() : 0, 1, 0,
                           nullptr, nullptr, !bias.empty(), nullptr};
      if (unpack) {
        kernels_.unpack[static_cast<int>(format)](weights, call_.experts.d_model(), s_.gate_up);
        product.panel = s_.gate_up;
        format = PanelFormat::kF32;
        // The next panel comes from memory while this one is computed.
        product.prefetch = reinterpret_cast<const char*>(weights + layout_.bytes());
      }
      const auto* scales = layout_.step_scale_bytes > 0
                               ? reinterpret_cast<const float*>(weights + layout_.gate_up_bytes)
                               : nullptr;
      for_row_tiles(kernels_, format, m, [&](std::int64_t row, std::int64_t rows, int kernel) {
        const float* x[kMaxPanelRows];
        float *out[kMaxPanelRows], *h[kMaxPanelRows];
        float weight[kMaxPanelRows];
        for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) {
          const std::int64_t real = row + std::min(r, rows - 1);
          x[r] = s_.x[real];
          out[r] = s_.products + r * kPanelWidth;
          h[r] = s_.hidden + real * kGroupNeurons + i * layout_.neurons;
          weight[r] = s_.row_weight[real];
          if (!bias.empty())
            std::memcpy(out[r], bias.data() + (panel + i) * kPanelWidth, kPanelWidth * 4);
        }
        product.x = x;
        product.y = out;
        kernels_.multiply[static_cast<int>(format)][kernel](product);
        if (product.prefetch != nullptr) product.prefetch += 64 * product.steps;
        if (product.prefetch >= reinterpret_cast<const char*>(weights + 2 * layout_.bytes()))
          product.prefetch = nullptr;
        kernels_.activate(call_.experts.activation(), call_.experts.gated(), rows, out, weight,
                          scales, h);
      });
    }
  }

  void down_of(std::int64_t panel, std::int64_t count, std::int64_t m) {
    const std::int64_t D = call_.experts.d_model(), whole = D / kPanelWidth;
    if (!unpacks(layout_.down_format, m)) {
      for (std::int64_t i = 0; i < count; ++i)
        down_product(layout_.down_format,
                     call_.experts.panel(panel + i) + layout_.down_offset(), layout_.neurons,
                     i * layout_.neurons, 0, layout_.down_panels, m);
      return;
    }
    for (std::int64_t d = 0; d < layout_.down_panels; ++d) {
      for (std::int64_t i = 0; i < count; ++i)
        kernels_.unpack[static_cast<int>(layout_.down_format)](
            call_.experts.panel(panel + i) + layout_.down_offset() + d * layout_.down_panel_bytes,
            layout_.neurons, s_.down + i * layout_.neurons * kPanelWidth);
      down_product(PanelFormat::kF32, s_.down, count * layout_.neurons, 0, d, 1, m);
    }
    static_cast<void>(whole);
  }

  /// y[:, 32 first ...) += hidden[:, hidden_begin ...) times `panels` panels of down.
  void down_product(PanelFormat format, const void* panel, std::int64_t steps,
                    std::int64_t hidden_begin, std::int64_t first, std::int64_t panels,
                    std::int64_t m) {
    const std::int64_t D = call_.experts.d_model();
    const std::int64_t whole = std::min(panels, D / kPanelWidth - first);
    for_row_tiles(kernels_, format, m, [&](std::int64_t row, std::int64_t rows, int kernel) {
      const float* x[kMaxPanelRows];
      float* y[kMaxPanelRows];
      const auto point = [&](std::int64_t d) {
        for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) {
          x[r] = s_.hidden + (row + std::min(r, rows - 1)) * kGroupNeurons + hidden_begin;
          // Rows that only fill the kernel go where nobody looks.
          y[r] = r < rows && d < whole ? s_.y[row + r] + (first + d) * kPanelWidth : nullptr;
        }
      };
      PanelProduct product{panel, steps, whole, layout_.down_panel_bytes, x, y, true, nullptr};
      const auto multiply = kernels_.multiply[static_cast<int>(format)][kernel];
      point(0);
      if (rows == kPanelRows[kernel]) {
        multiply(product);
      } else {
        // Panel by panel, so that the filling rows need no more room than one panel.
        product.panels = 1;
        for (std::int64_t d = 0; d < whole; ++d) {
          point(d);
          for (std::int64_t r = rows; r < kPanelRows[kernel]; ++r)
            y[r] = s_.tail + r * kPanelWidth;
          product.panel = static_cast<const std::byte*>(panel) + d * layout_.down_panel_bytes;
          multiply(product);
        }
      }
      if (whole == panels) return;
      for (std::int64_t r = 0; r < kPanelRows[kernel]; ++r) y[r] = s_.tail + r * kPanelWidth;
      product.panel = static_cast<const std::byte*>(panel) + whole * layout_.down_panel_bytes;
      product.panels = 1;
      product.add = false;
      multiply(product);
      const std::int64_t begin = (first + whole) * kPanelWidth;
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t o = begin; o < D; ++o)
          s_.y[row + r][o] += s_.tail[r * kPanelWidth + o - begin];
    });
  }

  const Call& call_;
  PartScratch s_;
  ExpertPanelLayout layout_;
  const PanelKernels& kernels_;
};

std::int64_t parts_of(const ParallelFor& parallel) { return std::max(1, parallel.threads); }

std::int64_t pass_tokens(const PackedExperts& experts, std::int64_t T, std::int64_t k) {
  const std::int64_t in_cache = kPassBytes / (8 * experts.d_model() + 1);
  const std::int64_t enough = kRowsToCutTokens * experts.num_experts() / k;
  return std::min(
      T, std::clamp(std::max(in_cache, enough), kMinPassTokens, kMaxPassTokens));
}

bool cuts_tokens(const PackedExperts& experts, std::int64_t T, std::int64_t k,
                 std::int64_t parts) {
  return T * k >= kRowsToCutTokens * experts.num_experts() * parts;
}

void cut_by_tokens(const Call& call, Workspace& workspace, const ParallelFor& parallel) {
  const std::int64_t T = call.x.rows, parts = parts_of(parallel);
  const std::int64_t pass = pass_tokens(call.experts, (T + parts - 1) / parts, call.k);
  Carver sizes(nullptr);
  carve(sizes, call.experts, pass, call.k);
  std::byte* memory = workspace.get(sizes.used() * static_cast<std::size_t>(parts));
  parallel(parts, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
    for (std::int64_t part = part_begin; part < part_end; ++part) {
      Carver room(memory + sizes.used() * static_cast<std::size_t>(part));
      PartRunner runner(call, carve(room, call.experts, pass, call.k));
      const std::int64_t end = T * (part + 1) / parts;
      for (std::int64_t t = T * part / parts; t < end; t += pass) {
        const std::int64_t count = std::min(pass, end - t);
        runner.group(t, count);
        for (std::int64_t e = 0; e < call.experts.num_experts(); ++e)
          runner.run_expert(e, 0, call.experts.panel_begin(e + 1) - call.experts.panel_begin(e),
                            call.y.slice_rows(t, count), t);
      }
    }
  });
}

/// A panel costs its reading and its rows; the constant is what a row's arithmetic is worth.
std::int64_t panel_cost(std::int64_t rows) { return rows == 0 ? 0 : 12 + rows; }

/// Runs part `part` of `parts` equal shares of the cost of tokens [t, t + count).
void run_share(PartRunner& runner, const PackedExperts& experts, std::int64_t part,
               std::int64_t parts, MatrixView<float> y, std::int64_t t) {
  std::int64_t total = 0;
  for (std::int64_t e = 0; e < experts.num_experts(); ++e)
    total += (experts.panel_begin(e + 1) - experts.panel_begin(e)) * panel_cost(runner.rows(e));
  const std::int64_t from = total * part / parts, to = total * (part + 1) / parts;
  std::int64_t before = 0;
  for (std::int64_t e = 0; e < experts.num_experts(); ++e) {
    const std::int64_t panels = experts.panel_begin(e + 1) - experts.panel_begin(e);
    const std::int64_t cost = panel_cost(runner.rows(e));
    if (cost > 0) {
      // The panel that holds a boundary belongs to the part that the boundary begins.
      const auto index = [&](std::int64_t at) {
        return std::clamp<std::int64_t>((at - before + cost - 1) / cost, 0, panels);
      };
      runner.run_expert(e, index(from), part + 1 == parts ? panels : index(to), y, t);
    }
    before += panels * cost;
  }
}

void cut_by_neurons(const Call& call, Workspace& workspace, const ParallelFor& parallel) {
  const std::int64_t T = call.x.rows, D = call.experts.d_model(), parts = parts_of(parallel);
  const std::int64_t pass = pass_tokens(call.experts, T, call.k);
  Carver sizes(nullptr);
  sizes.take<float>(pass * D);
  carve(sizes, call.experts, pass, call.k);
  std::byte* memory = workspace.get(sizes.used() * static_cast<std::size_t>(parts));
  const auto sum_of = [&](std::int64_t part) {
    return reinterpret_cast<float*>(memory + sizes.used() * static_cast<std::size_t>(part));
  };
  for (std::int64_t t = 0; t < T; t += pass) {
    const std::int64_t count = std::min(pass, T - t);
    parallel(parts, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
      for (std::int64_t part = part_begin; part < part_end; ++part) {
        Carver room(memory + sizes.used() * static_cast<std::size_t>(part));
        auto* sum = room.take<float>(pass * D);
        PartRunner runner(call, carve(room, call.experts, pass, call.k));
        runner.group(t, count);
        MatrixView<float> y = call.y.slice_rows(t, count);
        if (part > 0) {
          std::fill_n(sum, count * D, 0.0f);
          y = {sum, count, D};
        }
        run_share(runner, call.experts, part, parts, y, t);
      }
    });
    if (parts == 1) continue;
    constexpr std::int64_t kRowsPerRange = 8;
    parallel(count, kRowsPerRange, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t part = 1; part < parts; ++part)
        for (std::int64_t r = begin; r < end; ++r)
          isa_kernels().add(sum_of(part) + r * D, call.y.row(t + r), D);
    });
  }
}

void run(const Call& call, Workspace& workspace, const ParallelFor& parallel) {
  if (call.x.rows == 0 || call.k == 0) return;
  if (cuts_tokens(call.experts, call.x.rows, call.k, parts_of(parallel)))
    cut_by_tokens(call, workspace, parallel);
  else
    cut_by_neurons(call, workspace, parallel);
}

void check_packed_shapes(const char* function, const PackedExperts& experts, MatrixView<const float> x,
                  MatrixView<float> y) {
  if (x.rows != y.rows || x.cols != experts.d_model() || y.cols != experts.d_model())
    fail_argument("{}: x is [{}, {}] and y [{}, {}]; expected both [T, D] with D = {}", function,
                  x.rows, x.cols, y.rows, y.cols, experts.d_model());
}

}  // namespace

void moe_ffn(const PackedExperts& experts, const Routing& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel) {
  check_routing("moe_ffn", routing, experts.num_experts());
  check_packed_shapes("moe_ffn", experts, x, y);
  if (routing.num_tokens != x.rows)
    fail_argument("moe_ffn: the routing is of {} tokens, x has {}", routing.num_tokens, x.rows);
  run({experts, routing.ids.data(), routing.weights.data(), routing.experts_per_token, scale, x, y},
      workspace, parallel);
}

void dense_ffn(const PackedExperts& ffn, MatrixView<const float> x, MatrixView<float> y,
               Workspace& workspace, const ParallelFor& parallel) {
  if (ffn.num_experts() != 1)
    fail_argument("dense_ffn: {} experts; a dense FFN is one", ffn.num_experts());
  check_packed_shapes("dense_ffn", ffn, x, y);
  const std::vector<std::int32_t> ids(static_cast<std::size_t>(x.rows), 0);
  const std::vector<float> ones(static_cast<std::size_t>(x.rows), 1.0f);
  run({ffn, ids.data(), ones.data(), 1, 1.0f, x, y}, workspace, parallel);
  if (ffn.down_bias().empty()) return;
  for (std::int64_t t = 0; t < y.rows; ++t)
    isa_kernels().add(ffn.down_bias().data(), y.row(t), y.cols);
}

}  // namespace cleave
