#pragma once

#include <cleave/cleave.h>
#include <ggml.h>

#include <atomic>
#include <cstdint>
#include <memory>

// What an engine on ggml needs to run its FFNs on cleave's kernels: this file and its .cpp.

/// The threads of one ggml op meet here. ggml gives a custom op its thread's number and their
/// count, but no barrier; a kernel that cuts work needs one.
class Barrier {
 public:
  /// Returns when `nth` threads have called it.
  void wait(int nth);

 private:
  std::atomic<int> arrived_{0};
  std::atomic<std::uint32_t> phase_{0};
};

/// One layer's FFN as a node of a ggml graph: y = experts(x), on ggml's own threads. No pool of
/// ours runs beside them, and nothing is allocated once the node has seen its token counts.
class FfnOp {
 public:
  struct Shared {  ///< of all layers: they run one after the other
    Barrier barrier;
    cleave::Workspace workspace;
    int threads = 1;  ///< as many as ggml computes with
  };

  /// A dense FFN is one expert of which one is active. `shared` must outlive the op.
  FfnOp(const cleave::ExpertBank& bank, std::int64_t experts_per_token, cleave::WeightType type,
        Shared& shared);

  /// Appends the node. x [T, D] (ggml: ne = {D, T}), float32 and contiguous.
  /// @param logits  the router's, [T, E]; nullptr where the layer is dense
  /// @return        y [T, D]. The op must outlive the graph.
  ggml_tensor* add(ggml_context* context, ggml_tensor* x, ggml_tensor* logits);

  /// Which experts the tokens go to: from `logits` as above.
  void route(const ggml_tensor* logits, std::int64_t tokens, cleave::Routing& routing) const;

 private:
  static void compute(ggml_tensor* y, int ith, int nth, void* op);

  cleave::PackedExperts experts_;
  std::int64_t experts_per_token_;
  Shared& shared_;
};
