#include "model_card.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <vector>

#include "fail.h"

namespace cleave {
namespace {

/// A JSON string is a YAML string, whatever characters a file name holds.
std::string yaml_string(const std::string& text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string gate_sentence(const Provenance& p) {
  if (p.gate == GateMode::kSoftmax)
    return fmt::format(
        "Gate: softmax over the selected logits. The scale {} is folded into the down projections.",
        p.folded_scale);
  return fmt::format(
      "Gate: hard, every selected expert counts the same. The router is scaled by {}, which keeps "
      "the choice and brings the softmax weights to 1/K; {} is folded into the down projections.",
      p.router_epsilon, p.folded_scale);
}

/// Neurons of each shared slice that are no padding; empty where all have as many.
std::vector<std::int64_t> slice_widths(const ModelConfig& c, const Provenance& p) {
  std::vector<std::int64_t> widths;
  for (const auto& neurons : p.shared_neurons)
    widths.push_back(static_cast<std::int64_t>(neurons.size()));
  const auto whole = std::count(widths.begin(), widths.end(), c.shared_intermediate_size);
  return whole == static_cast<std::ptrdiff_t>(widths.size()) ? std::vector<std::int64_t>() : widths;
}

/// What the padding is and costs; empty without any.
std::string padding_paragraph(const ModelConfig& c, const Provenance& p) {
  if (is_bert(c.family)) return {};  // each slice has a width of its own
  if (static_cast<std::int64_t>(p.shared_neurons.size()) != c.num_layers) return {};
  ModelConfig own = c;
  own.shared_widths = slice_widths(c, p);
  if (own.shared_widths.empty()) return {};
  const auto [least, most] =
      std::minmax_element(own.shared_widths.begin(), own.shared_widths.end());
  const auto stock = static_cast<double>(model_cost(c).macs_per_token);
  const auto used = static_cast<double>(model_cost(own).macs_per_token);
  return fmt::format(
      "The layers have {} to {} shared neurons and rows of zeros up to {}, which change nothing. "
      "Stock loaders\ncompute them all the same: {:.1f} % more multiply-adds per token. cleave "
      "drops them.\n\n",
      *least, *most, c.shared_intermediate_size, 100.0 * (stock / used - 1.0));
}

/// "512", or "128 to 512" where the configuration has a width for each layer.
std::string shared_text(const ModelConfig& c) {
  if (!is_bert(c.family) || c.shared_widths.empty())
    return fmt::format("{}", c.shared_intermediate_size);
  const auto [least, most] = std::minmax_element(c.shared_widths.begin(), c.shared_widths.end());
  return fmt::format("{} to {}", *least, *most);
}

std::string origin_paragraph(const ModelConfig& c, const Provenance& p) {
  if (!c.is_moe())
    return fmt::format(
        "A dense model made from `{}` by cleave {}: its feed-forward layers have {} hidden "
        "neurons.",
        p.source, p.tool_version, c.intermediate_size);
  std::string text = fmt::format(
      "A mixture of experts made from the dense model `{}` by cleave {}: the hidden neurons of\n"
      "every feed-forward layer are divided among {} experts, of which {} run for each token",
      p.source, p.tool_version, c.num_experts, c.experts_per_token);
  if (c.shared_intermediate_size > 0)
    text += fmt::format(",\nand {} shared neurons, which always run", shared_text(c));
  return text + ".";
}

std::string facts_table(const ModelConfig& c, const Provenance& p) {
  const ModelCost cost = model_cost(c);
  std::string table = fmt::format("| | |\n|---|---|\n| layers | {} |\n", c.num_layers);
  const auto row = [&](const char* name, const auto& value) {
    table += fmt::format("| {} | {} |\n", name, value);
  };
  if (c.is_moe()) {
    row("experts per layer (E)", c.num_experts);
    row("experts per token (K)", c.experts_per_token);
    row("neurons per expert (I)", c.intermediate_size);
    if (c.shared_intermediate_size > 0) row("shared neurons", shared_text(c));
  } else {
    row("neurons (H)", c.intermediate_size);
  }
  row("parameters", cost.parameters);
  if (c.is_moe()) row("parameters active per token", cost.active_parameters);
  row("partition of the neurons", fmt::format("{} (seed {})", p.partition, p.seed));
  if (c.is_moe()) row("router", p.router);
  row("SHA-256 of the source's weights", fmt::format("`{}`", p.source_sha256));
  return table;
}

/// Who opens the model, and how. What is generic is the class that Transformers takes.
std::string use_section(const std::string& name, const ModelConfig& c) {
  if (is_bert(c.family) && c.is_moe())
    return fmt::format(
        R"(cleave opens this model; no stock class holds an encoder with experts:

```sh
cleave inspect {name}
```
)",
        fmt::arg("name", name));
  std::string text = fmt::format(
      R"(With Transformers, without remote code:

```python
from transformers import {loader}, AutoTokenizer

model = {loader}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
)",
      fmt::arg("loader", c.has_head ? "AutoModelForCausalLM" : "AutoModel"),
      fmt::arg("name", name));
  if (c.has_head)
    text += fmt::format(
        R"(
With cleave:

```sh
cleave generate {} --prompt "Once upon a time"
```
)",
        name);
  return text;
}

}  // namespace

std::string model_card(const std::string& name, const ModelConfig& c, const Provenance& p) {
  return fmt::format(
      R"(---
base_model: {base}
library_name: {library}
pipeline_tag: {task}
tags:
{experts_tag}- {family}
- cleave
---

# {name}

{origin}

{facts}
{padding}{gate}`cleave.json` holds every setting and the origin of every neuron. License and terms are those of the
source model.

## Use

{use})",
      fmt::arg("base", yaml_string(p.source)),
      fmt::arg("library", is_bert(c.family) && c.is_moe() ? "cleave" : "transformers"),
      fmt::arg("task", c.has_head ? "text-generation" : "feature-extraction"),
      fmt::arg("experts_tag", c.is_moe() ? "- mixture-of-experts\n" : ""),
      fmt::arg("family", family_name(c.family)), fmt::arg("name", name),
      fmt::arg("origin", origin_paragraph(c, p)), fmt::arg("facts", facts_table(c, p)),
      fmt::arg("padding", padding_paragraph(c, p)),
      fmt::arg("gate", c.is_moe() ? gate_sentence(p) + "\n" : ""),
      fmt::arg("use", use_section(name, c)));
}

}  // namespace cleave
