#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace cleave {

class GgufFile;

/// The tokenizer keys of a GGUF, checked.
struct GgufVocabulary {
  enum TokenType : std::int64_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4 };
  using MergeList = std::vector<std::pair<std::string, std::string>>;

  std::string origin;  ///< the file, for messages
  std::string model;   ///< "gpt2" or "llama"
  std::string pre;     ///< which pre-tokenizer; "default" where the key is absent
  std::vector<std::string> tokens;
  std::vector<std::int64_t> types;  ///< one per token
  MergeList merges;                 ///< from the file, or recovered from the scores
  std::optional<std::int64_t> bos, eos, unk, pad;
  bool add_bos = false, add_eos = false, add_space_prefix = true;

  /// @throws FileError  names the key
  static GgufVocabulary read(const GgufFile& file);
};

/// The merges that a SentencePiece BPE vocabulary implies: every way to cut a token into two other
/// tokens, best score first. The order among equals follows Transformers' `generate_merges`.
/// @param scores  one per token
GgufVocabulary::MergeList merges_from_scores(const std::vector<std::string>& tokens,
                                             const std::vector<double>& scores);

}  // namespace cleave
