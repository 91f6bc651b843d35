#pragma once

#include <string>

namespace cleave {

class GgufFile;

/// The texts of the HuggingFace files that say the same as a GGUF's tokenizer keys. An empty string
/// means that the file does not exist.
struct GgufTokenizerFiles {
  std::string tokenizer_json;
  std::string tokenizer_config_json;
  std::string special_tokens_map_json;
  std::string generation_config_json;
  std::string chat_template;  ///< for chat_template.jinja
};

/// Builds them from tokenizer.ggml.*: "gpt2" becomes byte-level BPE with the pre-tokenizer that
/// tokenizer.ggml.pre names, "llama" the Llama-2 kind, its merges recovered from the tokens and
/// their scores.
/// @throws FileError  a missing key, lists of different lengths, or a kind that is not known
GgufTokenizerFiles gguf_tokenizer_files(const GgufFile& file);

}  // namespace cleave
