#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace cleave {

class Checkpoint;

/// Text to token ids and back, exactly as HuggingFace `tokenizers` does it for the same
/// `tokenizer.json`: byte-level BPE (GPT-2, Llama-3, SmolLM2), the Llama-2 kind (BPE with byte
/// fallback behind Prepend/Replace normalisers) and WordPiece (BERT). Added and special tokens are
/// recognised inside text. Its truncation and padding are ignored.
///
/// Invalid UTF-8 is read as U+FFFD, one per maximal invalid subpart (Unicode 3.9, as Python's
/// errors="replace"). Immutable after construction; concurrent use is safe.
class Tokenizer {
 public:
  /// @param origin  names the source in messages
  /// @throws FileError  malformed, or a normaliser, pre-tokenizer, model or decoder it does not
  /// know
  static Tokenizer from_json(const std::string& json_text, const std::string& origin);
  static Tokenizer from_file(const std::filesystem::path& tokenizer_json);
  static Tokenizer from_checkpoint(const Checkpoint& checkpoint);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  /// @param add_special_tokens  apply the post-processor (a leading BOS for most models,
  ///                            [CLS] and [SEP] for encoders)
  std::vector<std::int32_t> encode(std::string_view text, bool add_special_tokens = false) const;
  /// What the post-processor puts before and behind one text. Valid while this lives.
  std::span<const std::int32_t> special_before() const;
  std::span<const std::int32_t> special_after() const;
  /// @param skip_special_tokens  leave out tokens marked special
  /// @throws InvalidArgument  an id outside [0, vocab_size)
  std::string decode(std::span<const std::int32_t> ids, bool skip_special_tokens = true) const;
  /// Ids are in [0, vocab_size), added tokens included.
  std::int32_t vocab_size() const;
  /// The id of a token by its exact spelling, or -1.
  std::int32_t token_to_id(std::string_view token) const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// Text piece by piece while ids are generated. A character whose bytes are spread over several
/// tokens is held back until it is complete. After eight ids that complete none all but the last
/// U+FFFD is returned, and special tokens are dropped, so an id costs the decoding of the last few,
/// however many there were before.
class TextStream {
 public:
  /// @param tokenizer  must outlive this
  /// @param prompt     what comes before; of its text nothing is returned but an incomplete
  /// character at its end, with what completes it
  explicit TextStream(const Tokenizer& tokenizer, std::span<const std::int32_t> prompt = {});

  /// What of the text is new and complete with this id; often all of a token, or nothing.
  /// @throws InvalidArgument  as Tokenizer::decode()
  std::string push(std::int32_t id);
  /// At the end: what was held back, with U+FFFD for an incomplete character.
  std::string flush();

 private:
  void hold_partial_character();
  std::string show(const std::string& text);
  std::string show_held(const std::string& text);

  const Tokenizer* tokenizer_;
  std::vector<std::int32_t> ids_;  // the last that were shown, and those behind them
  std::size_t shown_ids_ = 0;      // how many of them were
  std::string shown_;              // their text
};

}  // namespace cleave
