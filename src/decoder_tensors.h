#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/model_config.h"

namespace cleave {

/// HuggingFace names of the parts of a layer, without ".weight" and ".bias".
struct LayerNames {
  LayerNames(const ModelConfig& config, std::int64_t layer);
  std::string input_norm;  ///< of what attention reads; NormPlace::kAfter: of the layer's input,
                           ///< which is the embedding or what the layer before gave
  std::string q, k, v, output;
  std::string post_norm;       ///< of what the FFN reads
  std::string gate, up, down;  ///< of a dense FFN; `gate` is empty without one
};

/// Names of the parts outside of layers, in the same way.
struct ModelNames {
  explicit ModelNames(const ModelConfig& config);
  std::string embedding;
  std::string positions, token_types;  ///< empty without
  std::string final_norm;
  std::string head;  ///< empty without
};

/// A tensor a model must have.
struct ExpectedTensor {
  std::string name;
  std::vector<std::int64_t> shape;
};

/// Every tensor of a model of this configuration, in HuggingFace names; lm_head only where there is
/// one that is not tied.
std::vector<ExpectedTensor> decoder_tensors(const ModelConfig& config);

/// "[576, 1536]", for messages.
std::string shape_text(const std::vector<std::int64_t>& shape);

/// Throws FileError naming the first tensor that is missing from `tensors` (sorted by name) or has
/// another shape. More tensors than expected are no fault.
void check_decoder_tensors(const ModelConfig& config, const std::vector<TensorInfo>& tensors,
                           const std::string& origin);

}  // namespace cleave
