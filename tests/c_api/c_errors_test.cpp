#include <fmt/format.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "c_api/c_layer.h"

namespace cleave {
namespace {

using namespace testing;

/// A struct in memory of its own size: a sanitizer sees what is read beyond it.
template <typename Struct>
class SizedStruct {
 public:
  SizedStruct(Struct value, std::size_t bytes) : memory_(new std::byte[bytes]()) {
    value.struct_size = static_cast<std::uint32_t>(bytes);
    std::memcpy(memory_.get(), &value, std::min(bytes, sizeof value));
    bytes_ = bytes;
  }
  const Struct* get() const { return reinterpret_cast<const Struct*>(memory_.get()); }
  std::byte& last() { return memory_[bytes_ - 1]; }

 private:
  std::unique_ptr<std::byte[]> memory_;
  std::size_t bytes_;
};

class CApiErrors : public ::testing::Test {
 protected:
  /// The message that a changed description gets.
  void expect_desc(const std::function<void(cleave_experts_desc&)>& change,
                   const std::string& message) {
    cleave_experts_desc desc = layer.desc();
    change(desc);
    auto* handle = reinterpret_cast<cleave_experts*>(&desc);
    expect_refusal(cleave_experts_create(&desc, &handle), message);
    EXPECT_EQ(handle, nullptr);
  }
  /// The message that a changed call of 5 tokens with 2 experts each gets; y stays as it is.
  void expect_call(const std::function<void(CCall&)>& change, const std::string& message) {
    CCall c(experts.get(), 5, 2, 1, 1);
    const OwnedMatrix before = c.y;
    change(c);
    expect_refusal(cleave_experts_run(c.experts, &c.call), message);
    EXPECT_EQ(c.y.values, before.values);
  }
  void expect_threads(const std::function<void(cleave_threads&)>& change,
                      const std::string& message) {
    cleave_threads threads = callback_threads(2);
    change(threads);
    expect_call([&](CCall& c) { c.call.threads = &threads; }, message);
  }
  void expect_dense(const std::function<void(CCall&)>& change, const std::string& message) {
    const CLayer one({.E = 1});
    const ExpertsHandle dense = create(one.desc());
    CCall c(dense.get(), 5, 0, 1, 1);
    change(c);
    expect_refusal(cleave_dense_run(c.experts, &c.call), message);
  }

  CLayer layer{{}};  // 4 experts, D = 40, I = 24
  ExpertsHandle experts = create(layer.desc());
};

TEST_F(CApiErrors, Descriptions) {
  using D = cleave_experts_desc;
  expect_desc([](D& d) { d.num_experts = 0; }, "num_experts is 0, d_model 40, width 24");
  expect_desc([](D& d) { d.d_model = -1; }, "d_model -1");
  expect_desc([](D& d) { d.width = std::int64_t{1} << 40; }, "expected each from 1 to 2^31");
  expect_desc([](D& d) { d.num_experts = d.d_model = d.width = std::int64_t{1} << 30; },
              "do not fit any memory");
  expect_desc([](D& d) { d.gated = 2; }, "gated is 2; expected 0 or 1");
  expect_desc([](D& d) { d.activation = 6; }, "activation is 6; expected 0 to 5");
  expect_desc([](D& d) { d.weight_dtype = CLEAVE_INT8; }, "weight_dtype is 3; expected 0 to 2");
  expect_desc([](D& d) { d.packed_dtype = -1; }, "packed_dtype is -1; expected 0 to 4");
  expect_desc([](D& d) { d.w13 = nullptr; }, "w13 is NULL");
  expect_desc([](D& d) { d.w2 = nullptr; }, "w2 is NULL");
  expect_desc([](D& d) { d.w2 = static_cast<const char*>(d.w2) + 1; }, "a multiple of 4 bytes");
  Spmd spmd(2);
  const cleave_threads threads = spmd.threads(0);
  expect_desc([&](D& d) { d.threads = &threads; }, "the threads are SPMD");
  expect_refusal(cleave_experts_create(nullptr, nullptr), "experts is NULL");
  cleave_experts* handle = nullptr;
  expect_refusal(cleave_experts_create(nullptr, &handle), "cleave_experts_desc is NULL");
}

TEST_F(CApiErrors, Weights) {
  reinterpret_cast<float*>(layer.stored_w13.data())[2 * 48 * 40 + 7 * 40 + 3] = std::nanf("");
  expect_desc([](cleave_experts_desc&) {}, "w13 of expert 2[7, 3] is nan");
  layer = CLayer({.seed = 2});
  reinterpret_cast<float*>(layer.stored_w2.data())[5] = 1e6f;
  expect_desc([](cleave_experts_desc& d) { d.packed_dtype = CLEAVE_F16; }, "beyond the range");
}

TEST_F(CApiErrors, Calls) {
  expect_call([](CCall& c) { c.experts = nullptr; }, "experts is NULL");
  expect_call([](CCall& c) { c.call.num_tokens = -1; }, "num_tokens is -1");
  expect_call([](CCall& c) { c.call.experts_per_token = 0; }, "experts_per_token is 0 of 4");
  expect_call([](CCall& c) { c.call.experts_per_token = 5; }, "experts_per_token is 5 of 4");
  expect_call([](CCall& c) { c.call.num_tokens = std::int64_t{1} << 31; }, "expected below 2^31");
  expect_call([](CCall& c) { c.call.x = nullptr; }, "x is NULL");
  expect_call([](CCall& c) { c.call.y = nullptr; }, "y is NULL");
  expect_call([](CCall& c) { c.call.topk_ids = nullptr; }, "topk_ids is NULL");
  expect_call([](CCall& c) { c.call.topk_weights = nullptr; }, "topk_weights is NULL");
  expect_call([](CCall& c) { c.call.x_stride = 39; }, "x_stride is 39; expected at least 40");
  expect_call([](CCall& c) { c.call.y_stride = -40; }, "y_stride is -40");
  expect_call([](CCall& c) { c.call.y_stride = std::numeric_limits<std::int64_t>::max(); },
              "y_stride is 9223372036854775807");
  expect_call(
      [](CCall& c) {
        c.call.x = reinterpret_cast<const float*>(reinterpret_cast<const char*>(c.call.x) + 2);
      },
      "expected a multiple of 4 bytes");
  expect_call([](CCall& c) { c.routing.ids[5] = 4; },
              "topk_ids[2, 1] is 4, but there are 4 experts (0 to 3)");
  expect_call([](CCall& c) { c.routing.ids[0] = -2; }, "topk_ids[0, 0] is -2");
  expect_call([](CCall& c) { c.routing.ids[8] = c.routing.ids[9]; }, "twice for token 4");
  expect_call([](CCall& c) { c.call.reserved = 1; }, "reserved is not 0");
  expect_refusal(cleave_experts_run(experts.get(), nullptr), "cleave_ffn_call is NULL");
}

TEST_F(CApiErrors, Workspaces) {
  expect_call([](CCall& c) { c.call.workspace = nullptr; }, "workspace is NULL");
  expect_call([](CCall& c) { c.call.workspace_size -= 1; }, "this call needs");
  expect_call([](CCall& c) { c.call.workspace = static_cast<char*>(c.call.workspace) + 32; },
              "expected a multiple of 64 bytes");
  // Enough for one thread is not for two.
  const cleave_threads two = callback_threads(2);
  expect_call([&](CCall& c) { c.call.threads = &two; }, "workspace_size is");
  std::size_t bytes = 0;
  const cleave_experts* e = experts.get();
  expect_refusal(cleave_experts_workspace_size(nullptr, 1, 1, 1, &bytes), "experts is NULL");
  expect_refusal(cleave_experts_workspace_size(e, 1, 1, 1, nullptr), "bytes is NULL");
  expect_refusal(cleave_experts_workspace_size(e, -1, 1, 1, &bytes), "num_tokens is -1");
  expect_refusal(cleave_experts_workspace_size(e, 1, 9, 1, &bytes), "experts_per_token is 9");
  expect_refusal(cleave_experts_workspace_size(e, 1, 1, 0, &bytes), "num_threads is 0");
  expect_refusal(cleave_dense_workspace_size(e, 1, -1, &bytes), "num_threads is -1");
}

TEST_F(CApiErrors, DenseCalls) {
  expect_dense([&](CCall& c) { c.experts = experts.get(); }, "holds 4 experts");
  expect_dense([](CCall& c) { c.experts = nullptr; }, "experts is NULL");
  expect_dense([](CCall& c) { c.call.experts_per_token = 1; }, "a dense FFN has no routing");
  expect_dense([](CCall& c) { c.call.topk_weights = c.x.values.data(); }, "has no routing");
  expect_dense([](CCall& c) { c.call.scale = 2.0f; }, "scale is 2");
  expect_dense([](CCall& c) { c.call.workspace_size = 0; }, "workspace_size is 0 bytes");
  expect_dense([](CCall& c) { c.call.x = nullptr; }, "x is NULL");
}

TEST_F(CApiErrors, Threads) {
  expect_threads([](cleave_threads& t) { t.kind = 4; }, "kind is 4");
  expect_threads([](cleave_threads& t) { t.num_threads = 0; }, "num_threads is 0");
  expect_threads([](cleave_threads& t) { t.parallel_for = nullptr; }, "parallel_for is NULL");
  expect_threads([](cleave_threads& t) { t.reserved = 1; }, "reserved is not 0");
  expect_threads([](cleave_threads& t) { t.kind = CLEAVE_THREADS_POOL; }, "pool is NULL");
  const auto spmd = [](cleave_threads& t) {
    t.kind = CLEAVE_THREADS_SPMD;
    t.barrier = [](void*) {};
  };
  expect_threads([&](cleave_threads& t) { spmd(t), t.thread_index = 2; }, "thread_index is 2 of 2");
  expect_threads([&](cleave_threads& t) { spmd(t), t.thread_index = -1; }, "thread_index is -1");
  expect_threads([&](cleave_threads& t) { spmd(t), t.num_threads = 0; }, "num_threads is 0");
  expect_threads([&](cleave_threads& t) { spmd(t), t.barrier = nullptr; }, "barrier is NULL");
  cleave_pool* pool = nullptr;
  expect_refusal(cleave_pool_create(-1, &pool), "-1 is not a number of threads");
  expect_refusal(cleave_pool_create(2, nullptr), "pool is NULL");
}

TEST_F(CApiErrors, Routes) {
  std::vector<float> logits(3 * 4, 0.5f), weights(6);
  std::vector<std::int32_t> ids(6);
  const auto expect_route = [&](const std::function<void(cleave_route_call&)>& change,
                                const std::string& message) {
    cleave_route_call call = cleave_route_call_init();
    call.num_tokens = 3;
    call.num_experts = 4;
    call.experts_per_token = 2;
    call.logits = logits.data();
    call.topk_ids = ids.data();
    call.topk_weights = weights.data();
    change(call);
    expect_refusal(cleave_route(&call), message);
  };
  using R = cleave_route_call;
  expect_route([](R& r) { r.num_tokens = -5; }, "num_tokens is -5");
  expect_route([](R& r) { r.num_experts = 1; }, "experts_per_token is 2 of 1");
  expect_route([](R& r) { r.experts_per_token = 0; }, "experts_per_token is 0");
  expect_route([](R& r) { r.gate = 2; }, "gate is 2");
  expect_route([](R& r) { r.reserved = 2; }, "reserved is not 0");
  expect_route([](R& r) { r.threshold = -0.1f; }, "threshold is -0.1");
  expect_route([](R& r) { r.threshold = 1.1f; }, "threshold is 1.1");
  expect_route([](R& r) { r.threshold = std::nanf(""); }, "threshold is nan");
  expect_route([](R& r) { r.keep_probabilities = 2; }, "keep_probabilities is 2; expected 0 or 1");
  expect_route([](R& r) { r.gate = CLEAVE_GATE_HARD, r.keep_probabilities = 1; },
               "keep_probabilities is 1 with CLEAVE_GATE_HARD");
  expect_route([](R& r) { r.logits = nullptr; }, "logits is NULL");
  expect_route([](R& r) { r.logits_stride = 3; }, "logits_stride is 3");
  expect_route([](R& r) { r.topk_ids = nullptr; }, "topk_ids is NULL");
  expect_route([](R& r) { r.topk_weights = nullptr; }, "topk_weights is NULL");
  logits[6] = std::nanf("");
  expect_route([](R&) {}, "the logit of expert 2 for token 1 is nan");
  logits[6] = std::numeric_limits<float>::infinity();
  expect_route([](R&) {}, "is inf");
  expect_refusal(cleave_route(nullptr), "cleave_route_call is NULL");
}

TEST_F(CApiErrors, NoTokensNeedNoOperands) {
  cleave_ffn_call call = cleave_ffn_call_init();
  call.experts_per_token = 2;
  EXPECT_EQ(cleave_experts_run(experts.get(), &call), CLEAVE_OK) << cleave_last_error();
  cleave_route_call route = cleave_route_call_init();
  route.num_experts = 4;
  route.experts_per_token = 2;
  EXPECT_EQ(cleave_route(&route), CLEAVE_OK) << cleave_last_error();
  std::size_t bytes = 1;
  EXPECT_EQ(cleave_experts_workspace_size(experts.get(), 0, 2, 4, &bytes), CLEAVE_OK);
  EXPECT_EQ(bytes, 0u);
  cleave_pool_destroy(nullptr);
  cleave_experts_destroy(nullptr);
}

TEST_F(CApiErrors, AnOlderStructIsShorter) {
  CCall c(experts.get(), 5, 2, 1, 1), whole(experts.get(), 5, 2, 1, 1);
  const SizedStruct<cleave_ffn_call> older(c.call, offsetof(cleave_ffn_call, scale));
  ASSERT_EQ(cleave_experts_run(experts.get(), older.get()), CLEAVE_OK) << cleave_last_error();
  ASSERT_EQ(whole.run(), CLEAVE_OK);
  EXPECT_EQ(c.y.values, whole.y.values);
  const CLayer biased({.biases = true});
  const SizedStruct<cleave_experts_desc> desc(biased.desc(),
                                              offsetof(cleave_experts_desc, w13_bias));
  const ExpertsHandle unbiased = create(*desc.get());
  EXPECT_TRUE(unbiased->packed.lane_bias().empty());
  const SizedStruct<cleave_ffn_call> short_one(c.call, offsetof(cleave_ffn_call, scale) - 1);
  expect_refusal(cleave_experts_run(experts.get(), short_one.get()), "expected at least");
  const SizedStruct<cleave_ffn_call> empty(c.call, 8);
  expect_refusal(cleave_experts_run(experts.get(), empty.get()), "struct_size is 8");
}

// What a header without the threshold had.
TEST(CApi, AnOlderRouteCallHasNoThreshold) {
  const float logits[] = {1.0f, 2.0f, 0.5f, -1.0f};
  std::int32_t ids[3];
  float weights[3];
  cleave_route_call call = cleave_route_call_init();
  call.num_tokens = 1;
  call.num_experts = 4;
  call.experts_per_token = 3;
  call.logits = logits;
  call.topk_ids = ids;
  call.topk_weights = weights;
  call.threshold = 0.9f;  // beyond the end of the older struct
  const SizedStruct<cleave_route_call> older(call, offsetof(cleave_route_call, threshold));
  ASSERT_EQ(cleave_route(older.get()), CLEAVE_OK) << cleave_last_error();
  EXPECT_EQ(std::vector(ids, ids + 3), (std::vector<std::int32_t>{1, 0, 2}));
  ASSERT_EQ(cleave_route(&call), CLEAVE_OK) << cleave_last_error();
  EXPECT_EQ(std::vector(ids, ids + 3), (std::vector<std::int32_t>{1, -1, -1}));
}

TEST_F(CApiErrors, ANewerStructIsLongerAndItsNewFieldsAreZero) {
  CCall c(experts.get(), 5, 2, 1, 1), whole(experts.get(), 5, 2, 1, 1);
  SizedStruct<cleave_ffn_call> newer(c.call, sizeof(cleave_ffn_call) + 24);
  ASSERT_EQ(cleave_experts_run(experts.get(), newer.get()), CLEAVE_OK) << cleave_last_error();
  ASSERT_EQ(whole.run(), CLEAVE_OK);
  EXPECT_EQ(c.y.values, whole.y.values);
  newer.last() = std::byte{1};
  expect_refusal(cleave_experts_run(experts.get(), newer.get()), "leave the newer fields zero");
  c.call.abi_version = CLEAVE_ABI_VERSION + 1;
  expect_refusal(c.run(), fmt::format("abi_version is {}", CLEAVE_ABI_VERSION + 1));
}

TEST(CApi, ErrorsAreTheThreadsOwnAndFitTheirBuffer) {
  expect_refusal(cleave_route(nullptr), "cleave_route: cleave_route_call is NULL");
  std::thread([] { EXPECT_STREQ(cleave_last_error(), ""); }).join();
  EXPECT_EQ(std::string(cleave_last_error()).find('\n'), std::string::npos);
  // The handle that was never there is not touched by a success either.
  EXPECT_NE(cleave_isa(), nullptr);
  expect_refusal(CLEAVE_INVALID_ARGUMENT, "cleave_route_call is NULL");
}

}  // namespace
}  // namespace cleave
