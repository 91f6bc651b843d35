#include <algorithm>
#include <string_view>

#include "cleave/tokenizer.h"

namespace cleave {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD: an incomplete character

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
  shown_ids_ = ids_.size();
}

std::string TextStream::push(std::int32_t id) {
  ids_.push_back(id);
  const std::string text = tokenizer_->decode(ids_);
  if (text.size() <= shown_.size() || text.ends_with(kReplacement)) return {};
  return show(text);
}

std::string TextStream::flush() {
  const std::string text = tokenizer_->decode(ids_);
  return text.size() > shown_.size() ? show(text) : std::string();
}

// The ids that were shown last time are no longer needed; those of now are: what a decoder makes of
// an id may depend on whether one stands before it.
std::string TextStream::show(const std::string& text) {
  std::string piece = text.substr(shown_.size());
  ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(shown_ids_));
  shown_ids_ = ids_.size();
  shown_ = tokenizer_->decode(ids_);
  return piece;
}

}  // namespace cleave
