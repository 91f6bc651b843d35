#include "gguf_vocabulary.h"

#include <fmt/format.h>

#include <algorithm>
#include <tuple>

#include "cleave/error.h"
#include "gguf.h"
#include "text_hash.h"
#include "unicode.h"

namespace cleave {
namespace {

[[noreturn]] void fail(const GgufFile& file, std::string_view message) {
  throw FileError(fmt::format("{}: {}", file.path().string(), message));
}

std::vector<std::string> read_tokens(const GgufFile& file) {
  const auto tokens = file.strings("tokenizer.ggml.tokens");
  if (!tokens || tokens->empty())
    fail(file,
         "the key tokenizer.ggml.tokens is missing; was the file written without vocabulary?");
  for (std::size_t i = 0; i < tokens->size(); ++i)
    if (!is_valid_utf8((*tokens)[i]))
      fail(file, fmt::format("tokenizer.ggml.tokens[{}] is not UTF-8", i));
  return {tokens->begin(), tokens->end()};
}

std::vector<std::int64_t> read_types(const GgufFile& file, std::size_t count) {
  const auto* types = file.integers("tokenizer.ggml.token_type");
  if (types == nullptr) return std::vector<std::int64_t>(count, GgufVocabulary::kNormal);
  if (types->size() != count)
    fail(file, fmt::format("tokenizer.ggml.token_type has {} entries for {} tokens", types->size(),
                           count));
  return *types;
}

GgufVocabulary::MergeList split_merges(const GgufFile& file,
                                       const std::vector<std::string_view>& lines) {
  GgufVocabulary::MergeList merges;
  merges.reserve(lines.size());
  for (const std::string_view line : lines) {
    // From the second byte on: a token may itself be a space.
    const std::size_t space = line.find(' ', 1);
    if (space == std::string::npos || space + 1 == line.size() || !is_valid_utf8(line))
      fail(file, fmt::format("tokenizer.ggml.merges[{}] is \"{}\"; expected two tokens and a space",
                             merges.size(), line));
    merges.emplace_back(line.substr(0, space), line.substr(space + 1));
  }
  return merges;
}

GgufVocabulary::MergeList read_merges(const GgufFile& file, const GgufVocabulary& vocabulary) {
  if (const auto lines = file.strings("tokenizer.ggml.merges")) return split_merges(file, *lines);
  const auto* scores = file.floats("tokenizer.ggml.scores");
  if (vocabulary.model != "llama" || scores == nullptr)
    fail(file, fmt::format("a tokenizer of the kind \"{}\" needs tokenizer.ggml.{}",
                           vocabulary.model, vocabulary.model == "llama" ? "scores" : "merges"));
  if (scores->size() != vocabulary.tokens.size())
    fail(file, fmt::format("tokenizer.ggml.scores has {} entries for {} tokens", scores->size(),
                           vocabulary.tokens.size()));
  return merges_from_scores(vocabulary.tokens, *scores);
}

std::optional<std::int64_t> read_id(const GgufFile& file, const std::string& name,
                                    std::size_t count) {
  const std::string key = "tokenizer.ggml." + name;
  const auto id = file.integer(key);
  if (id && (*id < 0 || *id >= static_cast<std::int64_t>(count)))
    fail(file, fmt::format("{} is {}; expected 0..{}", key, *id, count - 1));
  return id;
}

/// A cut of a token into two, with the keys that order it.
struct Cut {
  std::string_view left, right;
  double score;
  std::size_t left_length, right_length;  // code points
};

}  // namespace

GgufVocabulary::MergeList merges_from_scores(const std::vector<std::string>& tokens,
                                             const std::vector<double>& scores) {
  TextMap<std::size_t> ids;
  for (std::size_t i = 0; i < tokens.size(); ++i) ids[tokens[i]] = i;

  std::vector<Cut> cuts;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::string_view token = tokens[i];
    const std::size_t first_cut = cuts.size();
    std::size_t length = 0;
    for (std::size_t at = 0; at < token.size(); at += decode_utf8(token, at).length, ++length) {
      const std::string_view left = token.substr(0, at), right = token.substr(at);
      if (at > 0 && ids.contains(left) && ids.contains(right))
        cuts.push_back({left, right, scores[i], length, 0});
    }
    for (std::size_t k = first_cut; k < cuts.size(); ++k)
      cuts[k].right_length = length - cuts[k].left_length;
    const auto by_ids = [&](const Cut& a, const Cut& b) {
      return std::pair(ids.find(a.left)->second, ids.find(a.right)->second) <
             std::pair(ids.find(b.left)->second, ids.find(b.right)->second);
    };
    std::sort(cuts.begin() + static_cast<std::ptrdiff_t>(first_cut), cuts.end(), by_ids);
  }
  std::stable_sort(cuts.begin(), cuts.end(), [](const Cut& a, const Cut& b) {
    return std::tuple(a.score, a.left_length, a.right_length) >
           std::tuple(b.score, b.left_length, b.right_length);
  });

  GgufVocabulary::MergeList merges;
  merges.reserve(cuts.size());
  for (const Cut& cut : cuts) merges.emplace_back(cut.left, cut.right);
  return merges;
}

GgufVocabulary GgufVocabulary::read(const GgufFile& file) {
  GgufVocabulary vocabulary;
  vocabulary.origin = file.path().string();
  vocabulary.model = file.string("tokenizer.ggml.model").value_or("");
  if (vocabulary.model != "gpt2" && vocabulary.model != "llama")
    fail(file,
         fmt::format("tokenizer.ggml.model is \"{}\"; expected gpt2 or llama", vocabulary.model));
  vocabulary.pre = file.string("tokenizer.ggml.pre").value_or("default");
  vocabulary.tokens = read_tokens(file);
  const std::size_t count = vocabulary.tokens.size();
  vocabulary.types = read_types(file, count);
  vocabulary.merges = read_merges(file, vocabulary);
  vocabulary.bos = read_id(file, "bos_token_id", count);
  vocabulary.eos = read_id(file, "eos_token_id", count);
  vocabulary.unk = read_id(file, "unknown_token_id", count);
  vocabulary.pad = read_id(file, "padding_token_id", count);
  // Files without the key mean llama.cpp's defaults: SentencePiece models and Llama 3 want a BOS.
  const bool wants_bos = vocabulary.model == "llama" || vocabulary.pre == "llama-bpe";
  vocabulary.add_bos = file.boolean("tokenizer.ggml.add_bos_token").value_or(wants_bos);
  vocabulary.add_eos = file.boolean("tokenizer.ggml.add_eos_token").value_or(false);
  vocabulary.add_space_prefix = file.boolean("tokenizer.ggml.add_space_prefix").value_or(true);
  if (vocabulary.add_bos && !vocabulary.bos)
    fail(file, "tokenizer.ggml.add_bos_token is set but tokenizer.ggml.bos_token_id is missing");
  if (vocabulary.add_eos && !vocabulary.eos)
    fail(file, "tokenizer.ggml.add_eos_token is set but tokenizer.ggml.eos_token_id is missing");
  return vocabulary;
}

}  // namespace cleave
