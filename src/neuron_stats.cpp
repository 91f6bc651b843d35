#include "neuron_stats.h"

#include <algorithm>
#include <bit>

#include "fail.h"
#include "support/buffer.h"

namespace cleave {
namespace {

// Tokens per product: what float sums hold without losing digits, and the weighted copies stay
// within some megabytes.
constexpr std::int64_t kStatsBlock = 512;
constexpr std::int64_t kMomentGrain = 64;    // neurons worth a thread
constexpr std::int64_t kTopGrain = 16;       // tokens worth a thread
constexpr std::int64_t kMostSize = 1 << 24;  // what a float of the file holds exactly

bool all_finite(const float* row, std::int64_t n) {
  // As whole numbers, so that the loop is vectorised: infinity is the least with this exponent.
  std::uint32_t largest = 0;
  for (std::int64_t i = 0; i < n; ++i)
    largest = std::max(largest, std::bit_cast<std::uint32_t>(row[i]) & 0x7fffffffu);
  return largest < 0x7f800000u;
}

void check_finite_rows(const char* function, const char* name, std::int64_t layer,
                       MatrixView<const float> m, std::int64_t seen) {
  for (std::int64_t t = 0; t < m.rows; ++t) {
    if (all_finite(m.row(t), m.cols)) continue;
    std::int64_t c = 0;
    while (std::isfinite(m(t, c))) ++c;
    fail_argument(
        "NeuronStats::{}: layer {}: {} of token {} is {} at column {}; must be finite. Did the "
        "model overflow?",
        function, layer, name, seen + t, m(t, c), c);
  }
}

void check_token_weights(const char* function, std::span<const float> weights,
                         std::int64_t tokens) {
  if (!weights.empty() && static_cast<std::int64_t>(weights.size()) != tokens)
    fail_argument("NeuronStats::{}: {} weights for {} tokens; expected one each, or none", function,
                  weights.size(), tokens);
  for (std::size_t t = 0; t < weights.size(); ++t)
    if (!(weights[t] >= 0.0f) || !std::isfinite(weights[t]))
      fail_argument("NeuronStats::{}: weight {} of token {}; must be finite and not negative",
                    function, weights[t], t);
}

/// The rows that count, each times the root of its weight: what a weighted sum of x x^T is made of.
struct WeightedRows {
  Buffer memory;
  MatrixView<const float> view;

  WeightedRows(MatrixView<const float> m, std::span<const float> weights) : view(m) {
    if (std::all_of(weights.begin(), weights.end(), [](float w) { return w == 1.0f; })) return;
    memory = Buffer(m.rows * m.cols);
    std::int64_t kept = 0;
    for (std::int64_t t = 0; t < m.rows; ++t) {
      if (weights[t] == 0.0f) continue;
      const float root = std::sqrt(weights[t]);
      float* row = memory.data() + kept++ * m.cols;
      for (std::int64_t c = 0; c < m.cols; ++c) row[c] = root * m(t, c);
    }
    view = {memory.data(), kept, m.cols};
  }
};

void add_moments(LayerStats& layer, MatrixView<const float> hidden, std::span<const float> weights,
                 const ParallelFor& parallel) {
  parallel(hidden.cols, kMomentGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = 0; t < hidden.rows; ++t) {
      const double weight = weights.empty() ? 1.0 : weights[t];
      if (weight == 0.0) continue;
      const float* h = hidden.row(t);
      for (std::int64_t j = begin; j < end; ++j) {
        const double value = h[j];
        layer.sum[j] += weight * value;
        layer.square[j] += weight * value * value;
      }
    }
  });
}

void add_rates(LayerStats& layer, std::int64_t top, MatrixView<const float> hidden,
               std::span<const float> weights, const ParallelFor& parallel) {
  std::vector<std::int32_t> ids(static_cast<std::size_t>(hidden.rows * top));
  parallel(hidden.rows, kTopGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t)
      largest_magnitudes(hidden.row(t), hidden.cols, top, ids.data() + t * top);
  });
  for (std::int64_t t = 0; t < hidden.rows; ++t) {
    const float weight = weights.empty() ? 1.0f : weights[t];
    if (weight == 0.0f) continue;
    const std::int32_t* of_token = ids.data() + t * top;
    std::int64_t active = 0;
    while (active < top && hidden(t, of_token[active]) != 0.0f) ++active;
    for (std::int64_t a = 0; a < active; ++a) {
      layer.rate[of_token[a]] += weight;
      for (std::int64_t b = 0; b < active && !layer.coactivation.empty(); ++b)
        if (of_token[a] >= of_token[b]) layer.coactivation.add(of_token[a], of_token[b], weight);
    }
  }
}

std::vector<float> scaled(const std::vector<double>& values, double factor) {
  std::vector<float> out(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) out[i] = static_cast<float>(factor * values[i]);
  return out;
}

void add_to(std::vector<double>& sum, const std::vector<double>& more) {
  for (std::size_t i = 0; i < sum.size(); ++i) sum[i] += more[i];
}

bool same_spec(const NeuronStatsSpec& a, const NeuronStatsSpec& b) {
  return a.num_layers == b.num_layers && a.hidden == b.hidden && a.d_model == b.d_model &&
         a.top == b.top && a.input_moment == b.input_moment && a.gram == b.gram &&
         a.coactivation == b.coactivation;
}

}  // namespace

void largest_magnitudes(const float* row, std::int64_t n, std::int64_t count, std::int32_t* ids) {
  // A sorted list that few elements get into: most cost one comparison.
  std::int64_t kept = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    const float value = std::abs(row[i]);
    if (kept == count && value <= std::abs(row[ids[kept - 1]])) continue;
    std::int64_t place = kept < count ? kept++ : count - 1;
    while (place > 0 && value > std::abs(row[ids[place - 1]])) {
      ids[place] = ids[place - 1];
      --place;
    }
    ids[place] = static_cast<std::int32_t>(i);
  }
}

LayerStats& NeuronStats::Impl::layer(const char* function, std::int64_t l) {
  if (l < 0 || l >= spec.num_layers)
    fail_argument("NeuronStats::{}: layer {}; must be in [0, {})", function, l, spec.num_layers);
  return layers[l];
}

const LayerStats& NeuronStats::Impl::observed(const char* function, std::int64_t l) const {
  const LayerStats& layer = const_cast<Impl*>(this)->layer(function, l);
  if (layer.weight <= 0.0)
    fail_argument("NeuronStats::{}: layer {} has seen no token; call observe() first", function, l);
  return layer;
}

void NeuronStats::Impl::allocate(LayerStats& layer) const {
  if (!layer.sum.empty()) return;
  layer.sum.assign(static_cast<std::size_t>(spec.hidden), 0.0);
  layer.square = layer.rate = layer.sum;
  if (spec.input_moment) layer.input_moment = SymmetricSum(spec.d_model);
  if (spec.gram) layer.gram = SymmetricSum(spec.hidden);
  if (spec.coactivation) layer.coactivation = SymmetricSum(spec.hidden);
}

NeuronStats::NeuronStats(const NeuronStatsSpec& spec) : impl_(std::make_unique<Impl>()) {
  for (const std::int64_t size : {spec.num_layers, spec.hidden, spec.d_model})
    if (size < 1 || size > kMostSize)
      fail_argument("NeuronStats: L = {}, H = {}, D = {}; each must be in [1, {}]", spec.num_layers,
                    spec.hidden, spec.d_model, kMostSize);
  if (spec.top < 1 || spec.top > spec.hidden)
    fail_argument("NeuronStats: Ka = {} neurons a token; must be in [1, H = {}]", spec.top,
                  spec.hidden);
  impl_->spec = spec;
  impl_->layers.resize(static_cast<std::size_t>(spec.num_layers));
}
NeuronStats::NeuronStats(NeuronStats&&) noexcept = default;
NeuronStats& NeuronStats::operator=(NeuronStats&&) noexcept = default;
NeuronStats::~NeuronStats() = default;

void NeuronStats::observe(std::int64_t l, MatrixView<const float> hidden,
                          MatrixView<const float> input, std::span<const float> weights,
                          const ParallelFor& parallel) {
  const NeuronStatsSpec& spec = impl_->spec;
  LayerStats& layer = impl_->layer("observe", l);
  if (hidden.rows != input.rows || hidden.cols != spec.hidden || input.cols != spec.d_model)
    fail_argument(
        "NeuronStats::observe: layer {}: hidden is [{}, {}], input [{}, {}]; expected [T, {}] and "
        "[T, {}]",
        l, hidden.rows, hidden.cols, input.rows, input.cols, spec.hidden, spec.d_model);
  check_token_weights("observe", weights, hidden.rows);
  check_finite_rows("observe", "hidden", l, hidden, layer.seen);
  check_finite_rows("observe", "input", l, input, layer.seen);
  impl_->allocate(layer);
  for (std::int64_t begin = 0; begin < hidden.rows; begin += kStatsBlock) {
    const std::int64_t count = std::min(kStatsBlock, hidden.rows - begin);
    const auto h = hidden.slice_rows(begin, count), x = input.slice_rows(begin, count);
    const auto w = weights.empty() ? weights : weights.subspan(begin, count);
    add_moments(layer, h, w, parallel);
    add_rates(layer, spec.top, h, w, parallel);
    if (spec.input_moment) layer.input_moment.add_rows(WeightedRows(x, w).view, parallel);
    if (spec.gram) layer.gram.add_rows(WeightedRows(h, w).view, parallel);
    for (std::int64_t t = 0; t < count; ++t) {
      const double weight = w.empty() ? 1.0 : w[t];
      layer.weight += weight;
      layer.tokens += weight > 0.0;
    }
  }
  layer.seen += hidden.rows;
}

void NeuronStats::observe_gate(std::int64_t l, MatrixView<const float> gate,
                               std::span<const float> weights) {
  LayerStats& layer = impl_->layer("observe_gate", l);
  if (gate.cols != impl_->spec.hidden)
    fail_argument("NeuronStats::observe_gate: layer {}: gate is [{}, {}]; expected [T, {}]", l,
                  gate.rows, gate.cols, impl_->spec.hidden);
  check_token_weights("observe_gate", weights, gate.rows);
  check_finite_rows("observe_gate", "gate", l, gate, 0);
  std::vector<double> sum(static_cast<std::size_t>(gate.cols));
  double total = 0.0;
  for (std::int64_t t = 0; t < gate.rows; ++t) {
    const double weight = weights.empty() ? 1.0 : weights[t];
    total += weight;
    for (std::int64_t j = 0; j < gate.cols; ++j) sum[j] += weight * gate(t, j);
  }
  if (total <= 0.0)
    fail_argument("NeuronStats::observe_gate: layer {}: a sample of no token that counts", l);
  const std::vector<float> mean = scaled(sum, 1.0 / total);
  layer.gate_means.insert(layer.gate_means.end(), mean.begin(), mean.end());
}

void NeuronStats::merge(const NeuronStats& other) {
  if (!same_spec(impl_->spec, other.impl_->spec))
    fail_argument(
        "NeuronStats::merge: other specs (L = {}, H = {}, D = {}, Ka = {} and L = {}, H = {}, D = "
        "{}, Ka = {}, or other matrices); merge what was counted alike",
        impl_->spec.num_layers, impl_->spec.hidden, impl_->spec.d_model, impl_->spec.top,
        other.impl_->spec.num_layers, other.impl_->spec.hidden, other.impl_->spec.d_model,
        other.impl_->spec.top);
  for (std::size_t l = 0; l < impl_->layers.size(); ++l) {
    LayerStats& to = impl_->layers[l];
    const LayerStats& from = other.impl_->layers[l];
    const std::vector<float> gate_means = from.gate_means;  // `from` may be `to`
    to.gate_means.insert(to.gate_means.end(), gate_means.begin(), gate_means.end());
    if (from.sum.empty()) continue;
    impl_->allocate(to);
    add_to(to.sum, from.sum);
    add_to(to.square, from.square);
    add_to(to.rate, from.rate);
    to.input_moment.merge(from.input_moment);
    to.gram.merge(from.gram);
    to.coactivation.merge(from.coactivation);
    to.tokens += from.tokens;
    to.seen += from.seen;
    to.weight += from.weight;
  }
}

const NeuronStatsSpec& NeuronStats::spec() const { return impl_->spec; }
std::int64_t NeuronStats::num_tokens(std::int64_t l) const {
  return impl_->layer("num_tokens", l).tokens;
}
double NeuronStats::total_weight(std::int64_t l) const {
  return impl_->layer("total_weight", l).weight;
}

std::vector<float> NeuronStats::mean(std::int64_t l) const {
  const LayerStats& layer = impl_->observed("mean", l);
  return scaled(layer.sum, 1.0 / layer.weight);
}

std::vector<float> NeuronStats::square(std::int64_t l) const {
  const LayerStats& layer = impl_->observed("square", l);
  return scaled(layer.square, 1.0 / layer.weight);
}

std::vector<float> NeuronStats::variance(std::int64_t l) const {
  const LayerStats& layer = impl_->observed("variance", l);
  std::vector<float> out(layer.sum.size());
  for (std::size_t j = 0; j < out.size(); ++j) {
    const double mean = layer.sum[j] / layer.weight;
    out[j] = static_cast<float>(std::max(0.0, layer.square[j] / layer.weight - mean * mean));
  }
  return out;
}

std::vector<float> NeuronStats::energy(std::int64_t l, std::span<const float> down_norm) const {
  std::vector<float> out = square(l);
  if (down_norm.size() != out.size())
    fail_argument("NeuronStats::energy: {} norms of `down` for H = {} neurons", down_norm.size(),
                  out.size());
  for (std::size_t j = 0; j < out.size(); ++j) out[j] *= down_norm[j] * down_norm[j];
  return out;
}

std::vector<float> NeuronStats::rate(std::int64_t l) const {
  const LayerStats& layer = impl_->observed("rate", l);
  return scaled(layer.rate, 1.0 / layer.weight);
}

std::vector<float> NeuronStats::input_moment(std::int64_t l) const {
  const LayerStats& layer = impl_->observed("input_moment", l);
  if (layer.input_moment.empty())
    fail_argument("NeuronStats::input_moment: not counted; set NeuronStatsSpec::input_moment");
  return layer.input_moment.full(1.0 / layer.weight);
}

std::vector<float> NeuronStats::gram(std::int64_t l) const {
  const LayerStats& layer = impl_->observed("gram", l);
  if (layer.gram.empty())
    fail_argument("NeuronStats::gram: not counted; set NeuronStatsSpec::gram");
  return layer.gram.full(1.0 / layer.weight);
}

std::vector<float> NeuronStats::coactivation(std::int64_t l) const {
  const LayerStats& layer = impl_->observed("coactivation", l);
  if (layer.coactivation.empty())
    fail_argument("NeuronStats::coactivation: not counted; set NeuronStatsSpec::coactivation");
  return layer.coactivation.full(1.0 / layer.weight);
}

std::vector<float> NeuronStats::gate_means(std::int64_t l) const {
  return impl_->layer("gate_means", l).gate_means;
}

std::int64_t NeuronStats::memory_bytes() const {
  std::int64_t bytes = 0;
  for (const LayerStats& layer : impl_->layers)
    bytes += static_cast<std::int64_t>(3 * layer.sum.size() * sizeof(double) +
                                       layer.gate_means.size() * sizeof(float)) +
             layer.input_moment.bytes() + layer.gram.bytes() + layer.coactivation.bytes();
  return bytes;
}

}  // namespace cleave
