#include <algorithm>

#include "cleave/model.h"
#include "fail.h"

namespace cleave {
namespace {

// A long prompt goes in pieces: the working memory of a forward pass grows with its tokens.
constexpr std::int64_t kPromptPiece = 512;

// Runs `tokens` and returns the logits behind the last one.
void run(Model& model, std::span<const std::int32_t> tokens, KvCache& cache,
         std::vector<float>& hidden, std::vector<float>& logits) {
  const std::int64_t D = model.config().hidden_size;
  const auto n = static_cast<std::int64_t>(tokens.size());
  hidden.resize(std::min(n, kPromptPiece) * D);
  std::int64_t count = 0;
  for (std::int64_t begin = 0; begin < n; begin += count) {
    count = std::min(kPromptPiece, n - begin);
    model.forward(tokens.subspan(begin, count), cache, {hidden.data(), count, D});
  }
  model.logits({hidden.data() + (count - 1) * D, 1, D},
               {logits.data(), 1, model.config().vocab_size});
}

}  // namespace

std::vector<std::int32_t> generate(Model& model, std::span<const std::int32_t> prompt,
                                   const GenerateSpec& spec,
                                   const std::function<bool(std::int32_t)>& on_token) {
  if (!model.config().causal || !model.config().has_head)
    fail_argument(
        "generate: the model is an encoder: it sees whole windows and gives hidden states, not the "
        "next token");
  if (prompt.empty())
    fail_argument(
        "generate: the prompt is empty; give at least one token (a BOS, if the model has one)");
  if (spec.max_tokens < 0)
    fail_argument("generate: max_tokens is {}; expected 0 or more", spec.max_tokens);
  Sampler sampler(spec.sampling);
  std::vector<std::int32_t> produced;
  if (spec.max_tokens == 0) return produced;
  KvCache cache(model.config(), static_cast<std::int64_t>(prompt.size()) + spec.max_tokens);
  std::vector<float> hidden, logits(model.config().vocab_size);
  const std::vector<std::int32_t>& ends = model.config().eos_token_ids;

  run(model, prompt, cache, hidden, logits);
  while (true) {
    const std::int32_t next = sampler(logits);
    if (!spec.ignore_eos && std::find(ends.begin(), ends.end(), next) != ends.end()) break;
    produced.push_back(next);
    if (on_token && !on_token(next)) break;
    if (static_cast<std::int64_t>(produced.size()) == spec.max_tokens) break;
    run(model, {&produced.back(), 1}, cache, hidden, logits);
  }
  return produced;
}

}  // namespace cleave
