#include "allocate_budget.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "cleave/evaluate.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "support/buffer.h"
#include "window_stream.h"

namespace cleave {
namespace {

constexpr std::int64_t kLeastApart = 2;  // windows
constexpr std::int64_t kWindowsPerApart = 16;
constexpr std::int64_t kQuickPart = 4;   // a quick conversion sees one window in so many
constexpr std::int64_t kStepPart = 4;    // a layer is tried with a quarter more, and with one less
constexpr std::int64_t kCandidates = 3;  // beside the uniform one

/// `count` of `all` indices, evenly spaced.
std::vector<std::int64_t> spread(std::int64_t all, std::int64_t count) {
  std::vector<std::int64_t> indices;
  for (std::int64_t i = 0; i < count; ++i) indices.push_back((2 * i + 1) * all / (2 * count));
  return indices;
}

/// The calibration text's parts.
struct AllocationText {
  TokenWindows fit;    // what the conversions learn from
  TokenWindows quick;  // of that, what the quick ones see
  TokenWindows apart;  // what is fitted on nothing
  TokenWindows scan;   // of that, the first halves: layers are many

  explicit AllocationText(const TokenWindows& text) {
    const std::int64_t all = text.count(), context = text.context;
    const auto held = spread(all, std::max(kLeastApart, all / kWindowsPerApart));
    std::vector<std::int64_t> others;
    for (std::int64_t w = 0; w < all; ++w)
      if (!std::binary_search(held.begin(), held.end(), w)) others.push_back(w);
    fit = pick_windows(text, others, context);
    quick = pick_windows(fit, spread(fit.count(), std::max<std::int64_t>(1, all / kQuickPart)),
                         context);
    apart = pick_windows(text, held, context);
    const std::int64_t least = std::max<std::int64_t>(2, text.before + text.after + 1);
    scan = pick_windows(text, held, std::max(least, context / 2));
  }
};

/// One round and a router in closed form: enough to tell layers and divisions apart.
BudgetSpec quick_spec(BudgetSpec spec) {
  spec.rounds = std::min<std::int64_t>(spec.rounds, 1);
  spec.refit_rounds = 1;
  if (spec.router_method == RouterMethod::kTrained || spec.router_method == RouterMethod::kLogistic)
    spec.router_method = RouterMethod::kRidge;
  return spec;
}

/// Every layer of the dense model converted alone, at three widths of its shared slice.
class LayerScan {
 public:
  LayerScan(Model& model, const BudgetSpec& spec, const BudgetShares& shares, std::int64_t step,
            const AllocationText& text)
      : model_(model),
        spec_(quick_spec(spec)),
        shares_(shares),
        step_(step),
        text_(text),
        parallel_(model.parallel()),
        stream_(model, std::vector<const TokenWindows*>{&text.quick, &text.apart}),
        seen_(text.quick.count() * text.quick.context),
        width_(model.config().intermediate_size + step * spec.expert_width),
        input_(stream_.tokens() * model.config().hidden_size),
        hidden_(stream_.tokens() * model.config().intermediate_size),
        target_(stream_.tokens() * model.config().hidden_size),
        work_(stream_.tokens() * width_),
        states_(hidden_states(model, text.scan)) {}

  std::vector<LayerCost> run(const BudgetProgress& progress) {
    std::vector<LayerCost> costs;
    const std::int64_t layers = model_.config().num_layers;
    for (std::int64_t l = 0; l < layers; ++l) {
      costs.push_back(scan_layer(l));
      if (progress) progress("scan", l + 1, layers);
    }
    return costs;
  }

 private:
  LayerCost scan_layer(std::int64_t l) {
    const SplitSource dense(model_.dense_ffn(l));
    const std::int64_t T = stream_.tokens(), D = dense.ffn.d_model, H = dense.ffn.hidden;
    const MatrixView<float> input(input_.data(), T, D), hidden(hidden_.data(), T, H);
    const MatrixView<float> target(target_.data(), T, D);
    stream_.attend(l, input);
    dense.hidden_values(input, hidden, parallel_);
    down_product(hidden, dense.down_t, {}, target, parallel_);
    weight_ =
        token_weights(stream_.rows(), target, text_.quick.context, spec_.first_token_weight, l);
    const std::int64_t uniform = shares_.shared, step = step_ * spec_.expert_width;
    double more = 0.0, less = 0.0, same = 0.0;
    const MoeLayer layer = try_width(dense, l, uniform, same);
    try_width(dense, l, uniform + step, more);
    try_width(dense, l, uniform - step, less);
    LayerCost cost;
    cost.kl = kl_of(l, layer);
    // Both sides in one number keep the cost convex, however noisy the three errors are.
    if (more > 0.0 && less > more)
      cost.slope = (std::log(less) - std::log(more)) / static_cast<double>(2 * step_);
    for (std::int64_t t = 0; t < T; ++t) {
      isa_kernels().add(target.row(t), stream_.rows().row(t), D);
      if (!dense.ffn.down_bias.empty())
        isa_kernels().add(dense.ffn.down_bias.data(), stream_.rows().row(t), D);
    }
    return cost;
  }

  /// The layer at a width, fitted on the windows to learn from; `error` is that on the others.
  MoeLayer try_width(const SplitSource& dense, std::int64_t l, std::int64_t shared_width,
                     double& error) {
    const std::int64_t T = stream_.tokens(), D = dense.ffn.d_model, H = dense.ffn.hidden;
    const std::int64_t size = shared_width + shares_.experts * spec_.expert_width;
    const MatrixView<float> input(input_.data(), T, D), target(target_.data(), T, D);
    const auto columns = [&](std::int64_t neurons) {
      return MatrixView<float>(work_.data(), T, neurons, width_);
    };
    for (std::int64_t t = 0; t < T; ++t) std::copy_n(hidden_.data() + t * H, H, columns(H).row(t));
    const auto tokens = [&](const SplitSource& source) {
      return LayerTokens{input.slice_rows(0, seen_),
                         columns(source.ffn.hidden).slice_rows(0, seen_),
                         std::span(weight_).first(static_cast<std::size_t>(seen_)),
                         source.down_square,
                         source.ffn.view(),
                         text_.quick.context};
    };
    const ResizedLayer layer =
        resize_layer(dense, tokens(dense), columns(std::max(H, size)), size, parallel_);
    const Capture capture = capture_energy(
        tokens(layer.source), capture_spec(spec_, shares_, shared_width, l), parallel_);
    BudgetRows rows(layer.source.ffn.view(), capture.partition);
    const Routing routing =
        route_tokens(input, capture.router, shares_.active, spec_.gate, parallel_);
    const MatrixView<float> features = columns(rows.size());
    mask_features(rows, routing, gate_scale(spec_.gate, shares_.active), columns(size), features,
                  parallel_);
    const std::span<const float> weight(weight_);
    if (spec_.refit)
      rows.set_down_t(repaired_down(
          rows.down_t(), features.slice_rows(0, seen_), target.slice_rows(0, seen_),
          weight.first(static_cast<std::size_t>(seen_)), spec_.refit_spec, parallel_));
    std::vector<float> missing;
    if (!dense.ffn.down_bias.empty()) missing = missing_mean(features, rows.down_t(), target);
    error = error_apart(features, rows.down_t(), missing, target);
    rows.experts.down_bias = summed(dense.ffn.down_bias, missing);
    return make_budget_layer(std::move(rows), capture.router, shares_.active, spec_.gate);
  }

  /// What an output bias has to give, of the windows to learn from.
  std::vector<float> missing_mean(MatrixView<const float> features,
                                  const std::vector<float>& down_t,
                                  MatrixView<const float> target) const {
    Buffer y(seen_ * target.cols);
    const MatrixView<float> out(y.data(), seen_, target.cols);
    down_product(features.slice_rows(0, seen_), down_t, {}, out, parallel_);
    return mean_difference(target.slice_rows(0, seen_), out, weight_);
  }

  /// Of the windows held apart.
  double error_apart(MatrixView<const float> features, const std::vector<float>& down_t,
                     std::span<const float> bias, MatrixView<const float> target) const {
    const std::int64_t rest = features.rows - seen_, D = target.cols;
    Buffer y(rest * D);
    const MatrixView<float> out(y.data(), rest, D);
    down_product(features.slice_rows(seen_, rest), down_t, bias, out, parallel_);
    return relative_error(out, target.slice_rows(seen_, rest),
                          std::span<const float>(weight_).subspan(static_cast<std::size_t>(seen_)));
  }

  /// Of the dense model with this layer in place of its FFN.
  double kl_of(std::int64_t l, const MoeLayer& layer) {
    EvalSpec eval{.reference = &model_, .reference_states = &states_};
    eval.hooks.ffn = [&](std::int64_t index, MatrixView<const float> x, MatrixView<float> y) {
      if (index != l) return false;
      layer.forward(x, y, parallel_);
      return true;
    };
    return std::max(evaluate(model_, text_.scan, eval).divergence(), 0.0);
  }

  Model& model_;
  BudgetSpec spec_;
  BudgetShares shares_;
  std::int64_t step_;  // experts
  const AllocationText& text_;
  ParallelFor parallel_;
  WindowStream stream_;  // of the dense model: the windows to learn from, then those held apart
  std::int64_t seen_;    // tokens of the former
  std::int64_t width_;   // of the rows of work_: the most neurons of a layer
  Buffer input_, hidden_, target_, work_;  // [T, D], [T, H], [T, D], [T, width_]
  std::vector<float> weight_;              // [T] of the layer at hand
  HiddenStates states_;                    // of the dense model on text_.scan
};

/// Converts and measures divisions of the shared neurons.
class AllocationTrials {
 public:
  AllocationTrials(Model& dense, const Checkpoint& source, const BudgetSpec& spec,
                   const AllocationText& text, const BudgetProgress& progress)
      : dense_(dense),
        converted_(Model::load(source, {.threads = spec.threads})),
        spec_(spec),
        text_(text),
        progress_(progress) {
    for (std::int64_t w = 0; w < text.apart.count(); ++w)
      states_.push_back(hidden_states(dense, pick_windows(text.apart, {w}, text.apart.context)));
  }

  double screen(const std::vector<std::int64_t>& shared_widths) {
    return mean(measure(
        convert_layers(dense_, quick_spec(spec_), shared_widths, text_.quick, named("screen"))));
  }
  /// @param kl  receives that of each window held apart
  Conversion convert(const std::vector<std::int64_t>& shared_widths, std::vector<double>& kl) {
    Conversion conversion =
        convert_layers(dense_, spec_, shared_widths, text_.fit, named("convert"));
    kl = measure(conversion);
    return conversion;
  }
  static double mean(const std::vector<double>& values) {
    return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  }

 private:
  std::vector<double> measure(const Conversion& conversion) {
    for (std::size_t l = 0; l < conversion.layers.size(); ++l)
      converted_.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
    std::vector<double> kl;
    for (std::int64_t w = 0; w < text_.apart.count(); ++w)
      kl.push_back(evaluate(converted_, pick_windows(text_.apart, {w}, text_.apart.context),
                            EvalSpec{.reference = &dense_,
                                     .reference_states = &states_[static_cast<std::size_t>(w)]})
                       .divergence());
    return kl;
  }
  BudgetProgress named(const char* what) const {
    if (!progress_) return {};
    return [this, what](const std::string&, std::int64_t done, std::int64_t all) {
      progress_(what, done, all);
    };
  }

  Model& dense_;
  Model converted_;
  const BudgetSpec& spec_;
  const AllocationText& text_;
  const BudgetProgress& progress_;
  std::vector<HiddenStates> states_;  // of the dense model on each window of text_.apart
};

/// On every window: the mean of a few is easily owned by one.
bool better_everywhere(const std::vector<double>& kl, const std::vector<double>& than) {
  return std::equal(kl.begin(), kl.end(), than.begin(), std::less<>());
}

double cost_at(const LayerCost& cost, std::int64_t more) {
  return cost.kl * std::exp(-cost.slope * static_cast<double>(more));
}

/// Divisions of growing strength: after a third of the moves, two thirds, all.
std::vector<AllocationCandidate> make_candidates(
    const std::vector<std::vector<std::int64_t>>& moves, std::size_t layers, std::int64_t uniform,
    std::int64_t expert_width) {
  std::vector<AllocationCandidate> candidates(1);
  candidates[0].shared_widths.assign(layers, uniform * expert_width);
  const auto count = static_cast<std::int64_t>(moves.size());
  std::int64_t last = 0;
  for (std::int64_t i = 1; i <= kCandidates; ++i) {
    const std::int64_t done = (count * i + kCandidates - 1) / kCandidates;
    if (done == last) continue;
    last = done;
    AllocationCandidate candidate;
    for (const std::int64_t width : moves[static_cast<std::size_t>(done - 1)])
      candidate.shared_widths.push_back(width * expert_width);
    candidates.push_back(std::move(candidate));
  }
  return candidates;
}

/// The first of the candidates with the least screening KL: the uniform one wins ties.
std::size_t best_screened(const std::vector<AllocationCandidate>& candidates) {
  const auto best =
      std::min_element(candidates.begin(), candidates.end(),
                       [](const AllocationCandidate& a, const AllocationCandidate& b) {
                         return a.screening_kl < b.screening_kl;
                       });
  return static_cast<std::size_t>(best - candidates.begin());
}

}  // namespace

TokenWindows pick_windows(const TokenWindows& from, const std::vector<std::int64_t>& which,
                          std::int64_t context) {
  TokenWindows picked;
  picked.context = context;
  picked.before = from.before;
  picked.after = from.after;
  for (const std::int64_t w : which) {
    const auto window = from.window(w);
    const auto text = window.first(static_cast<std::size_t>(context - from.after));
    const auto after = window.last(static_cast<std::size_t>(from.after));
    picked.tokens.insert(picked.tokens.end(), text.begin(), text.end());
    picked.tokens.insert(picked.tokens.end(), after.begin(), after.end());
  }
  return picked;
}

std::vector<std::vector<std::int64_t>> exchange_widths(const std::vector<LayerCost>& costs,
                                                       const WidthRange& range) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<std::int64_t> more(costs.size(), 0);  // than uniform
  std::vector<std::vector<std::int64_t>> moves;
  for (;;) {
    double gain = 0.0, loss = kInfinity;
    std::size_t to = costs.size(), from = costs.size();
    for (std::size_t l = 0; l < costs.size(); ++l) {
      const double now = cost_at(costs[l], more[l]);
      if (range.uniform + more[l] < range.most) {
        const double gained = now - cost_at(costs[l], more[l] + 1);
        if (gained > gain) gain = gained, to = l;
      }
      if (range.uniform + more[l] > range.least) {
        const double lost = cost_at(costs[l], more[l] - 1) - now;
        if (lost < loss) loss = lost, from = l;
      }
    }
    if (to == costs.size() || from == costs.size() || gain <= loss) return moves;
    ++more[to];
    --more[from];
    moves.push_back(more);
    for (std::int64_t& width : moves.back()) width += range.uniform;
  }
}

void check_allocation(const BudgetShares& shares, const TokenWindows& calibration) {
  if (shares.active == 0 || shares.shared == 0)
    fail_argument(
        "convert: allocation 'kl' divides the neurons that always run among the layers, beside "
        "experts of which some run; here {}; give another shared part, or allocation 'uniform'",
        shares.shared == 0 ? "none always run" : "nothing is routed");
  if (calibration.count() < kLeastApart + 1)
    fail_argument(
        "convert: allocation 'kl' holds {} windows apart from the fit, and the calibration text "
        "has {} of {} tokens; needs at least {}: give more text, shorter windows, or allocation "
        "'uniform'",
        kLeastApart, calibration.count(), calibration.context, kLeastApart + 1);
}

Conversion convert_allocated(Model& model, const Checkpoint& source, const BudgetSpec& spec,
                             const TokenWindows& calibration, const BudgetProgress& progress) {
  const BudgetShares shares = divide_budget(model.config().intermediate_size, spec);
  const auto layers = static_cast<std::size_t>(model.config().num_layers);
  const std::int64_t uniform = shares.shared / spec.expert_width;
  // What a layer gets more leaves as many experts empty; K must be left to choose from.
  const std::int64_t step =
      std::min(std::max<std::int64_t>(1, uniform / kStepPart), shares.experts - shares.active);
  const WidthRange range{uniform, std::max<std::int64_t>(0, uniform - 2 * step),
                         uniform + std::min(2 * step, shares.experts - shares.active)};
  const AllocationText text(calibration);
  AllocationChoice choice;
  choice.windows = text.apart.count();
  std::vector<LayerCost> costs(layers);
  if (step > 0) costs = LayerScan(model, spec, shares, step, text).run(progress);
  for (const LayerCost& cost : costs) {
    choice.layer_kl.push_back(cost.kl);
    choice.layer_slope.push_back(cost.slope);
  }
  choice.candidates =
      make_candidates(exchange_widths(costs, range), layers, uniform, spec.expert_width);

  AllocationTrials trials(model, source, spec, text, progress);
  if (choice.candidates.size() > 1)
    for (AllocationCandidate& candidate : choice.candidates)
      candidate.screening_kl = trials.screen(candidate.shared_widths);
  const std::size_t best = best_screened(choice.candidates);
  std::vector<double> uniform_kl, kl;
  Conversion conversion = trials.convert(choice.candidates[0].shared_widths, uniform_kl);
  choice.candidates[0].kl = AllocationTrials::mean(uniform_kl);
  if (best != 0) {
    Conversion other = trials.convert(choice.candidates[best].shared_widths, kl);
    choice.candidates[best].kl = AllocationTrials::mean(kl);
    if (better_everywhere(kl, uniform_kl)) {
      choice.chosen = best;
      conversion = std::move(other);
    }
  }
  conversion.allocation = std::move(choice);
  return conversion;
}

}  // namespace cleave
