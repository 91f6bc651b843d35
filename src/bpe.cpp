#include "bpe.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "cleave/error.h"
#include "json_node.h"
#include "json_vocabulary.h"
#include "unicode.h"

namespace cleave {
namespace {

// Longer words hardly repeat; more different words than this fill memory for little.
constexpr std::size_t kLongestRememberedWord = 256;
constexpr std::size_t kMostRememberedWords = 1 << 16;

// The queue of possible merges is a heap of integers, smallest first: rank, then position.
constexpr std::uint64_t queue_entry(std::int32_t rank, std::int32_t position) {
  return std::uint64_t{static_cast<std::uint32_t>(rank)} << 32 |
         static_cast<std::uint32_t>(position);
}

}  // namespace

MergeTable::MergeTable(std::size_t expected)
    : slots_(static_cast<std::size_t>(static_cast<double>(expected) / kMostFull) + 2) {}

std::uint64_t MergeTable::key_of(std::int32_t left, std::int32_t right) noexcept {
  return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
}

std::size_t MergeTable::first_slot(std::uint64_t key) const noexcept {
  // Multiplicative hashing (2^64 / golden ratio); its high bits are the well-mixed ones. As a
  // fraction of 2^32 they choose a slot of any number of slots.
  return static_cast<std::size_t>(((key * 0x9E3779B97F4A7C15u) >> 32) * slots_.size() >> 32);
}

void MergeTable::insert(std::int32_t left, std::int32_t right, Merge merge) {
  put(key_of(left, right), merge);
  if (static_cast<double>(size_) <= kMostFull * static_cast<double>(slots_.size())) return;
  MergeTable larger(2 * size_);
  for (const Slot& slot : slots_)
    if (slot.key != kEmpty) larger.put(slot.key, slot.merge);
  *this = std::move(larger);
}

void MergeTable::put(std::uint64_t key, Merge merge) {
  std::size_t slot = first_slot(key);
  while (slots_[slot].key != kEmpty && slots_[slot].key != key) slot = next_slot(slot);
  if (slots_[slot].key == kEmpty) ++size_;
  slots_[slot] = {key, merge};
}

const Merge* MergeTable::find(std::int32_t left, std::int32_t right) const noexcept {
  const std::uint64_t key = key_of(left, right);
  for (std::size_t slot = first_slot(key); slots_[slot].key != kEmpty; slot = next_slot(slot))
    if (slots_[slot].key == key) return &slots_[slot].merge;
  return nullptr;
}

Bpe Bpe::from_json(const JsonNode& node) {
  Bpe bpe;
  bpe.tokens_ = read_vocabulary(node.at("vocab"));
  bpe.read_merges(node.at("merges"));
  bpe.read_options(node);
  bpe.index_code_points();
  return bpe;
}

void Bpe::read_merges(const JsonNode& merges) {
  if (!merges.value().is_array()) merges.fail("expected an array");
  merges_ = MergeTable(merges.value().size());
  joints_ = MergeTable(0);  // few pairs of code points are new
  std::int32_t rank = 0;
  for (const nlohmann::json& merge : merges.value()) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      add_merge(merges, merge[0].get_ref<const std::string&>(),
                merge[1].get_ref<const std::string&>(), rank++);
      continue;
    }
    if (!merge.is_string())
      merges.fail(fmt::format("merge {} is neither \"a b\" nor [\"a\", \"b\"]", rank));
    const std::string_view text = merge.get_ref<const std::string&>();
    if (text.starts_with("#version")) continue;  // the first line of a merges.txt
    const std::size_t space = text.find(' ');
    if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos)
      merges.fail(fmt::format("merge {} is \"{}\"; expected two tokens and one space", rank, text));
    add_merge(merges, text.substr(0, space), text.substr(space + 1), rank++);
  }
}

void Bpe::add_merge(const JsonNode& node, std::string_view left, std::string_view right,
                    std::int32_t rank) {
  const auto id = [&](std::string_view token) {
    const std::int32_t found = tokens_.find(token);
    if (found < 0)
      node.fail(
          fmt::format("merge {} (\"{}\" and \"{}\") needs the token \"{}\", which is not in "
                      "the vocabulary",
                      rank, left, right, token));
    return found;
  };
  const std::int32_t left_id = id(left), right_id = id(right);
  if (left.empty() || right.empty()) node.fail(fmt::format("merge {} has an empty token", rank));
  merges_.insert(left_id, right_id, {rank, id(std::string(left) + std::string(right))});
  index_joint(left, right);
}

void Bpe::read_options(const JsonNode& node) {
  fuse_unk_ = node.bool_or("fuse_unk", false);
  byte_fallback_ = node.bool_or("byte_fallback", false);
  ignore_merges_ = node.bool_or("ignore_merges", false);
  if (node.has("unk_token")) {
    const std::string unk = node.at("unk_token").as_string();
    unk_id_ = tokens_.find(unk);
    if (unk_id_ < 0) node.fail(fmt::format("unk_token \"{}\" is not in the vocabulary", unk));
  }
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!node.string_or(affix, "").empty())
      node.fail(fmt::format("{} \"{}\" is not supported; expected null or \"\"", affix,
                            node.at(affix).as_string()));
  if (node.has("dropout") && node.at("dropout").value() != 0.0)
    node.fail("dropout is for training; expected null or 0");
}

void Bpe::index_code_points() {
  for (char32_t c = 0; c < short_code_points_.size(); ++c) {
    std::string spelled;
    append_utf8(spelled, c);
    short_code_points_[c] = tokens_.find(spelled);
  }
  for (std::size_t byte = 0; byte < byte_ids_.size(); ++byte)
    byte_ids_[byte] = tokens_.find(fmt::format("<0x{:02X}>", byte));
}

void Bpe::encode(std::string_view word, Workspace& workspace,
                 std::vector<std::int32_t>& ids) const {
  if (ignore_merges_) {
    if (const std::int32_t id = tokens_.find(word); id >= 0) return ids.push_back(id);
  }
  if (word.size() <= kLongestRememberedWord) return encode_part(word, workspace, ids);
  for (std::size_t begin = 0; begin < word.size();) {
    const std::size_t end = end_of_part(word, begin);
    encode_part(word.substr(begin, end - begin), workspace, ids);
    begin = end;
  }
}

void Bpe::encode_part(std::string_view part, Workspace& workspace,
                      std::vector<std::int32_t>& ids) const {
  const auto known = workspace.words.find(part);
  if (known != workspace.words.end()) {
    const auto begin =
        workspace.word_ids.begin() + static_cast<std::ptrdiff_t>(known->second.begin);
    ids.insert(ids.end(), begin, begin + static_cast<std::ptrdiff_t>(known->second.count));
    return;
  }
  split_into_symbols(part, workspace);
  merge_symbols(workspace);

  const std::size_t first = ids.size();
  for (const Workspace::Symbol& symbol : workspace.symbols)
    if (symbol.id >= 0) ids.push_back(symbol.id);
  if (part.size() <= kLongestRememberedWord && workspace.words.size() < kMostRememberedWords) {
    workspace.words.emplace(part, Workspace::Span{workspace.word_ids.size(), ids.size() - first});
    workspace.word_ids.insert(workspace.word_ids.end(),
                              ids.begin() + static_cast<std::ptrdiff_t>(first), ids.end());
  }
}

// Between two code points that no merge brings together a word may be cut: whatever happens on one
// side never reaches the other. Without a pre-tokenizer the whole text is one word, and short parts
// are found again and fit the cache. Both code points must be tokens: unknown ones may be fused
// with, or vanish between, their neighbours.
std::size_t Bpe::end_of_part(std::string_view word, std::size_t begin) const {
  std::int32_t left = -1;
  for (std::size_t at = begin; at < word.size();) {
    const std::size_t length = decode_utf8(word, at).length;
    const std::int32_t right = id_of_code_point(word.substr(at, length));
    if (left >= 0 && right >= 0 && joints_.find(left, right) == nullptr) return at;
    left = right;
    at += length;
  }
  return word.size();
}

// What is on the two sides of a joint in a word are code points that are tokens. A symbol grows
// from the code points at its ends; one that does not (a byte fallback, unk) has no such end, and
// the word is not cut beside it.
void Bpe::index_joint(std::string_view left, std::string_view right) {
  std::size_t last = left.size() - 1;
  while (last > 0 && (static_cast<unsigned char>(left[last]) & 0xC0) == 0x80) --last;
  const std::int32_t end = tokens_.find(left.substr(last));
  const std::int32_t begin = tokens_.find(right.substr(0, decode_utf8(right, 0).length));
  if (end >= 0 && begin >= 0) joints_.insert(end, begin, {});
}

std::int32_t Bpe::id_of_code_point(std::string_view spelled) const {
  if (spelled.size() <= 2) return short_code_points_[decode_utf8(spelled, 0).value];
  return tokens_.find(spelled);
}

void Bpe::split_into_symbols(std::string_view word, Workspace& workspace) const {
  // Positions are 32 bits wide; a code point gives at most four symbols (byte fallback).
  if (word.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
    throw InvalidArgument(fmt::format(
        "Tokenizer::encode: a piece of {} bytes without a place to split; expected below 2^31; "
        "encode the text in parts",
        word.size()));
  auto& symbols = workspace.symbols;
  symbols.clear();
  // An unknown code point becomes unk only when something known follows, so that neighbours can be
  // fused. A byte fallback does not count as something known: that is how HuggingFace has it.
  bool unk_is_due = false;
  const auto add = [&](std::int32_t id) { symbols.push_back({id, -1, -1}); };
  const auto byte_id = [&](char byte) { return byte_ids_[static_cast<unsigned char>(byte)]; };
  for (std::size_t at = 0; at < word.size();) {
    const std::string_view spelled = word.substr(at, decode_utf8(word, at).length);
    at += spelled.size();
    const std::int32_t id = id_of_code_point(spelled);
    if (id >= 0) {
      if (unk_is_due) add(unk_id_);
      unk_is_due = false;
      add(id);
    } else if (byte_fallback_ && std::all_of(spelled.begin(), spelled.end(),
                                             [&](char byte) { return byte_id(byte) >= 0; })) {
      for (const char byte : spelled) add(byte_id(byte));
    } else if (unk_id_ >= 0) {
      if (unk_is_due && !fuse_unk_) add(unk_id_);
      unk_is_due = true;
    }
  }
  if (unk_is_due) add(unk_id_);
  const auto count = static_cast<std::int32_t>(symbols.size());
  for (std::int32_t i = 0; i < count; ++i) {
    symbols[i].previous = i - 1;
    symbols[i].next = i + 1 < count ? i + 1 : -1;
  }
}

void Bpe::push_merge(Workspace& workspace, std::int32_t position) const {
  const auto& symbols = workspace.symbols;
  if (position < 0 || symbols[position].next < 0) return;
  const Merge* merge = merges_.find(symbols[position].id, symbols[symbols[position].next].id);
  if (merge == nullptr) return;
  workspace.heap.push_back(queue_entry(merge->rank, position));
  std::push_heap(workspace.heap.begin(), workspace.heap.end(), std::greater<>());
}

// Lowest rank first, leftmost among equals. A queue keeps this O(n log n): a run of 100 000 equal
// characters would be quadratic if each merge searched the whole word.
void Bpe::merge_symbols(Workspace& workspace) const {
  auto& symbols = workspace.symbols;
  auto& heap = workspace.heap;
  heap.clear();
  const auto count = static_cast<std::int32_t>(symbols.size());
  for (std::int32_t i = 0; i + 1 < count; ++i)
    if (const Merge* merge = merges_.find(symbols[i].id, symbols[i + 1].id))
      heap.push_back(queue_entry(merge->rank, i));
  std::make_heap(heap.begin(), heap.end(), std::greater<>());

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const std::uint64_t top = heap.back();
    heap.pop_back();
    const auto position = static_cast<std::int32_t>(top & 0xFFFFFFFFu);
    auto& left = symbols[position];
    if (left.id < 0 || left.next < 0) continue;
    auto& right = symbols[left.next];
    // One of the two may have grown since this was queued.
    const Merge* merge = merges_.find(left.id, right.id);
    if (merge == nullptr || merge->rank != static_cast<std::int32_t>(top >> 32)) continue;

    left.id = merge->merged_id;
    right.id = -1;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = position;
    push_merge(workspace, left.previous);
    push_merge(workspace, position);
  }
}

}  // namespace cleave
