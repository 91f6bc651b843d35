#include <algorithm>

#include "cleave/export.h"
#include "export_directory.h"
#include "export_moe.h"
#include "fail.h"
#include "moe_layer_check.h"
#include "target_config.h"

// GraniteMoeShared: Mixtral's routing beside a slice that always runs. A layer's experts are one
// tensor each way; gate rows stand before up rows.

namespace cleave {
namespace {

namespace fs = std::filesystem;

constexpr MoeTarget kGraniteTensors{"granite_moe_shared_tensors", "GraniteMoeShared"};

void check_granite_source(const ModelConfig& source, const char* function) {
  check_is_decoder(function, "GraniteMoeShared", source);
  if (source.mlp_bias)
    fail_argument("{}: the model has FFN biases, which GraniteMoeShared cannot hold", function);
  // Transformers takes another head_dim from config.json; vLLM and llama.cpp divide.
  if (source.head_dim * source.num_heads != source.hidden_size)
    fail_argument(
        "{}: head_dim is {} with {} heads and D = {}; GraniteMoeShared has head_dim = D / heads; "
        "convert without shared experts, which Mixtral can hold",
        function, source.head_dim, source.num_heads, source.hidden_size);
  check_no_sliding_window(function, "GraniteMoeShared", source);
}

/// [E, 2I, D] of a bank whose experts all have the same width.
std::vector<float> fused_input(const ExpertBank& bank) {
  std::vector<float> all;
  all.reserve(bank.gate.size() + bank.up.size());
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
    append_rows(bank.gate, bank.begin[e], bank.width(e), bank.d_model, all);
    append_rows(bank.up, bank.begin[e], bank.width(e), bank.d_model, all);
  }
  return all;
}

/// [2 width, D] of one slice; rows of zeros where it has fewer.
std::vector<float> padded_input(const ExpertBank& slice, std::int64_t width, std::int64_t D) {
  const std::int64_t part = width * D;
  std::vector<float> all(static_cast<std::size_t>(2 * part), 0.0f);
  std::copy(slice.gate.begin(), slice.gate.end(), all.begin());
  std::copy(slice.up.begin(), slice.up.end(), all.begin() + part);
  return all;
}

/// [D, width], not scaled: its weight is 1. Columns of zeros where the slice has fewer rows.
std::vector<float> padded_output(const ExpertBank& slice, std::int64_t width, std::int64_t D) {
  std::vector<float> all(static_cast<std::size_t>(D * width), 0.0f);
  for (std::int64_t j = 0; j < slice.rows(); ++j)
    for (std::int64_t d = 0; d < D; ++d) all[d * width + j] = slice.down_t[j * D + d];
  return all;
}

/// @param width  of all shared slices
void add_granite_layer(const MoeLayer& layer, std::int64_t index, std::int64_t width,
                       std::vector<NamedTensor>& out) {
  const ExpertBank &bank = layer.experts, &shared = layer.shared;
  const std::int64_t E = bank.num_experts(), D = bank.d_model, I = bank.width(0);
  out.push_back(
      {GraniteMoeNames::router(index), {E, D}, [&layer] { return stored_router(layer); }});
  out.push_back(
      {GraniteMoeNames::input(index), {E, 2 * I, D}, [&bank] { return fused_input(bank); }});
  out.push_back({GraniteMoeNames::output(index), {E, D, I}, [&layer] {
                   return fused_down(layer.experts, static_cast<float>(folded_scale(layer)));
                 }});
  if (width == 0) return;
  out.push_back({GraniteMoeNames::shared_input(index), {2 * width, D}, [&shared, width, D] {
                   return padded_input(shared, width, D);
                 }});
  out.push_back({GraniteMoeNames::shared_output(index), {D, width}, [&shared, width, D] {
                   return padded_output(shared, width, D);
                 }});
}

void check_shared_slices(const ModelConfig& config, std::span<const MoeLayer> layers) {
  for (std::size_t l = 0; l < layers.size(); ++l) {
    check_shared(kGraniteTensors.function, layers[l]);
    if (layers[l].shared.rows() > 0)
      check_bank(kGraniteTensors, config, layers[l].shared, "shared experts", l);
  }
}

}  // namespace

std::vector<std::int64_t> shared_widths(std::span<const MoeLayer> layers) {
  if (widest_shared(layers) == 0) return {};
  std::vector<std::int64_t> widths;
  for (const MoeLayer& layer : layers) widths.push_back(layer.shared.rows());
  return widths;
}

std::int64_t widest_shared(std::span<const MoeLayer> layers) {
  std::int64_t width = 0;
  for (const MoeLayer& layer : layers) width = std::max(width, layer.shared.rows());
  return width;
}

std::vector<NamedTensor> granite_moe_shared_tensors(const Checkpoint& source,
                                                    std::span<const MoeLayer> layers) {
  const ModelConfig& config = source.config();
  check_granite_source(config, kGraniteTensors.function);
  check_moe_layers(kGraniteTensors, config, layers);
  check_shared_slices(config, layers);
  const ExpertBank& bank = layers[0].experts;
  const GraniteMoeSharedShape shape{bank.num_experts(), layers[0].experts_per_token, bank.width(0),
                                    widest_shared(layers)};
  std::vector<NamedTensor> tensors =
      backbone_tensors(source, granite_moe_shared_config(config, shape, DType::kF32));
  for (std::size_t l = 0; l < layers.size(); ++l)
    add_granite_layer(layers[l], static_cast<std::int64_t>(l), shape.shared_width, tensors);
  return tensors;
}

void write_granite_moe_shared(const fs::path& out, const Checkpoint& source,
                              const GraniteMoeSharedShape& shape,
                              std::span<const NamedTensor> tensors, const Provenance& provenance,
                              const WriteSpec& spec) {
  constexpr const char* kFunction = "write_granite_moe_shared";
  check_output(out, spec.overwrite);
  check_granite_source(source.config(), kFunction);
  check_experts_per_token(kFunction, shape.experts_per_token, shape.num_experts);
  if (shape.shared_width < 0)
    fail_argument("{}: {} shared neurons; expected 0 or more", kFunction, shape.shared_width);
  const DType dtype =
      spec.dtype.value_or(default_write_dtype(source.config(), provenance.folded_scale));
  write_model_directory(out, source,
                        {kFunction, granite_moe_shared_config(source.config(), shape, dtype)},
                        tensors, provenance, spec);
}

}  // namespace cleave
