// moe_ffn on the CPU: y[t] += scale * sum_k weights[t,k] * expert_{ids[t,k]}(x[t]).
// Definition: moe_ffn_reference.cpp.
//
// One token: nothing is gathered. Threads share the hidden neurons of the K experts, then the
// columns of y.
//
// Many tokens, wide experts: group the tokens by expert; every thread takes an equal share of the
// (token, expert) pairs, gathers the tokens of one expert, runs its products and leaves one result
// row per pair; a second pass adds the K rows of each token.
//
// Many tokens, narrow experts: those result rows would cost more memory traffic than the products.
// Every thread takes a share of the tokens through all experts and adds each product to y at once.
//
// Either way no two threads write one row of y, and the order of a row's sum does not depend on how
// many threads there are.

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "cleave/error.h"
#include "cleave/kernels.h"
#include "kernels/check_routing.h"
#include "kernels/dispatch.h"
#include "kernels/product.h"
#include "support/buffer.h"

namespace cleave {
namespace {

// Up to so many tokens, each is run on its own: there is nothing to share between them that the
// caches do not already share.
constexpr std::int64_t kSingly = 4;
// Rows of one gathered product: enough to pay for repacking the weights, few enough for the hidden
// rows to stay in a second-level cache.
constexpr std::int64_t kMaxRows = 256;
// The result rows of all pairs are kept below so many floats (64 MB) by taking fewer tokens at
// once.
constexpr std::int64_t kMaxPairElements = 16 * 1024 * 1024;
// Experts narrower than this, in neurons, are run by tokens, where there are enough of those to
// give every thread a real product. Measured on 576 x 1536 in 8 to 96 experts, half of them active.
constexpr std::int64_t kNarrow = 96;
constexpr std::int64_t kTokensPerThread = 64;

std::int64_t grain_for(std::int64_t macs_per_item) { return 1 + kGrainMacs / (macs_per_item + 1); }

void check_shapes(const ExpertBank& bank, const Routing& routing, MatrixView<const float> x,
                  MatrixView<float> y) {
  check_routing("moe_ffn", routing, bank.num_experts());
  if (x.rows != routing.num_tokens || y.rows != x.rows || x.cols != bank.d_model ||
      y.cols != bank.d_model)
    throw InvalidArgument(fmt::format(
        "moe_ffn: x [{}, {}] and y [{}, {}] do not fit a routing of {} tokens and experts of width "
        "D = {}; expected x and y [T, D]",
        x.rows, x.cols, y.rows, y.cols, routing.num_tokens, bank.d_model));
}

// hidden[r] = act(gate x[r]) .* up x[r] for neurons [begin, begin + count) of an expert.
// `gate_out` is room for as many floats as `hidden`.
void hidden_rows(const ExpertView& e, std::int64_t begin, std::int64_t count,
                 MatrixView<const float> x, float* gate_out, MatrixView<float> hidden) {
  const IsaKernels& isa = isa_kernels();
  const bool gated = !e.gate.empty();
  const MatrixView<float> gate(gate_out, x.rows, count);
  isa.product_nt(plain(x), plain(e.up.slice_rows(begin, count)), plain(hidden), Store::kOverwrite);
  if (gated)
    isa.product_nt(plain(x), plain(e.gate.slice_rows(begin, count)), plain(gate),
                   Store::kOverwrite);
  for (std::int64_t r = 0; r < x.rows; ++r) {
    if (!e.up_bias.empty()) isa.add(e.up_bias.data() + begin, hidden.row(r), count);
    if (gated && !e.gate_bias.empty()) isa.add(e.gate_bias.data() + begin, gate.row(r), count);
    isa.activate(e.activation, gated ? gate.row(r) : nullptr, hidden.row(r), hidden.row(r), count);
  }
}

void one_token(const ExpertBank& bank, std::span<const std::int32_t> ids,
               std::span<const float> weights, float scale, const float* x, float* y,
               const ParallelFor& parallel) {
  const IsaKernels& isa = isa_kernels();
  const std::int64_t D = bank.d_model;
  std::vector<std::int64_t> first{0};  // of the k-th expert's neurons, among those of all K
  for (const std::int32_t id : ids)
    first.push_back(first.back() + (id == Routing::kUnused ? 0 : bank.width(id)));
  const std::int64_t neurons = first.back();
  Buffer hidden(neurons), gate(neurons);

  parallel(neurons, grain_for(2 * D), [&](std::int64_t begin, std::int64_t end) {
    for (std::size_t k = 0; k < ids.size(); ++k) {
      const std::int64_t from = std::max(begin, first[k]), to = std::min(end, first[k + 1]);
      if (from >= to) continue;
      const ExpertView e = bank.expert(ids[k]);
      hidden_rows(e, from - first[k], to - from, {x, 1, D}, gate.data() + from,
                  {hidden.data() + from, 1, to - from});
      isa.scale(scale * e.scale * weights[k], hidden.data() + from, to - from);
    }
  });
  parallel(D, std::max<std::int64_t>(16, grain_for(neurons)),
           [&](std::int64_t begin, std::int64_t end) {
             for (std::size_t k = 0; k < ids.size(); ++k) {
               if (ids[k] == Routing::kUnused) continue;
               const ExpertView e = bank.expert(ids[k]);
               isa.product_nn({hidden.data() + first[k], 1, e.down_t.rows, e.down_t.rows},
                              {e.down_t.data + begin, e.down_t.rows, end - begin, D},
                              {y + begin, 1, end - begin, D}, Store::kAdd);
             }
           });
}

// Room for one thread's gathered product.
struct Scratch {
  Scratch(std::int64_t d_model, std::int64_t width)
      : x(kMaxRows * d_model), gate(kMaxRows * width), hidden(kMaxRows * width) {}
  Buffer x, gate, hidden;
};

// results[i] = weight * expert(x[token of pairs[i]]) for all pairs, which belong to one expert.
void gathered_expert(const ExpertView& e, std::span<const std::int64_t> pairs,
                     const Routing& routing, float scale, MatrixView<const float> x,
                     Scratch& scratch, float* results) {
  const IsaKernels& isa = isa_kernels();
  const auto rows = static_cast<std::int64_t>(pairs.size());
  const std::int64_t D = x.cols;
  for (std::int64_t r = 0; r < rows; ++r)
    std::copy_n(x.row(pairs[r] / routing.experts_per_token), D, scratch.x.data() + r * D);
  const MatrixView<float> hidden(scratch.hidden.data(), rows, e.up.rows);
  hidden_rows(e, 0, e.up.rows, {scratch.x.data(), rows, D}, scratch.gate.data(), hidden);
  for (std::int64_t r = 0; r < rows; ++r)
    isa.scale(scale * e.scale * routing.weights[pairs[r]], hidden.row(r), hidden.cols);
  isa.product_nn(plain(MatrixView<const float>(hidden)), plain(e.down_t), {results, rows, D, D},
                 Store::kOverwrite);
}

std::int64_t widest_expert(const ExpertBank& bank) {
  std::int64_t widest = 0;
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) widest = std::max(widest, bank.width(e));
  return widest;
}

// A share of the (token, expert) pairs per thread.
void grouped(const ExpertBank& bank, const Routing& routing, float scale, MatrixView<const float> x,
             MatrixView<float> y, const ParallelFor& parallel) {
  const std::int64_t D = bank.d_model, K = routing.experts_per_token;
  const TokenGroups groups = group_tokens(routing, bank.num_experts());
  const auto num_pairs = static_cast<std::int64_t>(groups.pair.size());
  const std::int64_t widest = widest_expert(bank);
  std::vector<std::int64_t> position(routing.ids.size(), -1);  // of a pair among the grouped ones
  for (std::int64_t i = 0; i < num_pairs; ++i) position[groups.pair[i]] = i;
  Buffer results(num_pairs * D);

  parallel(num_pairs, grain_for(3 * D * widest), [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(D, widest);
    // The expert that owns `begin`: the last whose first pair is not behind it.
    auto e = std::upper_bound(groups.begin.begin(), groups.begin.end(), begin) - 1 -
             groups.begin.begin();
    for (std::int64_t i = begin; i < end;) {
      while (groups.begin[e + 1] <= i) ++e;
      const std::int64_t stop = std::min({end, groups.begin[e + 1], i + kMaxRows});
      gathered_expert(bank.expert(e), std::span(groups.pair).subspan(i, stop - i), routing, scale,
                      x, scratch, results.data() + i * D);
      i = stop;
    }
  });
  parallel(x.rows, grain_for(K * D), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t pair = begin * K; pair < end * K; ++pair)
      if (position[pair] >= 0)
        isa_kernels().add(results.data() + position[pair] * D, y.row(pair / K), D);
  });
}

// A share of the tokens per thread.
void by_tokens(const ExpertBank& bank, const Routing& routing, float scale,
               MatrixView<const float> x, MatrixView<float> y, const ParallelFor& parallel) {
  const std::int64_t D = bank.d_model, K = routing.experts_per_token;
  const TokenGroups groups = group_tokens(routing, bank.num_experts());
  const std::int64_t widest = widest_expert(bank);
  parallel(x.rows, kTokensPerThread, [&](std::int64_t begin, std::int64_t end) {
    Scratch scratch(D, widest);
    Buffer results(kMaxRows * D);
    for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
      // Pairs ascend within an expert, so those of a range of tokens lie together.
      const auto first = groups.pair.begin() + groups.begin[e];
      const auto last = groups.pair.begin() + groups.begin[e + 1];
      const auto mine = std::lower_bound(first, last, begin * K);
      std::span<const std::int64_t> pairs(mine, std::lower_bound(mine, last, end * K));
      while (!pairs.empty()) {
        const auto some = pairs.first(std::min<std::size_t>(pairs.size(), kMaxRows));
        gathered_expert(bank.expert(e), some, routing, scale, x, scratch, results.data());
        for (std::size_t r = 0; r < some.size(); ++r)
          isa_kernels().add(results.data() + static_cast<std::int64_t>(r) * D, y.row(some[r] / K),
                            D);
        pairs = pairs.subspan(some.size());
      }
    }
  });
}

Routing part_of(const Routing& routing, std::int64_t begin, std::int64_t count) {
  const std::int64_t K = routing.experts_per_token;
  Routing part{count, K, {}, {}};
  part.ids.assign(routing.ids.begin() + begin * K, routing.ids.begin() + (begin + count) * K);
  part.weights.assign(routing.weights.begin() + begin * K,
                      routing.weights.begin() + (begin + count) * K);
  return part;
}

}  // namespace

void moe_ffn(const ExpertBank& bank, const Routing& routing, float scale, MatrixView<const float> x,
             MatrixView<float> y, const ParallelFor& parallel) {
  check_shapes(bank, routing, x, y);
  const std::int64_t T = x.rows, K = routing.experts_per_token;
  if (T <= kSingly) {
    for (std::int64_t t = 0; t < T; ++t)
      one_token(bank, std::span(routing.ids).subspan(t * K, K),
                std::span(routing.weights).subspan(t * K, K), scale, x.row(t), y.row(t), parallel);
    return;
  }
  if (T >= kTokensPerThread && widest_expert(bank) < kNarrow)
    return by_tokens(bank, routing, scale, x, y, parallel);
  const std::int64_t piece =
      std::max<std::int64_t>(64, kMaxPairElements / std::max<std::int64_t>(1, K * bank.d_model));
  if (T <= piece) return grouped(bank, routing, scale, x, y, parallel);
  for (std::int64_t begin = 0; begin < T; begin += piece) {
    const std::int64_t count = std::min(piece, T - begin);
    grouped(bank, part_of(routing, begin, count), scale, x.slice_rows(begin, count),
            y.slice_rows(begin, count), parallel);
  }
}

}  // namespace cleave
