#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text_hash.h"
#include "token_table.h"

namespace cleave {

class JsonNode;

/// What two neighbouring tokens become, and how early (a lower rank merges first).
struct Merge {
  std::int32_t rank = -1;
  std::int32_t merged_id = -1;
};

/// A hash table from token pairs to merges, open-addressed: one cache line per look-up, where
/// std::unordered_map takes two or three. Encoding a text is mostly this look-up.
class MergeTable {
 public:
  /// Room for `expected` pairs; grows beyond.
  explicit MergeTable(std::size_t expected = 0);
  void insert(std::int32_t left, std::int32_t right, Merge merge);  ///< replaces an equal pair
  const Merge* find(std::int32_t left, std::int32_t right) const noexcept;

 private:
  struct Slot {
    std::uint64_t key = kEmpty;
    Merge merge;
  };
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};
  static std::uint64_t key_of(std::int32_t left, std::int32_t right) noexcept;
  // Sixteen bytes a slot: at 0.6, a look-up that finds nothing meets 3.6 slots, mostly of one line.
  static constexpr double kMostFull = 0.6;
  std::size_t first_slot(std::uint64_t key) const noexcept;
  std::size_t next_slot(std::size_t slot) const noexcept {
    return slot + 1 == slots_.size() ? 0 : slot + 1;
  }
  void put(std::uint64_t key, Merge merge);

  std::vector<Slot> slots_;  // at most kMostFull of them used
  std::size_t size_ = 0;
};

/// Byte-pair encoding with ranked merges: `model` of a `tokenizer.json`. Immutable.
class Bpe {
 public:
  /// @throws FileError  a merge names an unknown token, or an option changes the result in a way
  /// that is not supported (dropout, continuing_subword_prefix, end_of_word_suffix)
  static Bpe from_json(const JsonNode& node);

  /// What one encode() keeps between the words of a text: memory, and the words it has met.
  class Workspace {
    friend class Bpe;
    struct Symbol {
      std::int32_t id = -1;  // -1: merged into its left neighbour
      std::int32_t previous = -1, next = -1;
    };
    struct Span {
      std::size_t begin = 0, count = 0;
    };
    std::vector<Symbol> symbols;
    std::vector<std::uint64_t> heap;
    TextMap<Span> words;  // into `word_ids`
    std::vector<std::int32_t> word_ids;
  };

  /// Appends the ids of a word.
  /// @param word  valid UTF-8
  /// @throws InvalidArgument  a word of 2^31 code points or more
  void encode(std::string_view word, Workspace& workspace, std::vector<std::int32_t>& ids) const;

  const TokenTable& tokens() const { return tokens_; }

 private:
  void read_merges(const JsonNode& merges);
  void add_merge(const JsonNode& node, std::string_view left, std::string_view right,
                 std::int32_t rank);
  void read_options(const JsonNode& node);
  void index_code_points();

  std::int32_t id_of_code_point(std::string_view spelled) const;
  void index_joint(std::string_view left, std::string_view right);
  std::size_t end_of_part(std::string_view word, std::size_t begin) const;
  void encode_part(std::string_view part, Workspace& workspace,
                   std::vector<std::int32_t>& ids) const;
  void split_into_symbols(std::string_view word, Workspace& workspace) const;
  void merge_symbols(Workspace& workspace) const;
  void push_merge(Workspace& workspace, std::int32_t position) const;

  TokenTable tokens_;
  MergeTable merges_;
  MergeTable joints_;  // pairs of code points that some merge brings together
  std::array<std::int32_t, 0x800> short_code_points_{};  // ids of one- and two-byte code points
  std::array<std::int32_t, 256> byte_ids_{};             // of "<0x00>" ... "<0xFF>"
  std::int32_t unk_id_ = -1;
  bool fuse_unk_ = false, byte_fallback_ = false, ignore_merges_ = false;
};

}  // namespace cleave
