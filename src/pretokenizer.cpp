#include "pretokenizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <optional>

#include "json_node.h"
#include "pattern.h"
#include "unicode.h"

namespace cleave {
namespace {

using Piece = PieceList::Piece;

// GPT-2's split expression, which ByteLevel applies unless use_regex is false.
constexpr std::string_view kGpt2Split =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// What becomes of a match when a text is split at it.
enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

/// Applies `behavior` to segments that cover a text: afterwards each is a piece to keep, except the
/// matches if they are to be removed.
void merge_segments(std::vector<Segment>& segments, Behavior behavior) {
  if (behavior == Behavior::kIsolated || behavior == Behavior::kRemoved) return;
  const bool backwards = behavior == Behavior::kMergedWithNext;
  if (backwards) std::reverse(segments.begin(), segments.end());
  std::size_t kept = 0;
  bool previous_is_match = false;
  for (const Segment& segment : segments) {
    const bool joins = behavior == Behavior::kContiguous ? segment.is_match == previous_is_match
                                                         : segment.is_match && !previous_is_match;
    previous_is_match = segment.is_match;
    if (joins && kept > 0) {
      Segment& last = segments[kept - 1];
      (backwards ? last.begin : last.end) = backwards ? segment.begin : segment.end;
    } else {
      segments[kept++] = segment;
    }
  }
  segments.resize(kept);
  if (backwards) std::reverse(segments.begin(), segments.end());
}

/// Splits every piece at the segments that `find(text, segments)` reports.
template <class Find>
void split_pieces(PieceList& list, Behavior behavior, const Find& find) {
  std::vector<Piece> result;
  result.reserve(list.pieces.size());
  std::vector<Segment> segments;
  for (const Piece& piece : list.pieces) {
    find(list.view(piece), segments);
    merge_segments(segments, behavior);
    for (const Segment& segment : segments) {
      const bool removed = behavior == Behavior::kRemoved && segment.is_match;
      if (removed || segment.begin == segment.end) continue;
      result.push_back({piece.begin + segment.begin, piece.begin + segment.end,
                        piece.starts_input && segment.begin == 0});
    }
  }
  list.pieces = std::move(result);
}

/// Rewrites every piece: `append(piece, text)` adds its new spelling to `text`.
template <class Append>
void rewrite_pieces(PieceList& list, const Append& append) {
  std::string text;
  text.reserve(list.text.size() + list.text.size() / 4);
  for (Piece& piece : list.pieces) {
    const std::size_t begin = text.size();
    append(piece, text);
    piece.begin = begin;
    piece.end = text.size();
  }
  list.text = std::move(text);
}

/// Splits every piece at the code points of a class, each of which is a match.
void split_at(PieceList& list, Behavior behavior, bool (*is_match)(char32_t) noexcept) {
  split_pieces(list, behavior, [&](std::string_view text, std::vector<Segment>& segments) {
    segments.clear();
    std::size_t covered = 0;
    for (std::size_t at = 0; at < text.size();) {
      const CodePoint next = decode_utf8(text, at);
      if (is_match(next.value)) {
        if (covered < at) segments.push_back({covered, at, false});
        covered = at + next.length;
        segments.push_back({at, covered, true});
      }
      at += next.length;
    }
    if (covered < text.size()) segments.push_back({covered, text.size(), false});
  });
}

void spell_bytes(PieceList& list) {
  static const auto kSpelling = [] {
    std::array<std::string, 256> spelling;
    for (int byte = 0; byte < 256; ++byte)
      append_utf8(spelling[byte], unicode_of_byte(static_cast<unsigned char>(byte)));
    return spelling;
  }();
  const std::string old = list.text;
  rewrite_pieces(list, [&](const Piece& piece, std::string& text) {
    for (std::size_t i = piece.begin; i < piece.end; ++i)
      text += kSpelling[static_cast<unsigned char>(old[i])];
  });
}

Behavior behavior_from_json(const JsonNode& node) {
  const std::string name = node.as_string();
  if (name == "Removed") return Behavior::kRemoved;
  if (name == "Isolated") return Behavior::kIsolated;
  if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return Behavior::kMergedWithNext;
  if (name == "Contiguous") return Behavior::kContiguous;
  node.fail(
      fmt::format("behavior \"{}\" is not known; expected Removed, Isolated, MergedWithPrevious, "
                  "MergedWithNext or Contiguous",
                  name));
}

}  // namespace

PreTokenizer PreTokenizer::from_json(const JsonNode& node) {
  PreTokenizer pretokenizer;
  if (!node.is_null()) pretokenizer.add(node);
  return pretokenizer;
}

void PreTokenizer::add(const JsonNode& node) {
  const std::string type = node.type();
  if (type == "Sequence") {
    for (const JsonNode& part : node.at("pretokenizers").elements()) add(part);
  } else if (type == "ByteLevel") {
    add_byte_level(node);
  } else if (type == "Split") {
    add_split(node);
  } else if (type == "Digits") {
    const Behavior behavior =
        node.bool_or("individual_digits", false) ? Behavior::kIsolated : Behavior::kContiguous;
    steps_.push_back([behavior](PieceList& list) { split_at(list, behavior, is_numeric); });
  } else if (type == "Metaspace") {
    add_metaspace(node);
  } else if (type == "BertPreTokenizer" || type == "WhitespaceSplit") {
    steps_.push_back([](PieceList& list) { split_at(list, Behavior::kRemoved, is_whitespace); });
    if (type == "BertPreTokenizer")
      steps_.push_back(
          [](PieceList& list) { split_at(list, Behavior::kIsolated, is_punctuation); });
  } else if (type == "Punctuation") {
    const Behavior behavior =
        node.has("behavior") ? behavior_from_json(node.at("behavior")) : Behavior::kIsolated;
    steps_.push_back([behavior](PieceList& list) { split_at(list, behavior, is_punctuation); });
  } else {
    node.fail(fmt::format(
        "pre-tokenizer \"{}\" is not supported; expected Sequence, ByteLevel, Split, Digits, "
        "Metaspace, BertPreTokenizer, WhitespaceSplit or Punctuation",
        type));
  }
}

void PreTokenizer::add_byte_level(const JsonNode& node) {
  if (node.bool_or("add_prefix_space", true))
    steps_.push_back([](PieceList& list) {
      const PieceList old = list;
      rewrite_pieces(list, [&](const Piece& piece, std::string& text) {
        const std::string_view view = old.view(piece);
        if (!view.starts_with(' ')) text += ' ';
        text += view;
      });
    });
  if (node.bool_or("use_regex", true))
    steps_.push_back([pattern = Pattern::regex(kGpt2Split, "ByteLevel")](PieceList& list) {
      split_pieces(list, Behavior::kIsolated,
                   [&](std::string_view text, auto& segments) { pattern.find(text, segments); });
    });
  steps_.push_back(spell_bytes);
}

void PreTokenizer::add_split(const JsonNode& node) {
  const Behavior behavior = behavior_from_json(node.at("behavior"));
  steps_.push_back([behavior, pattern = Pattern::from_json(node.at("pattern")),
                    invert = node.bool_or("invert", false)](PieceList& list) {
    split_pieces(list, behavior, [&](std::string_view text, std::vector<Segment>& segments) {
      pattern.find(text, segments);
      if (invert)
        for (Segment& segment : segments) segment.is_match = !segment.is_match;
    });
  });
}

void PreTokenizer::add_metaspace(const JsonNode& node) {
  const std::string replacement = node.at("replacement").as_string();
  std::string scheme = node.string_or("prepend_scheme", "always");
  if (!node.bool_or("add_prefix_space", true)) scheme = "never";  // the older spelling
  if (scheme != "always" && scheme != "first" && scheme != "never")
    node.fail(
        fmt::format("prepend_scheme \"{}\" is not known; expected always, first or never", scheme));

  steps_.push_back([replacement, scheme, space = Pattern::literal(" ")](PieceList& list) {
    const PieceList old = list;
    rewrite_pieces(list, [&](const Piece& piece, std::string& text) {
      const std::string spelled = space.replace(old.view(piece), replacement);
      const bool may_prepend = scheme == "always" || (scheme == "first" && piece.starts_input);
      if (may_prepend && !spelled.starts_with(replacement)) text += replacement;
      text += spelled;
    });
  });
  if (node.bool_or("split", true))
    steps_.push_back([pattern = Pattern::literal(replacement)](PieceList& list) {
      split_pieces(list, Behavior::kMergedWithNext,
                   [&](std::string_view text, auto& segments) { pattern.find(text, segments); });
    });
}

PieceList PreTokenizer::apply(std::string text, bool starts_input) const {
  PieceList list;
  if (text.empty()) return list;
  list.pieces.push_back({0, text.size(), starts_input});
  list.text = std::move(text);
  for (const Step& step : steps_) step(list);
  return list;
}

}  // namespace cleave
