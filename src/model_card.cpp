#include "model_card.h"

#include <nlohmann/json.hpp>

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

}  // namespace

std::string model_card(const std::string& name, const ModelConfig& c, const Provenance& p) {
  const ModelCost cost = model_cost(c);
  return fmt::format(
      R"(---
base_model: {base}
library_name: transformers
pipeline_tag: text-generation
tags:
- mixture-of-experts
- mixtral
- cleave
---

# {name}

A mixture of experts made from the dense model `{source}` by cleave {version}: the hidden neurons of
every feed-forward layer are divided among {experts} experts, of which {active} run for each token.

| | |
|---|---|
| layers | {layers} |
| experts per layer (E) | {experts} |
| experts per token (K) | {active} |
| neurons per expert (I) | {width} |
| parameters | {parameters} |
| parameters active per token | {active_parameters} |
| partition of the neurons | {partition} (seed {seed}) |
| router | {router} |
| SHA-256 of the source's weights | `{sha}` |

{gate}
`cleave.json` holds every setting and the origin of every neuron. License and terms are those of the
source model.

## Use

With Transformers, without remote code:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

With cleave:

```sh
cleave generate {name} --prompt "Once upon a time"
```
)",
      fmt::arg("base", yaml_string(p.source)), fmt::arg("name", name), fmt::arg("source", p.source),
      fmt::arg("version", p.tool_version), fmt::arg("experts", c.num_experts),
      fmt::arg("active", c.experts_per_token), fmt::arg("layers", c.num_layers),
      fmt::arg("width", c.intermediate_size), fmt::arg("parameters", cost.parameters),
      fmt::arg("active_parameters", cost.active_parameters), fmt::arg("partition", p.partition),
      fmt::arg("seed", p.seed), fmt::arg("router", p.router), fmt::arg("sha", p.source_sha256),
      fmt::arg("gate", gate_sentence(p)));
}

}  // namespace cleave
