#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cleave/routing.h"

// Other libraries' gated FFN, for the same shapes: y = down(silu(gate x) * up x). Weights are
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

/// "2.6.3"; "" where the library was not there at build time.
std::string onednn_version();
inline constexpr const char* kNoOneDnn =
    "this build has no oneDNN; install libdnnl-dev, then cmake and the build again";

/// `bf16`: weights and inputs. nullptr where the library was not there at build time, or has no
/// such products on this processor.
std::unique_ptr<DenseBaseline> onednn_baseline(const BaselineShape& shape, bool bf16);

/// What it says of itself; "" where there is no libopenblas.so.0 at run time.
std::string openblas_version();
inline constexpr const char* kNoOpenBlas = "there is no libopenblas.so.0; install libopenblas0";
/// Weights as they are, in float32. nullptr without the library.
std::unique_ptr<DenseBaseline> openblas_baseline(const BaselineShape& shape);

/// The experts as a framework runs them without kernels of its own.
class SparseBaseline {
 public:
  virtual ~SparseBaseline() = default;
  virtual std::string name() const = 0;
  /// x [T, D] -> y [T, D], each token through its experts of `layer`.
  virtual void run(std::int64_t layer, const Routing& routing, const float* x, float* y) = 0;
};
/// "2.13.0"; "" in a build without LibTorch.
std::string torch_version();
inline constexpr const char* kNoTorch =
    "this build has no LibTorch; configure with -DCLEAVE_TRAIN=ON";
/// LibTorch's eager operators: for each expert index_select of its tokens, three products,
/// index_add_ of the result. `experts` of equal width. nullptr in a build without LibTorch.
std::unique_ptr<SparseBaseline> torch_baseline(const BaselineShape& shape, std::int64_t experts,
                                               bool bf16);

}  // namespace cleave::bench
