// What the C interface allocates, and a decoder's step: nothing while they run. Replaces operator
// new for this program.
#include <atomic>
#include <cstdlib>
#include <new>

#include "c_api/c_layer.h"
#include "cleave/model.h"
#include "support/paths.h"

namespace {

std::atomic<long> allocations{0};
std::atomic<bool> out_of_memory{false};

void* allocate_counted(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  if (out_of_memory) return nullptr;
  return std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
}

// Not inline, or GCC sees a free() of what an operator new returned and warns.
[[gnu::noinline]] void release(void* memory) { std::free(memory); }

}  // namespace

void* operator new(std::size_t bytes) {
  void* memory = allocate_counted(bytes, 16);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  void* memory = allocate_counted(bytes, static_cast<std::size_t>(alignment));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new[](std::size_t bytes) { return ::operator new(bytes); }
void* operator new[](std::size_t bytes, std::align_val_t a) { return ::operator new(bytes, a); }
void operator delete(void* memory) noexcept { release(memory); }
void operator delete(void* memory, std::size_t) noexcept { release(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { release(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { release(memory); }
void operator delete[](void* memory) noexcept { release(memory); }
void operator delete[](void* memory, std::size_t) noexcept { release(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { release(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { release(memory); }

namespace cleave {
namespace {

using namespace testing;

/// Allocations, in all threads, of 3 times `run`.
template <typename Run>
long allocations_of(const Run& run) {
  const long before = allocations;
  for (int i = 0; i < 3; ++i) EXPECT_EQ(run(), CLEAVE_OK) << cleave_last_error();
  return allocations - before;
}

TEST(CApi, CountsAllocations) {
  EXPECT_EQ(allocations_of([] {
              ::operator delete(::operator new(1));  // a plain `new` might be left out
              return CLEAVE_OK + 0;
            }),
            3);
}

TEST(CApi, RunningAllocatesNothing) {
  cleave_pool* pool = nullptr;
  ASSERT_EQ(cleave_pool_create(2, &pool), CLEAVE_OK);
  cleave_threads of_pool = cleave_threads_init();
  of_pool.kind = CLEAVE_THREADS_POOL;
  of_pool.pool = pool;
  cleave_threads by_callback = callback_threads(3);
  by_callback.parallel_for = [](void*, std::int32_t tasks, cleave_task task, void* context) {
    for (std::int32_t i = 0; i < tasks; ++i) task(context, i);
  };
  cleave_threads one_of_one = cleave_threads_init();
  one_of_one.kind = CLEAVE_THREADS_SPMD;
  one_of_one.num_threads = 1;
  const cleave_threads* kinds[] = {nullptr, &of_pool, &by_callback, &one_of_one};
  for (const std::int32_t packed : {CLEAVE_F32, CLEAVE_BF16, CLEAVE_INT8, CLEAVE_INT4})
    for (const std::int64_t E : {1, 5}) {
      const CLayer layer({.E = E, .biases = true, .packed = packed});
      const ExpertsHandle experts = create(layer.desc());
      for (const std::int64_t T : {1, 6, 700}) {
        const CCall c(experts.get(), T, E == 1 ? 0 : 2, 3, 1);
        for (const cleave_threads* threads : kinds)
          EXPECT_EQ(allocations_of([&] { return c.run(threads); }), 0)
              << "E " << E << " T " << T << " packed " << packed;
      }
    }
  cleave_pool_destroy(pool);
}

TEST(CApi, RoutingAllocatesNothing) {
  std::mt19937 rng(1);
  const OwnedMatrix logits = random_matrix(rng, 50, 16);
  std::vector<std::int32_t> ids(50 * 4);
  std::vector<float> weights(50 * 4);
  cleave_route_call call = cleave_route_call_init();
  call.num_tokens = 50;
  call.num_experts = 16;
  call.experts_per_token = 4;
  call.logits = logits.values.data();
  call.topk_ids = ids.data();
  call.topk_weights = weights.data();
  EXPECT_EQ(allocations_of([&] { return cleave_route(&call); }), 0);
}

/// Allocations of a step behind a text, one that has been seen to be as long before.
void expect_steps_allocate_nothing(const std::filesystem::path& directory, WeightType type,
                                   int threads) {
  const Checkpoint checkpoint = Checkpoint::open(directory);
  Model model = Model::load(checkpoint, {.threads = threads, .weights = type});
  const std::int64_t D = model.config().hidden_size, V = model.config().vocab_size;
  KvCache cache(model.config(), 100), other(model.config(), 100);
  KvCache* const caches[] = {&cache, &other};
  std::vector<float> hidden(2 * D), logits(2 * V);
  const std::int32_t tokens[] = {1, 2};
  const auto step = [&] {
    model.forward({tokens, 1}, cache, {hidden.data(), 1, D});
    model.logits({hidden.data(), 1, D}, {logits.data(), 1, V});
    model.forward_step(tokens, caches, {hidden.data(), 2, D});
  };
  for (int i = 0; i < 45; ++i) step();
  cache.clear();
  other.clear();
  for (int i = 0; i < 30; ++i) step();
  const long before = allocations;
  for (int i = 0; i < 10; ++i) step();
  EXPECT_EQ(allocations - before, 0)
      << directory << ", " << weight_type_name(type) << ", " << threads << " threads";
}

TEST(Model, StepsAllocateNothing) {
  const auto golden = source_dir() / "tests" / "golden" / "logits";
  for (const WeightType type : {WeightType::kF32, WeightType::kBF16, WeightType::kF16,
                                WeightType::kInt8, WeightType::kInt4})
    for (const int threads : {1, 3})
      for (const char* name : {"llama", "llama_long", "mixtral", "granitemoeshared"})
        expect_steps_allocate_nothing(golden / name, type, threads);
}

TEST(CApi, MissingMemoryIsAStatus) {
  const CLayer layer({});
  const cleave_experts_desc desc = layer.desc();
  cleave_experts* experts = nullptr;
  out_of_memory = true;
  const cleave_status status = cleave_experts_create(&desc, &experts);
  out_of_memory = false;
  EXPECT_EQ(status, CLEAVE_OUT_OF_MEMORY);
  EXPECT_STREQ(cleave_last_error(), "cleave_experts_create: out of memory");
  EXPECT_EQ(experts, nullptr);
}

}  // namespace
}  // namespace cleave
