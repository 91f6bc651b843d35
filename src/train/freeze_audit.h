#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "cleave/train/recipe.h"
#include "cleave/train/transformer.h"

namespace cleave::train {

/// 64-bit fingerprint of bytes. Any single changed 8-byte word changes it for certain (every step
/// is a bijection of the state), anything else but for chance.
std::uint64_t fingerprint_bytes(const void* data, std::size_t bytes, std::uint64_t seed = 0);
/// Of a tensor's values, whatever its device.
std::uint64_t fingerprint(const at::Tensor& tensor);

/// Fingerprints of everything that must not change, taken now and compared later.
class FreezeAudit {
 public:
  /// Watches all weights that are none of the recipe's parameters, those parameters that `phase`
  /// does not train, and the reference's FFNs.
  FreezeAudit(TransformerImpl& model, const Recipe& recipe, const Phase& phase);
  /// @throws Error  names the tensors that changed and the phase
  void verify() const;
  /// One number for all of it: two runs that start from the same weights agree in it.
  std::uint64_t summary() const;

 private:
  struct Watched {
    std::string name;
    std::function<std::uint64_t()> measure;
    std::uint64_t before = 0;
  };
  void watch(std::string name, std::function<std::uint64_t()> measure);
  std::vector<Watched> watched_;
  std::string phase_;
};

/// Throws Error unless every tensor that the phase trains has a gradient that is not zero.
void check_gradients_arrive(const Recipe& recipe, const Phase& phase);

}  // namespace cleave::train
