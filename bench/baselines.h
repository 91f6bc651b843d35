#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

// Other libraries' dense gated FFN, for the same shapes: y = down(silu(gate x) * up x). Weights are
// prepacked where the library can. Products and the activation between them, as an engine would.
namespace cleave::bench {

class DenseBaseline {
 public:
  virtual ~DenseBaseline() = default;
  virtual std::string name() const = 0;
  /// x [T, D] -> y [T, D] with the weights of `layer`.
  virtual void run(std::int64_t layer, std::int64_t T, const float* x, float* y) = 0;
};

struct BaselineShape {
  std::int64_t d_model, hidden, layers;
  int threads;
};

/// nullptr where the library was not there at build time. `bf16`: weights and inputs.
std::unique_ptr<DenseBaseline> onednn_baseline(const BaselineShape& shape, bool bf16);
std::unique_ptr<DenseBaseline> openblas_baseline(const BaselineShape& shape);

}  // namespace cleave::bench
