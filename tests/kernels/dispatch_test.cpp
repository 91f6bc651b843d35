#include "kernels/dispatch.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>

#include "cleave/error.h"
#include "cleave/moe_layer.h"
#include "cleave/packed.h"
#include "kernels/random_ffn.h"
#include "support/thread_pool.h"

namespace cleave {
namespace {

using namespace testing;

/// Operands for one call of each op.
struct Ops {
  explicit Ops(const ParallelFor& threads) : parallel(threads) {}

  void linear_floats() { linear(x.view(), router.view(), {}, logits.view(), parallel); }
  void linear_packed() {
    const PackedLinear packed(router.view(), WeightType::kF32);
    linear(packed, x.view(), {}, logits.view(), /*add=*/false, workspace, parallel);
  }
  void route_logits() { route(logits.view(), {.experts_per_token = 2}, routing, parallel); }
  void moe_floats() { moe_ffn(bank, routing, 1.0f, x.view(), y.view(), parallel); }
  void moe_packed() {
    const PackedExperts packed(bank, WeightType::kBF16);
    moe_ffn(packed, routing, 1.0f, x.view(), y.view(), workspace, parallel);
  }
  void dense_floats() { dense_ffn(dense.view(), x.view(), y.view(), parallel); }
  void dense_packed() {
    const PackedExperts packed(dense.view(), WeightType::kInt8);
    dense_ffn(packed, x.view(), y.view(), workspace, parallel);
  }
  void layer() {
    MoeLayer moe;
    moe.experts = bank;
    moe.router = {4, 8, router.values};
    moe.experts_per_token = 2;
    moe.forward(x.view(), y.view(), parallel);
  }

  std::mt19937 rng{1};
  ParallelFor parallel;
  OwnedMatrix x = random_matrix(rng, 64, 8), y = x, router = random_matrix(rng, 4, 8);
  OwnedMatrix logits = random_matrix(rng, 64, 4);
  ExpertBank bank = random_bank(rng, 8, 32, 4, true, false, Activation::kSilu);
  DenseFfn dense = random_dense(rng, 8, 32, true, false, Activation::kSilu);
  Routing routing{64, 1, std::vector<std::int32_t>(64, 2), std::vector<float>(64, 1.0f)};
  Workspace workspace;
};

/// Runs `op` under CLEAVE_ISA = name and ends the process: with code 0 if it threw InvalidArgument.
void run_on(const char* name, void (Ops::*op)(), int threads) {
  ::setenv("CLEAVE_ISA", name, 1);
  ThreadPool pool(threads);
  Ops ops(pool.parallel_for());
  try {
    (ops.*op)();
  } catch (const InvalidArgument& error) {
    fmt::print(stderr, "{}\n", error.what());
    std::_Exit(0);
  }
  std::_Exit(1);
}

// The set is chosen once per process, so each op gets one of its own.
TEST(DispatchDeathTest, EveryOpThrowsWhereTheSetIsUnknownOrUnsupported) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  std::vector<const char*> names = {"sse9"};
  for (const char* name : {"avx512bf16", "avx512vnni", "avx512", "avx2", "neon"})
    if (find_isa_kernels(name) == nullptr) names.push_back(name);
  const std::pair<const char*, void (Ops::*)()> ops[] = {
      {"linear of floats", &Ops::linear_floats},
      {"linear, packed", &Ops::linear_packed},
      {"route", &Ops::route_logits},
      {"moe_ffn of floats", &Ops::moe_floats},
      {"moe_ffn, packed", &Ops::moe_packed},
      {"dense_ffn of floats", &Ops::dense_floats},
      {"dense_ffn, packed", &Ops::dense_packed},
      {"MoeLayer::forward", &Ops::layer}};
  for (const char* name : names)
    for (const auto& [what, op] : ops)
      for (const int threads : {1, 2})
        EXPECT_EXIT(run_on(name, op, threads), ::testing::ExitedWithCode(0),
                    fmt::format("CLEAVE_ISA: '{}' is not an instruction set", name))
            << what << " with " << threads << " threads";
}

}  // namespace
}  // namespace cleave
