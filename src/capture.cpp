#include "capture.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "assignment.h"
#include "cleave/refit.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "kmeans.h"
#include "support/buffer.h"

namespace cleave {
namespace {

constexpr std::int64_t kProfileTokens = 2048;  // of the k-means that everything starts from
constexpr std::int32_t kProfileRounds = 8;
constexpr std::int64_t kCaptureBlock = 512;

/// rows[t] = energies of all neurons for tokens [first, first + rows.rows).
void neuron_energies(const LayerTokens& tokens, std::int64_t first, MatrixView<float> rows) {
  for (std::int64_t t = 0; t < rows.rows; ++t) {
    const float* h = tokens.hidden.row(first + t);
    const float weight = tokens.weight[first + t];
    float* out = rows.row(t);
    for (std::int64_t j = 0; j < rows.cols; ++j)
      out[j] = weight * h[j] * h[j] * tokens.down_square[j];
  }
}

std::vector<double> total_energy(const LayerTokens& tokens, const ParallelFor& parallel) {
  const std::int64_t H = tokens.hidden.cols;
  std::vector<double> total(static_cast<std::size_t>(H), 0.0);
  parallel(H, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = 0; t < tokens.hidden.rows; ++t) {
      const float* h = tokens.hidden.row(t);
      const float weight = tokens.weight[t];
      for (std::int64_t j = begin; j < end; ++j) total[j] += weight * h[j] * h[j];
    }
    for (std::int64_t j = begin; j < end; ++j) total[j] *= tokens.down_square[j];
  });
  return total;
}

/// The part of the energies that is not that of the means.
std::vector<double> total_fluctuation(const LayerTokens& tokens, std::vector<double> energy,
                                      const ParallelFor& parallel) {
  const double weights = std::accumulate(tokens.weight.begin(), tokens.weight.end(), 0.0);
  parallel(tokens.hidden.cols, 64, [&](std::int64_t begin, std::int64_t end) {
    std::vector<double> sum(static_cast<std::size_t>(end - begin), 0.0);
    for (std::int64_t t = 0; t < tokens.hidden.rows; ++t) {
      const float* h = tokens.hidden.row(t);
      const float weight = tokens.weight[t];
      for (std::int64_t j = begin; j < end; ++j) sum[j - begin] += weight * h[j];
    }
    for (std::int64_t j = begin; j < end; ++j)
      energy[j] -= sum[j - begin] * sum[j - begin] / weights * tokens.down_square[j];
  });
  return energy;
}

/// All neurons, the largest first.
std::vector<std::int32_t> by_falling(const std::vector<double>& total) {
  std::vector<std::int32_t> order(total.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return total[a] > total[b]; });
  return order;
}

/// The neurons of most energy shared, the others clustered by when they are active.
NeuronPartition first_partition(const LayerTokens& tokens, const CaptureSpec& spec,
                                const std::vector<double>& total) {
  const std::int64_t H = tokens.hidden.cols, T = tokens.hidden.rows;
  const std::vector<std::int32_t> order = by_falling(total);
  NeuronPartition partition;
  partition.num_experts = static_cast<std::int32_t>(spec.experts);
  partition.expert_of_neuron.assign(static_cast<std::size_t>(H), NeuronPartition::kShared);
  std::vector<std::int32_t> rest(order.begin() + spec.shared, order.end());
  std::sort(rest.begin(), rest.end());

  const std::int64_t samples = std::min(kProfileTokens, T);
  Buffer profile(static_cast<std::int64_t>(rest.size()) * samples);
  for (std::int64_t s = 0; s < samples; ++s) {
    const std::int64_t t = s * T / samples;
    const float root = std::sqrt(tokens.weight[t]);
    for (std::size_t i = 0; i < rest.size(); ++i)
      profile.data()[static_cast<std::int64_t>(i) * samples + s] =
          std::abs(tokens.hidden(t, rest[i])) * root;
  }
  const auto clusters =
      balanced_kmeans({profile.data(), static_cast<std::int64_t>(rest.size()), samples},
                      {static_cast<std::int32_t>(spec.experts), kProfileRounds, spec.seed});
  for (std::size_t i = 0; i < rest.size(); ++i)
    partition.expert_of_neuron[rest[i]] = clusters.cluster_of_row[i];
  return partition;
}

/// Ridge regression of the experts' shares of a token's routed amplitude on x.
LinearRouter fit_amplitudes(const LayerTokens& tokens, MatrixView<const float> energy,
                            double penalty, const ParallelFor& parallel) {
  const std::int64_t E = energy.cols, D = tokens.input.cols;
  RidgeRefit fit(D, E);
  std::vector<float> target(static_cast<std::size_t>(kCaptureBlock * E));
  for (std::int64_t first = 0; first < energy.rows; first += kCaptureBlock) {
    const std::int64_t T = std::min(kCaptureBlock, energy.rows - first);
    for (std::int64_t t = 0; t < T; ++t) {
      const float* row = energy.row(first + t);
      float* out = target.data() + t * E;
      double sum = 0.0;
      for (std::int64_t e = 0; e < E; ++e) sum += out[e] = std::sqrt(row[e]);
      const float factor = sum > 0.0 ? static_cast<float>(static_cast<double>(E) / sum) : 0.0f;
      for (std::int64_t e = 0; e < E; ++e) out[e] *= factor;
    }
    fit.observe(tokens.input.slice_rows(first, T), {target.data(), T, E}, {}, parallel);
  }
  const std::vector<float> solved = fit.solve({}, {.penalty = penalty}, parallel);  // [D, E]
  LinearRouter router{E, D, std::vector<float>(static_cast<std::size_t>(E * D))};
  for (std::int64_t d = 0; d < D; ++d)
    for (std::int64_t e = 0; e < E; ++e) router.weight[e * D + d] = solved[d * E + e];
  return router;
}

/// benefit[j, e]: energy of neuron j over the tokens whose experts include e; benefit[j, E]: over
/// all tokens, which is what the shared slice has of it.
void assignment_benefit(const LayerTokens& tokens, const std::vector<std::int32_t>& ids,
                        std::int64_t active, MatrixView<float> benefit,
                        const ParallelFor& parallel) {
  const std::int64_t H = tokens.hidden.cols, columns = benefit.cols, all = columns - 1;
  std::fill_n(benefit.data, H * columns, 0.0f);
  Buffer energy(kCaptureBlock * H), chosen(kCaptureBlock * columns);
  for (std::int64_t first = 0; first < tokens.hidden.rows; first += kCaptureBlock) {
    const std::int64_t T = std::min(kCaptureBlock, tokens.hidden.rows - first);
    std::fill_n(chosen.data(), T * columns, 0.0f);
    for (std::int64_t t = 0; t < T; ++t) {
      for (std::int64_t k = 0; k < active; ++k)
        chosen.data()[t * columns + ids[(first + t) * active + k]] = 1.0f;
      chosen.data()[t * columns + all] = 1.0f;
    }
    parallel(T, 16, [&](std::int64_t begin, std::int64_t end) {
      neuron_energies(tokens, first + begin, {energy.data() + begin * H, end - begin, H});
    });
    parallel(H, 64, [&](std::int64_t begin, std::int64_t end) {
      gram_kernels().product_tn({energy.data() + begin, T, end - begin, H},
                                {chosen.data(), T, columns, columns},
                                {benefit.row(begin), end - begin, columns, columns});
    });
  }
}

NeuronPartition reassign(const LayerTokens& tokens, const CaptureSpec& spec,
                         const LinearRouter& router, const ParallelFor& parallel) {
  const std::int64_t H = tokens.hidden.cols, columns = spec.experts + 1;
  const auto ids = choose_experts(tokens.input, router, spec.active, parallel);
  Buffer benefit(H * columns);
  const MatrixView<float> view(benefit.data(), H, columns);
  assignment_benefit(tokens, ids, spec.active, view, parallel);
  std::vector<std::int64_t> capacity(static_cast<std::size_t>(columns), spec.width);
  capacity.back() = spec.shared;
  NeuronPartition partition{static_cast<std::int32_t>(spec.experts),
                            assign_balanced(view, capacity)};
  for (std::int32_t& e : partition.expert_of_neuron)
    if (e == spec.experts) e = NeuronPartition::kShared;
  return partition;
}

void score(const std::vector<std::int32_t>& ids, MatrixView<const float> energy,
           const std::vector<double>& total, const CaptureSpec& spec, Capture& capture) {
  double shared = 0.0, all = 0.0, chosen = 0.0, best = 0.0, hits = 0.0;
  for (std::size_t j = 0; j < total.size(); ++j) {
    all += total[j];
    if (capture.partition.expert_of_neuron[j] == NeuronPartition::kShared) shared += total[j];
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(energy.cols));
  for (std::int64_t t = 0; t < energy.rows; ++t) {
    const float* row = energy.row(t);
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + (spec.active - 1), order.end(),
                     [&](std::int32_t a, std::int32_t b) { return row[a] > row[b]; });
    for (std::int64_t k = 0; k < spec.active; ++k) {
      const std::int32_t id = ids[t * spec.active + k];
      chosen += row[id];
      best += row[order[k]];
      hits +=
          std::find(order.begin(), order.begin() + spec.active, id) != order.begin() + spec.active
              ? 1.0
              : 0.0;
    }
  }
  if (all > 0.0) {
    capture.energy = (shared + chosen) / all;
    capture.oracle_energy = (shared + best) / all;
  }
  capture.recall = hits / static_cast<double>(energy.rows * spec.active);
}

/// The final router of a split and what it catches. @param energy  [T, E], written
void fit_router(const LayerTokens& tokens, const CaptureSpec& spec,
                const std::vector<double>& total, MatrixView<float> energy, Capture& capture,
                const ParallelFor& parallel) {
  expert_energies(tokens, capture.partition, energy, parallel);
  capture.router =
      final_router(tokens, spec, capture.partition, energy,
                   fit_amplitudes(tokens, energy, spec.router_penalty, parallel), parallel);
  score(choose_experts(tokens.input, capture.router, spec.active, parallel), energy, total, spec,
        capture);
}

void check_capture(const LayerTokens& tokens, const CaptureSpec& spec) {
  const std::int64_t T = tokens.hidden.rows, H = tokens.hidden.cols;
  if (tokens.input.rows != T || static_cast<std::int64_t>(tokens.weight.size()) != T ||
      static_cast<std::int64_t>(tokens.down_square.size()) != H || T < 1)
    fail_argument(
        "capture_energy: {} inputs, {} hidden rows, {} weights, {} neurons of {}; must agree",
        tokens.input.rows, T, tokens.weight.size(), tokens.down_square.size(), H);
  if (spec.shared + spec.experts * spec.width != H || spec.experts < 1 || spec.active < 1 ||
      spec.active > spec.experts || spec.shared < 0)
    fail_argument(
        "capture_energy: {} shared neurons and {} experts of {} (K = {}) do not make up H = {}",
        spec.shared, spec.experts, spec.width, spec.active, H);
}

}  // namespace

void expert_energies(const LayerTokens& tokens, const NeuronPartition& partition,
                     MatrixView<float> energy, const ParallelFor& parallel) {
  const std::int64_t H = tokens.hidden.cols;
  parallel(tokens.hidden.rows, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const float* h = tokens.hidden.row(t);
      float* out = energy.row(t);
      std::fill_n(out, energy.cols, 0.0f);
      for (std::int64_t j = 0; j < H; ++j) {
        const std::int32_t e = partition.expert_of_neuron[j];
        if (e >= 0) out[e] += h[j] * h[j] * tokens.down_square[j];
      }
      for (std::int64_t e = 0; e < energy.cols; ++e) out[e] *= tokens.weight[t];
    }
  });
}

Routing route_tokens(MatrixView<const float> x, const LinearRouter& router,
                     std::int64_t experts_per_token, GateMode gate, const ParallelFor& parallel) {
  const std::int64_t E = router.num_experts, K = experts_per_token;
  Routing routing{x.rows, K, std::vector<std::int32_t>(static_cast<std::size_t>(x.rows * K)),
                  std::vector<float>(static_cast<std::size_t>(x.rows * K))};
  Buffer logits(kCaptureBlock * E);
  for (std::int64_t first = 0; first < x.rows; first += kCaptureBlock) {
    const std::int64_t T = std::min(kCaptureBlock, x.rows - first);
    linear(x.slice_rows(first, T), router.view(), {}, {logits.data(), T, E}, parallel);
    route({logits.data(), T, E}, {.experts_per_token = K, .mode = gate},
          routing.ids.data() + first * K, routing.weights.data() + first * K);
  }
  return routing;
}

std::vector<std::int32_t> choose_experts(MatrixView<const float> x, const LinearRouter& router,
                                         std::int64_t experts_per_token,
                                         const ParallelFor& parallel) {
  return route_tokens(x, router, experts_per_token, GateMode::kHard, parallel).ids;
}

Capture keep_highest(const LayerTokens& tokens, std::int64_t kept, StaticScore score,
                     const ParallelFor& parallel) {
  const std::vector<double> total = total_energy(tokens, parallel);
  const std::vector<std::int32_t> order = by_falling(
      score == StaticScore::kEnergy ? total : total_fluctuation(tokens, total, parallel));
  Capture capture;
  capture.partition.expert_of_neuron.assign(total.size(), NeuronPartition::kDropped);
  double left = 0.0, all = 0.0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    all += total[order[i]];
    if (static_cast<std::int64_t>(i) >= kept) continue;
    left += total[order[i]];
    capture.partition.expert_of_neuron[order[i]] = NeuronPartition::kShared;
  }
  capture.energy = capture.oracle_energy = all > 0.0 ? left / all : 0.0;
  return capture;
}

Capture capture_energy(const LayerTokens& tokens, const CaptureSpec& spec,
                       const ParallelFor& parallel) {
  check_capture(tokens, spec);
  const std::int64_t T = tokens.hidden.rows;
  const std::vector<double> total = total_energy(tokens, parallel);
  Capture capture;
  const bool captured = spec.partition == BudgetPartition::kCaptured;
  if (captured) {
    capture.partition = first_partition(tokens, spec, total);
  } else {
    auto shared = by_falling(total);
    shared.resize(static_cast<std::size_t>(spec.shared));
    capture.partition = fixed_partition(tokens, spec, shared, parallel);
  }
  Buffer buffer(T * spec.experts);
  const MatrixView<float> energy(buffer.data(), T, spec.experts);
  for (std::int64_t round = 0; captured && round < spec.rounds; ++round) {
    expert_energies(tokens, capture.partition, energy, parallel);
    const LinearRouter router = fit_amplitudes(tokens, energy, spec.router_penalty, parallel);
    capture.partition = reassign(tokens, spec, router, parallel);
  }
  fit_router(tokens, spec, total, energy, capture, parallel);
  return capture;
}

void retrain_router(const LayerTokens& tokens, const CaptureSpec& spec, Capture& capture,
                    const ParallelFor& parallel) {
  check_capture(tokens, spec);
  Buffer energy(tokens.hidden.rows * spec.experts);
  fit_router(tokens, spec, total_energy(tokens, parallel),
             {energy.data(), tokens.hidden.rows, spec.experts}, capture, parallel);
}

}  // namespace cleave
