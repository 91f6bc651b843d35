#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>

#include "cleave/cleave.h"

// A decoder that runs a prompt and continues it: ours, or llama.cpp's, for the same model.
namespace cleave::bench {

class DecoderWay {
 public:
  virtual ~DecoderWay() = default;
  virtual std::int64_t weight_bytes() const = 0;
  /// Forgets everything and runs the tokens in one batch, the head for the last one alone.
  virtual void prompt(std::span<const std::int32_t> tokens) = 0;
  /// Appends `count` tokens, each the likeliest one after those before it.
  virtual void generate(std::int64_t count) = 0;
};

struct DecoderSpec {
  int threads = 2;
  std::int64_t context = 0;  ///< tokens that fit
};

std::unique_ptr<DecoderWay> cleave_way(const Checkpoint& model, WeightType weights,
                                       const DecoderSpec& spec);

/// "ggml 0.25.3"; "" where the build has none.
std::string llama_cpp_version();
inline constexpr const char* kNoLlamaCpp =
    "this build has no llama.cpp; run scripts/fetch_llama_cpp.sh, then cmake and the build again";

/// llama.cpp on the model's values as bfloat16. nullptr where the build has no llama.cpp.
std::unique_ptr<DecoderWay> llama_bf16_way(const Checkpoint& model, const DecoderSpec& spec);
/// llama.cpp on a GGUF file as it is. nullptr where the build has no llama.cpp.
std::unique_ptr<DecoderWay> llama_file_way(const std::filesystem::path& gguf,
                                           const DecoderSpec& spec);

}  // namespace cleave::bench
