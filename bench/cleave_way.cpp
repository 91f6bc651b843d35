#include <algorithm>
#include <vector>

#include "decoder_ways.h"

namespace cleave::bench {
namespace {

class CleaveWay : public DecoderWay {
 public:
  CleaveWay(const Checkpoint& model, WeightType weights, const DecoderSpec& spec)
      : model_(Model::load(model, {.threads = spec.threads, .weights = weights})),
        cache_(model_.config(), spec.context),
        logits_(model_.config().vocab_size) {}

  std::int64_t weight_bytes() const override { return model_.weight_bytes(); }
  void prompt(std::span<const std::int32_t> tokens) override {
    cache_.clear();
    append(tokens);
  }
  void generate(std::int64_t count) override {
    for (std::int64_t i = 0; i < count; ++i) {
      const auto best = std::max_element(logits_.begin(), logits_.end());
      const auto id = static_cast<std::int32_t>(best - logits_.begin());
      append({&id, 1});
    }
  }

 private:
  void append(std::span<const std::int32_t> tokens) {
    const std::int64_t D = model_.config().hidden_size;
    const auto T = static_cast<std::int64_t>(tokens.size());
    hidden_.resize(T * D);
    model_.forward(tokens, cache_, {hidden_.data(), T, D});
    model_.logits({hidden_.data() + (T - 1) * D, 1, D},
                  {logits_.data(), 1, model_.config().vocab_size});
  }

  Model model_;
  KvCache cache_;
  std::vector<float> hidden_, logits_;
};

}  // namespace

std::unique_ptr<DecoderWay> cleave_way(const Checkpoint& model, WeightType weights,
                                       const DecoderSpec& spec) {
  return std::make_unique<CleaveWay>(model, weights, spec);
}

}  // namespace cleave::bench
