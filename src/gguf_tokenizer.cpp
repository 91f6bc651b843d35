#include "gguf_tokenizer.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "cleave/error.h"
#include "gguf.h"
#include "gguf_vocabulary.h"

namespace cleave {
namespace {

using nlohmann::json;

constexpr const char* kMetaspace = "\xE2\x96\x81";  // U+2581, SentencePiece's space

// The split expressions of Llama 3 and Qwen 2, as their own tokenizer.json has them. They differ in
// how many digits make a piece.
constexpr std::string_view kWordSplit =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{})"
    R"(| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

json byte_level(bool use_regex) {
  return {{"type", "ByteLevel"},
          {"add_prefix_space", false},
          {"trim_offsets", true},
          {"use_regex", use_regex}};
}

json sequence(const char* key, json parts) { return {{"type", "Sequence"}, {key, parts}}; }

json split_then_bytes(std::string_view digits) {
  const json split = {{"type", "Split"},
                      {"pattern", {{"Regex", fmt::format(fmt::runtime(kWordSplit), digits)}}},
                      {"behavior", "Isolated"},
                      {"invert", false}};
  return sequence("pretokenizers", {split, byte_level(false)});
}

/// The pre-tokenizer (and for Qwen 2 the normaliser) that belongs to tokenizer.ggml.pre.
void set_byte_level_pipeline(json& tokenizer, const GgufVocabulary& vocabulary) {
  const std::string& pre = vocabulary.pre;
  if (pre == "smollm") {
    const json digits = {{"type", "Digits"}, {"individual_digits", true}};
    tokenizer["pre_tokenizer"] = sequence("pretokenizers", {digits, byte_level(true)});
  } else if (pre == "gpt-2" || pre == "default") {
    tokenizer["pre_tokenizer"] = byte_level(true);
  } else if (pre == "llama-bpe" || pre == "llama3" || pre == "llama-v3") {
    tokenizer["pre_tokenizer"] = split_then_bytes(R"(\p{N}{1,3})");
    tokenizer["model"]["ignore_merges"] = true;
  } else if (pre == "qwen2") {
    tokenizer["normalizer"] = {{"type", "NFC"}};
    tokenizer["pre_tokenizer"] = split_then_bytes(R"(\p{N})");
  } else {
    throw FileError(fmt::format(
        "{}: tokenizer.ggml.pre is \"{}\"; expected smollm, gpt-2, default, llama-bpe or qwen2; "
        "use the model's HuggingFace directory instead",
        vocabulary.origin, pre));
  }
  tokenizer["decoder"] = byte_level(true);
}

/// Llama 2's normalisers and decoder.
void set_sentencepiece_pipeline(json& tokenizer, const GgufVocabulary& vocabulary) {
  const json spaces = {
      {"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", kMetaspace}};
  json normalizers = json::array({spaces});
  json decoders =
      json::array({{{"type", "Replace"}, {"pattern", {{"String", kMetaspace}}}, {"content", " "}},
                   {{"type", "ByteFallback"}},
                   {{"type", "Fuse"}}});
  if (vocabulary.add_space_prefix) {
    const json prefix = {{"type", "Prepend"}, {"prepend", kMetaspace}};
    normalizers = json::array({prefix, spaces});
    decoders.push_back({{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}});
  }
  tokenizer["normalizer"] = sequence("normalizers", normalizers);
  tokenizer["decoder"] = sequence("decoders", decoders);
  json& model = tokenizer["model"];
  model["byte_fallback"] = true;
  model["fuse_unk"] = true;
  if (vocabulary.unk) model["unk_token"] = vocabulary.tokens[*vocabulary.unk];
}

json model_of(const GgufVocabulary& vocabulary) {
  json vocab = json::object(), merges = json::array();
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) vocab[vocabulary.tokens[i]] = i;
  for (const auto& [left, right] : vocabulary.merges) merges.push_back({left, right});
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", nullptr},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", false},
          {"byte_fallback", false},
          {"ignore_merges", false},
          {"vocab", std::move(vocab)},
          {"merges", std::move(merges)}};
}

json added_tokens_of(const GgufVocabulary& vocabulary) {
  json added = json::array();
  for (std::size_t i = 0; i < vocabulary.tokens.size(); ++i) {
    const std::int64_t type = vocabulary.types[i];
    // Llama's <unk> (type "unknown") is a special token in HuggingFace's files, too.
    const bool special = type == GgufVocabulary::kControl || type == GgufVocabulary::kUnknown;
    if (vocabulary.tokens[i].empty() || (!special && type != GgufVocabulary::kUserDefined))
      continue;
    added.push_back({{"id", i},
                     {"content", vocabulary.tokens[i]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", special}});
  }
  return added;
}

/// A template that puts BOS before and EOS after the text, as the keys ask for; null if neither.
json post_processor_of(const GgufVocabulary& vocabulary) {
  if (!vocabulary.add_bos && !vocabulary.add_eos) return nullptr;
  json special = json::object();
  const auto token_part = [&](std::int64_t id, int segment) {
    const std::string& token = vocabulary.tokens[id];
    special[token] = {{"id", token}, {"ids", {id}}, {"tokens", {token}}};
    return json{{"SpecialToken", {{"id", token}, {"type_id", segment}}}};
  };
  const auto wrap = [&](const char* text, int segment) {
    json parts = json::array();
    if (vocabulary.add_bos) parts.push_back(token_part(*vocabulary.bos, segment));
    parts.push_back({{"Sequence", {{"id", text}, {"type_id", segment}}}});
    if (vocabulary.add_eos) parts.push_back(token_part(*vocabulary.eos, segment));
    return parts;
  };
  json single = wrap("A", 0), pair = single;
  for (json& part : wrap("B", 1)) pair.push_back(part);
  return {{"type", "TemplateProcessing"},
          {"single", single},
          {"pair", pair},
          {"special_tokens", special}};
}

json tokenizer_json_of(const GgufVocabulary& vocabulary) {
  json tokenizer = {{"version", "1.0"},
                    {"truncation", nullptr},
                    {"padding", nullptr},
                    {"added_tokens", added_tokens_of(vocabulary)},
                    {"normalizer", nullptr},
                    {"pre_tokenizer", nullptr},
                    {"post_processor", post_processor_of(vocabulary)},
                    {"decoder", nullptr},
                    {"model", model_of(vocabulary)}};
  if (vocabulary.model == "gpt2")
    set_byte_level_pipeline(tokenizer, vocabulary);
  else
    set_sentencepiece_pipeline(tokenizer, vocabulary);
  return tokenizer;
}

json special_tokens_of(const GgufVocabulary& vocabulary) {
  json map = json::object();
  const auto put = [&](const char* name, const std::optional<std::int64_t>& id) {
    if (id) map[name] = vocabulary.tokens[*id];
  };
  put("bos_token", vocabulary.bos);
  put("eos_token", vocabulary.eos);
  put("unk_token", vocabulary.unk);
  put("pad_token", vocabulary.pad);
  return map;
}

json tokenizer_config_of(const GgufVocabulary& vocabulary, const GgufFile& file) {
  json config = special_tokens_of(vocabulary);
  // The class that takes tokenizer.json as it is; a model's own class would rebuild parts of it.
  config["tokenizer_class"] = "PreTrainedTokenizerFast";
  config["add_bos_token"] = vocabulary.add_bos;
  config["add_eos_token"] = vocabulary.add_eos;
  config["clean_up_tokenization_spaces"] = false;
  const std::string architecture = file.string("general.architecture").value_or("");
  if (const auto length = file.integer(architecture + ".context_length"))
    config["model_max_length"] = *length;
  return config;
}

json generation_config_of(const GgufVocabulary& vocabulary) {
  json config = json::object();
  const auto put = [&](const char* name, const std::optional<std::int64_t>& id) {
    if (id) config[name] = *id;
  };
  put("bos_token_id", vocabulary.bos);
  put("eos_token_id", vocabulary.eos);
  put("pad_token_id", vocabulary.pad);
  return config;
}

}  // namespace

GgufTokenizerFiles gguf_tokenizer_files(const GgufFile& file) {
  const GgufVocabulary vocabulary = GgufVocabulary::read(file);
  const auto text_of = [](const json& value) { return value.dump(2) + "\n"; };
  GgufTokenizerFiles files;
  files.tokenizer_json = text_of(tokenizer_json_of(vocabulary));
  files.tokenizer_config_json = text_of(tokenizer_config_of(vocabulary, file));
  files.special_tokens_map_json = text_of(special_tokens_of(vocabulary));
  files.generation_config_json = text_of(generation_config_of(vocabulary));
  files.chat_template = file.string("tokenizer.chat_template").value_or("");
  file.release_keys();
  return files;
}

}  // namespace cleave
