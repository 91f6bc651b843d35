#pragma once

#include <llama.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <vector>

/// A model file that llama.cpp has loaded. Owns it; must outlive its sessions.
class LlamaModel {
 public:
  /// @throws std::runtime_error  llama.cpp cannot load it (its reason goes to stderr)
  explicit LlamaModel(const std::filesystem::path& gguf);
  llama_model* get() const { return model_.get(); }
  std::int64_t vocab_size() const;
  std::int64_t bytes() const;  ///< of the weights

 private:
  std::unique_ptr<llama_model, void (*)(llama_model*)> model_;
};

/// A sequence that llama.cpp runs through a model.
class LlamaSession {
 public:
  struct Spec {
    int threads = 1;
    std::int64_t context = 1024;  ///< tokens that it can hold
    /// Keys, values and their products in float32; without it as llama.cpp chooses: half precision.
    bool exact_attention = false;
  };
  LlamaSession(const LlamaModel& model, const Spec& spec);

  /// Forgets all tokens.
  void clear();
  /// Appends tokens, all in one batch. Logits exist for the last, or for `all` of them.
  /// @throws std::runtime_error  it failed, or the context is full
  void decode(std::span<const llama_token> tokens, bool all = false);
  /// [V] of the i-th token of the last decode(), which must have asked for it; -1: of the last.
  /// Valid until the next decode().
  std::span<const float> logits(std::int64_t i = -1) const;

 private:
  std::unique_ptr<llama_context, void (*)(llama_context*)> context_;
  std::int64_t vocab_size_;
  std::int64_t position_ = 0;
};
