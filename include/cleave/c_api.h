#pragma once

// The C interface: routing and expert FFNs for inference engines that are not written in C++. Plain
// C99, no other header of cleave is needed. How to build, link and call: docs/c_api.md.
//
// Shapes use one alphabet: T tokens, D model width, E experts, K experts per token, I neurons of an
// expert. Matrices are row-major.
//
// Structs begin with struct_size and abi_version; their <struct>_init() sets both and zeroes the
// rest, and zero is the default of every field that has one. A struct of an older header, which is
// shorter, is accepted; a longer one too, as long as what this library does not know is zero.
//
// Every call that can fail returns a cleave_status, and leaves a message for cleave_last_error().
// The library throws nothing across this border, never prints, never exits. All calls may be made
// from several threads at once, also on one handle; only destroying a handle must be the last call
// on it. Calls that run keep nothing of what they were given.

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__)
#define CLEAVE_C_API __attribute__((visibility("default")))
#else
#define CLEAVE_C_API
#endif

/// Changes when something that was compiled against this header would no longer work. Also the
/// number in libcleave.so.<number>.
#define CLEAVE_ABI_VERSION 1

/// Alignment of a workspace, bytes.
#define CLEAVE_WORKSPACE_ALIGNMENT 64

#ifdef __cplusplus
extern "C" {
#endif

// ---- Status ----

typedef int32_t cleave_status;
enum {
  CLEAVE_OK = 0,
  CLEAVE_INVALID_ARGUMENT = 1,  ///< what was passed cannot be honoured; do not use the results
  CLEAVE_OUT_OF_MEMORY = 2,
  CLEAVE_INTERNAL_ERROR = 3  ///< a mistake of the library
};

/// What went wrong in the last call of this thread that failed: one line, which names the function,
/// the fact and a way out. Empty before the first. Valid until the next call of this thread fails;
/// the library owns it.
CLEAVE_C_API const char* cleave_last_error(void);

/// CLEAVE_ABI_VERSION of the library, to be compared with that of the header.
CLEAVE_C_API uint32_t cleave_abi_version(void);
/// "0.1.0". Static memory.
CLEAVE_C_API const char* cleave_version(void);
/// The instruction set that the kernels use: "scalar", "avx2", "avx512", "avx512vnni",
/// "avx512bf16" or "neon".
/// The environment variable CLEAVE_ISA overrides the widest one; NULL (and an error) if this CPU
/// lacks it. Static memory.
CLEAVE_C_API const char* cleave_isa(void);

// ---- Types ----

/// Types of stored weights and, beside them, of packed ones. Values passed as int32_t.
enum {
  CLEAVE_F32 = 0,
  CLEAVE_BF16 = 1,
  CLEAVE_F16 = 2,
  CLEAVE_INT8 = 3,  ///< packed only: a scale per row (of w2: per hidden neuron)
  CLEAVE_INT4 = 4   ///< packed only: 4.5 bits a weight; scale and minimum per 32 weights (of w2
                    ///< beside a gate: 5 bits, per 16)
};

/// act() between the two products.
enum {
  CLEAVE_SILU = 0,
  CLEAVE_GELU = 1,
  CLEAVE_GELU_TANH = 2,
  CLEAVE_RELU = 3,
  CLEAVE_RELU2 = 4,  ///< max(0, x)^2
  CLEAVE_IDENTITY = 5
};

/// How the logits of the K selected experts become their weights.
enum {
  CLEAVE_GATE_SOFTMAX = 0,  ///< softmax over the selected ones
  CLEAVE_GATE_HARD = 1      ///< 1 each
};

// ---- Threads: none of the library's own unless asked for ----

/// Task `index` of a parallel region.
typedef void (*cleave_task)(void* task_context, int32_t index);
/// Runs task(task_context, i) once for each i in [0, num_tasks), in any order, on any threads, and
/// returns when all are done. A task may wait for one that has begun, never for one that has not.
typedef void (*cleave_parallel_for)(void* context, int32_t num_tasks, cleave_task task,
                                    void* task_context);
/// Returns when all threads of the call have entered it.
typedef void (*cleave_barrier)(void* context);

/// The library's own small pool; its threads sleep between calls.
typedef struct cleave_pool cleave_pool;
/// @param num_threads  in all, the caller's included; 0: as many as the machine has cores
CLEAVE_C_API cleave_status cleave_pool_create(int32_t num_threads, cleave_pool** pool);
/// NULL is allowed. No call may still be running on it.
CLEAVE_C_API void cleave_pool_destroy(cleave_pool* pool);

enum {
  CLEAVE_THREADS_CALLER = 0,    ///< the calling thread alone
  CLEAVE_THREADS_CALLBACK = 1,  ///< parallel_for, context, num_threads
  CLEAVE_THREADS_SPMD = 2,      ///< num_threads, thread_index, barrier, context
  CLEAVE_THREADS_POOL = 3       ///< pool
};

/// Which threads a call runs on. Results are the same for the same number of threads, whichever
/// kind they are.
///
/// SPMD: every one of num_threads threads makes the same call with the same operands and its own
/// thread_index; each does its share, and they meet at `barrier` some times in between. A mistake
/// in the operands is returned by all of them before any barrier.
typedef struct cleave_threads {
  uint32_t struct_size;
  uint32_t abi_version;
  int32_t kind;
  int32_t num_threads;  ///< callback: how many tasks at most to cut work into; SPMD: how many enter
  int32_t thread_index;  ///< SPMD: [0, num_threads)
  int32_t reserved;      ///< 0
  void* context;         ///< passed to the callbacks
  cleave_parallel_for parallel_for;
  cleave_barrier barrier;
  cleave_pool* pool;  ///< must outlive the call
} cleave_threads;

// ---- Routing ----

/// Selects the K largest logits of each token, ties to the lower id, and weighs them; with a
/// threshold those of them that reach it. Rows are independent, so threads may share them out among
/// several calls.
typedef struct cleave_route_call {
  uint32_t struct_size;
  uint32_t abi_version;
  int64_t num_tokens;         ///< T; 0: nothing is done
  int64_t num_experts;        ///< E
  int64_t experts_per_token;  ///< K, 1 to E
  const float* logits;        ///< [T, E], finite
  int64_t logits_stride;      ///< floats from row to row; 0: E
  int32_t* topk_ids;          ///< [T, K], written: by falling logit
  float* topk_weights;        ///< [T, K], written
  int32_t gate;               ///< CLEAVE_GATE_*
  int32_t reserved;           ///< 0
  // Appended; zero, what an older header leaves them at, is how it was:
  /// [0, 1]: of the K only experts with p_e >= threshold * p_max are used, where p is the softmax
  /// over all E logits; the slots of the others come last, with id -1 and weight 0, as
  /// cleave_experts_run() takes them. The largest always is used; 0: all K are.
  float threshold;
  /// CLEAVE_GATE_SOFTMAX: 0: the weights of the experts in use sum to 1; 1: they are their p_e.
  /// CLEAVE_GATE_HARD: 0; its weights are 1, and 1 is refused (CLEAVE_INVALID_ARGUMENT).
  int32_t keep_probabilities;
} cleave_route_call;

/// Allocates nothing.
CLEAVE_C_API cleave_status cleave_route(const cleave_route_call* call);

// ---- Experts ----

/// The experts of one layer, or a dense FFN as one expert:
///   expert(x) = w2 (act(gate x + gate_bias) .* (up x + up_bias)) + w2_bias   gated
///   expert(x) = w2 act(w1 x + w1_bias) + w2_bias                             two matrices
/// Nothing of it is needed after cleave_experts_create(), which packs the weights.
typedef struct cleave_experts_desc {
  uint32_t struct_size;
  uint32_t abi_version;
  int64_t num_experts;       ///< E
  int64_t d_model;           ///< D
  int64_t width;             ///< I
  int32_t gated;             ///< 1, or 0: two matrices
  int32_t activation;        ///< CLEAVE_SILU ...
  int32_t weight_dtype;      ///< of w13 and w2 as given: CLEAVE_F32, CLEAVE_BF16 or CLEAVE_F16
  int32_t packed_dtype;      ///< as the library keeps them: CLEAVE_F32 ... CLEAVE_INT4
  const void* w13;           ///< [E, 2I, D]: gate rows, then up rows; two matrices: w1 [E, I, D]
  const void* w2;            ///< [E, D, I]
  const float* w13_bias;     ///< [E, 2I] (two matrices: [E, I]), or NULL
  const float* w2_bias;      ///< [E, D], weighted like its expert, or NULL
  const float* output_bias;  ///< [D], added once to every token, or NULL
  const cleave_threads* threads;  ///< to pack with: not SPMD; NULL: the calling thread
} cleave_experts_desc;

typedef struct cleave_experts cleave_experts;
/// @param experts  receives a handle, to be destroyed by the caller; NULL after an error
CLEAVE_C_API cleave_status cleave_experts_create(const cleave_experts_desc* desc,
                                                 cleave_experts** experts);
/// NULL is allowed. No call may still be running on it.
CLEAVE_C_API void cleave_experts_destroy(cleave_experts* experts);
/// Bytes that the packed weights take; 0 for NULL.
CLEAVE_C_API size_t cleave_experts_bytes(const cleave_experts* experts);

/// Operands of cleave_experts_run() and cleave_dense_run(). y must overlap neither x nor the
/// workspace.
typedef struct cleave_ffn_call {
  uint32_t struct_size;
  uint32_t abi_version;
  int64_t num_tokens;             ///< T; 0: nothing is done
  int64_t experts_per_token;      ///< K, 1 to E; dense: 0
  const float* x;                 ///< [T, D]
  int64_t x_stride;               ///< floats from row to row; 0: D
  float* y;                       ///< [T, D], added to
  int64_t y_stride;               ///< floats from row to row; 0: D
  const int32_t* topk_ids;        ///< [T, K], in [0, E), distinct within a token, or -1 for
                                  ///< a slot that is not used; dense: NULL
  const float* topk_weights;      ///< [T, K]; dense: NULL
  void* workspace;                ///< aligned to CLEAVE_WORKSPACE_ALIGNMENT; contents do not matter
  size_t workspace_size;          ///< bytes, at least *_workspace_size() says
  float scale;                    ///< of the experts' sum; 0 counts as 1
  int32_t reserved;               ///< 0
  const cleave_threads* threads;  ///< NULL: the calling thread alone
} cleave_ffn_call;

/// y[t] += scale * sum over k of topk_weights[t,k] * expert_{topk_ids[t,k]}(x[t]) + output_bias.
///
/// To replace an FFN start from y = 0; to add to a residual stream, from its values. Allocates
/// nothing. Calls that run at the same time need a workspace each (the threads of one SPMD call
/// share one).
CLEAVE_C_API cleave_status cleave_experts_run(const cleave_experts* experts,
                                              const cleave_ffn_call* call);
/// y[t] += expert_0(x[t]) + output_bias, for experts with E = 1.
CLEAVE_C_API cleave_status cleave_dense_run(const cleave_experts* experts,
                                            const cleave_ffn_call* call);

/// Bytes of workspace that are enough for cleave_experts_run() on up to num_tokens tokens with K
/// experts each, on num_threads threads (of a pool: its threads; without threads: 1). Depends on
/// nothing else, so it may be asked once, for the largest T.
CLEAVE_C_API cleave_status cleave_experts_workspace_size(const cleave_experts* experts,
                                                         int64_t num_tokens,
                                                         int64_t experts_per_token,
                                                         int32_t num_threads, size_t* bytes);
/// The same for cleave_dense_run().
CLEAVE_C_API cleave_status cleave_dense_workspace_size(const cleave_experts* experts,
                                                       int64_t num_tokens, int32_t num_threads,
                                                       size_t* bytes);

#ifdef __cplusplus
}
#endif

#define CLEAVE_DEFINE_INIT(type)            \
  static inline type type##_init(void) {    \
    type value;                             \
    memset(&value, 0, sizeof value);        \
    value.struct_size = sizeof value;       \
    value.abi_version = CLEAVE_ABI_VERSION; \
    return value;                           \
  }
CLEAVE_DEFINE_INIT(cleave_threads)
CLEAVE_DEFINE_INIT(cleave_route_call)
CLEAVE_DEFINE_INIT(cleave_experts_desc)
CLEAVE_DEFINE_INIT(cleave_ffn_call)
#undef CLEAVE_DEFINE_INIT
