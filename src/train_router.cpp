#include "train_router.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <random>

#include "cleave/fit_router.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "support/random.h"

namespace cleave {
namespace {

constexpr std::int64_t kScaleTokens = 2048;  // on which the spread of the logits is measured
constexpr double kMomentum = 0.9, kSquareMomentum = 0.99, kEpsilon = 1e-8;

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
      : x_(x), gain_(gain), k_(k), spec_(spec), loss_(loss), parallel_(parallel), rng_(spec.seed) {
    router_ = start;
    normalise_logits(x_, router_, parallel_);
    const std::size_t size = router_.weight.size();
    gradient_.resize(size);
    mean_.assign(size, 0.0f);
    square_.assign(size, 0.0f);
    batch_x_.resize(static_cast<std::size_t>(spec.batch * x.cols));
    logits_.resize(static_cast<std::size_t>(spec.batch * gain.cols));
    gain_border_.resize(static_cast<std::size_t>(x.rows));
    parallel_(x.rows, 256, [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> scratch;
      for (std::int64_t t = begin; t < end; ++t)
        gain_border_[t] = border(gain_.row(t), gain_.cols, k_, scratch);
    });
  }

  LinearRouter run() {
    for (std::int64_t step = 0; step < spec_.steps; ++step) {
      draw_batch();
      logit_gradients();
      weight_gradient();
      descend(step);
    }
    return std::move(router_);
  }

 private:
  void draw_batch() {
    tokens_.resize(static_cast<std::size_t>(spec_.batch));
    for (std::int64_t& t : tokens_)
      t = static_cast<std::int64_t>(bounded_draw(rng_, static_cast<std::uint64_t>(x_.rows)));
    for (std::int64_t i = 0; i < spec_.batch; ++i)
      std::copy_n(x_.row(tokens_[i]), x_.cols, batch_x_.data() + i * x_.cols);
  }

  /// logits_ becomes the gradient of the loss with respect to the logits.
  void logit_gradients() {
    const std::int64_t E = gain_.cols;
    linear({batch_x_.data(), spec_.batch, x_.cols}, router_.view(), {},
           {logits_.data(), spec_.batch, E}, parallel_);
    const auto factor =
        static_cast<float>(1.0 / (spec_.temperature * static_cast<double>(spec_.batch)));
    const auto sharpness = static_cast<float>(1.0 / spec_.temperature);
    parallel_(spec_.batch, 128, [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> scratch;
      for (std::int64_t i = begin; i < end; ++i) {
        float* z = logits_.data() + i * E;
        const float* gain = gain_.row(tokens_[i]);
        const float middle = border(z, E, k_, scratch), gain_middle = gain_border_[tokens_[i]];
        for (std::int64_t e = 0; e < E; ++e) {
          const float p = 1.0f / (1.0f + std::exp((middle - z[e]) * sharpness));
          z[e] = factor * slope(loss_, gain[e] - gain_middle, p);
        }
      }
    });
  }

  void weight_gradient() {
    const std::int64_t E = gain_.cols, D = x_.cols, B = spec_.batch;
    std::fill(gradient_.begin(), gradient_.end(), 0.0f);
    parallel_(D, 64, [&](std::int64_t begin, std::int64_t end) {
      gram_kernels().product_tn({logits_.data(), B, E, E},
                                {batch_x_.data() + begin, B, end - begin, D},
                                {gradient_.data() + begin, E, end - begin, D});
    });
  }

  void descend(std::int64_t step) {  // Adam, arXiv:1412.6980
    const double rate =
        spec_.rate * (1.0 - static_cast<double>(step) / static_cast<double>(spec_.steps));
    const double first = 1.0 - std::pow(kMomentum, static_cast<double>(step + 1));
    const double second = 1.0 - std::pow(kSquareMomentum, static_cast<double>(step + 1));
    for (std::size_t i = 0; i < gradient_.size(); ++i) {
      const double g = gradient_[i];
      mean_[i] = static_cast<float>(kMomentum * mean_[i] + (1.0 - kMomentum) * g);
      square_[i] =
          static_cast<float>(kSquareMomentum * square_[i] + (1.0 - kSquareMomentum) * g * g);
      router_.weight[i] -= static_cast<float>(rate * (mean_[i] / first) /
                                              (std::sqrt(square_[i] / second) + kEpsilon));
    }
  }

  MatrixView<const float> x_, gain_;
  std::int64_t k_;
  RouterTrainSpec spec_;
  RouterLoss loss_;
  const ParallelFor& parallel_;
  std::mt19937_64 rng_;
  LinearRouter router_;
  std::vector<float> gradient_, mean_, square_;  // [E, D]
  std::vector<float> batch_x_, logits_;          // [batch, D], [batch, E]
  std::vector<float> gain_border_;               // [T]
  std::vector<std::int64_t> tokens_;             // [batch]
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

void normalise_logits(MatrixView<const float> x, LinearRouter& router,
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
    for (float& w : router.weight) w = static_cast<float>(w / deviation);
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
