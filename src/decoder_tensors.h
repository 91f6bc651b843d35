#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cleave/checkpoint.h"
#include "cleave/model_config.h"

namespace cleave {

/// A tensor a model must have.
struct ExpectedTensor {
  std::string name;
  std::vector<std::int64_t> shape;
};

/// Every tensor of a model of this configuration, in HuggingFace names; lm_head only where it is
/// not tied.
std::vector<ExpectedTensor> decoder_tensors(const ModelConfig& config);

/// "[576, 1536]", for messages.
std::string shape_text(const std::vector<std::int64_t>& shape);

/// Throws FileError naming the first tensor that is missing from `tensors` (sorted by name) or has
/// another shape. More tensors than expected are no fault.
void check_decoder_tensors(const ModelConfig& config, const std::vector<TensorInfo>& tensors,
                           const std::string& origin);

}  // namespace cleave
