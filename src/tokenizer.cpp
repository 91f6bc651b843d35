#include "cleave/tokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <variant>

#include "added_tokens.h"
#include "bpe.h"
#include "cleave/checkpoint.h"
#include "cleave/error.h"
#include "json_node.h"
#include "normalizer.h"
#include "post_processor.h"
#include "pretokenizer.h"
#include "token_decoder.h"
#include "unicode.h"
#include "word_piece.h"

// text -> [added tokens cut out] -> normaliser -> [added tokens again] -> pre-tokenizer ->
//      BPE or WordPiece -> post-processor -> ids, and back through the decoder. Each stage is a
//      file of its own.

namespace cleave {

using TextModel = std::variant<Bpe, WordPiece>;

struct Tokenizer::Impl {
  TextModel model;
  Normalizer normalizer;
  AddedTokens added;
  PreTokenizer pretokenizer;
  PostProcessor post_processor;
  TokenDecoder decoder;
  std::int32_t vocab_size;

  explicit Impl(const JsonNode& root);
  const TokenTable& vocabulary() const {
    return std::visit([](const auto& of) -> const TokenTable& { return of.tokens(); }, model);
  }
  void encode(std::string_view text, std::vector<std::int32_t>& ids) const;
  template <class Model>
  void encode_text(const Model& of, std::string_view text, bool starts_input,
                   typename Model::Workspace& workspace, std::vector<std::int32_t>& ids) const;
};

namespace {

TextModel read_model(const JsonNode& node) {
  // Files before 0.9 leave the type out.
  const std::string type =
      node.string_or("type", node.has("max_input_chars_per_word") ? "WordPiece" : "BPE");
  if (type == "BPE") return Bpe::from_json(node);
  if (type == "WordPiece") return WordPiece::from_json(node);
  node.fail(fmt::format("model \"{}\" is not supported; expected BPE or WordPiece", type));
}

void check_version(const JsonNode& root) {
  const std::string version = root.string_or("version", "1.0");
  if (version != "1.0")
    root.fail(fmt::format("tokenizer version \"{}\" is not known; expected 1.0", version));
}

}  // namespace

// "truncation" and "padding" of the file are left out on purpose: they shape batches, and
// Transformers switches them off as well unless a call asks for them.
Tokenizer::Impl::Impl(const JsonNode& root)
    : model(read_model(root.at("model"))),
      normalizer(Normalizer::from_json(root.at_or_null("normalizer"))),
      added(AddedTokens::from_json(root.at_or_null("added_tokens"), vocabulary(), normalizer)),
      pretokenizer(PreTokenizer::from_json(root.at_or_null("pre_tokenizer"))),
      post_processor(PostProcessor::from_json(root.at_or_null("post_processor"))),
      decoder(TokenDecoder::from_json(root.at_or_null("decoder"))),
      vocab_size(std::max(vocabulary().max_id(), added.max_id()) + 1) {
  check_version(root);
  for (const auto* ids : {&post_processor.before, &post_processor.after})
    for (const std::int32_t id : *ids)
      if (id < 0 || id >= vocab_size)
        root.at("post_processor")
            .fail(fmt::format("token id {} is outside the vocabulary of {}", id, vocab_size));
}

template <class Model>
void Tokenizer::Impl::encode_text(const Model& of, std::string_view text, bool starts_input,
                                  typename Model::Workspace& workspace,
                                  std::vector<std::int32_t>& ids) const {
  const std::string normalized = normalizer.apply(std::string(text));
  for (const TextSection& section : added.normalized().split(normalized)) {
    if (section.token != nullptr) {
      ids.push_back(section.token->id);
      continue;
    }
    const PieceList list =
        pretokenizer.apply(normalized.substr(section.begin, section.end - section.begin),
                           starts_input && section.begin == 0);
    for (const PieceList::Piece& piece : list.pieces) of.encode(list.view(piece), workspace, ids);
  }
}

void Tokenizer::Impl::encode(std::string_view text, std::vector<std::int32_t>& ids) const {
  std::visit(
      [&]<class Model>(const Model& of) {
        typename Model::Workspace workspace;
        for (const TextSection& section : added.raw().split(text)) {
          if (section.token != nullptr)
            ids.push_back(section.token->id);
          else
            encode_text(of, text.substr(section.begin, section.end - section.begin),
                        section.begin == 0, workspace, ids);
        }
      },
      model);
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Tokenizer Tokenizer::from_json(const std::string& json_text, const std::string& origin) {
  nlohmann::json document;
  try {
    document = nlohmann::json::parse(json_text);
  } catch (const nlohmann::json::exception& error) {
    throw FileError(fmt::format("{}: no valid JSON: {}", origin, error.what()));
  }
  return Tokenizer(std::make_unique<Impl>(JsonNode(document, origin)));
}

Tokenizer Tokenizer::from_file(const std::filesystem::path& tokenizer_json) {
  std::ifstream file(tokenizer_json, std::ios::binary);
  std::ostringstream text;
  if (!file || !(text << file.rdbuf()))
    throw FileError(
        fmt::format("{}: cannot be read; expected a tokenizer.json", tokenizer_json.string()));
  return from_json(text.str(), tokenizer_json.string());
}

Tokenizer Tokenizer::from_checkpoint(const Checkpoint& checkpoint) {
  return from_json(checkpoint.tokenizer_json(), checkpoint.path().string());
}

std::vector<std::int32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  std::string repaired;
  if (!is_valid_utf8(text)) {
    repaired = replace_invalid_utf8(text);
    text = repaired;
  }
  std::vector<std::int32_t> ids;
  if (add_special_tokens) ids = impl_->post_processor.before;
  impl_->encode(text, ids);
  const auto& after = impl_->post_processor.after;
  if (add_special_tokens) ids.insert(ids.end(), after.begin(), after.end());
  return ids;
}

std::string Tokenizer::decode(std::span<const std::int32_t> ids, bool skip_special_tokens) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= impl_->vocab_size)
      throw InvalidArgument(fmt::format(
          "Tokenizer::decode: id {} is outside the vocabulary; expected 0..{}; was it made with "
          "another tokenizer?",
          id, impl_->vocab_size - 1));
    // Added tokens come back as they are found in a text, that is normalised; decoders undo it.
    if (const AddedToken* token = impl_->added.by_id(id)) {
      if (!skip_special_tokens || !token->special) tokens.push_back(token->spelling);
    } else if (const auto spelling = impl_->vocabulary().spelling(id)) {
      tokens.emplace_back(*spelling);
    }  // else a hole in the vocabulary, which stands for nothing
  }
  return impl_->decoder.apply(std::move(tokens));
}

std::int32_t Tokenizer::vocab_size() const { return impl_->vocab_size; }

std::span<const std::int32_t> Tokenizer::special_before() const {
  return impl_->post_processor.before;
}

std::span<const std::int32_t> Tokenizer::special_after() const {
  return impl_->post_processor.after;
}

std::int32_t Tokenizer::token_to_id(std::string_view token) const {
  if (const AddedToken* added = impl_->added.by_content(token)) return added->id;
  return impl_->vocabulary().find(token);
}

}  // namespace cleave
