#include "cleave/c_dlpack.h"

#include <string>

#include "c_api/c_layer.h"

namespace cleave {
namespace {

using namespace testing;

// The layout that every producer of DLPack tensors writes, on 64-bit machines.
static_assert(sizeof(cleave_dl_tensor) == 48 && offsetof(cleave_dl_tensor, device) == 8 &&
              offsetof(cleave_dl_tensor, ndim) == 16 && offsetof(cleave_dl_tensor, dtype) == 20 &&
              offsetof(cleave_dl_tensor, shape) == 24 &&
              offsetof(cleave_dl_tensor, strides) == 32 &&
              offsetof(cleave_dl_tensor, byte_offset) == 40);
static_assert(offsetof(cleave_dl_managed_tensor, manager_ctx) == 48 &&
              offsetof(cleave_dl_managed_tensor, deleter) == 56);

struct Tensor {
  Tensor(const void* data, std::vector<std::int64_t> shape_in, cleave_dl_data_type type)
      : shape(std::move(shape_in)) {
    dl.data = const_cast<void*>(data);
    dl.device = {1, 0};
    dl.ndim = static_cast<std::int32_t>(shape.size());
    dl.dtype = type;
    dl.shape = shape.data();
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor& strided(std::vector<std::int64_t> elements) {
    strides = std::move(elements);
    dl.strides = strides.data();
    return *this;
  }
  std::vector<std::int64_t> shape, strides;
  cleave_dl_tensor dl{};
};
constexpr cleave_dl_data_type kFloat{2, 32, 1}, kHalf{2, 16, 1}, kBf16{4, 16, 1}, kInt{0, 32, 1};

TEST(CDlpack, ALayerFromTensorsEqualsOneFromPointers) {
  for (const bool gated : {true, false})
    for (const std::int32_t stored : {CLEAVE_F32, CLEAVE_BF16, CLEAVE_F16}) {
      const CLayer layer({.gated = gated, .biases = true, .stored = stored});
      const cleave_dl_data_type type = stored == CLEAVE_F32    ? kFloat
                                       : stored == CLEAVE_BF16 ? kBf16
                                                               : kHalf;
      const Tensor w13(layer.stored_w13.data(), {4, layer.rows, 40}, type);
      Tensor w2(layer.stored_w2.data(), {4, 40, 24}, type);
      w2.strided({40 * 24, 24, 1});
      const Tensor w13_bias(layer.w13_bias.data(), {4, layer.rows}, kFloat);
      const Tensor w2_bias(layer.w2_bias.data(), {4, 40}, kFloat);
      cleave_experts_desc desc = cleave_experts_desc_init();
      ASSERT_EQ(cleave_experts_desc_from_dlpack(&desc, &w13.dl, &w2.dl, &w13_bias.dl, &w2_bias.dl),
                CLEAVE_OK)
          << cleave_last_error();
      desc.output_bias = layer.output_bias.data();
      const cleave_experts_desc expected = layer.desc();
      EXPECT_EQ(std::memcmp(&desc, &expected, sizeof desc), 0);
    }
}

TEST(CDlpack, ACallFromTensorsEqualsOneFromPointers) {
  const CLayer layer({});
  const ExpertsHandle experts = create(layer.desc());
  CCall pointers(experts.get(), 6, 2, 1, 3), tensors(experts.get(), 6, 2, 1, 3);
  // x has rows 50 apart and starts 2 floats into its memory.
  std::vector<float> memory(6 * 50);
  for (std::int64_t t = 0; t < 6; ++t)
    std::copy_n(tensors.x.view().row(t), 40, memory.data() + 2 + t * 50);
  Tensor x(memory.data(), {6, 40}, kFloat), y(tensors.y.values.data(), {6, 40}, kFloat);
  x.strided({50, 1}).dl.byte_offset = 8;
  const Tensor ids(tensors.routing.ids.data(), {6, 2}, kInt);
  const Tensor weights(tensors.routing.weights.data(), {6, 2}, kFloat);
  cleave_ffn_call call = cleave_ffn_call_init();
  ASSERT_EQ(cleave_ffn_call_from_dlpack(&call, experts.get(), &x.dl, &y.dl, &ids.dl, &weights.dl),
            CLEAVE_OK)
      << cleave_last_error();
  call.workspace = tensors.call.workspace;
  call.workspace_size = tensors.call.workspace_size;
  ASSERT_EQ(cleave_experts_run(experts.get(), &call), CLEAVE_OK) << cleave_last_error();
  ASSERT_EQ(pointers.run(), CLEAVE_OK);
  EXPECT_EQ(pointers.y.values, tensors.y.values);
}

TEST(CDlpack, ADenseCallAndNoTokensHaveNoRouting) {
  const CLayer layer({.E = 1});
  const ExpertsHandle experts = create(layer.desc());
  const Tensor nothing(nullptr, {0, 40}, kFloat);
  cleave_ffn_call call = cleave_ffn_call_init();
  ASSERT_EQ(
      cleave_ffn_call_from_dlpack(&call, experts.get(), &nothing.dl, &nothing.dl, nullptr, nullptr),
      CLEAVE_OK)
      << cleave_last_error();
  EXPECT_EQ(cleave_dense_run(experts.get(), &call), CLEAVE_OK) << cleave_last_error();
}

TEST(CDlpack, RoutesTensors) {
  std::mt19937 rng(1);
  const OwnedMatrix values = random_matrix(rng, 5, 9);
  Routing expected;
  route({values.values.data(), 5, 8, 9}, 3, GateMode::kSoftmax, expected);
  std::vector<std::int32_t> id_values(15);
  std::vector<float> weight_values(15);
  Tensor logits(values.values.data(), {5, 8}, kFloat);
  logits.strided({9, 1});
  const Tensor ids(id_values.data(), {5, 3}, kInt), weights(weight_values.data(), {5, 3}, kFloat);
  cleave_route_call call = cleave_route_call_init();
  ASSERT_EQ(cleave_route_call_from_dlpack(&call, &logits.dl, &ids.dl, &weights.dl), CLEAVE_OK)
      << cleave_last_error();
  ASSERT_EQ(cleave_route(&call), CLEAVE_OK) << cleave_last_error();
  EXPECT_EQ(id_values, expected.ids);
  EXPECT_EQ(weight_values, expected.weights);
}

TEST(CDlpack, RefusesWhatItCannotUse) {
  const CLayer layer({});
  const ExpertsHandle experts = create(layer.desc());
  const CCall c(experts.get(), 6, 2, 1, 3);
  const auto refuse = [&](auto change, const std::string& message) {
    Tensor x(c.x.values.data(), {6, 40}, kFloat), y(c.y.values.data(), {6, 40}, kFloat);
    Tensor ids(c.routing.ids.data(), {6, 2}, kInt);
    Tensor weights(c.routing.weights.data(), {6, 2}, kFloat);
    cleave_ffn_call call = cleave_ffn_call_init();
    const cleave_ffn_call before = call;
    change(x, y, ids, weights);
    expect_refusal(
        cleave_ffn_call_from_dlpack(&call, experts.get(), &x.dl, &y.dl, &ids.dl, &weights.dl),
        message);
    EXPECT_EQ(std::memcmp(&call, &before, sizeof call), 0);
  };
  using T = Tensor&;
  refuse([](T x, T, T, T) { x.dl.device.device_type = 2; }, "x is on a device of DLPack type 2");
  refuse([](T x, T, T, T) { x.dl.ndim = 1; }, "x has 1 dimensions; expected 2");
  refuse([](T x, T, T, T) { x.dl.shape = nullptr; }, "x is NULL");
  refuse([](T x, T, T, T) { x.dl.dtype = kBf16; }, "expected float32");
  refuse([](T x, T, T, T) { x.dl.dtype.lanes = 4; }, "4 lanes; expected float32");
  refuse([](T x, T, T, T) { x.shape[1] = 39; }, "x is [6, 39]; expected [T, D] = [6, 40]");
  refuse([](T x, T, T, T) { x.shape[0] = -6; }, "a size is negative");
  refuse([](T, T y, T, T) { y.shape[0] = 5; }, "y is [5, 40]; expected [T, D] = [6, 40]");
  refuse([](T x, T, T, T) { x.strided({1, 6}); }, "x has stride 6 in dimension 1; expected 1");
  refuse([](T, T y, T, T) { y.strided({0, 1}); }, "y has stride 0 in dimension 0");
  refuse([](T, T, T ids, T) { ids.dl.dtype = {0, 64, 1}; }, "64 bits and 1 lanes; expected int32");
  refuse([](T, T, T ids, T) { ids.strided({3, 1}); }, "topk_ids has stride 3");
  refuse([](T, T, T, T weights) { weights.shape[1] = 3; }, "topk_weights is [6, 3]");

  Tensor w13(layer.stored_w13.data(), {4, 48, 40}, kFloat);
  Tensor w2(layer.stored_w2.data(), {4, 40, 24}, kFloat);
  cleave_experts_desc desc = cleave_experts_desc_init();
  const auto describe = [&] {
    return cleave_experts_desc_from_dlpack(&desc, &w13.dl, &w2.dl, nullptr, nullptr);
  };
  w13.shape[1] = 47;
  expect_refusal(describe(), "w13 is [4, 47, 40]; expected [E, 2I, D] or [E, I, D]");
  w13.shape[1] = 48;
  w2.dl.dtype = kBf16;
  expect_refusal(describe(), "different types");
  w13.dl.dtype = w2.dl.dtype = kInt;
  expect_refusal(describe(), "another type than float32");
  w13.dl.dtype = w2.dl.dtype = kFloat;
  w2.strided({40 * 24, 1, 40});
  expect_refusal(describe(), "w2 has stride 40 in dimension 2");
  expect_refusal(cleave_experts_desc_from_dlpack(&desc, nullptr, &w2.dl, nullptr, nullptr),
                 "w13 is NULL");
  expect_refusal(cleave_experts_desc_from_dlpack(nullptr, &w13.dl, &w2.dl, nullptr, nullptr),
                 "cleave_experts_desc is NULL");
  expect_refusal(cleave_route_call_from_dlpack(nullptr, nullptr, nullptr, nullptr), "is NULL");
}

}  // namespace
}  // namespace cleave
