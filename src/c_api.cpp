#include "cleave/c_api.h"

#include <algorithm>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "c_border.h"
#include "c_handles.h"
#include "cleave/packed.h"
#include "cleave/version.h"
#include "kernels/check_routing.h"
#include "kernels/packed_ffn.h"

namespace cleave {
namespace {

constexpr auto kLargest = std::numeric_limits<std::int64_t>::max();

// The values of the C enums, in their order.
constexpr Activation kCActivations[] = {Activation::kSilu,     Activation::kGelu,
                                        Activation::kGeluTanh, Activation::kRelu,
                                        Activation::kRelu2,    Activation::kIdentity};
constexpr DType kCStoredTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr WeightType kCPackedTypes[] = {WeightType::kF32, WeightType::kBF16, WeightType::kF16,
                                        WeightType::kInt8, WeightType::kInt4};
constexpr GateMode kCGateModes[] = {GateMode::kSoftmax, GateMode::kHard};

template <typename Type, std::size_t N>
Type c_enum(const Type (&values)[N], std::int32_t value, const char* name) {
  if (value < 0 || value >= static_cast<std::int32_t>(N))
    fail_argument("{} is {}; expected 0 to {}, see c_api.h", name, value, N - 1);
  return values[value];
}

void c_check_aligned(const void* data, const char* name, std::size_t alignment) {
  c_check_pointer(data, name);
  if (reinterpret_cast<std::uintptr_t>(data) % alignment != 0)
    fail_argument("{} is {}; expected a multiple of {} bytes", name, data, alignment);
}

/// Row-major rows of the caller; a stride of 0 means that they are side by side.
template <typename T>
MatrixView<T> c_matrix(T* data, const char* name, std::int64_t rows, std::int64_t cols,
                       std::int64_t stride) {
  c_check_aligned(data, name, alignof(T));
  if (stride == 0) stride = cols;
  if (stride < cols || stride > kLargest / 8 / rows)
    fail_argument("{}_stride is {}; expected at least {}, or 0 for rows side by side", name, stride,
                  cols);
  return {data, rows, cols, stride};
}

void c_check_tokens(std::int64_t num_tokens) {
  if (num_tokens < 0) fail_argument("num_tokens is {}; expected 0 or more", num_tokens);
}

/// T * K is counted in 32 bits, and K experts are distinct.
void c_check_slots(std::int64_t T, std::int64_t K, std::int64_t E) {
  if (K < 1 || K > E)
    fail_argument("experts_per_token is {} of {} experts; expected 1 to {}", K, E, E);
  if (T > std::numeric_limits<std::int32_t>::max() / K)
    fail_argument("{} tokens x {} experts; expected below 2^31 in one call; make several", T, K);
}

StackedExperts c_stack(const cleave_experts_desc& d) {
  const auto in_range = [](std::int64_t n) { return n >= 1 && n <= std::int64_t{1} << 31; };
  if (!in_range(d.num_experts) || !in_range(d.d_model) || !in_range(d.width))
    fail_argument("num_experts is {}, d_model {}, width {}; expected each from 1 to 2^31",
                  d.num_experts, d.d_model, d.width);
  if (d.d_model > kLargest / 64 / d.width / d.num_experts)
    fail_argument("{} experts of {} x {} weights do not fit any memory", d.num_experts, d.d_model,
                  d.width);
  if (d.gated != 0 && d.gated != 1) fail_argument("gated is {}; expected 0 or 1", d.gated);
  StackedExperts stack;
  stack.num_experts = d.num_experts;
  stack.d_model = d.d_model;
  stack.width = d.width;
  stack.gated = d.gated == 1;
  stack.activation = c_enum(kCActivations, d.activation, "activation");
  stack.dtype = c_enum(kCStoredTypes, d.weight_dtype, "weight_dtype");
  const std::size_t alignment = stack.dtype == DType::kF32 ? 4 : 2;
  c_check_aligned(d.w13, "w13", alignment);
  c_check_aligned(d.w2, "w2", alignment);
  stack.w13 = d.w13;
  stack.w2 = d.w2;
  stack.w13_bias = d.w13_bias;
  return stack;
}

std::vector<float> c_copy(const float* values, std::int64_t count) {
  return values == nullptr ? std::vector<float>() : std::vector<float>(values, values + count);
}

std::unique_ptr<cleave_experts> c_create(const cleave_experts_desc& d) {
  isa_name();  // chosen now, so that a wrong CLEAVE_ISA shows here and the first run allocates
               // nothing
  const StackedExperts stack = c_stack(d);
  const WeightType type = c_enum(kCPackedTypes, d.packed_dtype, "packed_dtype");
  CallerThreads threads(d.threads);
  if (threads.spmd())
    fail_argument("the threads are SPMD, but one thread makes a handle; use another kind");
  auto experts = std::make_unique<cleave_experts>();
  experts->packed = PackedExperts(stack, type, threads.parallel_for());
  experts->w2_bias = c_copy(d.w2_bias, d.num_experts * d.d_model);
  experts->output_bias = c_copy(d.output_bias, d.d_model);
  return experts;
}

cleave_ffn_call c_read_call(const cleave_ffn_call* given) {
  const cleave_ffn_call call =
      c_read_struct(given, "cleave_ffn_call", offsetof(cleave_ffn_call, scale));
  if (call.reserved != 0) fail_argument("cleave_ffn_call: reserved is not 0");
  c_check_tokens(call.num_tokens);
  return call;
}

/// Ids of the caller: each within range, none twice in a token. Every thread of an SPMD call finds
/// the same, before the first barrier; nothing looks at them again.
void c_check_ids(const RoutingView& routing, std::int64_t E) {
  const std::int64_t K = routing.experts_per_token;
  if (const std::int64_t p = find_foreign_id(routing, E); p >= 0)
    fail_argument("topk_ids[{}, {}] is {}, but there are {} experts (0 to {})", p / K, p % K,
                  routing.ids[p], E, E - 1);
  if (const std::int64_t p = find_repeated_id(routing, E); p >= 0)
    fail_argument("topk_ids has expert {} twice for token {}; its ids must be distinct",
                  routing.ids[p], p / K);
}

/// The caller's memory, if it is enough.
Workspace c_workspace(const cleave_ffn_call& call, std::size_t needed) {
  c_check_pointer(call.workspace, "workspace");
  if (reinterpret_cast<std::uintptr_t>(call.workspace) % CLEAVE_WORKSPACE_ALIGNMENT != 0)
    fail_argument("workspace is {}; expected a multiple of {} bytes (CLEAVE_WORKSPACE_ALIGNMENT)",
                  call.workspace, CLEAVE_WORKSPACE_ALIGNMENT);
  if (call.workspace_size < needed)
    fail_argument("workspace_size is {} bytes; this call needs {}, as *_workspace_size() says",
                  call.workspace_size, needed);
  return Workspace(
      std::span<std::byte>(static_cast<std::byte*>(call.workspace), call.workspace_size));
}

/// What the experts' w2_bias and the output's bias add to a token. ids may be NULL: expert 0.
void c_add_biases(const cleave_experts& experts, const cleave_ffn_call& call, float scale,
                  MatrixView<float> y, const ParallelFor& parallel) {
  if (experts.w2_bias.empty() && experts.output_bias.empty()) return;
  const std::int64_t D = y.cols, K = std::max<std::int64_t>(1, call.experts_per_token);
  constexpr std::int64_t kTokensPerRange = 16;
  parallel(y.rows, kTokensPerRange, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      float* row = y.row(t);
      for (std::int64_t k = 0; k < K && !experts.w2_bias.empty(); ++k) {
        const std::int64_t e = call.topk_ids != nullptr ? call.topk_ids[t * K + k] : 0;
        if (e == Routing::kUnused) continue;
        const float weight =
            call.topk_ids != nullptr ? scale * call.topk_weights[t * K + k] : scale;
        const float* bias = experts.w2_bias.data() + e * D;
        for (std::int64_t d = 0; d < D; ++d) row[d] += weight * bias[d];
      }
      for (std::int64_t d = 0; d < D && !experts.output_bias.empty(); ++d)
        row[d] += experts.output_bias[d];
    }
  });
}

void c_experts_run(const cleave_experts* experts, const cleave_ffn_call* given) {
  c_check_pointer(experts, "experts");
  const cleave_ffn_call call = c_read_call(given);
  const PackedExperts& packed = experts->packed;
  const std::int64_t T = call.num_tokens, K = call.experts_per_token, D = packed.d_model();
  c_check_slots(T, K, packed.num_experts());
  CallerThreads threads(call.threads);
  if (T == 0) return;
  const auto x = c_matrix(call.x, "x", T, D, call.x_stride);
  const auto y = c_matrix(call.y, "y", T, D, call.y_stride);
  c_check_pointer(call.topk_ids, "topk_ids");
  c_check_pointer(call.topk_weights, "topk_weights");
  const RoutingView routing{T, K, call.topk_ids, call.topk_weights};
  c_check_ids(routing, packed.num_experts());
  const ParallelFor parallel = threads.parallel_for();
  Workspace workspace = c_workspace(call, moe_ffn_workspace_size(packed, T, K, parallel.threads));
  const float scale = call.scale == 0.0f ? 1.0f : call.scale;
  const FfnCall all{packed, routing.ids, routing.weights, K, scale, x, y};
  run_checked({&all, 1}, workspace, parallel);
  c_add_biases(*experts, call, scale, y, parallel);
  threads.finish();
}

void c_dense_run(const cleave_experts* experts, const cleave_ffn_call* given) {
  c_check_pointer(experts, "experts");
  const cleave_ffn_call call = c_read_call(given);
  const PackedExperts& packed = experts->packed;
  const std::int64_t T = call.num_tokens, D = packed.d_model();
  if (packed.num_experts() != 1)
    fail_argument("the handle holds {} experts; a dense FFN is one; use cleave_experts_run",
                  packed.num_experts());
  if (call.topk_ids != nullptr || call.topk_weights != nullptr || call.experts_per_token != 0)
    fail_argument("experts_per_token, topk_ids or topk_weights is set; a dense FFN has no routing");
  if (call.scale != 0.0f && call.scale != 1.0f)
    fail_argument("scale is {}; a dense FFN has none; leave it 0", call.scale);
  c_check_slots(T, 1, 1);
  CallerThreads threads(call.threads);
  if (T == 0) return;
  const auto x = c_matrix(call.x, "x", T, D, call.x_stride);
  const auto y = c_matrix(call.y, "y", T, D, call.y_stride);
  const ParallelFor parallel = threads.parallel_for();
  Workspace workspace = c_workspace(call, dense_ffn_workspace_size(packed, T, parallel.threads));
  dense_ffn(packed, x, y, workspace, parallel);
  c_add_biases(*experts, call, 1.0f, y, parallel);
  threads.finish();
}

void c_check_size_query(const cleave_experts* experts, std::int64_t num_tokens,
                        std::int32_t num_threads, const std::size_t* bytes) {
  c_check_pointer(experts, "experts");
  c_check_pointer(bytes, "bytes");
  c_check_tokens(num_tokens);
  if (num_threads < 1) fail_argument("num_threads is {}; expected 1 or more", num_threads);
}

void c_route(const cleave_route_call* given) {
  const cleave_route_call call =
      c_read_struct(given, "cleave_route_call", offsetof(cleave_route_call, gate));
  if (call.reserved != 0) fail_argument("cleave_route_call: reserved is not 0");
  c_check_tokens(call.num_tokens);
  c_check_slots(call.num_tokens, call.experts_per_token, call.num_experts);
  const RouteSpec spec{.experts_per_token = call.experts_per_token,
                       .mode = c_enum(kCGateModes, call.gate, "gate"),
                       .threshold = call.threshold,
                       .normalise = call.keep_probabilities == 0};
  if (!(call.threshold >= 0.0f && call.threshold <= 1.0f))  // NaN as well
    fail_argument("threshold is {}; expected a share of the largest probability, 0 to 1",
                  call.threshold);
  if (call.keep_probabilities != 0 && call.keep_probabilities != 1)
    fail_argument("keep_probabilities is {}; expected 0 or 1", call.keep_probabilities);
  if (call.keep_probabilities == 1 && spec.mode == GateMode::kHard)
    fail_argument(
        "keep_probabilities is 1 with CLEAVE_GATE_HARD, whose weights are 1; leave it 0, or use "
        "CLEAVE_GATE_SOFTMAX");
  if (call.num_tokens == 0) return;
  const auto logits =
      c_matrix(call.logits, "logits", call.num_tokens, call.num_experts, call.logits_stride);
  c_check_pointer(call.topk_ids, "topk_ids");
  c_check_pointer(call.topk_weights, "topk_weights");
  route(logits, spec, call.topk_ids, call.topk_weights);
}

}  // namespace
}  // namespace cleave

uint32_t cleave_abi_version(void) { return CLEAVE_ABI_VERSION; }
const char* cleave_version(void) { return cleave::kVersion; }

const char* cleave_isa(void) {
  const char* name = nullptr;
  cleave::c_guarded("cleave_isa", [&] { name = cleave::isa_name(); });
  return name;
}

cleave_status cleave_route(const cleave_route_call* call) {
  return cleave::c_guarded("cleave_route", [&] { cleave::c_route(call); });
}

cleave_status cleave_experts_create(const cleave_experts_desc* desc, cleave_experts** experts) {
  return cleave::c_guarded("cleave_experts_create", [&] {
    cleave::c_check_pointer(experts, "experts");
    *experts = nullptr;
    const auto d =
        cleave::c_read_struct(desc, "cleave_experts_desc", offsetof(cleave_experts_desc, w13_bias));
    *experts = cleave::c_create(d).release();
  });
}

void cleave_experts_destroy(cleave_experts* experts) { delete experts; }

size_t cleave_experts_bytes(const cleave_experts* experts) {
  return experts == nullptr ? 0 : static_cast<std::size_t>(experts->packed.bytes());
}

cleave_status cleave_experts_run(const cleave_experts* experts, const cleave_ffn_call* call) {
  return cleave::c_guarded("cleave_experts_run", [&] { cleave::c_experts_run(experts, call); });
}

cleave_status cleave_dense_run(const cleave_experts* experts, const cleave_ffn_call* call) {
  return cleave::c_guarded("cleave_dense_run", [&] { cleave::c_dense_run(experts, call); });
}

cleave_status cleave_experts_workspace_size(const cleave_experts* experts, int64_t num_tokens,
                                            int64_t experts_per_token, int32_t num_threads,
                                            size_t* bytes) {
  return cleave::c_guarded("cleave_experts_workspace_size", [&] {
    cleave::c_check_size_query(experts, num_tokens, num_threads, bytes);
    cleave::c_check_slots(num_tokens, experts_per_token, experts->packed.num_experts());
    *bytes =
        cleave::moe_ffn_workspace_size(experts->packed, num_tokens, experts_per_token, num_threads);
  });
}

cleave_status cleave_dense_workspace_size(const cleave_experts* experts, int64_t num_tokens,
                                          int32_t num_threads, size_t* bytes) {
  return cleave::c_guarded("cleave_dense_workspace_size", [&] {
    cleave::c_check_size_query(experts, num_tokens, num_threads, bytes);
    cleave::c_check_slots(num_tokens, 1, experts->packed.num_experts());
    *bytes = cleave::dense_ffn_workspace_size(experts->packed, num_tokens, num_threads);
  });
}
