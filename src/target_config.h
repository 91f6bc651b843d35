#pragma once

#include <string>

#include "cleave/export.h"

namespace cleave {

/// `source` as the Mixtral that is written: uniform experts, untied head.
ModelConfig mixtral_config(const ModelConfig& source, const MixtralShape& shape, DType dtype);

/// `source` as the GraniteMoeShared that is written: the same, and no sliding window.
ModelConfig granite_moe_shared_config(const ModelConfig& source, const GraniteMoeSharedShape& shape,
                                      DType dtype);

/// `source` as a dense Llama with FFNs of `hidden` neurons; the head stays tied where it is.
ModelConfig llama_dense_config(const ModelConfig& source, std::int64_t hidden, DType dtype);

/// `source`, a BERT, with experts.
ModelConfig bert_moe_config(const ModelConfig& source, const BertMoeShape& shape, DType dtype);

/// `source`, a BERT, with FFNs of `hidden` neurons.
ModelConfig bert_dense_config(const ModelConfig& source, std::int64_t hidden, DType dtype);

/// The text of config.json for Transformers 4 and 5 and the engines that read either. One of those
/// above.
std::string target_config_json(const ModelConfig& target);

/// The text of a generation_config.json that names the special tokens; empty if none is known, or
/// for a model that generates nothing.
std::string generation_config_json(const ModelConfig& config);

}  // namespace cleave
