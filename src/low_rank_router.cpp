#include <Eigen/Core>
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>

#include "cleave/fit_router.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "support/buffer.h"

namespace cleave {
namespace {

using RowMajorD = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using FloatRows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr std::int64_t kLogitBlock = 512;  // tokens a product in float; blocks add up in double

/// Z^T Z [E, E] of the logits Z = X W^T.
Eigen::MatrixXd logit_gram(MatrixView<const float> x, const LinearRouter& router,
                           const ParallelFor& parallel) {
  const std::int64_t E = router.num_experts;
  Buffer logits(kLogitBlock * E), block(E * E);
  Eigen::MatrixXd gram = Eigen::MatrixXd::Zero(E, E);
  for (std::int64_t first = 0; first < x.rows; first += kLogitBlock) {
    const std::int64_t T = std::min(kLogitBlock, x.rows - first);
    linear(x.slice_rows(first, T), router.view(), {}, {logits.data(), T, E}, parallel);
    std::fill_n(block.data(), E * E, 0.0f);
    parallel(E, 16, [&](std::int64_t begin, std::int64_t end) {
      gram_kernels().product_tn({logits.data() + begin, T, end - begin, E},
                                {logits.data(), T, E, E},
                                {block.data() + begin * E, end - begin, E, E});
    });
    gram += Eigen::Map<const FloatRows>(block.data(), E, E).cast<double>();
  }
  return gram;
}

}  // namespace

LinearRouter low_rank_router(MatrixView<const float> x, const LinearRouter& router,
                             std::int64_t rank, const ParallelFor& parallel) {
  const std::int64_t E = router.num_experts, D = router.d_model;
  if (x.rows < 1 || x.cols != D || static_cast<std::int64_t>(router.weight.size()) != E * D)
    fail_argument(
        "low_rank_router: x is [{}, {}], the router [{}, {}]; expected [T >= 1, D], [E, "
        "D]",
        x.rows, x.cols, E, D);
  if (rank < 1 || rank > E)
    fail_argument("low_rank_router: rank {} of a router of E = {} experts; must be in [1, E]", rank,
                  E);
  const Eigen::MatrixXd gram = logit_gram(x, router, parallel);
  if (!gram.allFinite())
    fail_argument("low_rank_router: a logit is not finite; are the inputs and the router?");
  // Eigenvalues come in rising order.
  const Eigen::MatrixXd top =
      Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>(gram).eigenvectors().rightCols(rank);
  const RowMajorD weight = Eigen::Map<const FloatRows>(router.weight.data(), E, D).cast<double>();
  LinearRouter result = zero_router(E, D);
  Eigen::Map<FloatRows>(result.weight.data(), E, D) =
      (top * (top.transpose() * weight)).cast<float>();
  return result;
}

}  // namespace cleave
