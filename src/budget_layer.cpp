#include "budget_layer.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "cleave/calibrate.h"
#include "cleave/refit.h"
#include "down_square.h"
#include "fail.h"
#include "kernels/dispatch.h"

namespace cleave {
namespace {

constexpr std::int64_t kRowBlock = 512;  // tokens whose gate and up values are there at a time

double mean_square(const float* x, std::int64_t n) {
  double sum = 0.0;
  for (std::int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum / static_cast<double>(n);
}

/// The FFN with these neurons; zeros for padding.
DenseFfn with_neurons(const DenseFfn& ffn, const std::vector<std::int32_t>& neuron) {
  const std::int64_t H = ffn.hidden, D = ffn.d_model;
  DenseFfn result;
  result.hidden = static_cast<std::int64_t>(neuron.size());
  result.d_model = D;
  result.activation = ffn.activation;
  result.down_bias = ffn.down_bias;
  const auto take = [&](const std::vector<float>& from, std::int64_t cols) {
    std::vector<float> to(from.empty() ? 0 : neuron.size() * static_cast<std::size_t>(cols), 0.0f);
    for (std::size_t r = 0; r < neuron.size() && !from.empty(); ++r)
      if (neuron[r] != ExpertBank::kPadding)
        std::copy_n(from.data() + neuron[r] * cols, cols,
                    to.data() + static_cast<std::int64_t>(r) * cols);
    return to;
  };
  result.gate = take(ffn.gate, D);
  result.up = take(ffn.up, D);
  result.gate_bias = take(ffn.gate_bias, 1);
  result.up_bias = take(ffn.up_bias, 1);
  result.down.assign(static_cast<std::size_t>(D * result.hidden), 0.0f);
  for (std::int64_t d = 0; d < D; ++d)
    for (std::int64_t r = 0; r < result.hidden; ++r)
      if (neuron[r] != ExpertBank::kPadding)
        result.down[d * result.hidden + r] = ffn.down[d * H + neuron[r]];
  return result;
}

}  // namespace

BudgetShares divide_budget(std::int64_t hidden, const BudgetSpec& spec) {
  const std::int64_t H = hidden, I = spec.expert_width;
  if (!(spec.active_share > 0.0 && spec.active_share <= 1.0) ||
      !(spec.shared_share >= 0.0 && spec.shared_share <= 1.0))
    fail_argument(
        "convert: active share {} with {} of it shared; expected an active share above 0 and up to "
        "1, and a shared part from 0 to 1",
        spec.active_share, spec.shared_share);
  if (I < 1 || H % I != 0)
    fail_argument("convert: experts of {} neurons do not divide H = {}; give a divisor", I, H);
  const auto all = static_cast<double>(H / I);
  const auto units = [&](double share) {
    return static_cast<std::int64_t>(std::llround(share * all));
  };
  if (spec.active_share * all < 1.0 - 1e-9)
    fail_argument(
        "convert: an active share of {} is {:.3g} of H = {} neurons, less than one expert of {}; "
        "give at least {:.6g}, or narrower experts",
        spec.active_share, spec.active_share * static_cast<double>(H), H, I, 1.0 / all);
  BudgetShares shares;
  const std::int64_t budget = units(spec.active_share);
  const std::int64_t shared = units(spec.active_share * spec.shared_share);
  shares.shared = shared * I;
  shares.experts = H / I - shared;
  shares.active = budget - shared;
  return shares;
}

CaptureSpec capture_spec(const BudgetSpec& spec, const BudgetShares& shares,
                         std::int64_t shared_width, std::int64_t layer) {
  CaptureSpec capture;
  capture.width = spec.expert_width;
  capture.shared = shared_width;
  capture.experts = shares.experts;
  capture.active = shares.active;
  capture.partition = spec.partition;
  capture.rounds = spec.rounds;
  capture.router = spec.router_method;
  capture.router_rank = spec.router_rank;
  capture.training = spec.router;
  if (spec.gate == GateMode::kSoftmax) capture.logit_spread = kSoftmaxGateSpread;
  // Layers must not share a permutation.
  capture.training.seed = capture.seed = spec.seed + static_cast<std::uint64_t>(layer);
  return capture;
}

SplitSource::SplitSource(DenseFfn dense) : ffn(std::move(dense)) {
  const std::int64_t H = ffn.hidden, D = ffn.d_model;
  down_t.resize(static_cast<std::size_t>(H * D));
  for (std::int64_t d = 0; d < D; ++d)
    for (std::int64_t j = 0; j < H; ++j) down_t[j * D + d] = ffn.down[d * H + j];
  down_square = down_squares(down_t, D);
}

void SplitSource::hidden_values(MatrixView<const float> x, MatrixView<float> hidden,
                                const ParallelFor& parallel) const {
  for (std::int64_t first = 0; first < x.rows; first += kRowBlock) {
    const std::int64_t T = std::min(kRowBlock, x.rows - first);
    hidden_activations(ffn.view(), x.slice_rows(first, T), hidden.slice_rows(first, T), {},
                       parallel);
  }
}

ResizedLayer resize_layer(SplitSource source, const LayerTokens& tokens, MatrixView<float> hidden,
                          std::int64_t size, const ParallelFor& parallel) {
  const std::int64_t H = source.ffn.hidden;
  std::vector<std::int32_t> neuron;
  double energy = 1.0;
  if (size < H) {
    const Capture kept = keep_highest(tokens, size, StaticScore::kEnergy, parallel);
    energy = kept.energy;
    for (std::int64_t j = 0; j < H; ++j)
      if (kept.partition.expert_of_neuron[j] != NeuronPartition::kDropped)
        neuron.push_back(static_cast<std::int32_t>(j));
  } else {
    neuron.assign(static_cast<std::size_t>(size), ExpertBank::kPadding);
    std::iota(neuron.begin(), neuron.begin() + H, 0);
  }
  if (size == H) return {std::move(source), std::move(neuron), energy};
  parallel(hidden.rows, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* row = hidden.row(t);  // ascending, so that nothing is read after it was overwritten
      for (std::int64_t j = 0; j < size; ++j) row[j] = neuron[j] < 0 ? 0.0f : row[neuron[j]];
    }
  });
  return {SplitSource(with_neurons(source.ffn, neuron)), std::move(neuron), energy};
}

void down_product(MatrixView<const float> h, const std::vector<float>& down_t,
                  std::span<const float> bias, MatrixView<float> y, const ParallelFor& parallel) {
  const MatrixView<const float> weight(down_t.data(), h.cols, y.cols);
  parallel(h.rows, 64, [&](std::int64_t begin, std::int64_t end) {
    isa_kernels().product_nn(plain(h.slice_rows(begin, end - begin)), plain(weight),
                             plain(y.slice_rows(begin, end - begin)), Store::kOverwrite);
    if (bias.empty()) return;
    for (std::int64_t t = begin; t < end; ++t) isa_kernels().add(bias.data(), y.row(t), y.cols);
  });
}

BudgetRows::BudgetRows(const FfnView& ffn, const NeuronPartition& partition) {
  if (partition.num_experts > 0) experts = factorize(ffn, partition);
  shared = shared_slice(ffn, partition);
  neuron = experts.neuron_order;
  neuron.insert(neuron.end(), shared.neuron_order.begin(), shared.neuron_order.end());
}

std::vector<float> BudgetRows::down_square() const {
  const std::vector<float> of_row =
      down_squares(down_t(), experts.num_experts() > 0 ? experts.d_model : shared.d_model);
  std::vector<float> square(neuron.size());
  for (std::size_t r = 0; r < neuron.size(); ++r)
    square[static_cast<std::size_t>(neuron[r])] = of_row[r];
  return square;
}

std::vector<float> BudgetRows::down_t() const {
  std::vector<float> down = experts.down_t;
  down.insert(down.end(), shared.down_t.begin(), shared.down_t.end());
  return down;
}

void BudgetRows::set_down_t(const std::vector<float>& down) {
  const auto middle = down.begin() + static_cast<std::ptrdiff_t>(experts.down_t.size());
  experts.down_t.assign(down.begin(), middle);
  shared.down_t.assign(middle, down.end());
}

void BudgetRows::name_neurons(const std::vector<std::int32_t>& dense, std::int64_t dense_hidden) {
  for (ExpertBank* bank : {&experts, &shared}) {
    bank->dense_hidden = dense_hidden;
    for (std::int32_t& j : bank->neuron_order) j = dense[static_cast<std::size_t>(j)];
  }
}

void mask_features(const BudgetRows& rows, const Routing& routing, float scale,
                   MatrixView<const float> hidden, MatrixView<float> features,
                   const ParallelFor& parallel) {
  const std::int64_t K = routing.experts_per_token;
  parallel(hidden.rows, 16, [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> row(static_cast<std::size_t>(rows.size()));
    const auto take = [&](const float* h, std::int64_t first, std::int64_t last, float weight) {
      for (std::int64_t r = first; r < last; ++r) row[r] = weight * h[rows.neuron[r]];
    };
    for (std::int64_t t = begin; t < end; ++t) {
      std::fill(row.begin(), row.begin() + rows.routed(), 0.0f);
      for (std::int64_t k = 0; k < K; ++k) {
        const std::int32_t e = routing.ids[t * K + k];
        take(hidden.row(t), rows.experts.begin[e], rows.experts.begin[e + 1],
             scale * routing.weights[t * K + k]);
      }
      take(hidden.row(t), rows.routed(), rows.size(), 1.0f);
      std::copy(row.begin(), row.end(), features.row(t));
    }
  });
}

std::vector<float> mean_difference(MatrixView<const float> target, MatrixView<const float> y,
                                   std::span<const float> weight) {
  std::vector<double> sum(static_cast<std::size_t>(y.cols));
  double total = 0.0;
  for (std::int64_t t = 0; t < y.rows; ++t) {
    total += weight[t];
    for (std::int64_t d = 0; d < y.cols; ++d)
      sum[d] += weight[t] * (static_cast<double>(target(t, d)) - y(t, d));
  }
  std::vector<float> mean;
  for (const double s : sum) mean.push_back(static_cast<float>(total > 0.0 ? s / total : 0.0));
  return mean;
}

std::vector<float> summed(std::vector<float> a, std::span<const float> b) {
  for (std::size_t i = 0; i < b.size(); ++i) a[i] += b[i];
  return a;
}

double relative_error(MatrixView<const float> y, MatrixView<const float> target,
                      std::span<const float> weight) {
  double error = 0.0, size = 0.0;
  for (std::int64_t t = 0; t < y.rows; ++t)
    for (std::int64_t d = 0; d < y.cols; ++d) {
      const double aim = target(t, d), e = y(t, d) - aim;
      error += weight[t] * e * e;
      size += weight[t] * aim * aim;
    }
  return size > 0.0 ? error / size : 0.0;
}

std::vector<float> repaired_down(const std::vector<float>& dense_down,
                                 MatrixView<const float> features, MatrixView<const float> target,
                                 std::span<const float> weight, const RefitSpec& spec,
                                 const ParallelFor& parallel) {
  RidgeRefit fit(features.cols, target.cols);
  fit.observe(features, target, weight, parallel);
  return fit.solve({dense_down.data(), features.cols, target.cols}, spec, parallel);
}

MoeLayer make_budget_layer(BudgetRows rows, const LinearRouter& router, std::int64_t active,
                           GateMode gate) {
  MoeLayer layer;
  layer.experts = std::move(rows.experts);
  if (rows.shared.rows() > 0) layer.shared = std::move(rows.shared);
  layer.router = router;
  layer.experts_per_token = active;
  layer.gate = gate;
  layer.scale = gate_scale(gate, active);
  return layer;
}

std::vector<float> token_weights(MatrixView<const float> stream, MatrixView<const float> y,
                                 std::int64_t context, double first_token_weight,
                                 std::int64_t layer) {
  std::vector<float> weight(static_cast<std::size_t>(y.rows));
  std::vector<float> sum(static_cast<std::size_t>(y.cols));
  double total = 0.0;
  for (std::int64_t t = 0; t < y.rows; ++t) {
    const float* x = stream.row(t);
    for (std::int64_t d = 0; d < y.cols; ++d) sum[d] = x[d] + y(t, d);
    const double size = mean_square(sum.data(), y.cols);
    if (!std::isfinite(size))
      fail_file(
          "convert: layer {}: the output of the FFN or its input is not finite at token {} of "
          "calibration window {}; is the model broken, or in a type too small for it?",
          layer, t % context, t / context);
    const bool first = t % context == 0;
    weight[t] = static_cast<float>((first ? first_token_weight : 1.0) / (size + 1e-12));
    total += weight[t];
  }
  const auto factor = static_cast<float>(static_cast<double>(y.rows) / total);
  for (float& w : weight) w *= factor;
  return weight;
}

}  // namespace cleave
