#pragma once

#include <cstdint>
#include <vector>

namespace cleave {

class JsonNode;

/// The special tokens that encoding may put around a text, a leading BOS for most models.
struct PostProcessor {
  std::vector<std::int32_t> before, after;

  /// Reads Sequence, TemplateProcessing (its `single` template) and ByteLevel, which only concerns
  /// offsets; null adds nothing.
  /// @throws FileError  any other type, or a template that names an undeclared token
  static PostProcessor from_json(const JsonNode& node);

 private:
  void add(const JsonNode& node);
};

}  // namespace cleave
