#include <algorithm>
#include <string_view>

#include "cleave/tokenizer.h"

namespace cleave {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD: an incomplete character
constexpr std::size_t kMaxPartial = 3;  // ids of an incomplete character: UTF-8 has four bytes
constexpr std::size_t kMaxHeld = 8;     // ids: more of them are no character

bool is_skipped(const Tokenizer& tokenizer, std::int32_t id) {
  const std::span one(&id, 1);
  return tokenizer.decode(one).empty() && !tokenizer.decode(one, false).empty();
}

/// Less the last U+FFFD, which may still become a character.
std::string_view settled(std::string_view text) {
  if (text.ends_with(kReplacement)) text.remove_suffix(kReplacement.size());
  return text;
}

/// What of `text` begins at the first character that is not in `shown`. Mostly `shown` is its
/// beginning; not where a decoder made a U+FFFD of each byte and bytes turned out a character.
std::string_view fresh(std::string_view text, std::string_view shown) {
  const auto differs = std::mismatch(text.begin(), text.end(), shown.begin(), shown.end()).first;
  auto at = static_cast<std::size_t>(differs - text.begin());
  while (at > 0 && at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0) == 0x80) --at;
  return text.substr(at);
}

}  // namespace

// Only the end of the prompt is kept: as much of it as begins with a whole character.
TextStream::TextStream(const Tokenizer& tokenizer, std::span<const std::int32_t> prompt)
    : tokenizer_(&tokenizer) {
  for (std::size_t count = std::min<std::size_t>(1, prompt.size());;
       count = std::min(2 * count, prompt.size())) {
    const auto tail = prompt.last(count);
    shown_ = tokenizer.decode(tail);
    ids_.assign(tail.begin(), tail.end());
    if (count == prompt.size() || (!shown_.empty() && !shown_.starts_with(kReplacement))) break;
  }
  std::erase_if(ids_, [&](std::int32_t id) { return is_skipped(tokenizer, id); });
  shown_ids_ = ids_.size();
  if (shown_.ends_with(kReplacement)) hold_partial_character();
}

// A decoder may make a U+FFFD of each byte of a whole run for the incomplete character at its end
// (so the ids before that character are decoded), or an id end one character and begin the next (so
// the text of all is cut).
void TextStream::hold_partial_character() {
  for (std::size_t held = 1; held <= std::min(kMaxPartial, ids_.size()); ++held) {
    std::string before = tokenizer_->decode(std::span(ids_).first(ids_.size() - held));
    if (before.ends_with(kReplacement)) continue;
    while (shown_.ends_with(kReplacement)) shown_.resize(shown_.size() - kReplacement.size());
    if (before.size() > shown_.size()) shown_ = std::move(before);
    shown_ids_ = ids_.size() - held;
    return;
  }
}

std::string TextStream::push(std::int32_t id) {
  if (is_skipped(*tokenizer_, id)) return {};
  ids_.push_back(id);
  const std::string text = tokenizer_->decode(ids_);
  if (!text.ends_with(kReplacement) && !fresh(text, shown_).empty()) return show(text);
  return ids_.size() - shown_ids_ > kMaxHeld ? show_held(text) : std::string();
}

std::string TextStream::flush() {
  const std::string text = tokenizer_->decode(ids_);
  return fresh(text, shown_).empty() ? std::string() : show(text);
}

// The ids that were shown last time are no longer needed; those of now are: what a decoder makes of
// an id may depend on whether one stands before it.
std::string TextStream::show(const std::string& text) {
  std::string piece(fresh(text, shown_));
  ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(shown_ids_));
  shown_ids_ = ids_.size();
  shown_ = tokenizer_->decode(ids_);
  return piece;
}

// All is shown but for what may be an incomplete character. Its ids are kept, and one before them:
// text that begins inside a character differs only there.
std::string TextStream::show_held(const std::string& text) {
  std::string piece(fresh(settled(text), shown_));
  ids_.erase(ids_.begin(), ids_.end() - static_cast<std::ptrdiff_t>(kMaxPartial + 1));
  shown_ids_ = 0;
  shown_ = settled(tokenizer_->decode(ids_));
  return piece;
}

}  // namespace cleave
