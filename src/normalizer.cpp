#include "normalizer.h"

#include <fmt/format.h>

#include "bert_normalizer.h"
#include "json_node.h"
#include "nfc.h"
#include "pattern.h"

namespace cleave {

Normalizer Normalizer::from_json(const JsonNode& node) {
  Normalizer normalizer;
  if (!node.is_null()) normalizer.add(node);
  return normalizer;
}

void Normalizer::add(const JsonNode& node) {
  const std::string type = node.type();
  if (type == "Sequence") {
    for (const JsonNode& part : node.at("normalizers").elements()) add(part);
  } else if (type == "Prepend") {
    steps_.push_back([prefix = node.at("prepend").as_string()](std::string text) {
      return text.empty() ? text : prefix + text;
    });
  } else if (type == "Replace") {
    steps_.push_back([pattern = Pattern::from_json(node.at("pattern")),
                      content = node.at("content").as_string()](const std::string& text) {
      return pattern.replace(text, content);
    });
  } else if (type == "NFC") {
    steps_.push_back([](const std::string& text) { return normalize_nfc(text); });
  } else if (type == "NFD") {
    steps_.push_back([](const std::string& text) { return normalize_nfd(text); });
  } else if (type == "Lowercase") {
    steps_.push_back([](const std::string& text) { return to_lowercase(text); });
  } else if (type == "BertNormalizer") {
    steps_.push_back([bert = BertNormalizer::from_json(node)](const std::string& text) {
      return bert.apply(text);
    });
  } else {
    node.fail(fmt::format(
        "normalizer \"{}\" is not supported; expected Sequence, Prepend, Replace, NFC, NFD, "
        "Lowercase or BertNormalizer",
        type));
  }
}

std::string Normalizer::apply(std::string text) const {
  for (const Step& step : steps_) text = step(std::move(text));
  return text;
}

}  // namespace cleave
