#pragma once

#include <gtest/gtest.h>

#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "c_handles.h"
#include "cleave/c_api.h"
#include "kernels/random_ffn.h"
#include "quants.h"

// Random layers and calls for tests of the C interface.
namespace cleave::testing {

struct FreeExperts {
  void operator()(cleave_experts* experts) const { cleave_experts_destroy(experts); }
};
using ExpertsHandle = std::unique_ptr<cleave_experts, FreeExperts>;

inline ExpertsHandle create(const cleave_experts_desc& desc) {
  cleave_experts* experts = nullptr;
  EXPECT_EQ(cleave_experts_create(&desc, &experts), CLEAVE_OK) << cleave_last_error();
  return ExpertsHandle(experts);
}

/// A call that was refused, and why.
inline void expect_refusal(cleave_status status, const std::string& message) {
  EXPECT_EQ(status, CLEAVE_INVALID_ARGUMENT);
  EXPECT_NE(std::string(cleave_last_error()).find(message), std::string::npos)
      << "expected '" << message << "' in: " << cleave_last_error();
}

struct CLayerSpec {
  std::int64_t E = 4, D = 40, I = 24;
  bool gated = true, biases = false;
  std::int32_t activation = CLEAVE_SILU;
  std::int32_t stored = CLEAVE_F32, packed = CLEAVE_F32;
  unsigned seed = 1;
};

/// The arrays of a layer as an engine has them.
struct CLayer {
  explicit CLayer(const CLayerSpec& s) : spec(s) {
    std::mt19937 rng(s.seed);
    rows = s.gated ? 2 * s.I : s.I;
    w13 = draw_values(rng, s.E * rows * s.D);
    w2 = draw_values(rng, s.E * s.D * s.I);
    stored_w13 = store(w13);
    stored_w2 = store(w2);
    if (!s.biases) return;
    w13_bias = draw_values(rng, s.E * rows);
    w2_bias = draw_values(rng, s.E * s.D);
    output_bias = draw_values(rng, s.D);
  }

  cleave_experts_desc desc() const {
    cleave_experts_desc d = cleave_experts_desc_init();
    d.num_experts = spec.E;
    d.d_model = spec.D;
    d.width = spec.I;
    d.gated = spec.gated ? 1 : 0;
    d.activation = spec.activation;
    d.weight_dtype = spec.stored;
    d.packed_dtype = spec.packed;
    d.w13 = stored_w13.data();
    d.w2 = stored_w2.data();
    if (!spec.biases) return d;
    d.w13_bias = w13_bias.data();
    d.w2_bias = w2_bias.data();
    d.output_bias = output_bias.data();
    return d;
  }

  CLayerSpec spec;
  std::int64_t rows = 0;  // of an expert's w13
  std::vector<float> w13, w2, w13_bias, w2_bias, output_bias;
  std::vector<std::byte> stored_w13, stored_w2;

 private:
  /// Rounds `values` to the stored type.
  std::vector<std::byte> store(std::vector<float>& values) const {
    const DType types[] = {DType::kF32, DType::kBF16, DType::kF16};
    const DType type = types[spec.stored];
    std::vector<std::byte> bytes(dtype_bytes(type, static_cast<std::int64_t>(values.size())));
    encode(type, values, bytes);
    decode(type, bytes, values);
    return bytes;
  }
};

struct FreeWorkspace {
  void operator()(void* memory) const {
    ::operator delete (memory, std::align_val_t{CLEAVE_WORKSPACE_ALIGNMENT});
  }
};
/// Exactly as many bytes as asked for, holding NaNs: a sanitizer sees a byte too many, and a sum
/// shows what was read before it was written.
inline std::unique_ptr<void, FreeWorkspace> make_workspace(std::size_t bytes) {
  std::unique_ptr<void, FreeWorkspace> memory(
      ::operator new (bytes, std::align_val_t{CLEAVE_WORKSPACE_ALIGNMENT}));
  std::memset(memory.get(), 0xFF, bytes);
  return memory;
}

/// Operands of a call, its workspace included. Routed, unless K is 0.
struct CCall {
  CCall(const cleave_experts* handle, std::int64_t T, std::int64_t K, int threads, unsigned seed)
      : experts(handle) {
    std::mt19937 rng(seed);
    const std::int64_t E = handle->packed.num_experts(), D = handle->packed.d_model();
    x = random_bf16_matrix(rng, T, D);  // which every kind of weights multiplies as it is
    y = random_matrix(rng, T, D);
    if (K > 0) routing = random_routing(rng, T, E, K);
    call = cleave_ffn_call_init();
    call.num_tokens = T;
    call.experts_per_token = K;
    call.x = x.values.data();
    call.y = y.values.data();
    call.topk_ids = K > 0 ? routing.ids.data() : nullptr;
    call.topk_weights = K > 0 ? routing.weights.data() : nullptr;
    const cleave_status status =
        K > 0 ? cleave_experts_workspace_size(handle, T, K, threads, &call.workspace_size)
              : cleave_dense_workspace_size(handle, T, threads, &call.workspace_size);
    EXPECT_EQ(status, CLEAVE_OK) << cleave_last_error();
    workspace = make_workspace(call.workspace_size);
    call.workspace = workspace.get();
  }
  CCall(const CCall&) = delete;
  CCall& operator=(const CCall&) = delete;

  cleave_status run(const cleave_threads* threads = nullptr) const {
    cleave_ffn_call copy = call;
    copy.threads = threads;
    return call.experts_per_token > 0 ? cleave_experts_run(experts, &copy)
                                      : cleave_dense_run(experts, &copy);
  }

  const cleave_experts* experts;
  OwnedMatrix x, y;
  Routing routing;
  cleave_ffn_call call;
  std::unique_ptr<void, FreeWorkspace> workspace;
};

/// What c_api.h says that a call makes of its y, from the packed weights: moe_ffn_reference and the
/// biases. To be made before the call runs.
struct Expectation {
  Expectation(const CLayer& layer, const CCall& c, float scale) : y(c.y), magnitude(c.y) {
    Routing routing = c.routing;
    const std::int64_t T = c.call.num_tokens, D = layer.spec.D;
    if (c.call.experts_per_token == 0)  // dense
      routing = {T, 1, std::vector<std::int32_t>(T, 0), std::vector<float>(T, 1.0f)};
    const std::int64_t K = routing.experts_per_token;
    const ExpertBank bank = c.experts->packed.unpack();
    moe_ffn_reference(bank, routing, scale, c.x.view(), y.view(), magnitude.view());
    bound = ffn_bound(D, K * layer.spec.I) + sum_bound(2 * K + 4) +
            hidden_bound(c.experts->packed.type());
    for (std::int64_t i = 0; i < T * D && layer.spec.biases; ++i) {
      const std::int64_t t = i / D, d = i % D;
      double sum = layer.output_bias[d], size = std::abs(sum);
      for (std::int64_t k = t * K; k < (t + 1) * K; ++k) {
        if (routing.ids[k] == Routing::kUnused) continue;
        const double weight = static_cast<double>(scale) * routing.weights[k];
        const double term = weight * layer.w2_bias[routing.ids[k] * D + d];
        sum += term;
        size += std::abs(term);
      }
      y.values[i] += static_cast<float>(sum);
      magnitude.values[i] += static_cast<float>(size);
    }
  }
  OwnedMatrix y, magnitude;  // [T, D]
  double bound = 0.0;        // of |error| / magnitude
};

/// Runs `share(i)` on threads of its own, i in [0, n).
template <typename Share>
void on_threads(int n, const Share& share) {
  std::vector<std::thread> threads;
  for (int i = 0; i < n; ++i) threads.emplace_back([&share, i] { share(i); });
  for (std::thread& thread : threads) thread.join();
}

/// n threads that enter a call together.
class Spmd {
 public:
  explicit Spmd(int n) : n_(n), barrier_(n) {}
  cleave_threads threads(int index) {
    cleave_threads threads = cleave_threads_init();
    threads.kind = CLEAVE_THREADS_SPMD;
    threads.num_threads = n_;
    threads.thread_index = index;
    threads.barrier = [](void* self) { static_cast<Spmd*>(self)->barrier_.arrive_and_wait(); };
    threads.context = this;
    return threads;
  }
  /// The statuses that the threads got.
  std::vector<cleave_status> run(const CCall& call) {
    std::vector<cleave_status> statuses(n_);
    on_threads(n_, [&](int i) {
      const cleave_threads mine = threads(i);
      statuses[i] = call.run(&mine);
    });
    return statuses;
  }

 private:
  int n_;
  std::barrier<> barrier_;
};

/// Threads by callback; every region gets fresh ones.
/// n tasks one after the other on the caller's thread, the last one first.
inline cleave_threads backward_threads(int n) {
  cleave_threads threads = cleave_threads_init();
  threads.kind = CLEAVE_THREADS_CALLBACK;
  threads.num_threads = n;
  threads.parallel_for = [](void*, std::int32_t tasks, cleave_task task, void* context) {
    for (std::int32_t i = tasks - 1; i >= 0; --i) task(context, i);
  };
  return threads;
}

inline cleave_threads callback_threads(int n) {
  cleave_threads threads = cleave_threads_init();
  threads.kind = CLEAVE_THREADS_CALLBACK;
  threads.num_threads = n;
  threads.parallel_for = [](void*, std::int32_t tasks, cleave_task task, void* context) {
    on_threads(tasks, [&](int i) { task(context, i); });
  };
  return threads;
}

}  // namespace cleave::testing
