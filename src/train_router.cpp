#include "train_router.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "cleave/fit_router.h"
#include "descent.h"
#include "fail.h"

namespace cleave {
namespace {

constexpr std::int64_t kScaleTokens = 2048;  // on which the spread of the logits is measured

/// Halfway between the K-th and the next largest value: what K of them lie above. -infinity for
/// K = E.
float border(const float* values, std::int64_t n, std::int64_t k, std::vector<float>& scratch) {
  if (k >= n) return -std::numeric_limits<float>::infinity();
  scratch.assign(values, values + n);
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<>());
  const float last_in = scratch[k - 1];
  return 0.5f * (last_in + *std::max_element(scratch.begin() + k, scratch.end()));
}

enum class RouterLoss { kGain, kLogistic };

/// Derivative of the loss by u = (logit - border) / temperature, where `over` is the gain over its
/// border and p = sigmoid(u): of -over * p, or of |over| log(1 + exp(-sign(over) u)).
float slope(RouterLoss loss, float over, float p) {
  if (loss == RouterLoss::kGain) return -over * p * (1.0f - p);
  return over > 0.0f ? over * (p - 1.0f) : -over * p;
}

class RouterTraining {
 public:
  RouterTraining(MatrixView<const float> x, MatrixView<const float> gain, std::int64_t k,
                 const LinearRouter& start, const RouterTrainSpec& spec, RouterLoss loss,
                 const ParallelFor& parallel)
      : x_(x),
        gain_(gain),
        k_(k),
        spec_(spec),
        loss_(loss),
        parallel_(parallel),
        rng_(spec.seed),
        router_(start),
        adam_(start.weight.size()),
        gradient_(start.weight.size()),
        batch_(spec.batch, x.cols) {
    normalise_logits(x_, router_, 1.0, parallel_);
    logits_.resize(static_cast<std::size_t>(spec.batch * gain.cols));
    gain_border_.resize(static_cast<std::size_t>(x.rows));
    parallel_(x.rows, 256, [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> scratch;
      for (std::int64_t t = begin; t < end; ++t)
        gain_border_[t] = border(gain_.row(t), gain_.cols, k_, scratch);
    });
  }

  LinearRouter run() {
    const MatrixView<const float> by_logit(logits_.data(), spec_.batch, gain_.cols);
    for (std::int64_t step = 0; step < spec_.steps; ++step) {
      batch_.draw(x_, rng_);
      logit_gradients();
      weight_gradient(by_logit, batch_.rows(), gradient_, parallel_);
      adam_.step(gradient_, falling_rate(spec_.rate, step, spec_.steps), router_.weight);
    }
    return std::move(router_);
  }

 private:
  /// logits_ becomes the gradient of the loss with respect to the logits.
  void logit_gradients() {
    const std::int64_t E = gain_.cols;
    linear(batch_.rows(), router_.view(), {}, {logits_.data(), spec_.batch, E}, parallel_);
    const auto factor =
        static_cast<float>(1.0 / (spec_.temperature * static_cast<double>(spec_.batch)));
    const auto sharpness = static_cast<float>(1.0 / spec_.temperature);
    parallel_(spec_.batch, 128, [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> scratch;
      for (std::int64_t i = begin; i < end; ++i) {
        float* z = logits_.data() + i * E;
        const float* gain = gain_.row(batch_.token(i));
        const float middle = border(z, E, k_, scratch), gain_middle = gain_border_[batch_.token(i)];
        for (std::int64_t e = 0; e < E; ++e) {
          const float p = 1.0f / (1.0f + std::exp((middle - z[e]) * sharpness));
          z[e] = factor * slope(loss_, gain[e] - gain_middle, p);
        }
      }
    });
  }

  MatrixView<const float> x_, gain_;
  std::int64_t k_;
  RouterTrainSpec spec_;
  RouterLoss loss_;
  const ParallelFor& parallel_;
  std::mt19937_64 rng_;
  LinearRouter router_;
  Adam adam_;
  std::vector<float> gradient_;  // [E, D]
  TokenBatch batch_;
  std::vector<float> logits_;       // [batch, E]
  std::vector<float> gain_border_;  // [T]
};

void check_training(const char* function, MatrixView<const float> x, MatrixView<const float> gain,
                    std::int64_t k, const LinearRouter& start, const RouterTrainSpec& spec) {
  if (x.rows != gain.rows || start.num_experts != gain.cols || start.d_model != x.cols || k < 1 ||
      k > gain.cols || x.rows < 1)
    fail_argument(
        "{}: x [{}, {}], gain [{}, {}], router [{}, {}], K = {}; expected [T, D], [T, E], [E, D], "
        "K in [1, E] and at least one token",
        function, x.rows, x.cols, gain.rows, gain.cols, start.num_experts, start.d_model, k);
  if (spec.steps < 0 || spec.batch < 1 || !(spec.rate > 0.0) || !(spec.temperature > 0.0))
    fail_argument(
        "{}: {} steps of {} tokens, rate {}, temperature {}; expected >= 0, >= 1, > 0, > 0",
        function, spec.steps, spec.batch, spec.rate, spec.temperature);
  for (std::int64_t t = 0; t < gain.rows; ++t)
    for (std::int64_t e = 0; e < gain.cols; ++e)
      if (!std::isfinite(gain(t, e)))
        fail_argument("{}: the gain of token {} by expert {} is {}; must be finite", function, t, e,
                      gain(t, e));
}

LinearRouter run_training(const char* function, MatrixView<const float> x,
                          MatrixView<const float> gain, std::int64_t experts_per_token,
                          const LinearRouter& start, const RouterTrainSpec& spec, RouterLoss loss,
                          const ParallelFor& parallel) {
  check_training(function, x, gain, experts_per_token, start, spec);
  if (experts_per_token == gain.cols) return start;  // nothing to choose
  return RouterTraining(x, gain, experts_per_token, start, spec, loss, parallel).run();
}

}  // namespace

void normalise_logits(MatrixView<const float> x, LinearRouter& router, double spread,
                      const ParallelFor& parallel) {
  const std::int64_t T = std::min(kScaleTokens, x.rows), E = router.num_experts;
  std::vector<float> logits(static_cast<std::size_t>(T * E));
  linear(x.slice_rows(0, T), router.view(), {}, {logits.data(), T, E}, parallel);
  double variance = 0.0;
  for (std::int64_t t = 0; t < T; ++t) {
    double sum = 0.0, square = 0.0;
    for (std::int64_t e = 0; e < E; ++e) {
      const double z = logits[t * E + e];
      sum += z;
      square += z * z;
    }
    variance += square / static_cast<double>(E) - sum * sum / static_cast<double>(E * E);
  }
  const double deviation = std::sqrt(std::max(0.0, variance / static_cast<double>(T)));
  if (deviation > 0.0)
    for (float& w : router.weight) w = static_cast<float>(w / deviation * spread);
}

LinearRouter train_router(MatrixView<const float> x, MatrixView<const float> gain,
                          std::int64_t experts_per_token, const LinearRouter& start,
                          const RouterTrainSpec& spec, const ParallelFor& parallel) {
  return run_training("train_router", x, gain, experts_per_token, start, spec, RouterLoss::kGain,
                      parallel);
}

LinearRouter logistic_router(MatrixView<const float> x, MatrixView<const float> gain,
                             std::int64_t experts_per_token, const LinearRouter& start,
                             const RouterTrainSpec& spec, const ParallelFor& parallel) {
  return run_training("logistic_router", x, gain, experts_per_token, start, spec,
                      RouterLoss::kLogistic, parallel);
}

}  // namespace cleave
