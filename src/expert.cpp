#include "cleave/expert.h"

namespace cleave {

FfnView DenseFfn::view() const {
  FfnView view;
  if (!gate.empty()) view.gate = {gate.data(), hidden, d_model};
  view.up = {up.data(), hidden, d_model};
  view.down = {down.data(), d_model, hidden};
  view.gate_bias = gate_bias;
  view.up_bias = up_bias;
  view.down_bias = down_bias;
  view.activation = activation;
  return view;
}

ExpertView ExpertBank::expert(std::int64_t e) const {
  const std::int64_t first = begin[e], count = width(e);
  const auto rows_of = [&](const std::vector<float>& matrix) {
    return MatrixView<const float>(matrix.data() + first * d_model, count, d_model);
  };
  const auto part_of = [&](const std::vector<float>& bias) {
    return bias.empty() ? std::span<const float>()
                        : std::span<const float>(bias).subspan(first, count);
  };
  ExpertView view;
  if (!gate.empty()) view.gate = rows_of(gate);
  view.up = rows_of(up);
  view.down_t = rows_of(down_t);
  view.gate_bias = part_of(gate_bias);
  view.up_bias = part_of(up_bias);
  view.activation = activation;
  return view;
}

}  // namespace cleave
