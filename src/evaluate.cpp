#include "cleave/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "fail.h"
#include "hidden_distance.h"
#include "kernels/dispatch.h"
#include "support/buffer.h"

namespace cleave {
namespace {

// Logits are made for so many positions at a time: 64 x 49152 floats are 12 MB.
constexpr std::int64_t kLogitRows = 64;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A model on one window after the other, with the time it takes. With `states` it does not run.
class Runner {
 public:
  Runner(Model& model, std::int64_t context, const HiddenStates* states = nullptr)
      : model_(model),
        states_(states),
        logits_(model.config().has_head ? kLogitRows * model.config().vocab_size : 0) {
    if (states != nullptr) return;
    cache_.emplace(model.config(), context);
    hidden_ = Buffer(context * model.config().hidden_size);
  }

  void run(std::span<const std::int32_t> window, std::int64_t index,
           const ForwardHooks& hooks = {}) {
    const auto T = static_cast<std::int64_t>(window.size()), D = model_.config().hidden_size;
    if (states_ != nullptr) {
      current_ = states_->values.data() + index * T * D;
      return;
    }
    const auto start = std::chrono::steady_clock::now();
    cache_->clear();
    model_.forward(window, *cache_, {hidden_.data(), T, D}, hooks);
    current_ = hidden_.data();
    elapsed_s_ += seconds_since(start);
  }

  const float* hidden() const { return current_; }
  /// Of the window, [context, D].
  MatrixView<const float> states(std::int64_t context) const {
    return {current_, context, model_.config().hidden_size};
  }

  /// Logits of positions [begin, begin + count) of the window; valid until the next call.
  MatrixView<const float> logits(std::int64_t begin, std::int64_t count) {
    const auto start = std::chrono::steady_clock::now();
    const std::int64_t D = model_.config().hidden_size;
    const MatrixView<float> out(logits_.data(), count, model_.config().vocab_size);
    model_.logits({current_ + begin * D, count, D}, out);
    elapsed_s_ += seconds_since(start);
    return out;
  }

  double elapsed_s() const { return elapsed_s_; }

 private:
  Model& model_;
  const HiddenStates* states_ = nullptr;
  std::optional<KvCache> cache_;
  Buffer hidden_, logits_;
  const float* current_ = nullptr;  // [context, D] of the window
  double elapsed_s_ = 0.0;
};

struct Sums {
  double nll = 0.0;
  double kl = 0.0;
  std::int64_t agreements = 0;
  double cosine = 0.0;  // over tokens
  double pooled = 0.0;  // over windows
};

// Adds positions [begin, begin + logits.rows) of a window. Rows are summed in order, so the result
// does not depend on the threads.
void add_positions(std::span<const std::int32_t> window, std::int64_t begin,
                   MatrixView<const float> logits, MatrixView<const float> reference,
                   const ParallelFor& parallel, Sums& sums) {
  const IsaKernels& isa = isa_kernels();
  std::vector<double> nll(logits.rows);
  std::vector<Comparison> compared(reference.rows);
  parallel(logits.rows, 1, [&](std::int64_t from, std::int64_t to) {
    for (std::int64_t r = from; r < to; ++r) {
      const float* row = logits.row(r);
      nll[r] = isa.log_sum_exp(row, logits.cols) - row[window[begin + r + 1]];
      if (!reference.empty()) compared[r] = isa.compare(reference.row(r), row, logits.cols);
    }
  });
  for (const double value : nll) sums.nll += value;
  for (const Comparison& c : compared) {
    sums.kl += c.kl;
    sums.agreements += c.best_of_reference == c.best_of_model ? 1 : 0;
  }
}

/// All positions of a window.
void add_predictions(std::span<const std::int32_t> window, Runner& model, Runner* reference,
                     const ParallelFor& parallel, Sums& sums) {
  const auto predicted = static_cast<std::int64_t>(window.size()) - 1;
  for (std::int64_t begin = 0; begin < predicted; begin += kLogitRows) {
    const std::int64_t count = std::min(kLogitRows, predicted - begin);
    add_positions(
        window, begin, model.logits(begin, count),
        reference != nullptr ? reference->logits(begin, count) : MatrixView<const float>(),
        parallel, sums);
  }
}

class LoadCounter {
 public:
  explicit LoadCounter(const Model& model) : counts_(model.config().num_layers) {
    for (std::int64_t l = 0; l < model.config().num_layers; ++l)
      counts_[l].assign(model.num_experts(l), 0);
  }
  /// The caller's hooks, with the counting.
  ForwardHooks hooks(ForwardHooks hooks) {
    const auto own = hooks.routing;
    hooks.routing = [this, own](std::int64_t layer, const Routing& routing) {
      for (const std::int32_t id : routing.ids)
        if (id != Routing::kUnused) ++counts_[layer][id];
      if (own) own(layer, routing);
    };
    return hooks;
  }
  void result(EvalResult& result) const {
    double active = 0.0, layers = 0.0;
    for (const auto& counts : counts_) {
      result.load.push_back(load(counts, result.tokens));
      active += result.load.back().active_experts;
      layers += counts.empty() ? 0.0 : 1.0;
    }
    if (layers > 0.0) result.active_experts = active / layers;
  }

 private:
  static LayerLoad load(const std::vector<std::int64_t>& counts, std::int64_t tokens) {
    LayerLoad load;
    std::int64_t total = 0;
    for (const std::int64_t count : counts) total += count;
    if (total == 0) return {};  // dense, or a hook stood in for the experts
    load.active_experts = static_cast<double>(total) / static_cast<double>(tokens);
    for (const std::int64_t count : counts) {
      const double share = static_cast<double>(count) / static_cast<double>(total);
      load.share.push_back(share);
      if (count > 0) load.entropy -= share * std::log(share);
    }
    return load;
  }
  std::vector<std::vector<std::int64_t>> counts_;  // [L][E]
};

/// What there is to measure.
void check_heads(const ModelConfig& model, const ModelConfig* reference) {
  if (reference == nullptr) {
    if (model.has_head) return;
    fail_argument(
        "evaluate: the model has no head, so no perplexity; give the dense model it was made of as "
        "reference");
  }
  if (model.has_head != reference->has_head)
    fail_argument(
        "evaluate: {} ends in logits, {} in hidden states; compare a model with the dense one it "
        "was made of",
        model.has_head ? "the model" : "the reference",
        model.has_head ? "the reference" : "the model");
  if (!model.has_head && model.hidden_size != reference->hidden_size)
    fail_argument(
        "evaluate: the model's hidden states have width D = {}, the reference's {}; compare a "
        "model with the dense one it was made of",
        model.hidden_size, reference->hidden_size);
}

void check(const Model& model, const TokenWindows& text, const Model* reference) {
  if (text.context < 2 || text.count() < 1)
    fail_argument("evaluate: {} windows of {} tokens; expected at least one of at least 2",
                  text.context > 0 ? text.count() : 0, text.context);
  const std::int64_t V = model.config().vocab_size;
  if (reference != nullptr && reference->config().vocab_size != V)
    fail_argument(
        "evaluate: the model has {} tokens in its vocabulary, the reference {}; compare "
        "models that share a tokenizer",
        V, reference->config().vocab_size);
  for (const std::int32_t id : text.tokens)
    if (id < 0 || id >= V)
      fail_argument(
          "evaluate: the text holds token id {}; expected 0 to {}; was it encoded with "
          "another tokenizer?",
          id, V - 1);
}

void check_states(const char* whose, const Model& model, const TokenWindows& text,
                  const HiddenStates* states) {
  if (states == nullptr) return;
  const std::int64_t D = model.config().hidden_size, tokens = text.count() * text.context;
  if (states->d_model != D || static_cast<std::int64_t>(states->values.size()) != tokens * D)
    fail_argument(
        "evaluate: the hidden states of the {} hold {} values of width {}; expected {} tokens of "
        "width {}: make them with hidden_states() on this text",
        whose, states->values.size(), states->d_model, tokens, D);
}

double perplexity(const Sums& sums, std::int64_t positions) {
  return std::exp(sums.nll / static_cast<double>(positions));
}

/// 0 where nothing ran.
double rate(std::int64_t tokens, double elapsed_s) {
  return elapsed_s > 0.0 ? static_cast<double>(tokens) / elapsed_s : 0.0;
}

void set_quality(const Sums& sums, EvalResult& result) {
  if (!result.has_head) {
    result.cosine_distance = sums.cosine / static_cast<double>(result.tokens);
    result.pooled_distance = sums.pooled / static_cast<double>(result.windows);
    return;
  }
  const auto positions = static_cast<double>(result.predicted_tokens);
  result.mean_nll = sums.nll / positions;
  result.perplexity = std::exp(result.mean_nll);
  if (!result.has_reference) return;
  result.kl = sums.kl / positions;
  result.top1_agreement = static_cast<double>(sums.agreements) / positions;
}

}  // namespace

const char* divergence_name(bool has_head) { return has_head ? "KL" : "cosine distance"; }

HiddenStates hidden_states(Model& model, const TokenWindows& text, const ForwardHooks& hooks) {
  check(model, text, nullptr);
  Runner runner(model, text.context);
  HiddenStates states{model.config().hidden_size, {}};
  const std::int64_t window_size = text.context * states.d_model;
  states.values.reserve(static_cast<std::size_t>(text.count() * window_size));
  for (std::int64_t w = 0; w < text.count(); ++w) {
    runner.run(text.window(w), w, hooks);
    states.values.insert(states.values.end(), runner.hidden(), runner.hidden() + window_size);
  }
  return states;
}

EvalResult evaluate(Model& model, const TokenWindows& text, Model* reference,
                    const EvalProgress& progress) {
  return evaluate(model, text, EvalSpec{.reference = reference, .progress = progress});
}

EvalResult evaluate(Model& model, const TokenWindows& text, const EvalSpec& spec) {
  Model* const reference = spec.reference;
  check(model, text, reference);
  check_heads(model.config(), reference != nullptr ? &reference->config() : nullptr);
  check_states("model", model, text, spec.states);
  if (reference != nullptr) check_states("reference", *reference, text, spec.reference_states);
  Runner runner(model, text.context, spec.states);
  std::optional<Runner> against;
  if (reference != nullptr) against.emplace(*reference, text.context, spec.reference_states);
  LoadCounter load(model);
  const ForwardHooks hooks = load.hooks(spec.hooks);
  EvalResult result;
  result.has_head = model.config().has_head;
  result.has_reference = reference != nullptr;
  Sums sums;
  const std::int64_t context = text.context, predicted = context - 1;
  for (std::int64_t w = 0; w < text.count(); ++w) {
    const std::span<const std::int32_t> window = text.window(w);
    runner.run(window, w, hooks);
    if (against) against->run(window, w);
    if (result.has_head) {
      add_predictions(window, runner, against ? &*against : nullptr, model.parallel(), sums);
    } else {
      sums.cosine += summed_distance(against->states(context), runner.states(context));
      sums.pooled += pooled_distance(against->states(context), runner.states(context));
    }
    if (spec.progress)
      spec.progress(w + 1, text.count(),
                    result.has_head ? perplexity(sums, (w + 1) * predicted)
                                    : sums.cosine / static_cast<double>((w + 1) * context));
  }

  result.windows = text.count();
  result.tokens = text.count() * context;
  result.predicted_tokens = result.has_head ? text.count() * predicted : 0;
  set_quality(sums, result);
  result.elapsed_s = runner.elapsed_s();
  result.tokens_per_s = rate(result.tokens, result.elapsed_s);
  load.result(result);
  if (against) result.reference_tokens_per_s = rate(result.tokens, against->elapsed_s());
  return result;
}

}  // namespace cleave
