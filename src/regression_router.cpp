#include "regression_router.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <span>

#include "descent.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "support/buffer.h"
#include "support/random.h"

namespace cleave {
namespace {

constexpr std::int64_t kScoreBlock = 512;  // tokens whose hidden units are held at a time
constexpr double kNothing = 1e-30;         // below it a scale has no inverse as a float
constexpr std::int64_t kBatchGrain = 64;   // tokens worth a thread

MatrixView<const float> hidden_weight(const RegressionRouter& router) {
  return {router.hidden_weight.data(), router.width, router.d_model};
}
MatrixView<const float> output_weight(const RegressionRouter& router) {
  return {router.weight.data(), router.num_experts, router.width};
}

/// hidden = relu(W1 x + b1), out = W2 hidden + b2.
void run_layers(const RegressionRouter& router, MatrixView<const float> x, MatrixView<float> hidden,
                MatrixView<float> out, const ParallelFor& parallel) {
  linear(x, hidden_weight(router), router.hidden_bias, hidden, parallel);
  for (std::int64_t i = 0; i < hidden.rows * hidden.cols; ++i)
    hidden.data[i] = std::max(hidden.data[i], 0.0f);
  linear(hidden, output_weight(router), router.bias, out, parallel);
}

/// Of a bias: the sum of every column.
void sum_columns(MatrixView<const float> m, std::span<float> sums) {
  std::fill(sums.begin(), sums.end(), 0.0f);
  for (std::int64_t r = 0; r < m.rows; ++r)
    for (std::int64_t c = 0; c < m.cols; ++c) sums[c] += m(r, c);
}

void check_regression(MatrixView<const float> x, MatrixView<const float> target,
                      const RegressionSpec& spec) {
  if (x.rows != target.rows || x.rows < 1 || x.cols < 1 || target.cols < 1)
    fail_argument(
        "fit_regression_router: x is [{}, {}], target [{}, {}]; expected [T, D] and [T, E] with at "
        "least one token and one expert",
        x.rows, x.cols, target.rows, target.cols);
  if (spec.width < 1 || spec.steps < 0 || spec.batch < 1 || !(spec.rate > 0.0) ||
      !std::isfinite(spec.rate))
    fail_argument(
        "fit_regression_router: width {}, {} steps of {} tokens, rate {}; expected >= 1, >= 0, "
        ">= 1, > 0",
        spec.width, spec.steps, spec.batch, spec.rate);
  for (std::int64_t t = 0; t < x.rows; ++t) {
    for (std::int64_t d = 0; d < x.cols; ++d)
      if (!std::isfinite(x(t, d)))
        fail_argument("fit_regression_router: input {} of token {} is {}; must be finite", d, t,
                      x(t, d));
    for (std::int64_t e = 0; e < target.cols; ++e)
      if (!std::isfinite(target(t, e)) || target(t, e) < 0.0f)
        fail_argument(
            "fit_regression_router: the target of expert {} for token {} is {}; must be finite and "
            "not negative, as the norm of an output is",
            e, t, target(t, e));
  }
}

/// One number for the inputs and one for the targets, by which they are divided.
struct RegressionScale {
  double input = 1.0, target = 1.0;
};

RegressionScale scale_of(MatrixView<const float> x, MatrixView<const float> target) {
  double square = 0.0, sum = 0.0;
  for (std::int64_t t = 0; t < x.rows; ++t) {
    for (std::int64_t d = 0; d < x.cols; ++d) square += static_cast<double>(x(t, d)) * x(t, d);
    for (std::int64_t e = 0; e < target.cols; ++e) sum += target(t, e);
  }
  const double rms = std::sqrt(square / static_cast<double>(x.rows * x.cols));
  const double mean = sum / static_cast<double>(target.rows * target.cols);
  return {rms > kNothing ? rms : 1.0, mean > kNothing ? mean : 1.0};
}

class RegressionTraining {
 public:
  RegressionTraining(MatrixView<const float> x, MatrixView<const float> target,
                     const RegressionSpec& spec, const ParallelFor& parallel)
      : x_(x),
        target_(target),
        spec_(spec),
        parallel_(parallel),
        scale_(scale_of(x, target)),
        rng_(spec.seed),
        size_(std::min(spec.batch, x.rows)),
        batch_(size_, x.cols),
        scaled_x_(size_ * x.cols),
        scaled_target_(size_ * target.cols),
        loss_(size_, spec.width, target.cols) {
    start();
  }

  RegressionRouter run() {
    const MatrixView<float> x(scaled_x_.data(), size_, x_.cols),
        target(scaled_target_.data(), size_, target_.cols);
    RegressionRouter gradient = router_;
    Adam first(router_.hidden_weight.size()), first_bias(router_.hidden_bias.size());
    Adam second(router_.weight.size()), second_bias(router_.bias.size());
    for (std::int64_t step = 0; step < spec_.steps; ++step) {
      load_batch(x, target);
      loss_.differentiate(router_, x, target, gradient, parallel_);
      const double rate = falling_rate(spec_.rate, step, spec_.steps);
      first.step(gradient.hidden_weight, rate, router_.hidden_weight);
      first_bias.step(gradient.hidden_bias, rate, router_.hidden_bias);
      second.step(gradient.weight, rate, router_.weight);
      second_bias.step(gradient.bias, rate, router_.bias);
    }
    fold_scale();
    return std::move(router_);
  }

 private:
  /// W1, b1, W2 as torch.nn.Linear starts them; b2 at the mean of each expert.
  void start() {
    const std::int64_t D = x_.cols, E = target_.cols, R = spec_.width;
    const auto draw = [&](std::int64_t size, std::int64_t fan_in) {
      std::vector<float> values(static_cast<std::size_t>(size));
      const double bound = 1.0 / std::sqrt(static_cast<double>(fan_in));
      for (float& v : values) v = static_cast<float>(bound * (2.0 * unit_draw(rng_) - 1.0));
      return values;
    };
    router_ = {E, D, R, draw(R * D, D), draw(R, D), draw(E * R, R), {}};
    for (std::int64_t e = 0; e < E; ++e) {
      double sum = 0.0;
      bool constant = true;
      for (std::int64_t t = 0; t < target_.rows; ++t) {
        sum += target_(t, e);
        constant = constant && target_(t, e) == target_(0, e);
      }
      const double mean = sum / static_cast<double>(target_.rows);
      // The very number that the batch will hold: the error and so every derivative are then 0.
      router_.bias.push_back(constant ? scaled(target_(0, e))
                                      : static_cast<float>(mean / scale_.target));
      if (constant) std::fill_n(router_.weight.begin() + e * R, R, 0.0f);
    }
  }

  float scaled(float target) const { return target * static_cast<float>(1.0 / scale_.target); }

  void load_batch(MatrixView<float> x, MatrixView<float> target) {
    batch_.draw(x_, rng_);
    const auto factor = static_cast<float>(1.0 / scale_.input);
    for (std::int64_t i = 0; i < size_ * x.cols; ++i) x.data[i] = factor * batch_.rows().data[i];
    for (std::int64_t i = 0; i < size_; ++i)
      for (std::int64_t e = 0; e < target.cols; ++e)
        target(i, e) = scaled(target_(batch_.token(i), e));
  }

  void fold_scale() {
    for (float& w : router_.hidden_weight) w = static_cast<float>(w / scale_.input);
    for (float& w : router_.weight) w = static_cast<float>(w * scale_.target);
    for (float& b : router_.bias) b = static_cast<float>(b * scale_.target);
  }

  MatrixView<const float> x_, target_;
  RegressionSpec spec_;
  const ParallelFor& parallel_;
  RegressionScale scale_;
  std::mt19937_64 rng_;
  std::int64_t size_;  // tokens of a batch
  TokenBatch batch_;
  Buffer scaled_x_, scaled_target_;  // [B, D], [B, E]
  RegressionLoss loss_;
  RegressionRouter router_;
};

/// ids [E], of which the first K are those of the largest values, ties to the lower id.
void largest_first(const float* values, std::int64_t k, std::vector<std::int32_t>& ids) {
  std::iota(ids.begin(), ids.end(), 0);
  std::partial_sort(ids.begin(), ids.begin() + k, ids.end(),
                    [values](std::int32_t a, std::int32_t b) {
                      return values[a] != values[b] ? values[a] > values[b] : a < b;
                    });
}

}  // namespace

RegressionLoss::RegressionLoss(std::int64_t batch, std::int64_t width, std::int64_t num_experts)
    : batch_(batch),
      width_(width),
      num_experts_(num_experts),
      hidden_(static_cast<std::size_t>(batch * width)),
      hidden_slope_(hidden_.size()),
      score_slope_(static_cast<std::size_t>(batch * num_experts)) {}

double RegressionLoss::differentiate(const RegressionRouter& router, MatrixView<const float> x,
                                     MatrixView<const float> target, RegressionRouter& gradient,
                                     const ParallelFor& parallel) {
  const MatrixView<float> hidden(hidden_.data(), batch_, width_),
      slope(score_slope_.data(), batch_, num_experts_),
      hidden_slope(hidden_slope_.data(), batch_, width_);
  run_layers(router, x, hidden, slope, parallel);
  const double pairs = static_cast<double>(batch_) * static_cast<double>(num_experts_);
  const auto factor = static_cast<float>(2.0 / pairs);
  double sum = 0.0;
  for (std::int64_t i = 0; i < batch_; ++i)
    for (std::int64_t e = 0; e < num_experts_; ++e) {
      const float z = slope(i, e), error = std::abs(z) - target(i, e);
      sum += static_cast<double>(error) * error;
      slope(i, e) = factor * (z < 0.0f ? -error : error);
    }
  weight_gradient(slope, hidden, gradient.weight, parallel);
  sum_columns(slope, gradient.bias);
  parallel(batch_, kBatchGrain, [&](std::int64_t begin, std::int64_t end) {
    isa_kernels().product_nn(plain(MatrixView<const float>(slope).slice_rows(begin, end - begin)),
                             plain(output_weight(router)),
                             plain(hidden_slope.slice_rows(begin, end - begin)), Store::kOverwrite);
  });
  for (std::size_t i = 0; i < hidden_.size(); ++i)
    if (hidden_[i] <= 0.0f) hidden_slope_[i] = 0.0f;
  weight_gradient(hidden_slope, x, gradient.hidden_weight, parallel);
  sum_columns(hidden_slope, gradient.hidden_bias);
  return sum / pairs;
}

RegressionRouter fit_regression_router(MatrixView<const float> x, MatrixView<const float> target,
                                       const RegressionSpec& spec, const ParallelFor& parallel) {
  check_regression(x, target, spec);
  return RegressionTraining(x, target, spec, parallel).run();
}

void regression_scores(const RegressionRouter& router, MatrixView<const float> x,
                       MatrixView<float> scores, const ParallelFor& parallel) {
  if (x.cols != router.d_model || scores.rows != x.rows || scores.cols != router.num_experts ||
      scores.row_stride != scores.cols)
    fail_argument(
        "regression_scores: x is [{}, {}], scores [{}, {}] with rows {} apart; expected [T, {}] "
        "and a compact [T, {}]",
        x.rows, x.cols, scores.rows, scores.cols, scores.row_stride, router.d_model,
        router.num_experts);
  Buffer hidden(std::min(kScoreBlock, x.rows) * router.width);
  for (std::int64_t begin = 0; begin < x.rows; begin += kScoreBlock) {
    const std::int64_t T = std::min(kScoreBlock, x.rows - begin);
    run_layers(router, x.slice_rows(begin, T), {hidden.data(), T, router.width},
               scores.slice_rows(begin, T), parallel);
  }
  for (std::int64_t i = 0; i < scores.rows * scores.cols; ++i)
    scores.data[i] = std::abs(scores.data[i]);
}

RouterQuality router_quality(MatrixView<const float> scores, MatrixView<const float> norms,
                             std::int64_t experts_per_token) {
  const std::int64_t E = scores.cols, K = experts_per_token;
  if (scores.rows != norms.rows || E != norms.cols || scores.rows < 1 || K < 1 || K > E)
    fail_argument(
        "router_quality: scores [{}, {}], norms [{}, {}], K = {}; expected both [T, E], at least "
        "one token and K in [1, E]",
        scores.rows, E, norms.rows, norms.cols, K);
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(E)), best = chosen;
  double hits = 0.0, energy = 0.0, most = 0.0;
  for (std::int64_t t = 0; t < scores.rows; ++t) {
    largest_first(scores.row(t), K, chosen);
    largest_first(norms.row(t), K, best);
    for (std::int64_t k = 0; k < K; ++k) {
      const double of_chosen = norms(t, chosen[k]), of_best = norms(t, best[k]);
      energy += of_chosen * of_chosen;
      most += of_best * of_best;
      hits += static_cast<double>(std::count(best.begin(), best.begin() + K, chosen[k]));
    }
  }
  return {hits / static_cast<double>(scores.rows * K), most > 0.0 ? energy / most : 1.0};
}

}  // namespace cleave
