// Experts with many tokens each: arithmetic is the limit. Two phases, each cut so that no two parts
// write the same place, however skewed the routing:
//   hidden  a part takes a share of the active experts' panels, with all their tokens; the hidden
//           values of all (token, expert) pairs of the pass go into shared memory
//   down    a part takes a share of y's columns, for all tokens and experts
// So a weight is unpacked once per pass, and y needs no sums beside it. Within a part, weights are
// unpacked in blocks of two panels and some 500 steps, which stay in a second-level cache while all
// rows go by (a first-level cache would hold 64 steps, but every product begins and ends with some
// 150 cycles that are not multiplications). The next block of weights is fetched from memory under
// the arithmetic of this one.

#include <algorithm>

#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"

namespace cleave {
namespace {

constexpr std::int64_t kBlockSteps = 512;   // at most; of two panels 128 kB of weights
constexpr std::int64_t kPanelGroup = 4;     // panels that share rows in a second-level cache
constexpr std::int64_t kRowGroup = 512;     // those rows, at most
constexpr std::int64_t kPassTokens = 1024;  // at most, which bounds the memory
constexpr std::int64_t kAccStride = kPanelGroup * kPanelWidth;
constexpr std::int64_t kLineFloats = 16;  // floats

/// Floats from row to row: rows of a tile must not fall into one set of a cache.
std::int64_t skewed_stride(std::int64_t floats) {
  const std::int64_t lines = (floats + kLineFloats - 1) / kLineFloats;
  return (lines | 1) * kLineFloats;
}

/// Experts that follow each other and have the same tokens (one expert, or those that all tokens
/// share): their panels and the columns of their hidden values go on from one to the next.
struct Run {
  std::int64_t expert, expert_end;
  std::int64_t panel, panel_end;
  std::int64_t rows;
  std::int64_t pair;    // where the first expert's pairs begin
  std::int64_t stride;  // of a row of hidden values
  std::int64_t hidden;  // where they begin
};

/// What all parts of a pass read, and write in turn.
struct Shared {
  PairGroups groups;
  float* weight;           // [pairs]
  Run* runs;               // [E]
  std::int64_t* num_runs;  // [1]
  float* x;                // [tokens, skewed D]
  float* hidden;           // by run
};

/// What one part alone writes.
struct Scratch {
  float* unpacked;  // [2, kBlockSteps, 32]
  float* products;  // [kPanelGroup, kRowGroup, 32]
  float* sums;      // [tokens, kAccStride] of y
};

/// Most floats that the hidden values of a pass can take.
std::int64_t hidden_size(const PackedExperts& experts, std::int64_t tokens, std::int64_t k) {
  std::int64_t widest = 0;
  for (std::int64_t e = 0; e < experts.num_experts(); ++e)
    widest = std::max(
        widest, (experts.panel_begin(e + 1) - experts.panel_begin(e)) * experts.panel_neurons());
  // A run of several experts can need a line more than they would need one by one.
  return tokens * (k * skewed_stride(widest) + k / 2 * kLineFloats);
}

Shared carve_shared(Carver& from, const PackedExperts& experts, std::int64_t tokens,
                    std::int64_t k) {
  const std::int64_t E = experts.num_experts(), pairs = tokens * k;
  Shared s;
  s.groups = carve_groups(from, E, pairs);
  s.weight = from.take<float>(pairs);
  s.runs = from.take<Run>(E);
  s.num_runs = from.take<std::int64_t>(1);
  s.x = from.take<float>(tokens * skewed_stride(experts.d_model()));
  s.hidden = from.take<float>(hidden_size(experts, tokens, k));
  return s;
}

Scratch carve_scratch(Carver& from, std::int64_t tokens) {
  Scratch s;
  s.unpacked = from.take<float>(2 * kBlockSteps * kPanelWidth);
  s.products = from.take<float>(kPanelGroup * kRowGroup * kPanelWidth);
  s.sums = from.take<float>(tokens * kAccStride);
  return s;
}

/// Sorts the pass's pairs and finds the runs.
void prepare(const FfnCall& call, std::int64_t first, std::int64_t count, Shared& s) {
  group_pairs(call, first, count, s.groups);
  const std::int64_t E = call.experts.num_experts(), neurons = call.experts.panel_neurons();
  for (std::int64_t i = 0; i < s.groups.begin[E]; ++i)
    s.weight[i] = call.scale * call.weights[s.groups.pair[i]];
  std::int64_t n = 0, hidden = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t m = s.groups.rows(e);
    if (m == 0 || call.experts.width(e) == 0) continue;
    if (n > 0 && m == count && s.runs[n - 1].rows == count && s.runs[n - 1].expert_end == e) {
      s.runs[n - 1].expert_end = e + 1;
    } else {
      s.runs[n++] = {e, e + 1, call.experts.panel_begin(e), 0, m, s.groups.begin[e], 0, 0};
    }
    s.runs[n - 1].panel_end = call.experts.panel_begin(e + 1);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    s.runs[i].stride = skewed_stride((s.runs[i].panel_end - s.runs[i].panel) * neurons);
    s.runs[i].hidden = hidden;
    hidden += s.runs[i].rows * s.runs[i].stride;
  }
  *s.num_runs = n;
}

/// Lines of memory to come, `pieces` of `bytes` each, `stride` apart, handed out to products.
class Fetcher {
 public:
  Fetcher(const std::byte* begin, std::int64_t bytes, std::int64_t pieces, std::int64_t stride)
      : at_(reinterpret_cast<const char*>(begin)),
        bytes_(bytes),
        pieces_(pieces),
        stride_(stride) {}
  const char* next(std::int64_t steps) {
    if (pieces_ == 0) return nullptr;
    const char* now = at_ + done_;
    done_ += steps * 32;
    if (done_ >= bytes_) {
      --pieces_;
      at_ += stride_;
      done_ = 0;
    }
    return now;
  }

 private:
  const char* at_;
  std::int64_t bytes_, pieces_, stride_, done_ = 0;
};

/// One part of both phases.
class PrefillPart {
 public:
  PrefillPart(const FfnCall& call, const Shared& shared, const Scratch& scratch,
              MatrixView<const float> x, MatrixView<float> y)
      : call_(call),
        shared_(shared),
        s_(scratch),
        x_(x),
        y_(y),
        layout_(call.experts.type(), call.experts.gated(), call.experts.d_model()),
        kernels_(panel_kernels()),
        unpack_(kernels_.unpack[static_cast<int>(layout_.format)]),
        unpack_and_multiply_(kernels_.unpack_and_multiply[static_cast<int>(layout_.format)]) {
    const std::int64_t blocks = (x.cols + kBlockSteps - 1) / kBlockSteps;
    block_steps_ = std::min(kBlockSteps, ((x.cols + blocks - 1) / blocks + 31) / 32 * 32);
  }

  /// Hidden values of panels [begin, end) of a run.
  void hidden(const Run& run, std::int64_t begin, std::int64_t end) {
    for (std::int64_t r = 0; r < run.rows; r += kRowGroup)
      for (std::int64_t p = begin; p < end; p += kPanelGroup)
        hidden_group(run, p, std::min(end, p + kPanelGroup), end, r,
                     std::min(kRowGroup, run.rows - r));
  }

  /// y's panels of columns [begin, end).
  void down(std::int64_t begin, std::int64_t end) {
    for (std::int64_t d = begin; d < end; d += kPanelGroup) {
      const std::int64_t n = std::min(kPanelGroup, end - d);
      std::fill_n(s_.sums, y_.rows * kAccStride, 0.0f);
      const std::int64_t runs = *shared_.num_runs;
      for (std::int64_t i = 0; i < runs; ++i) {
        const bool last = i + 1 == runs;
        down_run(shared_.runs[i], d, n, shared_.runs[last ? 0 : i + 1],
                 last ? std::min(d + kPanelGroup, end - 1) : d);
      }
      const std::int64_t column = d * kPanelWidth;
      const std::int64_t columns = std::min(n * kPanelWidth, y_.cols - column);
      for (std::int64_t t = 0; t < y_.rows; ++t)
        isa_kernels().add(s_.sums + t * kAccStride, y_.row(t) + column, columns);
    }
  }

 private:
  const float* scales(std::int64_t panel) const {
    return reinterpret_cast<const float*>(call_.experts.panel(panel));
  }
  const std::byte* gate_up(std::int64_t panel, std::int64_t block) const {
    return call_.experts.panel(panel) + layout_.gate_up_offset() +
           block * panel_bytes(layout_.format, block_steps_);
  }
  const std::byte* down_panel(std::int64_t panel, std::int64_t d) const {
    return call_.experts.panel(panel) + layout_.down_offset() + d * layout_.down_panel_bytes;
  }
  float* product(std::int64_t panel, std::int64_t row) const {
    return s_.products + (panel * kRowGroup + row) * kPanelWidth;
  }

  /// Panels [begin, end) for rows [first, first + m) of the run. `last`: end of the run's panels of
  /// this part.
  void hidden_group(const Run& run, std::int64_t begin, std::int64_t end, std::int64_t last,
                    std::int64_t first, std::int64_t m) {
    const std::int32_t* token = shared_.groups.token + run.pair + first;
    const std::int64_t D = x_.cols, blocks = (D + block_steps_ - 1) / block_steps_;
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t steps = std::min(block_steps_, D - b * block_steps_);
      for (std::int64_t p = begin; p < end; p += 2) {
        const std::int64_t panels = std::min<std::int64_t>(2, end - p);
        const Weights weights{{gate_up(p, b), gate_up(p + panels - 1, b)}, steps, 1, 0};
        const bool fused = fuses(panels, m);
        for (std::int64_t i = 0; i < panels && !fused; ++i)
          unpack_(gate_up(p + i, b), steps, scales(p + i), s_.unpacked + i * steps * kPanelWidth);
        const bool same_block = p + panels < end;
        const bool same_group = same_block || b + 1 < blocks;
        const std::int64_t next = same_block   ? p + panels
                                  : same_group ? begin
                                               : std::min(end, last - 1);
        Fetcher fetch(gate_up(next, same_block   ? b
                                    : same_group ? b + 1
                                                 : 0),
                      panel_bytes(layout_.format, block_steps_), panels, layout_.bytes());
        multiply(
            weights, panels, fused, m, b > 0, kRowGroup * kPanelWidth, fetch,
            [&](std::int64_t r) { return x_.row(token[r]) + b * block_steps_; },
            [&](std::int64_t r) { return product(p - begin, r); });
      }
    }
    for (std::int64_t p = begin; p < end; ++p) activate(run, p, p - begin, first, m);
  }

  void activate(const Run& run, std::int64_t panel, std::int64_t index, std::int64_t first,
                std::int64_t m) const {
    std::int64_t e = run.expert;
    while (call_.experts.panel_begin(e + 1) <= panel) ++e;
    const std::span<const float> biases = call_.experts.lane_bias();
    for (std::int64_t r = 0; r < m && !biases.empty(); ++r)
      isa_kernels().add(biases.data() + panel * kPanelWidth, product(index, r), kPanelWidth);
    kernels_.activate(
        call_.experts.activation(), call_.experts.gated(), m, product(index, 0),
        shared_.weight + shared_.groups.begin[e] + first,
        layout_.format == PanelFormat::kInt8 ? scales(panel) + layout_.scale_bytes / 4 : nullptr,
        shared_.hidden + run.hidden + first * run.stride + (panel - run.panel) * layout_.neurons,
        run.stride);
  }

  /// Panels of a run whose neurons are unpacked at once: equal shares of it.
  std::int64_t chunk_of(const Run& run) const {
    const std::int64_t panels = run.panel_end - run.panel, most = kBlockSteps / layout_.neurons;
    const std::int64_t chunks = (panels + most - 1) / most;
    return (panels + chunks - 1) / chunks;
  }

  /// s_.sums += the run's hidden values times panels [d, d + n) of down. After it comes `next_run`,
  /// at panel next_d.
  void down_run(const Run& run, std::int64_t d, std::int64_t n, const Run& next_run,
                std::int64_t next_d) {
    const std::int64_t chunk = chunk_of(run);
    const std::int32_t* token = shared_.groups.token + run.pair;
    for (std::int64_t p = run.panel; p < run.panel_end; p += chunk) {
      const std::int64_t panels = std::min(chunk, run.panel_end - p);
      const std::int64_t steps = panels * layout_.neurons;
      const float* h = shared_.hidden + run.hidden + (p - run.panel) * layout_.neurons;
      const bool last = p + panels == run.panel_end;
      const std::int64_t next = last ? next_run.panel : p + panels;
      Fetcher fetch(down_panel(next, last ? next_d : d), n * layout_.down_panel_bytes,
                    last ? std::min(chunk_of(next_run), next_run.panel_end - next)
                         : std::min(chunk, run.panel_end - next),
                    layout_.bytes());
      for (std::int64_t i = 0; i < n; i += 2) {
        const std::int64_t outputs = std::min<std::int64_t>(2, n - i);
        const Weights weights{{down_panel(p, d + i), down_panel(p, d + i + outputs - 1)},
                              layout_.neurons,
                              panels,
                              layout_.bytes()};
        const bool fused = fuses(outputs, run.rows);
        for (std::int64_t j = 0; j < outputs && !fused; ++j)
          unpack_down(p, panels, d + i + j, s_.unpacked + j * steps * kPanelWidth);
        multiply(
            weights, outputs, fused, run.rows, true, kPanelWidth, fetch,
            [&](std::int64_t r) { return h + r * run.stride; },
            [&](std::int64_t r) { return s_.sums + token[r] * kAccStride + i * kPanelWidth; });
      }
    }
  }

  void unpack_down(std::int64_t panel, std::int64_t panels, std::int64_t d, float* to) const {
    for (std::int64_t p = panel; p < panel + panels; ++p, to += layout_.neurons * kPanelWidth)
      unpack_(
          down_panel(p, d), layout_.neurons,
          layout_.format == PanelFormat::kInt8 ? kUnitScales : scales(p) + layout_.scale_bytes / 4,
          to);
  }

  /// Where a block of weights is packed: one or two panels, in pieces.
  struct Weights {
    const std::byte* panel[2];
    std::int64_t piece_steps, pieces, piece_stride;
  };
  /// Whether the first product of a block unpacks it.
  bool fuses(std::int64_t panels, std::int64_t m) const {
    return panels == 2 && m >= kPairRows && unpack_and_multiply_ != nullptr;
  }

  /// A block of one or two panels times m rows whose operands and results are where x_of and y_of
  /// say. The block is unpacked, or is here.
  template <typename XOf, typename YOf>
  void multiply(const Weights& weights, std::int64_t panels, bool fused, std::int64_t m, bool add,
                std::int64_t panel_offset, Fetcher& fetch, const XOf& x_of, const YOf& y_of) const {
    const auto* kernels = panels == 2 ? kernels_.multiply_pair : kernels_.multiply_block;
    const std::int64_t most = panels == 2 ? kPairRows : kBlockRows;
    const std::int64_t steps = weights.pieces * weights.piece_steps;
    const float* x[kBlockRows];
    float* y[kBlockRows];
    for (std::int64_t first = 0; first < m; first += most) {
      const std::int64_t rows = std::min(most, m - first);
      for (std::int64_t i = 0; i < rows; ++i) {
        x[i] = x_of(first + i);
        y[i] = y_of(first + i);
      }
      if (first == 0 && fused)
        unpack_and_multiply_({{weights.panel[0], weights.panel[1]},
                              weights.piece_steps,
                              weights.pieces,
                              weights.piece_stride,
                              s_.unpacked,
                              x,
                              y,
                              panel_offset,
                              add,
                              fetch.next(steps)});
      else
        kernels[rows - 1]({s_.unpacked, steps, x, y, panel_offset, add, fetch.next(steps)});
    }
  }

  const FfnCall& call_;
  const Shared& shared_;
  Scratch s_;
  MatrixView<const float> x_;  // of the pass
  MatrixView<float> y_;
  ExpertPanelLayout layout_;
  const PanelKernels& kernels_;
  void (*unpack_)(const void*, std::int64_t, const float*, float*);
  void (*unpack_and_multiply_)(const UnpackProduct&);
  std::int64_t block_steps_;
};

}  // namespace

std::size_t prefill_bytes(const PackedExperts& experts, std::int64_t tokens, std::int64_t k,
                          std::int64_t parts) {
  const std::int64_t pass = std::min(tokens, kPassTokens);
  Carver shared(nullptr), part(nullptr);
  carve_shared(shared, experts, pass, k);
  carve_scratch(part, pass);
  return shared.used() + part.used() * static_cast<std::size_t>(parts);
}

void run_prefill(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  const std::int64_t T = call.x.rows, D = call.x.cols, parts = std::max(1, parallel.threads);
  const std::int64_t passes = (T + kPassTokens - 1) / kPassTokens, pass = (T + passes - 1) / passes;
  std::byte* memory = workspace.get(prefill_bytes(call.experts, pass, call.k, parts));
  Carver room(memory);
  Shared shared = carve_shared(room, call.experts, pass, call.k);
  const std::size_t shared_bytes = room.used();
  carve_scratch(room, pass);
  const std::size_t part_bytes = room.used() - shared_bytes;
  const std::int64_t stride = skewed_stride(D), panels = num_blocks(D);
  for (std::int64_t first = 0; first < T; first += pass) {
    const std::int64_t count = std::min(pass, T - first);
    // One range: in one thread, whoever that is.
    parallel(1, 1, [&](std::int64_t, std::int64_t) { prepare(call, first, count, shared); });
    parallel(count, 16, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t)
        std::copy_n(call.x.row(first + t), D, shared.x + t * stride);
    });
    const auto run_parts = [&](const auto& body) {
      parallel(parts, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
        for (std::int64_t part = part_begin; part < part_end; ++part) {
          Carver own(memory + shared_bytes + part_bytes * static_cast<std::size_t>(part));
          const Scratch scratch = carve_scratch(own, pass);
          PrefillPart runner(call, shared, scratch, {shared.x, count, D, stride},
                             call.y.slice_rows(first, count));
          body(runner, part);
        }
      });
    };
    run_parts([&](PrefillPart& runner, std::int64_t part) {
      // Unpacking a panel is worth some 4 rows.
      const auto cost = [&](std::int64_t e) {
        return shared.groups.rows(e) == 0 ? 0 : 4 + shared.groups.rows(e);
      };
      std::int64_t run = 0, from = 0, to = 0;
      for_share_of_panels(call.experts, part, parts, cost,
                          [&](std::int64_t e, std::int64_t begin, std::int64_t end) {
                            if (e >= shared.runs[run].expert_end || from == to) {
                              if (from < to) runner.hidden(shared.runs[run], from, to);
                              while (shared.runs[run].expert_end <= e) ++run;
                              from = begin;
                            }
                            to = end;
                          });
      if (from < to) runner.hidden(shared.runs[run], from, to);
    });
    run_parts([&](PrefillPart& runner, std::int64_t part) {
      runner.down(panels * part / parts, panels * (part + 1) / parts);
    });
  }
}

}  // namespace cleave
