#include "cleave/c_dlpack.h"

#include <fmt/ranges.h>

#include <initializer_list>
#include <span>
#include <string>

#include "c_border.h"
#include "c_handles.h"

namespace cleave {
namespace {

// Values of dlpack.h's enums.
constexpr std::int32_t kDlCpu = 1;
constexpr std::uint8_t kDlInt = 0, kDlFloat = 2, kDlBfloat = 4;

enum class DlType { kFloat32, kBfloat16, kFloat16, kInt32, kOther };

DlType dl_type(const cleave_dl_data_type& type) {
  if (type.lanes != 1) return DlType::kOther;
  if (type.code == kDlFloat && type.bits == 32) return DlType::kFloat32;
  if (type.code == kDlBfloat && type.bits == 16) return DlType::kBfloat16;
  if (type.code == kDlFloat && type.bits == 16) return DlType::kFloat16;
  if (type.code == kDlInt && type.bits == 32) return DlType::kInt32;
  return DlType::kOther;
}

/// A tensor of the caller under the name that messages use.
class DlOperand {
 public:
  DlOperand(const cleave_dl_tensor* tensor, const char* name, int ndim) : name_(name) {
    c_check_pointer(tensor, name);
    tensor_ = tensor;
    if (tensor->device.device_type != kDlCpu)
      fail_argument("{} is on a device of DLPack type {}; expected 1, the CPU; copy it there", name,
                    tensor->device.device_type);
    if (tensor->ndim != ndim)
      fail_argument("{} has {} dimensions; expected {}", name, tensor->ndim, ndim);
    c_check_pointer(tensor->shape, name);
    for (const std::int64_t n : shape())
      if (n < 0) fail_argument("{} is {}; a size is negative", name, shape());
  }

  std::span<const std::int64_t> shape() const {
    return {tensor_->shape, static_cast<std::size_t>(tensor_->ndim)};
  }
  std::int64_t size(int dim) const { return tensor_->shape[dim]; }
  DlType type() const { return dl_type(tensor_->dtype); }
  void* data() const {
    if (tensor_->data == nullptr) return nullptr;
    return static_cast<char*>(tensor_->data) + tensor_->byte_offset;
  }

  void expect_type(DlType type, const char* type_name) const {
    if (this->type() != type)
      fail_argument("{} has DLPack type code {} with {} bits and {} lanes; expected {}", name_,
                    tensor_->dtype.code, tensor_->dtype.bits, tensor_->dtype.lanes, type_name);
  }
  void expect_shape(std::initializer_list<std::int64_t> expected, const char* letters) const {
    if (!std::equal(expected.begin(), expected.end(), shape().begin(), shape().end()))
      fail_argument("{} is {}; expected {} = {}", name_, shape(), letters, expected);
  }
  /// Row-major without gaps; those between rows of a matrix are allowed with `rows_apart`, which
  /// receives the distance.
  void expect_row_major(std::int64_t* rows_apart = nullptr) const {
    std::int64_t next = 1;
    for (int dim = tensor_->ndim - 1; dim >= 0; --dim) {
      const std::int64_t stride = tensor_->strides != nullptr ? tensor_->strides[dim] : next;
      const bool gap_allowed = rows_apart != nullptr && dim == 0 && stride > next;
      if (size(dim) > 1 && stride != next && !gap_allowed)
        fail_argument("{} has stride {} in dimension {}; expected {}{}; make it contiguous", name_,
                      stride, dim, next, rows_apart != nullptr && dim == 0 ? " or more" : "");
      if (rows_apart != nullptr && dim == 0) *rows_apart = size(0) > 1 ? stride : 0;
      next *= size(dim);
    }
  }

 private:
  const cleave_dl_tensor* tensor_ = nullptr;
  const char* name_;
};

float* dl_floats(const DlOperand& operand) {
  operand.expect_type(DlType::kFloat32, "float32 (2, 32, 1)");
  return static_cast<float*>(operand.data());
}

/// Checks topk_ids and topk_weights. @return K
std::int64_t dl_slots(const DlOperand& ids, const DlOperand& weights, std::int64_t T) {
  const std::int64_t K = ids.size(1);
  ids.expect_type(DlType::kInt32, "int32 (0, 32, 1)");
  ids.expect_shape({T, K}, "[T, K]");
  ids.expect_row_major();
  weights.expect_type(DlType::kFloat32, "float32 (2, 32, 1)");
  weights.expect_shape({T, K}, "[T, K]");
  weights.expect_row_major();
  return K;
}

void dl_route(cleave_route_call* call, const cleave_dl_tensor* logits_in,
              const cleave_dl_tensor* ids_in, const cleave_dl_tensor* weights_in) {
  c_check_struct(call, "cleave_route_call", offsetof(cleave_route_call, gate), sizeof *call);
  const DlOperand logits(logits_in, "logits", 2), ids(ids_in, "topk_ids", 2);
  const DlOperand weights(weights_in, "topk_weights", 2);
  const float* values = dl_floats(logits);
  std::int64_t stride = 0;
  logits.expect_row_major(&stride);
  call->experts_per_token = dl_slots(ids, weights, logits.size(0));
  call->num_tokens = logits.size(0);
  call->num_experts = logits.size(1);
  call->logits = values;
  call->logits_stride = stride;
  call->topk_ids = static_cast<std::int32_t*>(ids.data());
  call->topk_weights = static_cast<float*>(weights.data());
}

std::int32_t dl_weight_type(const DlOperand& w13, const DlOperand& w2) {
  if (w13.type() != w2.type())
    fail_argument("w13 and w2 are of different types; expected the same for both");
  switch (w13.type()) {
    case DlType::kFloat32:
      return CLEAVE_F32;
    case DlType::kBfloat16:
      return CLEAVE_BF16;
    case DlType::kFloat16:
      return CLEAVE_F16;
    default:
      fail_argument("w13 is of another type than float32, bfloat16 and float16; convert it");
  }
}

const float* dl_bias(const cleave_dl_tensor* tensor, const char* name, std::int64_t rows,
                     std::int64_t cols, const char* letters) {
  if (tensor == nullptr) return nullptr;
  const DlOperand bias(tensor, name, 2);
  bias.expect_shape({rows, cols}, letters);
  bias.expect_row_major();
  return dl_floats(bias);
}

void dl_experts(cleave_experts_desc* desc, const cleave_dl_tensor* w13_in,
                const cleave_dl_tensor* w2_in, const cleave_dl_tensor* w13_bias,
                const cleave_dl_tensor* w2_bias) {
  c_check_struct(desc, "cleave_experts_desc", offsetof(cleave_experts_desc, output_bias),
                 sizeof *desc);
  const DlOperand w13(w13_in, "w13", 3), w2(w2_in, "w2", 3);
  const std::int64_t E = w2.size(0), D = w2.size(1), I = w2.size(2);
  const bool gated = w13.size(1) == 2 * I;
  w13.expect_shape({E, gated ? 2 * I : I, D}, "[E, 2I, D] or [E, I, D] beside w2 [E, D, I]");
  w13.expect_row_major();
  w2.expect_row_major();
  const std::int32_t type = dl_weight_type(w13, w2);
  const float* bias = dl_bias(w13_bias, "w13_bias", E, w13.size(1), "[E, rows of w13]");
  desc->w2_bias = dl_bias(w2_bias, "w2_bias", E, D, "[E, D]");
  desc->w13_bias = bias;
  desc->num_experts = E;
  desc->d_model = D;
  desc->width = I;
  desc->gated = gated ? 1 : 0;
  desc->weight_dtype = type;
  desc->w13 = w13.data();
  desc->w2 = w2.data();
}

void dl_ffn(cleave_ffn_call* call, const cleave_experts* experts, const cleave_dl_tensor* x_in,
            const cleave_dl_tensor* y_in, const cleave_dl_tensor* ids_in,
            const cleave_dl_tensor* weights_in) {
  c_check_struct(call, "cleave_ffn_call", offsetof(cleave_ffn_call, scale), sizeof *call);
  c_check_pointer(experts, "experts");
  const DlOperand x(x_in, "x", 2), y(y_in, "y", 2);
  const std::int64_t T = x.size(0), D = experts->packed.d_model();
  x.expect_shape({T, D}, "[T, D]");
  y.expect_shape({T, D}, "[T, D]");
  const float* x_values = dl_floats(x);
  float* y_values = dl_floats(y);
  std::int64_t x_stride = 0, y_stride = 0, K = 0;
  x.expect_row_major(&x_stride);
  y.expect_row_major(&y_stride);
  std::int32_t* id_values = nullptr;
  float* weight_values = nullptr;
  if (ids_in != nullptr || weights_in != nullptr) {
    const DlOperand ids(ids_in, "topk_ids", 2), weights(weights_in, "topk_weights", 2);
    K = dl_slots(ids, weights, T);
    id_values = static_cast<std::int32_t*>(ids.data());
    weight_values = static_cast<float*>(weights.data());
  }
  call->num_tokens = T;
  call->experts_per_token = K;
  call->x = x_values;
  call->x_stride = x_stride;
  call->y = y_values;
  call->y_stride = y_stride;
  call->topk_ids = id_values;
  call->topk_weights = weight_values;
}

}  // namespace
}  // namespace cleave

cleave_status cleave_route_call_from_dlpack(cleave_route_call* call, const cleave_dl_tensor* logits,
                                            const cleave_dl_tensor* topk_ids,
                                            const cleave_dl_tensor* topk_weights) {
  return cleave::c_guarded("cleave_route_call_from_dlpack",
                           [&] { cleave::dl_route(call, logits, topk_ids, topk_weights); });
}

cleave_status cleave_experts_desc_from_dlpack(cleave_experts_desc* desc,
                                              const cleave_dl_tensor* w13,
                                              const cleave_dl_tensor* w2,
                                              const cleave_dl_tensor* w13_bias,
                                              const cleave_dl_tensor* w2_bias) {
  return cleave::c_guarded("cleave_experts_desc_from_dlpack",
                           [&] { cleave::dl_experts(desc, w13, w2, w13_bias, w2_bias); });
}

cleave_status cleave_ffn_call_from_dlpack(cleave_ffn_call* call, const cleave_experts* experts,
                                          const cleave_dl_tensor* x, const cleave_dl_tensor* y,
                                          const cleave_dl_tensor* topk_ids,
                                          const cleave_dl_tensor* topk_weights) {
  return cleave::c_guarded("cleave_ffn_call_from_dlpack",
                           [&] { cleave::dl_ffn(call, experts, x, y, topk_ids, topk_weights); });
}
