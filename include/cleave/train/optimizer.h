#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace cleave::train {

struct ScheduleSpec {
  double learning_rate = 3e-4;    ///< the peak
  double min_lr_ratio = 0.1;      ///< floor, as a share of the peak
  std::int64_t warmup_steps = 0;  ///< linear from peak / warmup_steps up to the peak
  std::int64_t steps = 1;         ///< of the whole run, warm-up included
};

/// Linear warm-up, then half a cosine down to the floor, which the last step reaches. A pure
/// function of the step, so a resumed run needs no state for it.
/// @param step  in [0, steps)
double learning_rate_at(const ScheduleSpec& spec, std::int64_t step);

/// Scales the gradients so that their common 2-norm is at most `max_norm` and returns the norm they
/// had before. max_norm <= 0 only measures. Undefined gradients count as zero. Call it after
/// backward and before the optimiser's step (the FactorLLM release clips before backward, which
/// does nothing).
double clip_gradients(std::span<const at::Tensor> parameters, double max_norm);

struct AdamWSpec {
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.01;  ///< decoupled: a share of lr * weight_decay goes every step
};

/// Adam with decoupled weight decay and bias correction; the numbers of torch.optim.AdamW.
///
/// Written here because its whole state has to go through safetensors and come back bit for bit.
/// Moments and a master copy are float32 whatever the parameter's type is (in bfloat16 an update of
/// 1e-4 would be lost in the rounding). Every parameter counts its own steps, so one whose training
/// starts in a later phase gets a bias correction of its own.
/// Source: arXiv:1711.05101.
class AdamW {
 public:
  struct Slot {
    std::string name;
    at::Tensor parameter;
    at::Tensor master;         ///< float32; the parameter itself where that is float32
    at::Tensor first, second;  ///< float32, like the parameter; undefined before its first step
    std::int64_t steps = 0;
    bool decay = true;
    double rate = 1.0;  ///< its learning rate, as a multiple of the one that step() is given
  };

  explicit AdamW(const AdamWSpec& spec) : spec_(spec) {}
  void add(std::string name, const at::Tensor& parameter, bool decay, double rate = 1.0);
  /// One step for every parameter that requires a gradient and has one; the others stay bitwise.
  void step(double learning_rate);
  void zero_grad();

  const std::vector<Slot>& slots() const { return slots_; }
  /// Puts saved state back: copies the values into the slot and its parameter.
  /// @throws InvalidArgument  element counts differ
  void restore(std::size_t slot, std::span<const float> master, std::span<const float> first,
               std::span<const float> second, std::int64_t steps);

 private:
  void update(Slot& slot, const at::Tensor& grad, double learning_rate) const;
  AdamWSpec spec_;
  std::vector<Slot> slots_;
};

}  // namespace cleave::train
