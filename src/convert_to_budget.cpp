#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "allocate_budget.h"
#include "budget_layer.h"
#include "budget_notices.h"
#include "cleave/convert.h"
#include "cleave/model.h"
#include "fail.h"
#include "kernels/dispatch.h"
#include "rare_tokens.h"
#include "support/buffer.h"
#include "window_stream.h"

namespace cleave {
namespace {

void check_rare_tokens(const BudgetSpec& spec) {
  if (!(spec.rare_tokens >= 0.0 && spec.rare_tokens <= 1.0))
    fail_argument("convert: rare tokens in {} of the windows; give a share from 0 to 1",
                  spec.rare_tokens);
}

void check_refit_rounds(const BudgetSpec& spec, const BudgetShares& shares) {
  if (spec.refit_rounds < 1)
    fail_argument("convert: {} refit rounds; give 1 or more", spec.refit_rounds);
  if (spec.refit_rounds == 1) return;
  const bool from_weights = spec.router_method == RouterMethod::kMeanGate ||
                            spec.router_method == RouterMethod::kRepresentative;
  if (!spec.refit || shares.active == 0 || from_weights)
    fail_argument(
        "convert: {} refit rounds fit the router again to the repaired experts, and here {}; give "
        "1",
        spec.refit_rounds,
        !spec.refit          ? "nothing is repaired"
        : shares.active == 0 ? "nothing is routed"
                             : "the router does not look at their energies");
}

class BudgetConversion {
 public:
  BudgetConversion(Model& model, const BudgetSpec& spec,
                   const std::vector<std::int64_t>& shared_widths, const TokenWindows& windows,
                   const BudgetProgress& progress, StaticScore score)
      : spec_(spec),
        score_(score),
        progress_(progress),
        shares_(divide_budget(model.config().intermediate_size, spec)),
        shared_widths_(shared_widths),
        model_(model),
        parallel_(model_.parallel()),
        windows_(windows),
        rare_(rare_windows(model, windows, spec)),
        stream_(model_, texts_),
        width_(std::max(model.config().intermediate_size,
                        layer_size(*std::max_element(shared_widths.begin(), shared_widths.end())))),
        input_(stream_.tokens() * model.config().hidden_size),
        hidden_(stream_.tokens() * width_),
        target_(stream_.tokens() * model.config().hidden_size) {
    if (!parallel_mode() && spec.correction != 0.0) dense_.emplace(model_, texts_);
  }

  Conversion run() {
    conversion_.partition = shares_.active == 0 ? "energy"
                            : spec_.partition == BudgetPartition::kCaptured
                                ? "captured energy"
                                : budget_partition_name(spec_.partition);
    conversion_.seed = spec_.seed;
    conversion_.router = shares_.active == 0 ? "none" : router_method_name(spec_.router_method);
    conversion_.scale = ScalePolicy::kActive;
    conversion_.calibration_tokens = text_tokens();
    const std::int64_t layers = model_.config().num_layers;
    for (std::int64_t l = 0; l < layers; ++l) {
      convert_layer(l);
      if (l + 1 == rare_token_layers(layers)) forget_rare_tokens();
      if (progress_) progress_("convert", l + 1, layers);
    }
    add_notices();
    return std::move(conversion_);
  }

 private:
  bool parallel_mode() const { return spec_.calibration_mode == CalibrationMode::kParallel; }

  static TokenWindows rare_windows(Model& model, const TokenWindows& windows,
                                   const BudgetSpec& spec) {
    if (spec.rare_tokens == 0.0) return {{}, windows.context};
    const auto count = static_cast<std::int64_t>(
        std::ceil(spec.rare_tokens * static_cast<double>(windows.count())));
    return rare_token_windows(model, windows, count, spec.seed);
  }
  std::int64_t text_tokens() const { return windows_.count() * windows_.context; }

  void forget_rare_tokens() {
    stream_.keep_windows(windows_.count());
    if (dense_) dense_->keep_windows(windows_.count());
  }

  /// H' of a layer: as many neurons as its experts and its shared slice hold.
  std::int64_t layer_size(std::int64_t shared_width) const {
    return shared_width + shares_.experts * spec_.expert_width;
  }

  /// Of all tokens at the layer at hand.
  MatrixView<float> hidden(std::int64_t neurons) {
    return {hidden_.data(), stream_.tokens(), neurons, width_};
  }

  void convert_layer(std::int64_t l) {
    SplitSource dense(model_.dense_ffn(l));
    const std::int64_t T = stream_.tokens(), D = dense.ffn.d_model, H = dense.ffn.hidden;
    const MatrixView<float> input(input_.data(), T, D), target(target_.data(), T, D);
    const std::vector<float> down_bias = dense.ffn.down_bias;
    if (dense_) advance_dense(dense, l);
    stream_.attend(l, input);
    dense.hidden_values(input, hidden(H), parallel_);
    down_product(hidden(H), dense.down_t, {}, target, parallel_);
    const std::vector<float> weight =
        token_weights(stream_.rows(), target, windows_.context, spec_.first_token_weight, l);
    const auto tokens_of = [&](const SplitSource& source) {
      return LayerTokens{
          input,           hidden(source.ffn.hidden), weight, source.down_square, source.ffn.view(),
          windows_.context};
    };
    // Nothing is routed: the slice takes what it wants of all neurons.
    const std::int64_t size = shares_.active > 0 ? layer_size(shared_widths_[l]) : H;
    const LayerTokens all = tokens_of(dense);  // what it looks at moves along, and stays in place
    const ResizedLayer layer =
        resize_layer(std::move(dense), all, hidden(std::max(H, size)), size, parallel_);
    Capture capture = split(tokens_of(layer.source), l);
    if (dense_) aim_at_dense_stream(target, down_bias);
    BudgetRows rows = route_and_refit(layer, tokens_of(layer.source), target, capture, l);
    record_capture(capture, layer.energy);
    const std::vector<float> missing =
        advance(down_bias, hidden(rows.size()), rows.down_t(), target, weight);
    keep(std::move(rows), capture, summed(down_bias, missing));
  }

  /// The rows of a split as they will be stored; hidden_ becomes the features of the refit.
  BudgetRows route_and_refit(const ResizedLayer& layer, const LayerTokens& tokens,
                             MatrixView<const float> target, Capture& capture, std::int64_t l) {
    BudgetRows rows(layer.source.ffn.view(), capture.partition);
    rows.name_neurons(layer.neuron, model_.config().intermediate_size);
    const std::vector<float> dense_down = rows.down_t();
    const MatrixView<float> features = hidden(rows.size());
    Routing routing;
    for (std::int64_t round = 0; round < spec_.refit_rounds; ++round) {
      if (round > 0) {
        layer.source.hidden_values(tokens.input, hidden(layer.source.ffn.hidden), parallel_);
        fit_to_rows(rows, tokens, capture, l);
      }
      if (shares_.active > 0)
        routing = route_tokens(tokens.input, capture.router, shares_.active, spec_.gate, parallel_);
      mask_features(rows, routing, gate_scale(spec_.gate, shares_.active),
                    hidden(layer.source.ffn.hidden), features, parallel_);
      if (spec_.refit)
        rows.set_down_t(repaired_down(dense_down, features, target, tokens.weight, spec_.refit_spec,
                                      parallel_));
    }
    record_load(rows, routing, l);
    return rows;
  }

  /// The router, fitted to what the rows' experts give.
  void fit_to_rows(const BudgetRows& rows, LayerTokens tokens, Capture& capture, std::int64_t l) {
    const std::vector<float> down_square = rows.down_square();
    tokens.down_square = down_square;
    retrain_router(tokens, capture_spec(spec_, shares_, shared_widths_[l], l), capture, parallel_);
  }

  Capture split(const LayerTokens& tokens, std::int64_t l) const {
    if (shares_.active == 0) return keep_highest(tokens, shares_.shared, score_, parallel_);
    return capture_energy(tokens, capture_spec(spec_, shares_, shared_widths_[l], l), parallel_);
  }

  /// @param left  share of the dense FFN's energy that the layer's neurons hold
  void record_capture(const Capture& capture, double left) {
    conversion_.captured_energy.push_back(left * capture.energy);
    conversion_.oracle_energy.push_back(left * capture.oracle_energy);
    conversion_.router_recall.push_back(capture.recall);
  }

  /// One layer of the dense model on its own stream.
  void advance_dense(const SplitSource& source, std::int64_t layer) {
    const std::int64_t T = stream_.tokens(), D = source.ffn.d_model;
    const MatrixView<float> h = hidden(source.ffn.hidden), y(target_.data(), T, D);
    const MatrixView<float> input(input_.data(), T, D);
    dense_->attend(layer, input);
    source.hidden_values(input, h, parallel_);
    down_product(h, source.down_t, source.ffn.down_bias, y, parallel_);
    for (std::int64_t t = 0; t < T; ++t) isa_kernels().add(y.row(t), dense_->rows().row(t), D);
  }

  /// How often each expert was chosen, and how much text there was for what is fitted.
  void record_load(const BudgetRows& rows, const Routing& routing, std::int64_t layer) {
    if (spec_.refit) fits_.push_back(fit_text(rows, routing, stream_.tokens(), layer));
    if (routing.ids.empty()) return;
    Routing of_text = routing;  // without the rare tokens behind it
    of_text.num_tokens = text_tokens();
    of_text.ids.resize(static_cast<std::size_t>(of_text.num_tokens * routing.experts_per_token));
    std::vector<double> load = expert_loads(of_text, shares_.experts);
    if (const auto notice = unused_notice(rows, load, layer))
      conversion_.notices.push_back(*notice);
    conversion_.expert_load.push_back(std::move(load));
  }

  /// What is to be said before what single layers had to say.
  void add_notices() {
    std::vector<std::string>& notices = conversion_.notices;
    if (const auto notice = text_notice(fits_)) notices.insert(notices.begin(), *notice);
    if (shares_.active == 0 && spec_.shared_share < 1.0)
      notices.insert(
          notices.begin(),
          fmt::format(
              "nothing is routed: of a budget of {} neurons in experts of {}, a shared part "
              "of {:.3g} is rounded to all; this is static pruning; share none of them, or "
              "give a larger budget or narrower experts",
              shares_.shared, spec_.expert_width, spec_.shared_share));
  }

  /// target += correction * (dense stream - what the converted one would be without any loss here).
  void aim_at_dense_stream(MatrixView<float> target, const std::vector<float>& down_bias) {
    const auto part = static_cast<float>(spec_.correction);
    parallel_(target.rows, 64, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t t = begin; t < end; ++t)
        for (std::int64_t d = 0; d < target.cols; ++d) {
          const float bias = down_bias.empty() ? 0.0f : down_bias[d];
          target(t, d) +=
              part * (dense_->rows()(t, d) - (stream_.rows()(t, d) + target(t, d) + bias));
        }
    });
  }

  /// The converted layer's output goes into the stream; in parallel mode the dense one's, which is
  /// the target. @return  what is added to the output bias, where there is one: the mean of what
  /// the layer lost, which costs nothing (GELU's small negative values add up over what is off)
  std::vector<float> advance(const std::vector<float>& down_bias, MatrixView<const float> features,
                             const std::vector<float>& down, MatrixView<const float> target,
                             std::span<const float> weight) {
    const std::int64_t D = target.cols;
    Buffer y(features.rows * D);
    const MatrixView<float> out(y.data(), features.rows, D);
    down_product(features, down, {}, out, parallel_);
    std::vector<float> missing;
    if (!down_bias.empty()) missing = mean_difference(target, out, weight);
    for (std::int64_t t = 0; t < out.rows && !missing.empty(); ++t)
      isa_kernels().add(missing.data(), out.row(t), D);
    conversion_.layer_error.push_back(
        relative_error(out.slice_rows(0, text_tokens()), target, weight));
    for (std::int64_t t = 0; t < features.rows; ++t) {
      isa_kernels().add(parallel_mode() ? target.row(t) : out.row(t), stream_.rows().row(t), D);
      if (!down_bias.empty()) isa_kernels().add(down_bias.data(), stream_.rows().row(t), D);
    }
    return missing;
  }

  /// @param down_bias  of the layer as it will be stored
  void keep(BudgetRows rows, const Capture& capture, const std::vector<float>& down_bias) {
    if (shares_.active == 0) {
      rows.shared.down_bias = down_bias;
      conversion_.pruned.push_back(std::move(rows.shared));
      return;
    }
    rows.experts.down_bias = down_bias;
    conversion_.layers.push_back(
        make_budget_layer(std::move(rows), capture.router, shares_.active, spec_.gate));
  }

  BudgetSpec spec_;
  StaticScore score_;
  const BudgetProgress& progress_;
  BudgetShares shares_;
  const std::vector<std::int64_t>& shared_widths_;  // [L]
  Model& model_;
  ParallelFor parallel_;
  const TokenWindows& windows_;
  TokenWindows rare_;  // for the first layers, behind those windows
  const std::array<const TokenWindows*, 2> texts_{&windows_, &rare_};
  WindowStream stream_;                // through the converted layers; in parallel mode the dense
  std::optional<WindowStream> dense_;  // through the dense model, where the correction needs it
  std::int64_t width_;                 // of the rows of hidden_: the most neurons of a layer
  Buffer input_, hidden_, target_;     // [T, D], [T, width_], [T, D] of the layer at hand
  std::vector<FitText> fits_;          // of the layers so far
  Conversion conversion_;
};

}  // namespace

Conversion convert_layers(Model& model, const BudgetSpec& spec,
                          const std::vector<std::int64_t>& shared_widths,
                          const TokenWindows& windows, const BudgetProgress& progress,
                          StaticScore score) {
  return BudgetConversion(model, spec, shared_widths, windows, progress, score).run();
}

Conversion convert_to_budget(
    const Checkpoint& source, const BudgetSpec& spec, const TokenWindows& calibration,
    const std::function<void(const std::string&, std::int64_t, std::int64_t)>& progress) {
  const ModelConfig& config = source.config();
  if (config.is_moe())
    fail_argument(
        "convert: {} is already a mixture of experts; give the dense model it was made of",
        source.path().string());
  if (calibration.context < 2 || calibration.count() < 1)
    fail_argument(
        "convert: the calibration text has {} tokens and windows of {}; needs at least one window "
        "of 2 or more",
        calibration.tokens.size(), calibration.context);
  const BudgetShares shares = divide_budget(config.intermediate_size, spec);
  if (spec.router_method == RouterMethod::kLowRank && spec.router_rank > shares.experts)
    fail_argument("convert: a router of rank {} for {} experts; give a rank of at most as many",
                  spec.router_rank, shares.experts);
  check_refit_rounds(spec, shares);
  check_rare_tokens(spec);
  if (spec.allocation == Allocation::kKl) check_allocation(shares, calibration);
  Model model = Model::load(source, {.threads = spec.threads});
  if (spec.allocation == Allocation::kKl)
    return convert_allocated(model, source, spec, calibration, progress);
  const std::vector<std::int64_t> uniform(static_cast<std::size_t>(config.num_layers),
                                          shares.shared);
  return convert_layers(model, spec, uniform, calibration, progress);
}

}  // namespace cleave
