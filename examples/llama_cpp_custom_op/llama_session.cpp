#include "llama_session.h"

#include <cstdio>
#include <stdexcept>
#include <string>

namespace {

// What llama.cpp has to say is for those who debug it; errors are for all.
void quiet(ggml_log_level level, const char* text, void* /*userdata*/) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

llama_model* load(const std::filesystem::path& gguf) {
  llama_log_set(&quiet, nullptr);
  llama_backend_init();
  llama_model_params params = llama_model_default_params();
  params.n_gpu_layers = 0;
  llama_model* model = llama_model_load_from_file(gguf.c_str(), params);
  if (model == nullptr) throw std::runtime_error("llama.cpp cannot load " + gguf.string());
  return model;
}

llama_context* init(const LlamaModel& model, const LlamaSession::Spec& spec) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(spec.context);
  params.n_batch = params.n_ubatch = params.n_ctx;
  params.n_threads = params.n_threads_batch = spec.threads;
  if (spec.exact_attention) {
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  }
  llama_context* context = llama_init_from_model(model.get(), params);
  if (context == nullptr) throw std::runtime_error("llama.cpp cannot make a context");
  return context;
}

}  // namespace

LlamaModel::LlamaModel(const std::filesystem::path& gguf) : model_(load(gguf), llama_model_free) {}

std::int64_t LlamaModel::vocab_size() const {
  return llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
}
std::int64_t LlamaModel::bytes() const {
  return static_cast<std::int64_t>(llama_model_size(model_.get()));
}

LlamaSession::LlamaSession(const LlamaModel& model, const Spec& spec)
    : context_(init(model, spec), llama_free), vocab_size_(model.vocab_size()) {}

void LlamaSession::clear() {
  llama_memory_clear(llama_get_memory(context_.get()), /*data=*/false);
  position_ = 0;
}

void LlamaSession::decode(std::span<const llama_token> tokens, bool all) {
  const auto count = static_cast<std::int32_t>(tokens.size());
  std::vector<llama_token> ids(tokens.begin(), tokens.end());
  std::vector<llama_pos> positions(count);
  std::vector<std::int32_t> sequences(count, 1);
  llama_seq_id sequence = 0;
  std::vector<llama_seq_id*> sequence_ids(count, &sequence);
  std::vector<std::int8_t> wanted(count, all ? 1 : 0);
  for (std::int32_t i = 0; i < count; ++i) positions[i] = static_cast<llama_pos>(position_ + i);
  if (count > 0) wanted[count - 1] = 1;
  const llama_batch batch{
      count,        ids.data(), nullptr, positions.data(), sequences.data(), sequence_ids.data(),
      wanted.data()};
  if (const int status = llama_decode(context_.get(), batch); status != 0)
    throw std::runtime_error("llama_decode of " + std::to_string(count) + " tokens failed with " +
                             std::to_string(status));
  position_ += count;
}

std::span<const float> LlamaSession::logits(std::int64_t i) const {
  const float* row = llama_get_logits_ith(context_.get(), static_cast<std::int32_t>(i));
  if (row == nullptr)
    throw std::runtime_error("llama.cpp has no logits of token " + std::to_string(i));
  return {row, static_cast<std::size_t>(vocab_size_)};
}
