// moe_ffn and dense_ffn on packed weights.
//
// Work is cut in one of two ways, whichever reads less memory per multiplication:
//   by neurons  every part takes a share of the active experts' panels, balanced by cost, and runs
//               all tokens through it into a sum of its own; the sums are added at the end. Each
//               weight is read once in all: right for few tokens per expert.
//   by tokens   every part takes a share of the tokens and runs them through all their experts,
//               straight into y. No two parts write the same row, however skewed the routing.
// Within a part, experts come one after the other, and panels in groups: for a group, first the
// hidden values of all its tokens, then down, so that a row of y is loaded and stored once per
// group and not once per panel.

#include <algorithm>

#include "cleave/packed.h"
#include "fail.h"
#include "kernels/check_routing.h"
#include "kernels/dispatch.h"
#include "kernels/packed_ffn_part.h"

namespace cleave {
namespace {

// Tokens of one pass: the rows of x and y should stay in a second-level cache, but every pass reads
// the weights again.
constexpr std::int64_t kMinPassTokens = 128, kMaxPassTokens = 1024;
constexpr std::int64_t kPassBytes = 1 << 20;
// From so many rows per expert and part on, reading the weights once per part is paid for.
constexpr std::int64_t kRowsToCutTokens = 96;

std::int64_t parts_of(const ParallelFor& parallel) { return std::max(1, parallel.threads); }

std::int64_t pass_tokens(const PackedExperts& experts, std::int64_t T, std::int64_t k) {
  const std::int64_t in_cache = kPassBytes / (8 * experts.d_model() + 1);
  const std::int64_t enough = kRowsToCutTokens * experts.num_experts() / k;
  return std::min(T, std::clamp(std::max(in_cache, enough), kMinPassTokens, kMaxPassTokens));
}

bool cuts_tokens(const PackedExperts& experts, std::int64_t T, std::int64_t k, std::int64_t parts) {
  return T * k >= kRowsToCutTokens * experts.num_experts() * parts;
}

/// Bytes of one part, for passes of so many tokens.
std::size_t token_part_bytes(const PackedExperts& experts, std::int64_t pass, std::int64_t k) {
  Carver sizes(nullptr);
  carve(sizes, experts, pass, k);
  return sizes.used();
}
std::size_t neuron_part_bytes(const PackedExperts& experts, std::int64_t pass, std::int64_t k) {
  Carver sizes(nullptr);
  sizes.take<float>(pass * experts.d_model());
  carve(sizes, experts, pass, k);
  return sizes.used();
}

void cut_by_tokens(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  const std::int64_t T = call.x.rows, parts = parts_of(parallel);
  const std::int64_t pass = pass_tokens(call.experts, (T + parts - 1) / parts, call.k);
  const std::size_t bytes = token_part_bytes(call.experts, pass, call.k);
  std::byte* memory = workspace.get(bytes * static_cast<std::size_t>(parts));
  parallel(parts, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
    for (std::int64_t part = part_begin; part < part_end; ++part) {
      Carver room(memory + bytes * static_cast<std::size_t>(part));
      PartRunner runner(call, carve(room, call.experts, pass, call.k));
      const std::int64_t end = T * (part + 1) / parts;
      for (std::int64_t t = T * part / parts; t < end; t += pass) {
        const std::int64_t count = std::min(pass, end - t);
        runner.group(t, count);
        for (std::int64_t e = 0; e < call.experts.num_experts(); ++e)
          runner.run_expert(e, 0, call.experts.panel_begin(e + 1) - call.experts.panel_begin(e),
                            call.y.slice_rows(t, count), t);
        runner.finish();
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

void cut_by_neurons(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  const std::int64_t T = call.x.rows, D = call.experts.d_model(), parts = parts_of(parallel);
  const std::int64_t pass = pass_tokens(call.experts, T, call.k);
  const std::size_t bytes = neuron_part_bytes(call.experts, pass, call.k);
  std::byte* memory = workspace.get(bytes * static_cast<std::size_t>(parts));
  const auto sum_of = [&](std::int64_t part) {
    return reinterpret_cast<float*>(memory + bytes * static_cast<std::size_t>(part));
  };
  for (std::int64_t t = 0; t < T; t += pass) {
    const std::int64_t count = std::min(pass, T - t);
    parallel(parts, 1, [&](std::int64_t part_begin, std::int64_t part_end) {
      for (std::int64_t part = part_begin; part < part_end; ++part) {
        Carver room(memory + bytes * static_cast<std::size_t>(part));
        auto* sum = room.take<float>(pass * D);
        PartRunner runner(call, carve(room, call.experts, pass, call.k));
        runner.group(t, count);
        MatrixView<float> y = call.y.slice_rows(t, count);
        if (part > 0) {
          std::fill_n(sum, count * D, 0.0f);
          y = {sum, count, D};
        }
        run_share(runner, call.experts, part, parts, y, t);
        runner.finish();
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

void run(const FfnCall& call, Workspace& workspace, const ParallelFor& parallel) {
  if (call.x.rows == 0 || call.k == 0) return;
  if (cuts_tokens(call.experts, call.x.rows, call.k, parts_of(parallel)))
    cut_by_tokens(call, workspace, parallel);
  else
    cut_by_neurons(call, workspace, parallel);
}

void check_packed_shapes(const char* function, const PackedExperts& experts,
                         MatrixView<const float> x, MatrixView<float> y) {
  if (x.rows != y.rows || x.cols != experts.d_model() || y.cols != experts.d_model())
    fail_argument("{}: x is [{}, {}] and y [{}, {}]; expected both [T, D] with D = {}", function,
                  x.rows, x.cols, y.rows, y.cols, experts.d_model());
}

/// Room that dense_ffn() needs before that of moe_ffn(): ids and weights [T].
std::size_t dense_routing_bytes(std::int64_t T) {
  Carver sizes(nullptr);
  sizes.take<std::int32_t>(T);
  sizes.take<float>(T);
  return sizes.used();
}

}  // namespace

std::size_t moe_ffn_workspace_size(const PackedExperts& experts, std::int64_t num_tokens,
                                   std::int64_t experts_per_token, int threads) {
  const std::int64_t T = num_tokens, k = experts_per_token, parts = std::max(1, threads);
  if (T < 1 || k < 1) return 0;
  // Both ways of cutting, because fewer tokens than these may be cut in the other one.
  const std::int64_t share = pass_tokens(experts, (T + parts - 1) / parts, k);
  return static_cast<std::size_t>(parts) *
         std::max(token_part_bytes(experts, share, k),
                  neuron_part_bytes(experts, pass_tokens(experts, T, k), k));
}

void moe_ffn(const PackedExperts& experts, const RoutingView& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel) {
  check_packed_shapes("moe_ffn", experts, x, y);
  if (routing.num_tokens != x.rows)
    fail_argument("moe_ffn: the routing is of {} tokens, x has {}", routing.num_tokens, x.rows);
  check_routing("moe_ffn", routing, experts.num_experts());
  run({experts, routing.ids, routing.weights, routing.experts_per_token, scale, x, y}, workspace,
      parallel);
}

void moe_ffn(const PackedExperts& experts, const Routing& routing, float scale,
             MatrixView<const float> x, MatrixView<float> y, Workspace& workspace,
             const ParallelFor& parallel) {
  check_routing("moe_ffn", routing, experts.num_experts());
  const RoutingView view{routing.num_tokens, routing.experts_per_token, routing.ids.data(),
                         routing.weights.data()};
  moe_ffn(experts, view, scale, x, y, workspace, parallel);
}

std::size_t dense_ffn_workspace_size(const PackedExperts& ffn, std::int64_t num_tokens,
                                     int threads) {
  if (num_tokens < 1) return 0;
  return dense_routing_bytes(num_tokens) + moe_ffn_workspace_size(ffn, num_tokens, 1, threads);
}

void dense_ffn(const PackedExperts& ffn, MatrixView<const float> x, MatrixView<float> y,
               Workspace& workspace, const ParallelFor& parallel) {
  if (ffn.num_experts() != 1)
    fail_argument("dense_ffn: {} experts; a dense FFN is one", ffn.num_experts());
  check_packed_shapes("dense_ffn", ffn, x, y);
  const std::int64_t T = x.rows;
  if (T == 0) return;
  const std::size_t bytes = dense_ffn_workspace_size(ffn, T, parallel.threads);
  std::byte* memory = workspace.get(bytes);
  Carver room(memory);
  auto* ids = room.take<std::int32_t>(T);
  auto* ones = room.take<float>(T);
  constexpr std::int64_t kTokensPerRange = 256;
  parallel(T, kTokensPerRange, [&](std::int64_t begin, std::int64_t end) {
    std::fill(ids + begin, ids + end, 0);
    std::fill(ones + begin, ones + end, 1.0f);
  });
  Workspace rest(std::span<std::byte>(memory + room.used(), bytes - room.used()));
  run({ffn, ids, ones, 1, 1.0f, x, y}, rest, parallel);
  if (ffn.down_bias().empty()) return;
  parallel(T, kTokensPerRange, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      isa_kernels().add(ffn.down_bias().data(), y.row(t), y.cols);
  });
}

}  // namespace cleave
