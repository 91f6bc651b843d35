#include "cleave/refit.h"

#include <algorithm>
#include <cmath>

#include "fail.h"
#include "kernels/dispatch.h"

namespace cleave {
namespace {

constexpr std::int64_t kTokenBlock = 512;  // whose scaled copies stay in a second-level cache
constexpr std::int64_t kGramRows = 96;     // rows of the Gram matrix that one product makes
constexpr std::int64_t kSolveRows = 16;    // right-hand sides worth a thread

void check_row(MatrixView<const float> view, const char* name, std::int64_t t, std::int64_t token) {
  for (std::int64_t c = 0; c < view.cols; ++c)
    if (!std::isfinite(view(t, c)))
      fail_argument("RidgeRefit::observe: {} of token {} is {} at column {}; must be finite", name,
                    token, view(t, c), c);
}

void scale_rows(MatrixView<const float> from, std::span<const float> factor, float* to) {
  for (std::int64_t t = 0; t < from.rows; ++t) {
    const float* row = from.row(t);
    for (std::int64_t c = 0; c < from.cols; ++c) to[t * from.cols + c] = row[c] * factor[t];
  }
}

}  // namespace

RidgeRefit::RidgeRefit(std::int64_t num_features, std::int64_t num_outputs)
    : features_(num_features), outputs_(num_outputs) {
  if (num_features < 1 || num_outputs < 1)
    fail_argument("RidgeRefit: {} features and {} outputs; both must be at least 1", num_features,
                  num_outputs);
  gram_.assign(static_cast<std::size_t>(features_ * features_), 0.0f);
  cross_.assign(static_cast<std::size_t>(features_ * outputs_), 0.0f);
}

void RidgeRefit::observe(MatrixView<const float> features, MatrixView<const float> target,
                         std::span<const float> weight, const ParallelFor& parallel) {
  if (features.cols != features_ || target.cols != outputs_ || target.rows != features.rows ||
      (!weight.empty() && static_cast<std::int64_t>(weight.size()) != features.rows))
    fail_argument(
        "RidgeRefit::observe: features [{}, {}], target [{}, {}], {} weights; expected [T, {}], "
        "[T, {}] and T weights or none",
        features.rows, features.cols, target.rows, target.cols, weight.size(), features_, outputs_);
  scaled_features_.resize(static_cast<std::size_t>(kTokenBlock * features_));
  scaled_target_.resize(static_cast<std::size_t>(kTokenBlock * outputs_));
  const GramKernels& kernels = gram_kernels();
  for (std::int64_t first = 0; first < features.rows; first += kTokenBlock) {
    const std::int64_t T = std::min(kTokenBlock, features.rows - first);
    parallel(T, 32, [&](std::int64_t begin, std::int64_t end) {
      std::vector<float> factor(static_cast<std::size_t>(end - begin), 1.0f);
      for (std::int64_t t = begin; t < end; ++t) {
        check_row(features, "the features", first + t, tokens_ + first + t);
        check_row(target, "the target", first + t, tokens_ + first + t);
        if (weight.empty()) continue;
        if (!(weight[first + t] >= 0.0f) || std::isinf(weight[first + t]))
          fail_argument("RidgeRefit::observe: token {} has weight {}; must be finite and >= 0",
                        tokens_ + first + t, weight[first + t]);
        factor[t - begin] = std::sqrt(weight[first + t]);
      }
      scale_rows(features.slice_rows(first + begin, end - begin), factor,
                 scaled_features_.data() + begin * features_);
      scale_rows(target.slice_rows(first + begin, end - begin), factor,
                 scaled_target_.data() + begin * outputs_);
    });
    const std::int64_t chunks = (features_ + kGramRows - 1) / kGramRows;
    const auto gram_rows = [&](std::int64_t chunk) {
      const std::int64_t begin = chunk * kGramRows;
      const std::int64_t rows = std::min(kGramRows, features_ - begin);
      const float* x = scaled_features_.data();
      kernels.product_tn({x + begin, T, rows, features_}, {x, T, begin + rows, features_},
                         {gram_.data() + begin * features_, rows, begin + rows, features_});
      kernels.product_tn({x + begin, T, rows, features_},
                         {scaled_target_.data(), T, outputs_, outputs_},
                         {cross_.data() + begin * outputs_, rows, outputs_, outputs_});
    };
    // Long rows with short ones, so that equal counts are equal work.
    parallel((chunks + 1) / 2, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        gram_rows(i);
        if (chunks - 1 - i != i) gram_rows(chunks - 1 - i);
      }
    });
  }
  tokens_ += features.rows;
}

std::vector<float> RidgeRefit::solve(MatrixView<const float> prior, const RefitSpec& spec,
                                     const ParallelFor& parallel) const {
  const std::int64_t F = features_, D = outputs_;
  if (tokens_ == 0) fail_argument("RidgeRefit::solve: no token was observed");
  if (!prior.empty() && (prior.rows != F || prior.cols != D))
    fail_argument("RidgeRefit::solve: the prior is [{}, {}]; expected [{}, {}]", prior.rows,
                  prior.cols, F, D);
  if (!(spec.penalty > 0.0))
    fail_argument(
        "RidgeRefit::solve: penalty {}; must be above 0, for features may be equal or never run",
        spec.penalty);
  double mean = 0.0;
  for (std::int64_t j = 0; j < F; ++j) mean += gram_[j * F + j];
  mean = mean > 0.0 ? mean / static_cast<double>(F) : 1.0;

  // Solved for W - prior, with every feature divided by the root of its diagonal entry: the factor
  // is then well conditioned however much the features differ in size.
  std::vector<double> factor(static_cast<std::size_t>(F * F)), size(F), penalty(F);
  for (std::int64_t j = 0; j < F; ++j) {
    penalty[j] = spec.penalty * (gram_[j * F + j] + mean);
    size[j] = std::sqrt(gram_[j * F + j] + penalty[j]);
  }
  parallel(F, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      for (std::int64_t j = 0; j < i; ++j)
        factor[i * F + j] = gram_[i * F + j] / (size[i] * size[j]);
      factor[i * F + i] = 1.0;
    }
  });
  std::vector<double> rhs(static_cast<std::size_t>(D * F));  // [D, F]
  // gram * prior, from the lower triangle: row i gives to itself and to the rows above.
  for (std::int64_t j = 0; j < F; ++j)
    for (std::int64_t d = 0; d < D; ++d) rhs[d * F + j] = cross_[j * D + d];
  if (!prior.empty()) {
    std::vector<float> full(gram_);
    for (std::int64_t i = 0; i < F; ++i)
      for (std::int64_t j = 0; j < i; ++j) full[j * F + i] = full[i * F + j];
    std::vector<float> product(static_cast<std::size_t>(F * D));
    parallel(F, 32, [&](std::int64_t begin, std::int64_t end) {
      isa_kernels().product_nn({full.data() + begin * F, end - begin, F, F}, plain(prior),
                               {product.data() + begin * D, end - begin, D, D}, Store::kOverwrite);
    });
    for (std::int64_t j = 0; j < F; ++j)
      for (std::int64_t d = 0; d < D; ++d) rhs[d * F + j] -= product[j * D + d];
  }
  for (std::int64_t d = 0; d < D; ++d)
    for (std::int64_t j = 0; j < F; ++j) rhs[d * F + j] /= size[j];
  if (!gram_kernels().cholesky(factor.data(), F))
    fail_argument(
        "RidgeRefit::solve: the Gram matrix of {} features over {} tokens is not positive definite "
        "with penalty {}; raise the penalty or give more tokens",
        F, tokens_, spec.penalty);
  parallel(D, kSolveRows, [&](std::int64_t begin, std::int64_t end) {
    gram_kernels().cholesky_solve(factor.data(), F, rhs.data() + begin * F, end - begin);
  });
  std::vector<float> weights(static_cast<std::size_t>(F * D));
  for (std::int64_t j = 0; j < F; ++j)
    for (std::int64_t d = 0; d < D; ++d)
      weights[j * D + d] =
          static_cast<float>((prior.empty() ? 0.0 : prior(j, d)) + rhs[d * F + j] / size[j]);
  return weights;
}

}  // namespace cleave
