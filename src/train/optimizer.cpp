#include "cleave/train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "cleave/error.h"

namespace cleave::train {

double learning_rate_at(const ScheduleSpec& spec, std::int64_t step) {
  if (step < spec.warmup_steps)
    return spec.learning_rate * static_cast<double>(step + 1) /
           static_cast<double>(spec.warmup_steps);
  const auto span =
      static_cast<double>(std::max<std::int64_t>(1, spec.steps - 1 - spec.warmup_steps));
  const double done = std::min(1.0, static_cast<double>(step - spec.warmup_steps) / span);
  const double cosine = 0.5 * (1.0 + std::cos(std::numbers::pi * done));
  return spec.learning_rate * (spec.min_lr_ratio + (1.0 - spec.min_lr_ratio) * cosine);
}

double clip_gradients(std::span<const at::Tensor> parameters, double max_norm) {
  double squares = 0.0;
  for (const auto& parameter : parameters)
    if (parameter.grad().defined()) {
      const double norm = at::linalg_vector_norm(parameter.grad().to(at::kFloat)).item<double>();
      squares += norm * norm;
    }
  const double norm = std::sqrt(squares);
  if (max_norm > 0.0 && norm > max_norm)
    for (const auto& parameter : parameters)
      if (parameter.grad().defined()) {
        at::Tensor grad = parameter.grad();
        grad.mul_(max_norm / norm);
      }
  return norm;
}

void AdamW::add(std::string name, const at::Tensor& parameter, bool decay, double rate) {
  Slot slot;
  slot.name = std::move(name);
  slot.parameter = parameter;
  slot.master =
      parameter.scalar_type() == at::kFloat ? parameter : parameter.detach().to(at::kFloat);
  slot.decay = decay;
  slot.rate = rate;
  slots_.push_back(std::move(slot));
}

void AdamW::zero_grad() {
  for (auto& slot : slots_) slot.parameter.mutable_grad() = at::Tensor();
}

/// The formulas on a piece at a time: eight passes over memory would take as long as the pass that
/// made the gradient of a small batch.
void AdamW::update(Slot& slot, const at::Tensor& grad, double learning_rate) const {
  constexpr std::int64_t kPiece = std::int64_t{1} << 14;  // elements; four tensors stay in cache
  const double decay = slot.decay ? 1.0 - learning_rate * spec_.weight_decay : 1.0;
  const double root = std::sqrt(1.0 - std::pow(spec_.beta2, static_cast<double>(slot.steps)));
  const double rate =
      learning_rate / (1.0 - std::pow(spec_.beta1, static_cast<double>(slot.steps)));
  const at::Tensor all_master = slot.master.view(-1), all_first = slot.first.view(-1),
                   all_second = slot.second.view(-1), all_grad = grad.view(-1);
  const std::int64_t count = all_master.numel();
  const std::int64_t piece = all_master.is_cpu() ? kPiece : std::max<std::int64_t>(1, count);
  const auto update_piece = [&](std::int64_t begin) {
    const at::NoGradGuard no_grad;  // of this thread
    const std::int64_t size = std::min(piece, count - begin);
    at::Tensor master = all_master.narrow(0, begin, size);
    at::Tensor first = all_first.narrow(0, begin, size);
    at::Tensor second = all_second.narrow(0, begin, size);
    const at::Tensor g = all_grad.narrow(0, begin, size);
    if (slot.decay) master.mul_(decay);
    first.mul_(spec_.beta1).add_(g, 1.0 - spec_.beta1);
    second.mul_(spec_.beta2).addcmul_(g, g, 1.0 - spec_.beta2);
    const at::Tensor denominator = second.sqrt().div_(root).add_(spec_.epsilon);
    master.addcdiv_(first, denominator, -rate);
  };
  at::parallel_for(0, (count + piece - 1) / piece, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) update_piece(i * piece);
  });
}

void AdamW::step(double learning_rate) {
  const at::NoGradGuard no_grad;
  for (auto& slot : slots_) {
    if (!slot.parameter.requires_grad() || !slot.parameter.grad().defined()) continue;
    const at::Tensor grad = slot.parameter.grad().to(at::kFloat);
    if (slot.steps == 0) {
      slot.first = at::zeros_like(grad);
      slot.second = at::zeros_like(grad);
    }
    ++slot.steps;
    update(slot, grad.contiguous(), learning_rate * slot.rate);
    if (!slot.master.is_same(slot.parameter)) slot.parameter.copy_(slot.master);
  }
}

void AdamW::restore(std::size_t index, std::span<const float> master, std::span<const float> first,
                    std::span<const float> second, std::int64_t steps) {
  const at::NoGradGuard no_grad;
  Slot& slot = slots_.at(index);
  const auto as_slot = [&slot](std::span<const float> values) {
    if (static_cast<std::int64_t>(values.size()) != slot.parameter.numel())
      throw InvalidArgument(
          fmt::format("AdamW: {} has {} elements but {} were saved; does the state belong to "
                      "another model?",
                      slot.name, slot.parameter.numel(), values.size()));
    at::Tensor copy = at::empty(slot.parameter.sizes(), at::TensorOptions(at::kFloat));
    std::copy(values.begin(), values.end(), copy.data_ptr<float>());
    return copy.to(slot.parameter.device());
  };
  at::Tensor new_first = as_slot(first);
  at::Tensor new_second = as_slot(second);
  slot.master.copy_(as_slot(master));
  if (!slot.master.is_same(slot.parameter)) slot.parameter.copy_(slot.master);
  slot.first = std::move(new_first);
  slot.second = std::move(new_second);
  slot.steps = steps;
}

}  // namespace cleave::train
