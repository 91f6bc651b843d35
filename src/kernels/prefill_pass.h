#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "kernels/packed_ffn.h"
#include "kernels/packed_format.h"
#include "kernels/panel_rows.h"
#include "kernels/stealing_ranges.h"

// A pass of packed_ffn_prefill.cpp: its memory, and how its work is cut into tasks.
namespace cleave::prefill {

inline constexpr std::int64_t kPanelGroup = 4;   // panels that share rows in a second-level cache
inline constexpr std::int64_t kFewPairs = 1024;  // that one part sorts in a few microseconds
inline constexpr std::int64_t kRowGroup = 512;   // those rows, at most
inline constexpr std::int64_t kRowsInCache = 512 << 10;  // bytes of x in a second-level cache
inline constexpr std::int64_t kDownGroup = 5;     // panels of y that are summed together, at most
inline constexpr std::int64_t kJoinedPanels = 8;  // of experts that may share a run

/// Tokens of one pass, which bounds the memory. Of narrow experts the sums of y are read and
/// written most, and should stay in a second-level cache.
inline std::int64_t pass_tokens(const PackedExperts& experts) {
  return is_narrow(experts) ? 512 : 1024;
}

/// Values to a cache line.
template <typename Value>
constexpr std::int64_t kLineValues = 64 / sizeof(Value);

/// Values from row to row: rows of a product must not fall into one set of a cache. Those of a line
/// or half of one follow each other.
template <typename Value>
std::int64_t skewed_stride(std::int64_t values) {
  if (values == kLineValues<Value> || 2 * values == kLineValues<Value>) return values;
  const std::int64_t lines = (values + kLineValues<Value> - 1) / kLineValues<Value>;
  return (lines | 1) * kLineValues<Value>;
}

/// Experts that follow each other, as wide as one another, and have the same tokens (one expert, or
/// those that all tokens share): their panels and the columns of their hidden values go on from one
/// to the next.
struct Run {
  std::int64_t expert, expert_end;
  std::int64_t panel, panel_end;
  std::int64_t each;  // panels of one expert
  std::int64_t rows;
  std::int64_t pair;    // where the first expert's pairs begin
  std::int64_t stride;  // of a row of hidden values
  std::int64_t hidden;  // where they begin
  std::int64_t task;    // the first of its tasks: groups of panels
};

/// What all parts of a pass read, and write in turn; the hidden values of a run are read once none
/// of its tasks is unfinished. Value: of x and the hidden values.
template <typename Value>
struct Shared {
  PairGroups groups;
  float* weight;                                     // [PairGroups::size()]
  Run* runs;                                         // [E]
  std::int64_t* num_runs;                            // [1]
  Value* x;                                          // [tokens, skewed D]
  Value* hidden;                                     // by run
  std::int32_t* counts;                              // [parts, E]
  StealingRanges::Range *hidden_tasks, *down_tasks;  // [parts]
  std::atomic<std::int32_t>* unfinished;             // [E] of each run: hidden tasks not done
  std::int64_t down_groups;                          // tasks, as many for each part
};

/// What one part alone writes.
struct PrefillScratch {
  std::byte* blocks;  // what the way to multiply needs
  float* products;    // [kPanelGroup, kRowGroup, 32]
  float* sums;        // [tokens, a group of y's panels]
};

/// Most room that the hidden values of a pass can take.
template <typename Value>
std::int64_t hidden_size(const PackedExperts& experts, std::int64_t tokens, std::int64_t k) {
  std::int64_t widest = 0;
  for (std::int64_t e = 0; e < experts.num_experts(); ++e)
    widest = std::max(
        widest, (experts.panel_begin(e + 1) - experts.panel_begin(e)) * experts.panel_neurons());
  // A run of several experts can need two lines more than they would need one by one.
  return tokens * k * (skewed_stride<Value>(widest) + kLineValues<Value>);
}

/// Tasks of y's panels. Narrow experts' short products want one panel at a time, whose sums are
/// nearly all in a first-level cache; or else, up to 5. Of wide ones two are as good, and leave no
/// part waiting.
template <typename Blocks>
std::int64_t num_down_groups(const PackedExperts& experts, std::int64_t parts) {
  const std::int64_t panels = num_blocks(experts.d_model());
  const bool narrow = is_narrow(experts);
  if (narrow && Blocks::kMultipliesShort) return panels;
  if (narrow && panels % (parts * kPanelGroup) == 0) return panels / kPanelGroup;
  const std::int64_t each = parts * (narrow ? kDownGroup : 2);
  return parts * ((panels + each - 1) / each);
}

template <typename Blocks>
Shared<typename Blocks::Value> carve_shared(Carver& from, const PackedExperts& experts,
                                            std::int64_t tokens, std::int64_t k,
                                            std::int64_t parts) {
  using Value = typename Blocks::Value;
  const std::int64_t E = experts.num_experts(), pairs = tokens * k;
  Shared<Value> s;
  s.groups = carve_groups(from, E, pairs);
  s.weight = from.take<float>(PairGroups::size(E, pairs));
  s.runs = from.take<Run>(E);
  s.num_runs = from.take<std::int64_t>(1);
  s.x = from.take<Value>(tokens * skewed_stride<Value>(experts.d_model() + 1));
  s.hidden = from.take<Value>(hidden_size<Value>(experts, tokens, k));
  s.counts = from.take<std::int32_t>(parts * E);
  s.hidden_tasks = from.take<StealingRanges::Range>(parts);
  s.down_tasks = from.take<StealingRanges::Range>(parts);
  s.unfinished = from.take<std::atomic<std::int32_t>>(E);
  s.down_groups = num_down_groups<Blocks>(experts, parts);
  return s;
}

template <typename Blocks>
PrefillScratch carve_scratch(Carver& from, std::int64_t tokens) {
  PrefillScratch s;
  s.blocks = from.take<std::byte>(Blocks::kScratchBytes);
  s.products = from.take<float>(kPanelGroup * kRowGroup * kPanelWidth);
  s.sums = from.take<float>(tokens * kDownGroup * kPanelWidth);
  return s;
}

/// Panels of a task of the hidden phase. Few rows stay in a second-level cache from task to task
/// anyway, and parts that end with small tasks wait less for each other.
template <typename Blocks>
std::int64_t task_panels(std::int64_t rows) {
  return Blocks::panels(rows) == 1 ? 1 : kPanelGroup;
}

/// Cuts the tasks of both phases into shares of equal cost.
template <typename Blocks>
void share_tasks(std::int64_t parts, const Shared<typename Blocks::Value>& s) {
  const StealingRanges hidden(s.hidden_tasks, parts), down(s.down_tasks, parts);
  const std::int64_t runs = *s.num_runs;
  std::int64_t total = 0;
  for (std::int64_t i = 0; i < runs; ++i)
    total += (s.runs[i].panel_end - s.runs[i].panel) * Blocks::panel_cost(s.runs[i].rows);
  std::int64_t part = 0, begin = 0, task = 0, before = 0;
  for (std::int64_t i = 0; i < runs; ++i) {
    s.runs[i].task = task;
    const std::int64_t group = task_panels<Blocks>(s.runs[i].rows);
    for (std::int64_t p = s.runs[i].panel; p < s.runs[i].panel_end; p += group, ++task) {
      for (; part + 1 < parts && before >= total * (part + 1) / parts; ++part, begin = task)
        hidden.set(part, begin, task);
      before += std::min(group, s.runs[i].panel_end - p) * Blocks::panel_cost(s.runs[i].rows);
    }
    new (&s.unfinished[i])
        std::atomic<std::int32_t>(static_cast<std::int32_t>(task - s.runs[i].task));
  }
  for (; part < parts; ++part, begin = task) hidden.set(part, begin, task);
  for (std::int64_t i = 0; i < parts; ++i)
    down.set(i, s.down_groups * i / parts, s.down_groups * (i + 1) / parts);
}

/// Finds the runs of the pass's pairs, which are counted.
template <typename Value>
void find_runs(const FfnCall& call, std::int64_t count, Shared<Value>& s) {
  const std::int64_t E = call.experts.num_experts(), neurons = call.experts.panel_neurons();
  std::int64_t n = 0, hidden = 0;
  for (std::int64_t e = 0; e < E; ++e) {
    const std::int64_t m = s.groups.rows(e);
    if (m == 0 || call.experts.width(e) == 0) continue;
    const std::int64_t first = call.experts.panel_begin(e);
    const std::int64_t each = call.experts.panel_begin(e + 1) - first;
    if (n > 0 && m == count && s.runs[n - 1].rows == count && s.runs[n - 1].expert_end == e &&
        s.runs[n - 1].each == each && each <= kJoinedPanels) {
      s.runs[n - 1].expert_end = e + 1;
    } else {
      s.runs[n++] = {e, e + 1, first, 0, each, m, s.groups.begin[e], 0, 0, 0};
    }
    s.runs[n - 1].panel_end = call.experts.panel_begin(e + 1);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    s.runs[i].stride = skewed_stride<Value>((s.runs[i].panel_end - s.runs[i].panel) * neurons);
    s.runs[i].hidden = hidden;
    hidden += s.runs[i].rows * s.runs[i].stride;
  }
  *s.num_runs = n;
}

}  // namespace cleave::prefill
