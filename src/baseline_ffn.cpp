#include "baseline_ffn.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "cleave/calibrate.h"
#include "kernels/dispatch.h"
#include "kernels/product.h"

namespace cleave {
namespace {

constexpr std::int64_t kTokenGrain = 16;    // tokens worth a thread
constexpr std::int64_t kSquareTokens = 64;  // whose expert outputs are held at a time

bool needs_outputs(BaselineRouter router) {
  return router == BaselineRouter::kOracleNorm || router == BaselineRouter::kOracleLabel;
}

}  // namespace

ExpertSplit::ExpertSplit(const FfnView& ffn, std::vector<std::int32_t> expert_of_neuron,
                         std::int64_t num_experts_in)
    : num_experts(num_experts_in), expert(std::move(expert_of_neuron)) {
  for (std::int32_t e = 0; e < num_experts; ++e)
    for (std::size_t j = 0; j < expert.size(); ++j)
      if (expert[j] == e) order.push_back(static_cast<std::int32_t>(j));
  const auto rows = static_cast<std::int64_t>(order.size());
  const std::int64_t D = ffn.down.rows;
  width = rows / num_experts;
  down_rows.resize(static_cast<std::size_t>(rows * D));
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t d = 0; d < D; ++d) down_rows[r * D + d] = ffn.down(d, order[r]);
}

void expert_squares(const ExpertSplit& split, MatrixView<const float> h,
                    MatrixView<const float> teacher, double share, MatrixView<float> out,
                    const ParallelFor& parallel) {
  const auto rows = static_cast<std::int64_t>(split.order.size());
  const std::int64_t I = split.width;
  const std::int64_t D = static_cast<std::int64_t>(split.down_rows.size()) / rows;
  const auto piece = [&](std::int64_t begin, std::int64_t count, float* grouped, float* output) {
    for (std::int64_t t = 0; t < count; ++t)
      for (std::int64_t r = 0; r < rows; ++r) grouped[t * rows + r] = h(begin + t, split.order[r]);
    for (std::int64_t e = 0; e < split.num_experts; ++e) {
      isa_kernels().product_nn({grouped + e * I, count, I, rows},
                               {split.down_rows.data() + e * I * D, I, D, D}, {output, count, D, D},
                               Store::kOverwrite);
      for (std::int64_t t = 0; t < count; ++t) {
        float sum[8] = {};  // side by side, so that the compiler may use vectors
        const float* row = output + t * D;
        const float* target = teacher.empty() ? nullptr : teacher.row(begin + t);
        for (std::int64_t d = 0; d < D; ++d) {
          const float value =
              target == nullptr ? row[d] : row[d] - static_cast<float>(share) * target[d];
          sum[d % 8] += value * value;
        }
        out(begin + t, e) = std::accumulate(sum, sum + 8, 0.0f);
      }
    }
  };
  parallel(h.rows, kTokenGrain, [&](std::int64_t from, std::int64_t to) {
    Buffer grouped(kSquareTokens * rows), output(kSquareTokens * D);
    for (std::int64_t begin = from; begin < to; begin += kSquareTokens)
      piece(begin, std::min(kSquareTokens, to - begin), grouped.data(), output.data());
  });
}

void choose_largest(MatrixView<const float> scores, std::int64_t experts_per_token,
                    std::uint8_t* on, const ParallelFor& parallel) {
  const std::int64_t E = scores.cols;
  parallel(scores.rows, kTokenGrain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(E));
    for (std::int64_t t = begin; t < end; ++t) {
      std::iota(ids.begin(), ids.end(), 0);
      const float* row = scores.row(t);
      std::partial_sort(ids.begin(), ids.begin() + experts_per_token, ids.end(),
                        [row](std::int32_t a, std::int32_t b) {
                          return row[a] != row[b] ? row[a] > row[b] : a < b;
                        });
      std::fill_n(on + t * E, E, std::uint8_t{0});
      for (std::int64_t k = 0; k < experts_per_token; ++k) on[t * E + ids[k]] = 1;
    }
  });
}

void router_scores(const BaselineSpec& spec, const BaselineLayer& layer, MatrixView<const float> x,
                   MatrixView<float> scores, const ParallelFor& parallel) {
  if (spec.router == BaselineRouter::kRegression)
    regression_scores(layer.regression, x, scores, parallel);
  else if (spec.router == BaselineRouter::kMass)
    mass_scores(layer.mass, x, scores, parallel);
  else
    linear(x, layer.router.view(), layer.router_bias, scores, parallel);
}

MaskedFfn::MaskedFfn(const DenseFfn& ffn, const BaselineSpec& spec, const BaselineLayer& layer)
    : ffn_(ffn), spec_(spec), layer_(layer) {
  if (needs_outputs(spec.router))
    split_.emplace_back(ffn.view(), layer.expert_of_neuron, spec.num_experts);
  if (spec.router == BaselineRouter::kOracleNeuron) norms_ = down_norms(ffn.view());
}

void MaskedFfn::score(MatrixView<const float> x, MatrixView<const float> h,
                      MatrixView<float> scores, const ParallelFor& parallel) const {
  const std::int64_t T = x.rows, E = spec_.num_experts;
  switch (spec_.router) {
    case BaselineRouter::kOracleNorm:
      expert_squares(split_.front(), h, {}, 0.0, scores, parallel);
      return;
    case BaselineRouter::kOracleLabel: {
      Buffer teacher(T * x.cols);
      const MatrixView<float> whole(teacher.data(), T, x.cols);
      linear(h, ffn_.view().down, {}, whole, parallel);
      const std::int64_t parts = std::max<std::int64_t>(1, E / spec_.experts_per_token);
      expert_squares(split_.front(), h, whole, 1.0 / static_cast<double>(parts), scores, parallel);
      for (std::int64_t i = 0; i < T * E; ++i) scores.data[i] = -scores.data[i];
      return;
    }
    case BaselineRouter::kRepresentative:
      for (std::int64_t t = 0; t < T; ++t)
        for (std::int64_t e = 0; e < E; ++e)
          scores(t, e) = std::abs(h(t, layer_.representatives[e]));
      return;
    default:
      router_scores(spec_, layer_, x, scores, parallel);
  }
}

void MaskedFfn::choose(MatrixView<const float> x, MatrixView<const float> h, std::uint8_t* on,
                       const ParallelFor& parallel) const {
  Buffer scores(x.rows * spec_.num_experts);
  const MatrixView<float> view(scores.data(), x.rows, spec_.num_experts);
  score(x, h, view, parallel);
  choose_largest(view, spec_.experts_per_token, on, parallel);
}

void MaskedFfn::mask_experts(const std::uint8_t* on, MatrixView<float> h,
                             const ParallelFor& parallel) const {
  const std::int64_t E = spec_.num_experts;
  const float scale =
      spec_.scale_up ? static_cast<float>(E) / static_cast<float>(spec_.experts_per_token) : 1.0f;
  parallel(h.rows, kTokenGrain, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* row = h.row(t);
      for (std::int64_t j = 0; j < h.cols; ++j) {
        const std::int32_t e = layer_.expert_of_neuron[j];
        if (e == BaselineLayer::kShared) continue;
        if (e != BaselineLayer::kOff && on[t * E + e] != 0)
          row[j] *= scale;
        else
          row[j] = layer_.off_value.empty() ? 0.0f : layer_.off_value[j];
      }
    }
  });
}

void MaskedFfn::mask_neurons(MatrixView<float> h, const ParallelFor& parallel) const {
  const std::int64_t H = h.cols, kept = spec_.shared;
  if (kept >= H) return;
  parallel(h.rows, kTokenGrain, [&](std::int64_t begin, std::int64_t end) {
    std::vector<std::pair<float, std::int32_t>> size(static_cast<std::size_t>(H));
    for (std::int64_t t = begin; t < end; ++t) {
      for (std::int64_t j = 0; j < H; ++j)
        size[j] = {-std::abs(h(t, j)) * norms_[j], static_cast<std::int32_t>(j)};
      std::nth_element(size.begin(), size.begin() + kept, size.end());
      for (std::int64_t i = kept; i < H; ++i) h(t, size[i].second) = 0.0f;
    }
  });
}

void MaskedFfn::run(MatrixView<const float> x, MatrixView<float> y,
                    const ParallelFor& parallel) const {
  const FfnView ffn = ffn_.view();
  Buffer hidden(x.rows * ffn_.hidden);
  const MatrixView<float> h(hidden.data(), x.rows, ffn_.hidden);
  hidden_activations(ffn, x, h, {}, parallel);
  if (spec_.router == BaselineRouter::kOracleNeuron) {
    mask_neurons(h, parallel);
  } else {
    std::vector<std::uint8_t> on(static_cast<std::size_t>(x.rows * spec_.num_experts));
    if (spec_.num_experts > 0) choose(x, h, on.data(), parallel);
    mask_experts(on.data(), h, parallel);
  }
  linear_add(h, ffn.down, ffn.down_bias, y, parallel);
}

}  // namespace cleave
