#include "cleave/mass_router.h"

#include <Eigen/Core>
#include <Eigen/Eigenvalues>
#include <algorithm>
#include <cmath>

#include "fail.h"
#include "opening_rows.h"
#include "support/buffer.h"

namespace cleave {
namespace {

using FloatRows = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

constexpr std::int64_t kMassTokens = 4096;
constexpr std::int64_t kMassBlock = 256;  // tokens whose products are held at a time
constexpr double kNearZero = 1e-4;        // act(a) / a is taken there for a smaller a

/// Rows of x, evenly spaced, one after the other; each with a 1 behind it if `constant`.
FloatRows sample_of(MatrixView<const float> x, bool constant) {
  const std::int64_t n = std::min(x.rows, kMassTokens), cols = x.cols + (constant ? 1 : 0);
  FloatRows sample(n, cols);
  for (std::int64_t i = 0; i < n; ++i) {
    sample(i, cols - 1) = 1.0f;
    std::copy_n(x.row(i * x.rows / n), x.cols, sample.data() + i * cols);
  }
  return sample;
}

/// sqrt(p) [H]: the root of the mean square of what an open gate lets through of its product.
std::vector<double> gate_openings(const FfnView& ffn, const FloatRows& x,
                                  const ParallelFor& parallel) {
  const std::int64_t T = x.rows(), H = ffn.up.rows;
  const Buffer products(T * H);
  const MatrixView<float> a(products.data(), T, H);
  linear({x.data(), T, ffn.up.cols, x.cols()}, opening_rows(ffn),
         ffn.gate.empty() ? ffn.up_bias : ffn.gate_bias, a, parallel);
  std::vector<double> open(static_cast<std::size_t>(H));
  parallel(H, 16, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t j = begin; j < end; ++j) {
        const double product = std::abs(a(t, j)) < kNearZero ? kNearZero : a(t, j);
        const double part = activate(ffn.activation, product) / product;
        open[j] += part * part;
      }
    for (std::int64_t j = begin; j < end; ++j)
      open[j] = std::sqrt(open[j] / static_cast<double>(T));
  });
  return open;
}

/// V^T A [R, D], V the first eigenvectors of A C A^T.
FloatRows truncated(const FloatRows& rows, const FloatRows& moment, std::int64_t rank) {
  const Eigen::MatrixXd gram = (rows * moment * rows.transpose()).cast<double>();
  // Eigenvalues come in rising order.
  const Eigen::MatrixXf top = Eigen::SelfAdjointEigenSolver<Eigen::MatrixXd>(gram)
                                  .eigenvectors()
                                  .rightCols(rank)
                                  .cast<float>();
  return top.transpose() * rows;
}

std::vector<std::vector<std::int32_t>> members_of(std::span<const std::int32_t> expert_of_neuron,
                                                  std::int64_t num_experts) {
  std::vector<std::vector<std::int32_t>> members(static_cast<std::size_t>(num_experts));
  for (std::size_t j = 0; j < expert_of_neuron.size(); ++j) {
    const std::int32_t e = expert_of_neuron[j];
    if (e >= num_experts)
      fail_argument("fit_mass_router: neuron {} is in expert {} of {}", j, e, num_experts);
    if (e >= 0) members[e].push_back(static_cast<std::int32_t>(j));
  }
  for (std::size_t e = 0; e < members.size(); ++e)
    if (members[e].empty() || members[e].size() != members[0].size())
      fail_argument(
          "fit_mass_router: expert {} has {} neurons, expert 0 {}; expected experts of one width",
          e, members[e].size(), members[0].size());
  return members;
}

void check_mass(const FfnView& ffn, std::span<const std::int32_t> expert_of_neuron,
                std::int64_t num_experts, MatrixView<const float> x, std::int64_t rank) {
  if (static_cast<std::int64_t>(expert_of_neuron.size()) != ffn.up.rows || num_experts < 1 ||
      x.rows < 1 || x.cols != ffn.up.cols || rank < 1)
    fail_argument(
        "fit_mass_router: {} neurons of {}, E = {}, x [{}, {}], rank {}; expected all neurons, at "
        "least one expert, token and rank, and x [T, {}]",
        expert_of_neuron.size(), ffn.up.rows, num_experts, x.rows, x.cols, rank, ffn.up.cols);
}

}  // namespace

MassRouter fit_mass_router(const FfnView& ffn, std::span<const std::int32_t> expert_of_neuron,
                           std::int64_t num_experts, MatrixView<const float> x, std::int64_t rank,
                           const ParallelFor& parallel) {
  check_mass(ffn, expert_of_neuron, num_experts, x, rank);
  const auto members = members_of(expert_of_neuron, num_experts);
  const auto I = static_cast<std::int64_t>(members[0].size());
  const std::int64_t D = x.cols, R = std::min({rank, I, D});
  const bool gated = !ffn.gate.empty(), biased = !gated && !ffn.up_bias.empty();
  const FloatRows sample = sample_of(x, biased);
  const FloatRows moment = sample.transpose() * sample / static_cast<float>(sample.rows());
  if (!moment.allFinite()) fail_argument("fit_mass_router: an input is not finite");
  const std::vector<double> open = gate_openings(ffn, sample, parallel);
  const auto size = static_cast<std::size_t>(num_experts * R * D);
  MassRouter router{num_experts, D, R, std::vector<float>(size), {}, {}};
  if (gated) router.up.resize(size);
  if (biased) router.gate_bias.resize(static_cast<std::size_t>(num_experts * R));
  parallel(num_experts, 1, [&](std::int64_t begin, std::int64_t end) {
    FloatRows gate(I, sample.cols()), up(I, D);
    for (std::int64_t e = begin; e < end; ++e) {
      for (std::int64_t i = 0; i < I; ++i) {
        const std::int32_t j = members[e][i];
        const auto weight = static_cast<float>(open[j]);
        for (std::int64_t d = 0; d < D; ++d) {
          gate(i, d) = weight * opening_rows(ffn)(j, d);
          up(i, d) = ffn.up(j, d);
        }
        if (biased) gate(i, D) = weight * ffn.up_bias[j];
      }
      const FloatRows short_gate = truncated(gate, moment, R);
      Eigen::Map<FloatRows>(router.gate.data() + e * R * D, R, D) = short_gate.leftCols(D);
      for (std::int64_t r = 0; biased && r < R; ++r) router.gate_bias[e * R + r] = short_gate(r, D);
      if (gated)
        Eigen::Map<FloatRows>(router.up.data() + e * R * D, R, D) = truncated(up, moment, R);
    }
  });
  return router;
}

void mass_scores(const MassRouter& router, MatrixView<const float> x, MatrixView<float> scores,
                 const ParallelFor& parallel) {
  const std::int64_t E = router.num_experts, R = router.rank, D = router.d_model;
  if (x.cols != D || scores.rows != x.rows || scores.cols != E)
    fail_argument("mass_scores: x is [{}, {}], scores [{}, {}]; expected [T, {}] and [T, {}]",
                  x.rows, x.cols, scores.rows, scores.cols, D, E);
  const Buffer room(2 * std::min(kMassBlock, x.rows) * E * R);
  for (std::int64_t first = 0; first < x.rows; first += kMassBlock) {
    const std::int64_t T = std::min(kMassBlock, x.rows - first);
    const MatrixView<float> gate(room.data(), T, E * R), up(room.data() + T * E * R, T, E * R);
    linear(x.slice_rows(first, T), {router.gate.data(), E * R, D}, router.gate_bias, gate,
           parallel);
    if (!router.up.empty())
      linear(x.slice_rows(first, T), {router.up.data(), E * R, D}, {}, up, parallel);
    for (std::int64_t t = 0; t < T; ++t)
      for (std::int64_t e = 0; e < E; ++e) {
        float of_gate = 0.0f, of_up = 0.0f;
        for (std::int64_t r = e * R; r < (e + 1) * R; ++r) {
          of_gate += gate(t, r) * gate(t, r);
          of_up += router.up.empty() ? 0.0f : up(t, r) * up(t, r);
        }
        if (router.up.empty()) of_up = 1.0f;
        scores(first + t, e) = std::sqrt(of_gate) * std::sqrt(of_up);
      }
  }
}

}  // namespace cleave
