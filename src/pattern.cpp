#define PCRE2_CODE_UNIT_WIDTH 8
#include "pattern.h"

#include <fmt/format.h>
#include <pcre2.h>

#include "cleave/error.h"
#include "json_node.h"
#include "unicode.h"

namespace cleave {

struct Pattern::Code {
  explicit Code(pcre2_code* compiled) : code(compiled) {}
  ~Code() { pcre2_code_free(code); }
  Code(const Code&) = delete;
  Code& operator=(const Code&) = delete;
  pcre2_code* code;
};

namespace {

template <auto kFree>
struct Free {
  template <class T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using CompileContext = std::unique_ptr<pcre2_compile_context, Free<pcre2_compile_context_free_8>>;
using MatchData = std::unique_ptr<pcre2_match_data, Free<pcre2_match_data_free_8>>;

std::string pcre2_message(int code) {
  unsigned char buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof(buffer));
  return reinterpret_cast<const char*>(buffer);
}

pcre2_match_data* match_data() {
  // One pair: only the whole match is read. Per thread, because a match writes into it.
  thread_local const MatchData data(pcre2_match_data_create(1, nullptr));
  return data.get();
}

}  // namespace

Pattern Pattern::from_json(const JsonNode& node) {
  if (node.has("String")) return literal(node.at("String").as_string());
  if (!node.has("Regex")) node.fail("expected {\"String\": ...} or {\"Regex\": ...}");
  const JsonNode expression = node.at("Regex");
  const std::string text = expression.as_string();
  try {
    return regex(text, "regular expression");
  } catch (const FileError& error) {
    expression.fail(error.what());
  }
}

Pattern Pattern::literal(std::string text) {
  Pattern pattern;
  pattern.literal_ = std::move(text);
  return pattern;
}

Pattern Pattern::regex(std::string_view oniguruma, const std::string& where) {
  const std::string spelled = pcre2_from_oniguruma(oniguruma, where);
  const CompileContext context(pcre2_compile_context_create(nullptr));
  // Ruby's "." stops at a line feed only, and its ^ and $ always mean lines.
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  std::size_t offset = 0;
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(spelled.data()), spelled.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &error, &offset, context.get());
  if (code == nullptr)
    throw FileError(
        fmt::format("{}: {} (at byte {} of \"{}\")", where, pcre2_message(error), offset, spelled));
  Pattern pattern;
  pattern.code_ = std::make_shared<const Code>(code);
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);  // where there is no JIT, pcre2_match interprets
  return pattern;
}

bool Pattern::next_match(std::string_view text, std::size_t from, Segment& match) const {
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  const auto run = [&](std::uint32_t options) {
    return pcre2_match(code_->code, subject, text.size(), from, options | PCRE2_NO_UTF_CHECK,
                       match_data(), nullptr);
  };
  int result = run(0);
  if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = run(PCRE2_NO_JIT);
  if (result == PCRE2_ERROR_NOMATCH) return false;
  if (result < 0)
    throw InvalidArgument(fmt::format("Tokenizer::encode: split pattern at byte {} of {}: {}", from,
                                      text.size(), pcre2_message(result)));
  const std::size_t* ends = pcre2_get_ovector_pointer(match_data());
  match = {ends[0], ends[1], true};
  return true;
}

void Pattern::find(std::string_view text, std::vector<Segment>& out) const {
  out.clear();
  std::size_t covered = 0;
  const auto add = [&](std::size_t begin, std::size_t end) {
    if (covered != begin) out.push_back({covered, begin, false});
    out.push_back({begin, end, true});
    covered = end;
  };
  if (code_ == nullptr) {
    if (!literal_.empty())
      for (std::size_t at = text.find(literal_); at != std::string_view::npos;
           at = text.find(literal_, at + literal_.size()))
        add(at, at + literal_.size());
  } else {
    Segment match;
    std::size_t from = 0;
    bool has_matched = false;
    while (from <= text.size() && next_match(text, from, match)) {
      // An empty match right after a match would be found for ever; step over one code point.
      if (match.begin == match.end && has_matched && match.end == covered) {
        from = match.end + (match.end < text.size() ? decode_utf8(text, match.end).length : 1);
        continue;
      }
      add(match.begin, match.end);
      from = match.end;
      has_matched = true;
    }
  }
  if (covered != text.size()) out.push_back({covered, text.size(), false});
}

std::string Pattern::replace(std::string_view text, std::string_view replacement) const {
  std::vector<Segment> segments;
  find(text, segments);
  std::string out;
  out.reserve(text.size());
  for (const Segment& segment : segments)
    out += segment.is_match ? replacement : text.substr(segment.begin, segment.end - segment.begin);
  return out;
}

}  // namespace cleave
