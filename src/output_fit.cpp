#include "output_fit.h"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <limits>

namespace cleave {
namespace {

constexpr std::int64_t kSampleTokens = 64;  // whose expert outputs, E * D floats each, are held

// Temperatures are tried relative to the spread of the selected logits: from weights that are all
// but equal (2^-6) to all but one-hot (2^3), half an octave apart. Below the range the weights no
// longer change and the router's logits would only get lost beside those of other layers.
constexpr double kLeastOctave = -6.0, kMostOctave = 3.0, kOctaveStep = 0.5;

using RowMajorF = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// Softmax of temperature * logits, or ones. logits fall, so the first is the largest.
void weigh(GateMode gate, double temperature, const double* logits, Eigen::VectorXd& weights) {
  if (gate == GateMode::kHard) {
    weights.setOnes();
    return;
  }
  for (Eigen::Index k = 0; k < weights.size(); ++k)
    weights[k] = std::exp(temperature * (logits[k] - logits[0]));
  weights /= weights.sum();
}

}  // namespace

OutputSample::OutputSample(const ExpertBank& bank, const LinearRouter& router,
                           std::int64_t experts_per_token, MatrixView<const float> x,
                           const ParallelFor& parallel)
    : k_(experts_per_token) {
  for (std::int64_t begin = 0; begin < x.rows; begin += kSampleTokens)
    add_block(bank, router, x.slice_rows(begin, std::min(kSampleTokens, x.rows - begin)), parallel);
}

void OutputSample::add_block(const ExpertBank& bank, const LinearRouter& router,
                             MatrixView<const float> x, const ParallelFor& parallel) {
  const std::int64_t E = bank.num_experts(), D = bank.d_model, T = x.rows;
  std::vector<float> logits(static_cast<std::size_t>(T * E));
  linear(x, router.view(), {}, {logits.data(), T, E}, parallel);
  Routing selected;
  route({logits.data(), T, E}, k_, GateMode::kHard, selected);

  std::vector<RowMajorF> outputs;  // [E] of [T, D]
  RowMajorF dense = RowMajorF::Zero(T, D);
  Routing one{.num_tokens = T, .experts_per_token = 1, .ids = {}, .weights = {}};
  one.weights.assign(static_cast<std::size_t>(T), 1.0f);
  for (std::int64_t e = 0; e < E; ++e) {
    one.ids.assign(static_cast<std::size_t>(T), static_cast<std::int32_t>(e));
    outputs.push_back(RowMajorF::Zero(T, D));
    moe_ffn(bank, one, 1.0f, x, {outputs.back().data(), T, D}, parallel);
    dense += outputs.back();
  }
  for (std::int64_t t = 0; t < T; ++t) {
    const std::int32_t* ids = selected.ids.data() + t * k_;
    const auto row = [&](std::int64_t k) { return outputs[ids[k]].row(t).cast<double>(); };
    const auto y = dense.row(t).cast<double>();
    const double square = y.squaredNorm();
    if (square <= 0.0) continue;  // a zero output has no relative error
    ++tokens_;
    for (std::int64_t k = 0; k < k_; ++k) {
      logits_.push_back(logits[t * E + ids[k]]);
      cross_.push_back(row(k).dot(y) / square);
      for (std::int64_t other = 0; other < k_; ++other)
        gram_.push_back(row(k).dot(row(other)) / square);
    }
  }
}

OutputSample::Error OutputSample::error_at(GateMode gate, double temperature) const {
  Error error;
  Eigen::VectorXd weights(k_);
  for (std::int64_t t = 0; t < tokens_; ++t) {
    weigh(gate, temperature, logits_.data() + t * k_, weights);
    const Eigen::Map<const Eigen::MatrixXd> gram(gram_.data() + t * k_ * k_, k_, k_);
    error.weighted_square += weights.dot(gram * weights);
    error.weighted_cross +=
        weights.dot(Eigen::Map<const Eigen::VectorXd>(cross_.data() + t * k_, k_));
  }
  return error;
}

OutputFit OutputSample::fit_scale(GateMode gate, double temperature,
                                  std::optional<double> fixed_scale) const {
  const Error error = error_at(gate, temperature);
  OutputFit fit{.temperature = temperature, .scale = 1.0, .relative_error = 0.0};
  if (fixed_scale)
    fit.scale = *fixed_scale;
  else if (error.weighted_square > 0.0 && error.weighted_cross > 0.0)
    fit.scale = error.weighted_cross / error.weighted_square;
  else  // dead experts, or ones that point away from the dense output: leave the sum as it is
    fit.scale = gate == GateMode::kSoftmax ? static_cast<double>(k_) : 1.0;
  const double sum = fit.scale * fit.scale * error.weighted_square -
                     2.0 * fit.scale * error.weighted_cross + static_cast<double>(tokens_);
  if (tokens_ > 0) fit.relative_error = std::max(sum, 0.0) / static_cast<double>(tokens_);
  return fit;
}

double OutputSample::logit_spread() const {
  double sum = 0.0;
  for (std::int64_t t = 0; t < tokens_; ++t) {
    const Eigen::Map<const Eigen::ArrayXd> logits(logits_.data() + t * k_, k_);
    sum += (logits - logits.mean()).square().mean();
  }
  return tokens_ == 0 ? 0.0 : std::sqrt(sum / static_cast<double>(tokens_));
}

OutputFit OutputSample::fit(GateMode gate, std::optional<double> fixed_scale) const {
  const double spread = logit_spread();
  // One expert weighs 1 at any temperature, and so do equal logits.
  if (gate == GateMode::kHard || k_ == 1 || spread <= 0.0) return fit_scale(gate, 1.0, fixed_scale);
  OutputFit best{.relative_error = std::numeric_limits<double>::infinity()};
  for (double octave = kLeastOctave; octave <= kMostOctave; octave += kOctaveStep) {
    const OutputFit fit = fit_scale(gate, std::exp2(octave) / spread, fixed_scale);
    if (fit.relative_error < best.relative_error) best = fit;
  }
  return best;
}

}  // namespace cleave
