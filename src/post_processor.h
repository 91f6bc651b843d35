#pragma once

#include <cstdint>
#include <vector>

namespace cleave {

class JsonNode;

/// The special tokens that encoding may put around a text: a leading BOS for most models, [CLS] and
/// [SEP] for encoders.
struct PostProcessor {
  std::vector<std::int32_t> before, after;

  /// Reads Sequence, TemplateProcessing (its `single` template; no token types), BertProcessing and
  /// ByteLevel, which only concerns offsets; null adds nothing.
  /// @throws FileError  any other type, a template that names an undeclared token, or a wrong id
  static PostProcessor from_json(const JsonNode& node);

 private:
  void add(const JsonNode& node);
  void add_template(const JsonNode& node);
};

}  // namespace cleave
