#include "cleave/self_text.h"

#include <algorithm>
#include <random>
#include <span>
#include <vector>

#include "fail.h"

namespace cleave {
namespace {

constexpr std::int64_t kBatch = 16;                          // windows at a time
constexpr std::int64_t kCacheBytes = std::int64_t{1} << 30;  // of their caches

std::int64_t batch_size(const ModelConfig& config, std::int64_t context) {
  const std::int64_t cache = config.num_layers * 2 * config.num_kv_heads * config.head_dim *
                             context * static_cast<std::int64_t>(sizeof(float));
  return std::clamp(kCacheBytes / cache, std::int64_t{1}, kBatch);
}

class SelfText {
 public:
  SelfText(Model& model, const SelfTextSpec& spec)
      : model_(model),
        spec_(spec),
        sampler_({.temperature = spec.temperature, .seed = spec.seed}),
        starts_(~spec.seed) {}

  TokenWindows write(const std::function<void(std::int64_t, std::int64_t)>& progress) {
    const std::int64_t T = spec_.context, all = spec_.windows * T;
    TokenWindows text;
    text.context = T;
    text.tokens.resize(static_cast<std::size_t>(all));
    const std::int64_t batch = std::min(batch_size(model_.config(), T), spec_.windows);
    std::vector<KvCache> caches(static_cast<std::size_t>(batch), KvCache(model_.config(), T));
    for (std::int64_t first = 0; first < spec_.windows; first += batch) {
      const std::int64_t B = std::min(batch, spec_.windows - first);
      std::vector<KvCache*> used;
      for (std::int64_t b = 0; b < B; ++b) used.push_back(&caches[static_cast<std::size_t>(b)]);
      for (KvCache* cache : used) cache->clear();
      const MatrixView<std::int32_t> rows(text.tokens.data() + first * T, B, T);
      for (std::int64_t b = 0; b < B; ++b) rows(b, 0) = start();
      for (std::int64_t t = 1; t < T; ++t) {
        write_column(rows, t, used);
        if (progress && (t % 64 == 0 || t + 1 == T)) progress(first * T + B * (t + 1), all);
      }
    }
    return text;
  }

 private:
  /// The first token of a text. (std::uniform_int_distribution differs between standard libraries.)
  std::int32_t start() {
    const auto V = static_cast<std::uint64_t>(model_.config().vocab_size);
    return static_cast<std::int32_t>((starts_() >> 32) * V >> 32);
  }
  /// Token t of every row, from those before it.
  void write_column(MatrixView<std::int32_t> rows, std::int64_t t,
                    std::span<KvCache* const> caches) {
    const ModelConfig& config = model_.config();
    const std::int64_t B = rows.rows, D = config.hidden_size, V = config.vocab_size;
    std::vector<std::int32_t> last;
    for (std::int64_t b = 0; b < B; ++b) last.push_back(rows(b, t - 1));
    hidden_.resize(B * D);
    logits_.resize(B * V);
    const MatrixView<float> hidden(hidden_.data(), B, D), logits(logits_.data(), B, V);
    model_.forward_step(last, caches, hidden);
    model_.logits(hidden, logits);
    for (std::int64_t b = 0; b < B; ++b) {
      const std::int32_t drawn = sampler_({logits.row(b), static_cast<std::size_t>(V)});
      const auto& ends = config.eos_token_ids;
      const bool over = std::find(ends.begin(), ends.end(), drawn) != ends.end();
      rows(b, t) = over ? start() : drawn;
    }
  }

  Model& model_;
  const SelfTextSpec& spec_;
  Sampler sampler_;
  std::mt19937_64 starts_;
  std::vector<float> hidden_, logits_;  // [B, D], [B, V]
};

}  // namespace

TokenWindows self_generated_text(Model& model, const SelfTextSpec& spec,
                                 const std::function<void(std::int64_t, std::int64_t)>& progress) {
  if (!model.config().causal || !model.config().has_head)
    fail_argument(
        "self_generated_text: the model is an encoder, which writes no text; calibrate on one of "
        "yours");
  if (spec.windows < 1 || spec.context < 2 || !(spec.temperature > 0.0))
    fail_argument(
        "self_generated_text: {} windows of {} tokens at temperature {}; expected at least one of "
        "2 or more, and a temperature above 0",
        spec.windows, spec.context, spec.temperature);
  return SelfText(model, spec).write(progress);
}

}  // namespace cleave
