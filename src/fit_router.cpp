#include "cleave/fit_router.h"

#include <fmt/format.h>

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <random>

#include "cleave/error.h"
#include "support/random.h"

namespace cleave {
namespace {

using RowMajorF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using MatrixF = Eigen::MatrixXf;
using MatrixD = Eigen::MatrixXd;

/// Tokens per product. Sums of so many float products are rounded to about 1e-6 of their size; the
/// blocks are then added in double, so a longer calibration text does not lose digits.
constexpr std::int64_t kBlockTokens = 256;

Eigen::Map<const RowMajorF, 0, Eigen::OuterStride<>> as_eigen(MatrixView<const float> view) {
  return {view.data, view.rows, view.cols, Eigen::OuterStride<>(view.row_stride)};
}

void check_finite(const char* name, MatrixView<const float> view, std::int64_t tokens_before) {
  for (std::int64_t t = 0; t < view.rows; ++t)
    for (std::int64_t c = 0; c < view.cols; ++c)
      if (!std::isfinite(view(t, c)))
        throw InvalidArgument(
            fmt::format("RouterFit::observe: {} of token {} is {} at column {}; must be finite",
                        name, tokens_before + t, view(t, c), c));
}

}  // namespace

struct RouterFit::Impl {
  std::int64_t tokens = 0;
  MatrixD gram;   // [D, D], sum of x x^T; lower triangle only
  MatrixD cross;  // [D, E], sum of x target^T
  MatrixF block;  // [D, D] scratch
};

RouterFit::RouterFit(std::int64_t d_model, std::int64_t num_experts)
    : impl_(std::make_unique<Impl>()) {
  if (d_model < 1 || num_experts < 1)
    throw InvalidArgument(
        fmt::format("RouterFit: D = {}, E = {}; both must be at least 1", d_model, num_experts));
  impl_->gram = MatrixD::Zero(d_model, d_model);
  impl_->cross = MatrixD::Zero(d_model, num_experts);
}
RouterFit::RouterFit(RouterFit&&) noexcept = default;
RouterFit& RouterFit::operator=(RouterFit&&) noexcept = default;
RouterFit::~RouterFit() = default;

void RouterFit::observe(MatrixView<const float> input, MatrixView<const float> target) {
  Impl& s = *impl_;
  if (input.rows != target.rows || input.cols != s.gram.rows() || target.cols != s.cross.cols())
    throw InvalidArgument(fmt::format(
        "RouterFit::observe: input is [{}, {}], target [{}, {}]; expected [T, {}] and [T, {}]",
        input.rows, input.cols, target.rows, target.cols, s.gram.rows(), s.cross.cols()));
  check_finite("input", input, s.tokens);
  check_finite("target", target, s.tokens);
  for (std::int64_t begin = 0; begin < input.rows; begin += kBlockTokens) {
    const std::int64_t count = std::min(kBlockTokens, input.rows - begin);
    const auto x = as_eigen(input.slice_rows(begin, count));
    const auto y = as_eigen(target.slice_rows(begin, count));
    s.block.setZero(input.cols, input.cols);
    s.block.selfadjointView<Eigen::Lower>().rankUpdate(x.transpose());
    s.gram.triangularView<Eigen::Lower>() += s.block.cast<double>();
    s.cross += (x.transpose() * y).cast<double>();
  }
  s.tokens += input.rows;
}

std::int64_t RouterFit::num_tokens() const { return impl_->tokens; }

LinearRouter RouterFit::solve(const RouterFitSpec& spec) const {
  const Impl& s = *impl_;
  if (s.tokens == 0)
    throw InvalidArgument("RouterFit::solve: no token was observed; call observe() first");
  if (!(spec.ridge >= 0.0) || !std::isfinite(spec.ridge))
    throw InvalidArgument(
        fmt::format("RouterFit::solve: ridge = {}; must be finite and not negative", spec.ridge));
  LinearRouter router = zero_router(s.cross.cols(), s.gram.rows());
  const double mean_diagonal = s.gram.diagonal().mean();
  if (mean_diagonal <= 0.0) return router;  // every input was 0: nothing to predict from
  MatrixD system = s.gram;
  system.diagonal().array() += spec.ridge * mean_diagonal;
  const MatrixD weight = system.selfadjointView<Eigen::Lower>().ldlt().solve(s.cross);
  if (!weight.allFinite())
    throw InvalidArgument(fmt::format(
        "RouterFit::solve: {} tokens do not determine a router of width {}; use ridge > 0 or more "
        "calibration text",
        s.tokens, s.gram.rows()));
  Eigen::Map<RowMajorF>(router.weight.data(), router.num_experts, router.d_model) =
      weight.transpose().cast<float>();
  return router;
}

void expert_output_norms(const ExpertBank& bank, MatrixView<const float> x, MatrixView<float> norms,
                         const ParallelFor& parallel) {
  if (x.cols != bank.d_model || norms.rows != x.rows || norms.cols != bank.num_experts())
    throw InvalidArgument(
        fmt::format("expert_output_norms: x is [{}, {}], norms [{}, {}]; expected [T, {}], [T, {}]",
                    x.rows, x.cols, norms.rows, norms.cols, bank.d_model, bank.num_experts()));
  std::vector<float> output(static_cast<std::size_t>(x.rows * x.cols));
  Routing routing{.num_tokens = x.rows,
                  .experts_per_token = 1,
                  .ids = std::vector<std::int32_t>(static_cast<std::size_t>(x.rows)),
                  .weights = std::vector<float>(static_cast<std::size_t>(x.rows), 1.0f)};
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
    std::fill(output.begin(), output.end(), 0.0f);
    std::fill(routing.ids.begin(), routing.ids.end(), static_cast<std::int32_t>(e));
    moe_ffn(bank, routing, 1.0f, x, {output.data(), x.rows, x.cols}, parallel);
    for (std::int64_t t = 0; t < x.rows; ++t)
      norms(t, e) = Eigen::Map<const Eigen::VectorXf>(output.data() + t * x.cols, x.cols).norm();
  }
}

LinearRouter random_router(std::int64_t num_experts, std::int64_t d_model, std::uint64_t seed,
                           double std_dev) {
  LinearRouter router = zero_router(num_experts, d_model);
  std::mt19937_64 rng(seed);
  for (float& w : router.weight) w = static_cast<float>(std_dev * normal_draw(rng));
  return router;
}

LinearRouter zero_router(std::int64_t num_experts, std::int64_t d_model) {
  if (num_experts < 1 || d_model < 1)
    throw InvalidArgument(
        fmt::format("router: E = {}, D = {}; both must be at least 1", num_experts, d_model));
  return {num_experts, d_model,
          std::vector<float>(static_cast<std::size_t>(num_experts * d_model), 0.0f)};
}

}  // namespace cleave
