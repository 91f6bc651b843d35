// Experts with many tokens each: arithmetic is the limit. Two phases, each cut so that no two parts
// write the same place, however skewed the routing:
//   hidden  a task is a few of the active experts' panels, with all their tokens; the hidden values
//           of all (token, expert) pairs of the pass go into shared memory
//   down    a task is a few of y's panels of columns, for all tokens and experts
// A part that finds no task of the first left begins with the second at once, and waits only where
// it comes to an expert that another part is still at.
// So a weight is unpacked once per pass, and y needs no sums beside it. Within a part, weights go
// in blocks of a panel or two and 500 or 2000 steps (prefill_blocks.h), which stay in a
// second-level cache while all rows go by (a first-level cache would hold 64 steps, but every
// product begins and ends with some 150 cycles that are not multiplications). The next block of
// weights is fetched from memory under the arithmetic of this one.

#include <algorithm>

#include "kernels/dispatch.h"
#include "kernels/packed_ffn.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"
#include "kernels/prefill_blocks.h"
#include "kernels/prefill_pass.h"
#include "kernels/stealing_ranges.h"
#include "kernels/wait_until.h"

namespace cleave {
namespace prefill {
namespace {

/// One part of both phases. Blocks: how weights are multiplied.
template <typename Blocks>
class PrefillPart {
 public:
  using Value = typename Blocks::Value;
  /// Rows of x are `x_stride` apart.
  PrefillPart(const FfnCall& call, const Shared<Value>& shared, const PrefillScratch& scratch,
              std::int64_t x_stride, MatrixView<float> y)
      : call_(call),
        shared_(shared),
        s_(scratch),
        x_stride_(x_stride),
        y_(y),
        layout_(call.experts.type(), call.experts.gated(), call.experts.d_model()),
        narrow_(is_narrow(call.experts)),
        blocks_(layout_.format, scratch.blocks) {
    const std::int64_t D = y.cols, blocks = (D + Blocks::kBlockSteps - 1) / Blocks::kBlockSteps;
    block_steps_ = std::min(Blocks::kBlockSteps, ((D + blocks - 1) / blocks + 31) / 32 * 32);
  }

  /// Hidden values of a group of panels.
  /// @param down_task  of the second phase, what probably comes next; -1: another task of this one
  void hidden(std::int64_t task, std::int64_t down_task) const {
    std::int64_t i = 0;
    while (i + 1 < *shared_.num_runs && shared_.runs[i + 1].task <= task) ++i;
    const Run& run = shared_.runs[i];
    const std::int64_t group = task_panels<Blocks>(run.rows);
    const std::int64_t p = run.panel + (task - run.task) * group;
    const std::int64_t end = std::min(run.panel_end, p + group);
    const Run& next = shared_.runs[(i + 1) % *shared_.num_runs];
    const Place after = end == run.panel_end ? place(next, next.panel) : place(run, end);
    for (std::int64_t r = 0; r < run.rows; r += kRowGroup) {
      const std::int64_t m = std::min(kRowGroup, run.rows - r), together = Blocks::panels(m);
      hidden_group(run, p, end,
                   r + m < run.rows ? next_gate_up(place(run, p), 0, together)
                   : down_task >= 0 ? first_down(down_task)
                                    : next_gate_up(after, 0, together),
                   r, m);
    }
    shared_.unfinished[i].fetch_sub(1, std::memory_order_release);
  }

  /// A group of y's panels.
  void down(std::int64_t task) const {
    const std::int64_t d = first_column_panel(task), n = first_column_panel(task + 1) - d;
    if (n == 0) return;
    const std::int64_t panels = num_blocks(y_.cols), stride = n * kPanelWidth;
    std::fill_n(s_.sums, y_.rows * stride, 0.0f);
    const std::int64_t column = d * kPanelWidth;
    const std::int64_t columns = std::min(n * kPanelWidth, y_.cols - column);
    const std::int64_t runs = *shared_.num_runs;
    for (std::int64_t i = 0; i < runs; ++i) {
      const bool last = i + 1 == runs;
      wait_until([&] { return shared_.unfinished[i].load(std::memory_order_acquire) == 0; });
      if (n == 1) fetch_y(y_.rows * i / runs, y_.rows * (i + 1) / runs, column);
      down_run(shared_.runs[i], d, n, shared_.runs[last ? 0 : i + 1],
               last ? std::min(d + n, panels - 1) : d);
    }
    row_kernels().add_rows(s_.sums, stride, y_.row(0) + column, y_.row_stride, y_.rows, columns);
  }

 private:
  /// Of y's, the first that a task of the second phase has.
  std::int64_t first_column_panel(std::int64_t task) const {
    return num_blocks(y_.cols) * task / shared_.down_groups;
  }

  /// Rows [begin, end) of one of y's panels, which starts at `column`. Between narrow experts these
  /// are few; a core drops prefetches of which it has dozens under way.
  void fetch_y(std::int64_t begin, std::int64_t end, std::int64_t column) const {
    for (std::int64_t t = begin; t < end; ++t) {
      __builtin_prefetch(y_.row(t) + column, 1, 3);
      __builtin_prefetch(y_.row(t) + column + 16, 1, 3);
    }
  }

  /// An expert panel of a run.
  struct Place {
    const std::byte* expert;
    std::int64_t panels, index;  // of the expert
  };
  Place place(const Run& run, std::int64_t panel) const {
    const std::int64_t at = panel - run.panel;
    return {call_.experts.expert(run.expert + at / run.each), run.each, at % run.each};
  }
  const float* scales(const Place& at) const {
    return reinterpret_cast<const float*>(at.expert + layout_.scales_at(at.index));
  }
  const float* down_scales(const Place& at) const {
    return reinterpret_cast<const float*>(at.expert + layout_.down_scales_at(at.index));
  }
  const std::byte* gate_up(const Place& at, std::int64_t block) const {
    return at.expert + layout_.gate_up_at(at.panels, at.index) +
           block * panel_bytes(layout_.format, block_steps_);
  }
  const std::byte* down_panel(const Place& at, std::int64_t d) const {
    return at.expert + layout_.down_at(at.panels, at.index, d);
  }
  float* product(std::int64_t panel, std::int64_t row) const {
    return s_.products + (panel * kRowGroup + row) * kPanelWidth;
  }

  /// Panels [begin, end) for rows [first, first + m) of the run. `after` comes next.
  void hidden_group(const Run& run, std::int64_t begin, std::int64_t end, const NextBlock& after,
                    std::int64_t first, std::int64_t m) const {
    const std::int32_t* token = shared_.groups.token + run.pair + first;
    const std::int64_t D = y_.cols, blocks = (D + block_steps_ - 1) / block_steps_;
    const std::int64_t together = Blocks::panels(m);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t steps = std::min(block_steps_, D - b * block_steps_);
      for (std::int64_t p = begin; p < end; p += together) {
        const std::int64_t panels = std::min(together, end - p);
        const Place one = place(run, p), other = place(run, p + panels - 1);
        const WeightBlock block{{gate_up(one, b), gate_up(other, b)},
                                {scales(one), scales(other)},
                                panels,
                                steps,
                                1,
                                0,
                                0};
        const bool same_block = p + panels < end;
        const bool same_group = same_block || b + 1 < blocks;
        NextBlock next = same_block   ? next_gate_up(place(run, p + panels), b, panels)
                         : same_group ? next_gate_up(place(run, begin), b + 1, panels)
                                      : after;
        // A block that is read once need not wait in the second level.
        if (Blocks::reads_once(m) && !narrow_) next.begin = gate_up(one, b) + kPrefetchBytesOfRows;
        blocks_.multiply(block, next, m, b > 0, kRowGroup * kPanelWidth,
                         {shared_.x + b * block_steps_, x_stride_, token},
                         {product(p - begin, 0), kPanelWidth, nullptr},
                         rows_to_fetch(run, p, panels));
        if (b + 1 == blocks)
          for (std::int64_t i = p; i < p + panels; ++i) activate(run, i, i - begin, first, m);
      }
    }
  }

  /// Of the next run's rows of x, the share that panels [p, p + panels) of this one fetch: none of
  /// so many rows that they would drive this run's own from a second-level cache.
  NextRows<const Value> rows_to_fetch(const Run& run, std::int64_t p, std::int64_t panels) const {
    const Run* next = &run + 1;
    const std::int64_t bytes = x_stride_ * static_cast<std::int64_t>(sizeof(Value));
    if (next == shared_.runs + *shared_.num_runs || (run.rows + next->rows) * bytes > kRowsInCache)
      return {};
    const std::int64_t all = run.panel_end - run.panel, from = next->rows * (p - run.panel) / all;
    return {{shared_.x, x_stride_, shared_.groups.token + next->pair + from},
            next->rows * (p + panels - run.panel) / all - from,
            y_.cols};
  }

  void activate(const Run& run, std::int64_t panel, std::int64_t index, std::int64_t first,
                std::int64_t m) const {
    const std::int64_t e = run.expert + (panel - run.panel) / run.each;
    const std::span<const float> biases = call_.experts.lane_bias();
    if (!biases.empty())
      row_kernels().add_rows(biases.data() + panel * kPanelWidth, 0, product(index, 0), kPanelWidth,
                             m, kPanelWidth);
    blocks_.activate(
        call_.experts.activation(), call_.experts.gated(), m, product(index, 0),
        shared_.weight + shared_.groups.begin[e] + first,
        layout_.format == PanelFormat::kInt8 ? down_scales(place(run, panel)) : nullptr,
        shared_.hidden + run.hidden + first * run.stride + (panel - run.panel) * layout_.neurons,
        run.stride);
  }

  /// Blocks of gate|up to be fetched, of so many panels.
  NextBlock next_gate_up(const Place& at, std::int64_t block, std::int64_t panels) const {
    const bool joined = at.panels > 1 && layout_.joins_down();
    return {gate_up(at, block), panel_bytes(layout_.format, block_steps_), panels,
            joined ? layout_.gate_up_bytes : layout_.bytes()};
  }

  /// Panels of a run that are multiplied at once: equal shares of it, of whole experts if it has
  /// several.
  std::int64_t chunk_of(const Run& run) const {
    const std::int64_t unit = run.expert_end - run.expert > 1 ? run.each : 1;
    const std::int64_t units = (run.panel_end - run.panel) / unit;
    const std::int64_t most = Blocks::kBlockSteps / layout_.neurons / unit;
    const std::int64_t chunks = (units + most - 1) / most;
    return (units + chunks - 1) / chunks * unit;
  }
  /// Of `panels` panels of a chunk, those whose neurons are one piece of a panel of down.
  std::int64_t piece_of(const Run& run, std::int64_t panels) const {
    return layout_.joined_panels(std::min(run.each, panels));
  }

  /// Panels [d, d + outputs) of down, of the neurons of `panels` panels from `panel` on.
  WeightBlock down_block(const Run& run, std::int64_t panel, std::int64_t panels, std::int64_t d,
                         std::int64_t outputs) const {
    const Place at = place(run, panel);
    const std::int64_t piece = piece_of(run, panels), stride = piece * layout_.bytes();
    const bool unit_scales = layout_.format == PanelFormat::kInt8;
    const float* own = unit_scales ? kUnitScales : down_scales(at);
    return {{down_panel(at, d), down_panel(at, d + outputs - 1)},
            {own, own},
            outputs,
            piece * layout_.neurons,
            panels / piece,
            stride,
            unit_scales ? 0 : stride};
  }
  /// The same, to be fetched.
  NextBlock next_down(const Run& run, std::int64_t panel, std::int64_t panels, std::int64_t d,
                      std::int64_t outputs) const {
    const Place at = place(run, panel);
    const std::int64_t piece = piece_of(run, panels), bytes = piece * layout_.down_panel_bytes;
    if (piece == panels) return {down_panel(at, d), bytes, outputs, layout_.down_stride(run.each)};
    return {down_panel(at, d), outputs * bytes, panels / piece, piece * layout_.bytes()};
  }

  /// What a task of the second phase begins with.
  NextBlock first_down(std::int64_t task) const {
    const Run& run = shared_.runs[0];
    const std::int64_t panels = std::min(chunk_of(run), run.panel_end - run.panel);
    return next_down(run, run.panel, panels, first_column_panel(task), Blocks::panels(run.rows));
  }

  /// s_.sums += the run's hidden values times panels [d, d + n) of down. After it comes `next_run`,
  /// at panel next_d.
  void down_run(const Run& run, std::int64_t d, std::int64_t n, const Run& next_run,
                std::int64_t next_d) const {
    const std::int64_t chunk = chunk_of(run), stride = n * kPanelWidth;
    const std::int64_t together = Blocks::panels(run.rows);
    const std::int32_t* token = shared_.groups.token + run.pair;
    if constexpr (Blocks::kMultipliesShort) {
      const std::int64_t steps = (run.panel_end - run.panel) * layout_.neurons;
      if (n == 1 && run.expert_end - run.expert == 1 && steps <= 2 * kShortSteps) {
        return blocks_.multiply_short(down_panel(place(run, run.panel), d),
                                      down_panel(place(next_run, next_run.panel), next_d), steps,
                                      shared_.hidden + run.hidden, run.rows, token, s_.sums,
                                      stride);
      }
    }
    for (std::int64_t p = run.panel; p < run.panel_end; p += chunk) {
      const std::int64_t panels = std::min(chunk, run.panel_end - p);
      const Value* h = shared_.hidden + run.hidden + (p - run.panel) * layout_.neurons;
      const bool last = p + panels == run.panel_end;
      const Run& after = last ? next_run : run;
      const std::int64_t next = last ? next_run.panel : p + panels;
      const std::int64_t next_panels = std::min(chunk_of(after), after.panel_end - next);
      for (std::int64_t i = 0; i < n; i += together) {
        const std::int64_t outputs = std::min(together, n - i);
        blocks_.multiply(down_block(run, p, panels, d + i, outputs),
                         next_down(after, next, next_panels, (last ? next_d : d) + i, outputs),
                         run.rows, true, kPanelWidth, {h, run.stride, nullptr},
                         {s_.sums + i * kPanelWidth, stride, token});
      }
    }
  }

  const FfnCall& call_;
  const Shared<Value>& shared_;
  PrefillScratch s_;
  std::int64_t x_stride_;
  MatrixView<float> y_;  // of the pass
  ExpertLayout layout_;
  bool narrow_;
  Blocks blocks_;
  std::int64_t block_steps_;
};

template <typename Blocks>
std::size_t bytes(const PackedExperts& experts, std::int64_t tokens, std::int64_t k,
                  std::int64_t parts) {
  const std::int64_t pass = std::min(tokens, pass_tokens(experts));
  Carver shared(nullptr), part(nullptr);
  carve_shared<Blocks>(shared, experts, pass, k, parts);
  carve_scratch<Blocks>(part, pass);
  return shared.used() + part.used() * static_cast<std::size_t>(parts);
}

template <typename Blocks>
void run(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  using Value = typename Blocks::Value;
  const std::int64_t T = call.x.rows, D = call.x.cols, parts = std::max(1, parallel.threads);
  const std::int64_t most = pass_tokens(call.experts);
  const std::int64_t passes = (T + most - 1) / most, pass = (T + passes - 1) / passes;
  std::byte* memory = workspace.get(bytes<Blocks>(call.experts, pass, call.k, parts));
  Carver room(memory);
  Shared<Value> shared = carve_shared<Blocks>(room, call.experts, pass, call.k, parts);
  const std::size_t shared_bytes = room.used();
  carve_scratch<Blocks>(room, pass);
  const std::size_t part_bytes = room.used() - shared_bytes;
  const auto scratch_of = [&](std::int64_t part) {
    Carver own(memory + shared_bytes + part_bytes * static_cast<std::size_t>(part));
    return carve_scratch<Blocks>(own, pass);
  };
  const std::int64_t stride = skewed_stride<Value>(D + 1);
  for (std::int64_t first = 0; first < T; first += pass) {
    const std::int64_t count = std::min(pass, T - first);
    // Few pairs are sorted by one part, at once, while the others round rows of x: each time that
    // all wait for each other costs more.
    const bool few = count * call.k <= kFewPairs;
    const PairSorter sorter(call, first, count, shared.groups, shared.counts, few ? 1 : parts,
                            shared.weight);
    const auto for_parts = [&](const auto& body) {
      parallel(parts, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
        for (std::int64_t part = part_begin; part < part_end; ++part) body(part);
      });
    };
    const auto plan = [&] {
      sorter.sum_up();
      find_runs(call, count, shared);
      share_tasks<Blocks>(parts, shared);
    };
    for_parts([&](std::int64_t part) {
      if (!few) sorter.count(part);
      if (few && part == 0) {
        sorter.count(0);
        plan();
        sorter.place(0);
      }
      for (std::int64_t t = count * part / parts; t < count * (part + 1) / parts; ++t)
        Blocks::set_row(call.x.row(first + t), D, shared.x + t * stride);
    });
    if (!few) {
      // One range: in one thread, whoever that is.
      parallel(1, 1, [&](std::int64_t, std::int64_t) { plan(); });
      for_parts([&](std::int64_t part) { sorter.place(part); });
    }
    for_parts([&](std::int64_t part) {
      const PrefillPart<Blocks> runner(call, shared, scratch_of(part), stride,
                                       call.y.slice_rows(first, count));
      const StealingRanges hidden(shared.hidden_tasks, parts), down(shared.down_tasks, parts);
      for (std::int64_t i = hidden.take(part); i >= 0; i = hidden.take(part))
        runner.hidden(i, hidden.is_empty(part) ? shared.down_groups * part / parts : -1);
      for (std::int64_t i = down.take(part); i >= 0; i = down.take(part)) runner.down(i);
    });
  }
}

}  // namespace
}  // namespace prefill

bool uses_dots(const PackedExperts& experts) {
  return experts.type() == WeightType::kBF16 && panel_kernels().dots != nullptr;
}

std::size_t prefill_bytes(const PackedExperts& experts, std::int64_t tokens, std::int64_t k,
                          std::int64_t parts) {
  return uses_dots(experts) ? prefill::bytes<DotBlocks>(experts, tokens, k, parts)
                            : prefill::bytes<UnpackedBlocks>(experts, tokens, k, parts);
}

void run_prefill(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  uses_dots(call.experts) ? prefill::run<DotBlocks>(call, workspace, parallel)
                          : prefill::run<UnpackedBlocks>(call, workspace, parallel);
}

}  // namespace cleave
