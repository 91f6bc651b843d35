#include "export_moe.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "fail.h"
#include "quants.h"

namespace cleave {
namespace {

void check_moe_layer(const MoeTarget& target, const ModelConfig& source, const MoeLayer& layer,
                     const MoeLayer& first, std::size_t index) {
  const ExpertBank& bank = layer.experts;
  const std::int64_t E = first.experts.num_experts();
  if (E < 1 || bank.num_experts() != E || layer.experts_per_token != first.experts_per_token ||
      layer.gate != first.gate || bank.width(0) != first.experts.width(0))
    fail_argument(
        "{}: layer {} differs from layer 0 in its experts, K, width or gate; {} has one choice for "
        "all layers",
        target.function, index, target.name);
  for (std::int64_t e = 0; e < E; ++e)
    if (bank.width(e) != bank.width(0))
      fail_argument("{}: layer {}: expert {} has {} neurons, expert 0 has {}", target.function,
                    index, e, bank.width(e), bank.width(0));
  check_bank(target, source, bank, "experts", index);
  if (layer.router.num_experts != E || layer.router.d_model != source.hidden_size)
    fail_argument("{}: layer {}: the router is [{}, {}]; expected [{}, {}]", target.function, index,
                  layer.router.num_experts, layer.router.d_model, E, source.hidden_size);
}

bool is_power_of_two(double value) {
  int exponent = 0;
  return value > 0.0 && std::frexp(value, &exponent) == 0.5;
}

bool bank_holds_exactly(DType dtype, const ExpertBank& bank) {
  return holds_exactly(dtype, bank.gate) && holds_exactly(dtype, bank.up) &&
         holds_exactly(dtype, bank.down_t) && holds_exactly(dtype, bank.up_bias) &&
         holds_exactly(dtype, bank.down_bias);
}

}  // namespace

void check_bank(const MoeTarget& target, const ModelConfig& source, const ExpertBank& bank,
                const char* what, std::size_t index) {
  if (!target.gated && !bank.gate.empty())
    fail_argument("{}: layer {}: the {} have a gate matrix, which {} cannot hold", target.function,
                  index, what, target.name);
  if (target.gated && bank.gate.empty())
    fail_argument("{}: layer {}: the {} have no gate matrix, which {} needs", target.function,
                  index, what, target.name);
  const bool biased = !bank.gate_bias.empty() || !bank.up_bias.empty() || !bank.down_bias.empty();
  if (target.gated && biased)
    fail_argument("{}: layer {}: the {} have biases, which {} cannot hold", target.function, index,
                  what, target.name);
  if (bank.activation != source.activation)
    fail_argument("{}: layer {}: activation {}, but the model says {}", target.function, index,
                  activation_name(bank.activation), activation_name(source.activation));
  if (bank.d_model != source.hidden_size)
    fail_argument("{}: layer {}: the {} are of width D = {}, the model of {}", target.function,
                  index, what, bank.d_model, source.hidden_size);
}

void check_moe_layers(const MoeTarget& target, const ModelConfig& source,
                      std::span<const MoeLayer> layers) {
  if (static_cast<std::int64_t>(layers.size()) != source.num_layers)
    fail_argument("{}: {} layers given; the model has {}", target.function, layers.size(),
                  source.num_layers);
  for (std::size_t l = 0; l < layers.size(); ++l)
    check_moe_layer(target, source, layers[l], layers[0], l);
}

void check_experts_per_token(const char* function, std::int64_t experts_per_token,
                             std::int64_t num_experts) {
  if (experts_per_token < 1 || experts_per_token > num_experts)
    fail_argument("{}: K = {} with E = {}; expected 1 to E", function, experts_per_token,
                  num_experts);
}

void append_rows(const std::vector<float>& matrix, std::int64_t begin, std::int64_t rows,
                 std::int64_t cols, std::vector<float>& to) {
  const auto first = matrix.begin() + begin * cols;
  to.insert(to.end(), first, first + rows * cols);
}

void append_down(const ExpertBank& bank, std::int64_t begin, std::int64_t width, float scale,
                 std::vector<float>& to) {
  const std::int64_t D = bank.d_model;
  const std::size_t before = to.size();
  to.resize(before + static_cast<std::size_t>(width * D));
  float* down = to.data() + before;
  for (std::int64_t j = 0; j < width; ++j)
    for (std::int64_t c = 0; c < D; ++c)
      down[c * width + j] = bank.down_t[(begin + j) * D + c] * scale;
}

std::vector<float> fused_down(const ExpertBank& bank, float scale) {
  std::vector<float> all;
  all.reserve(bank.down_t.size());
  for (std::int64_t e = 0; e < bank.num_experts(); ++e)
    append_down(bank, bank.begin[e], bank.width(e), scale, all);
  return all;
}

std::vector<float> stored_router(const MoeLayer& layer) {
  std::vector<float> weight = layer.router.weight;
  if (layer.gate == GateMode::kHard)
    for (float& value : weight) value *= static_cast<float>(kHardGateEpsilon);
  return weight;
}

bool holds_exactly(DType dtype, std::span<const float> values) {
  if (dtype == DType::kF32) return true;
  std::array<std::byte, 8192> bytes;
  std::array<float, 2048> rounded;
  for (std::size_t begin = 0; begin < values.size(); begin += rounded.size()) {
    const auto some = values.subspan(begin, std::min(rounded.size(), values.size() - begin));
    const auto size =
        static_cast<std::size_t>(dtype_bytes(dtype, static_cast<std::int64_t>(some.size())));
    encode(dtype, some, std::span(bytes).first(size));
    decode(dtype, std::span(bytes).first(size), std::span(rounded).first(some.size()));
    if (!std::equal(some.begin(), some.end(), rounded.begin())) return false;
  }
  return true;
}

double folded_scale(const MoeLayer& layer) {
  const double weights_sum =
      layer.gate == GateMode::kHard ? static_cast<double>(layer.experts_per_token) : 1.0;
  return layer.scale * weights_sum;
}

DType default_write_dtype(const ModelConfig& source, double folded_scale) {
  const bool plain = source.dtype == DType::kF16 || source.dtype == DType::kBF16;
  return plain && is_power_of_two(folded_scale) ? source.dtype : DType::kF32;
}

DType default_write_dtype(const ModelConfig& source, std::span<const MoeLayer> layers) {
  for (const MoeLayer& layer : layers)
    if (default_write_dtype(source, folded_scale(layer)) == DType::kF32 ||
        !bank_holds_exactly(source.dtype, layer.experts) ||
        !bank_holds_exactly(source.dtype, layer.shared))
      return DType::kF32;
  return layers.empty() ? default_write_dtype(source, 1.0) : source.dtype;
}

}  // namespace cleave
