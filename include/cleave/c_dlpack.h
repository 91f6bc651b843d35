#pragma once

// Operands of the C interface from DLPack tensors (PyTorch, NumPy, JAX, TVM, ...). Each function
// checks device, type, shape and strides, and fills in a struct of c_api.h.
//
// Tensors are borrowed: their memory must live as long as the pointers in the struct are used, and
// the caller calls the deleter. From a DLManagedTensor or DLManagedTensorVersioned pass its
// &managed->dl_tensor.

#include "cleave/c_api.h"

// The same memory layout as in dlpack.h (version 0 and 1), under names that cannot collide with it.
// Where dlpack.h was included before, these are its types; included after, cast the pointer.
#ifdef DLPACK_DLPACK_H_
typedef DLTensor cleave_dl_tensor;
typedef DLManagedTensor cleave_dl_managed_tensor;
#else
typedef struct cleave_dl_device {
  int32_t device_type;  ///< 1: CPU
  int32_t device_id;
} cleave_dl_device;
typedef struct cleave_dl_data_type {
  uint8_t code;    ///< 0: signed integer, 2: IEEE float, 4: bfloat16
  uint8_t bits;    ///< 32 or 16
  uint16_t lanes;  ///< 1
} cleave_dl_data_type;
typedef struct cleave_dl_tensor {
  void* data;
  cleave_dl_device device;
  int32_t ndim;
  cleave_dl_data_type dtype;
  int64_t* shape;        ///< [ndim]
  int64_t* strides;      ///< [ndim], elements; NULL: row-major without gaps
  uint64_t byte_offset;  ///< of the first element from `data`
} cleave_dl_tensor;
typedef struct cleave_dl_managed_tensor {
  cleave_dl_tensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(struct cleave_dl_managed_tensor* self);
} cleave_dl_managed_tensor;
#endif

#ifdef __cplusplus
extern "C" {
#endif

/// Sets num_tokens, num_experts, experts_per_token, logits, topk_ids and topk_weights.
///   logits float32 [T, E]   topk_ids int32 [T, K]   topk_weights float32 [T, K]
/// Rows of logits may have gaps; the others must be without.
CLEAVE_C_API cleave_status cleave_route_call_from_dlpack(cleave_route_call* call,
                                                         const cleave_dl_tensor* logits,
                                                         const cleave_dl_tensor* topk_ids,
                                                         const cleave_dl_tensor* topk_weights);

/// Sets num_experts, d_model, width, gated, weight_dtype and the four pointers; gated from the
/// shapes: whether w13 has 2I rows or I.
///   w13 [E, 2I, D] or [E, I, D], w2 [E, D, I]: float32, bfloat16 or float16, the same for both
///   w13_bias float32 [E, 2I] or [E, I], w2_bias float32 [E, D]: or NULL
/// All without gaps.
CLEAVE_C_API cleave_status cleave_experts_desc_from_dlpack(cleave_experts_desc* desc,
                                                           const cleave_dl_tensor* w13,
                                                           const cleave_dl_tensor* w2,
                                                           const cleave_dl_tensor* w13_bias,
                                                           const cleave_dl_tensor* w2_bias);

/// Sets num_tokens, experts_per_token, x, y, topk_ids and topk_weights.
///   x, y float32 [T, D], D that of `experts`   topk_ids int32, topk_weights float32 [T, K]
/// Rows of x and y may have gaps. For cleave_dense_run() the last two are NULL.
CLEAVE_C_API cleave_status cleave_ffn_call_from_dlpack(cleave_ffn_call* call,
                                                       const cleave_experts* experts,
                                                       const cleave_dl_tensor* x,
                                                       const cleave_dl_tensor* y,
                                                       const cleave_dl_tensor* topk_ids,
                                                       const cleave_dl_tensor* topk_weights);

#ifdef __cplusplus
}
#endif
