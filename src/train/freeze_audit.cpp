#include "train/freeze_audit.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "cleave/error.h"

namespace cleave::train {
namespace {

std::uint64_t mix(std::uint64_t state, std::uint64_t word) {
  state = (state ^ word) * 0x9E3779B97F4A7C15ULL;
  return state ^ (state >> 32);
}

}  // namespace

std::uint64_t fingerprint_bytes(const void* data, std::size_t bytes, std::uint64_t seed) {
  const auto* in = static_cast<const unsigned char*>(data);
  std::uint64_t state = mix(seed, bytes);
  std::size_t at = 0;
  for (; at + sizeof(std::uint64_t) <= bytes; at += sizeof(std::uint64_t)) {
    std::uint64_t word = 0;
    std::memcpy(&word, in + at, sizeof(word));
    state = mix(state, word);
  }
  std::uint64_t rest = 0;
  std::memcpy(&rest, in + at, bytes - at);
  return mix(state, rest);
}

std::uint64_t fingerprint(const at::Tensor& tensor) {
  const at::Tensor values = tensor.detach().cpu().contiguous();
  return fingerprint_bytes(values.data_ptr(), values.nbytes());
}

FreezeAudit::FreezeAudit(TransformerImpl& model, const Recipe& recipe, const Phase& phase)
    : phase_(phase.name) {
  const auto in_recipe = [&recipe](const at::Tensor& tensor) {
    return std::any_of(
        recipe.parameters.begin(), recipe.parameters.end(),
        [&](const Parameter& parameter) { return parameter.tensor.is_same(tensor); });
  };
  for (const auto& weight : model.named_parameters())
    if (!in_recipe(weight.value()))
      watch(weight.key(), [tensor = weight.value()] { return fingerprint(tensor); });
  for (const auto& parameter : recipe.parameters)
    if (!phase.trains(parameter))
      watch(parameter.name, [tensor = parameter.tensor] { return fingerprint(tensor); });
  if (recipe.reference.is_empty()) return;
  Transformer reference = recipe.reference;
  auto& layers = reference->layers();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    if (layers[l].dense.is_empty()) continue;
    watch(fmt::format("teacher.layers.{}.down", l),
          [tensor = layers[l].dense->down] { return fingerprint(tensor); });
    watch(fmt::format("teacher.layers.{}.up", l),
          [tensor = layers[l].dense->up] { return fingerprint(tensor); });
    if (layers[l].dense->gate.defined())
      watch(fmt::format("teacher.layers.{}.gate", l),
            [tensor = layers[l].dense->gate] { return fingerprint(tensor); });
  }
}

void FreezeAudit::watch(std::string name, std::function<std::uint64_t()> measure) {
  const std::uint64_t before = measure();
  watched_.push_back({std::move(name), std::move(measure), before});
}

void FreezeAudit::verify() const {
  std::string changed;
  std::size_t count = 0;
  for (const auto& watched : watched_) {
    if (watched.measure() == watched.before) continue;
    if (++count <= 3) changed += (changed.empty() ? "" : ", ") + watched.name;
  }
  if (count == 0) return;
  throw Error(fmt::format(
      "train: freeze audit: {} of {} tensors that phase '{}' must not train changed ({}{}); the "
      "run's result cannot be trusted",
      count, watched_.size(), phase_, changed, count > 3 ? ", ..." : ""));
}

std::uint64_t FreezeAudit::summary() const {
  std::uint64_t state = 0;
  for (const auto& watched : watched_) state = mix(state, watched.before);
  return state;
}

void check_gradients_arrive(const Recipe& recipe, const Phase& phase) {
  for (const auto& parameter : recipe.parameters) {
    if (!phase.trains(parameter)) continue;
    const at::Tensor grad = parameter.tensor.grad();
    if (grad.defined() && at::any(grad.ne(0)).item<bool>()) continue;
    throw Error(fmt::format("train: phase '{}' trains {} but its gradient is {}{}{}", phase.name,
                            parameter.name, grad.defined() ? "all zero" : "missing",
                            parameter.no_gradient_hint.empty() ? "" : ": ",
                            parameter.no_gradient_hint));
  }
}

}  // namespace cleave::train
