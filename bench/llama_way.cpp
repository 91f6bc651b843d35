#include "decoder_ways.h"

#ifdef CLEAVE_HAVE_LLAMA_CPP
#include <algorithm>

#include "gguf_writer.h"
#include "llama_session.h"
#endif

namespace cleave::bench {

#ifdef CLEAVE_HAVE_LLAMA_CPP
namespace {

class LlamaWay : public DecoderWay {
 public:
  LlamaWay(std::unique_ptr<TemporaryGguf> file, const std::filesystem::path& gguf,
           const DecoderSpec& spec)
      : file_(std::move(file)), model_(gguf), session_(model_, {spec.threads, spec.context}) {}

  std::int64_t weight_bytes() const override { return model_.bytes(); }
  void prompt(std::span<const std::int32_t> tokens) override {
    session_.clear();
    session_.decode(tokens);
  }
  void generate(std::int64_t count) override {
    for (std::int64_t i = 0; i < count; ++i) {
      const auto logits = session_.logits();
      const auto best = std::max_element(logits.begin(), logits.end());
      const auto id = static_cast<llama_token>(best - logits.begin());
      session_.decode({&id, 1});
    }
  }

 private:
  std::unique_ptr<TemporaryGguf> file_;  // mapped while the model lives
  LlamaModel model_;
  LlamaSession session_;
};

}  // namespace

std::string llama_cpp_version() { return std::string("ggml ") + ggml_version(); }
std::unique_ptr<DecoderWay> llama_bf16_way(const Checkpoint& model, const DecoderSpec& spec) {
  auto file = std::make_unique<TemporaryGguf>(model, GGML_TYPE_BF16);
  const std::filesystem::path path = file->path();
  return std::make_unique<LlamaWay>(std::move(file), path, spec);
}

std::unique_ptr<DecoderWay> llama_file_way(const std::filesystem::path& gguf,
                                           const DecoderSpec& spec) {
  return std::make_unique<LlamaWay>(nullptr, gguf, spec);
}
#else
std::string llama_cpp_version() { return {}; }
std::unique_ptr<DecoderWay> llama_bf16_way(const Checkpoint&, const DecoderSpec&) {
  return nullptr;
}
std::unique_ptr<DecoderWay> llama_file_way(const std::filesystem::path&, const DecoderSpec&) {
  return nullptr;
}
#endif

}  // namespace cleave::bench
