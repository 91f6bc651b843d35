#include "cleave/evaluate.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>

#include "fail.h"
#include "kernels/dispatch.h"
#include "support/buffer.h"

namespace cleave {
namespace {

// Logits are made for so many positions at a time: 64 x 49152 floats are 12 MB.
constexpr std::int64_t kLogitRows = 64;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// A model on one window after the other, with the time it takes.
class Runner {
 public:
  Runner(Model& model, std::int64_t context)
      : model_(model),
        cache_(model.config(), context),
        hidden_(context * model.config().hidden_size),
        logits_(kLogitRows * model.config().vocab_size) {}

  void run(std::span<const std::int32_t> window, const ForwardHooks& hooks = {}) {
    const auto start = std::chrono::steady_clock::now();
    cache_.clear();
    model_.forward(
        window, cache_,
        {hidden_.data(), static_cast<std::int64_t>(window.size()), model_.config().hidden_size},
        hooks);
    elapsed_s_ += seconds_since(start);
  }

  /// Logits of positions [begin, begin + count) of the window; valid until the next call.
  MatrixView<const float> logits(std::int64_t begin, std::int64_t count) {
    const auto start = std::chrono::steady_clock::now();
    const std::int64_t D = model_.config().hidden_size;
    const MatrixView<float> out(logits_.data(), count, model_.config().vocab_size);
    model_.logits({hidden_.data() + begin * D, count, D}, out);
    elapsed_s_ += seconds_since(start);
    return out;
  }

  double elapsed_s() const { return elapsed_s_; }

 private:
  Model& model_;
  KvCache cache_;
  Buffer hidden_, logits_;
  double elapsed_s_ = 0.0;
};

struct Sums {
  double nll = 0.0;
  double kl = 0.0;
  std::int64_t agreements = 0;
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

class LoadCounter {
 public:
  explicit LoadCounter(const Model& model) : counts_(model.config().num_layers) {
    for (std::int64_t l = 0; l < model.config().num_layers; ++l)
      counts_[l].assign(model.num_experts(l), 0);
  }
  ForwardHooks hooks() {
    ForwardHooks hooks;
    hooks.routing = [this](std::int64_t layer, const Routing& routing) {
      for (const std::int32_t id : routing.ids)
        if (id != Routing::kUnused) ++counts_[layer][id];
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

double perplexity(const Sums& sums, std::int64_t positions) {
  return std::exp(sums.nll / static_cast<double>(positions));
}

}  // namespace

EvalResult evaluate(Model& model, const TokenWindows& text, Model* reference,
                    const std::function<void(std::int64_t, std::int64_t, double)>& progress) {
  check(model, text, reference);
  Runner runner(model, text.context);
  std::optional<Runner> against;
  if (reference != nullptr) against.emplace(*reference, text.context);
  LoadCounter load(model);
  Sums sums;
  const std::int64_t predicted = text.context - 1;
  for (std::int64_t w = 0; w < text.count(); ++w) {
    const std::span<const std::int32_t> window = text.window(w);
    runner.run(window, load.hooks());
    if (against) against->run(window);
    for (std::int64_t begin = 0; begin < predicted; begin += kLogitRows) {
      const std::int64_t count = std::min(kLogitRows, predicted - begin);
      add_positions(window, begin, runner.logits(begin, count),
                    against ? against->logits(begin, count) : MatrixView<const float>(),
                    model.parallel(), sums);
    }
    if (progress) progress(w + 1, text.count(), perplexity(sums, (w + 1) * predicted));
  }

  EvalResult result;
  result.windows = text.count();
  result.tokens = text.count() * text.context;
  result.predicted_tokens = text.count() * predicted;
  const auto positions = static_cast<double>(result.predicted_tokens);
  result.mean_nll = sums.nll / positions;
  result.perplexity = std::exp(result.mean_nll);
  result.elapsed_s = runner.elapsed_s();
  result.tokens_per_s = static_cast<double>(result.tokens) / result.elapsed_s;
  load.result(result);
  if (!against) return result;
  result.has_reference = true;
  result.kl = sums.kl / positions;
  result.top1_agreement = static_cast<double>(sums.agreements) / positions;
  result.reference_tokens_per_s = static_cast<double>(result.tokens) / against->elapsed_s();
  return result;
}

}  // namespace cleave
