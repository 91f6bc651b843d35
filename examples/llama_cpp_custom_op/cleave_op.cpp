#include "cleave_op.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <exception>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

/// One thread's place among those that run an op.
struct Member {
  Barrier& barrier;
  int ith, nth;
};

// A ParallelFor for threads that are all there already: every one calls it, runs its own range, and
// waits for the others. The ranges are those of cleave's own pool. What an op does outside of such
// calls it does once per thread; cleave's kernels only look at their operands there.
void run_own_range(void* member, std::int64_t n, std::int64_t grain, void* context,
                   void (*body)(void*, std::int64_t, std::int64_t)) {
  const auto& self = *static_cast<const Member*>(member);
  const std::int64_t most = n / std::max<std::int64_t>(1, grain);
  const std::int64_t ranges = std::clamp<std::int64_t>(most, 1, self.nth);
  if (self.ith < ranges) {
    const std::int64_t share = n / ranges, rest = n % ranges;
    const std::int64_t begin = self.ith * share + std::min<std::int64_t>(self.ith, rest);
    body(context, begin, begin + share + (self.ith < rest ? 1 : 0));
  }
  self.barrier.wait(self.nth);
}

cleave::MatrixView<float> view(const ggml_tensor* t) {
  GGML_ASSERT(t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && ggml_is_matrix(t));
  return {static_cast<float*>(t->data), t->ne[1], t->ne[0]};
}

}  // namespace

void Barrier::wait(int nth) {
  const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == nth) {
    arrived_.store(0, std::memory_order_relaxed);
    phase_.fetch_add(1, std::memory_order_release);
    return;
  }
  while (phase_.load(std::memory_order_acquire) == phase) {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
}

FfnOp::FfnOp(const cleave::ExpertBank& bank, std::int64_t experts_per_token,
             cleave::WeightType type, Shared& shared)
    : experts_(bank, type), experts_per_token_(experts_per_token), shared_(shared) {}

ggml_tensor* FfnOp::add(ggml_context* context, ggml_tensor* x, ggml_tensor* logits) {
  // The threads share the workspace, so it must not grow while they run.
  shared_.workspace.get(
      cleave::moe_ffn_workspace_size(experts_, x->ne[1], experts_per_token_, shared_.threads));
  ggml_tensor* operands[] = {x, logits};
  return ggml_custom_4d(context, GGML_TYPE_F32, x->ne[0], x->ne[1], 1, 1, operands,
                        logits != nullptr ? 2 : 1, &FfnOp::compute, GGML_N_TASKS_MAX, this);
}

void FfnOp::route(const ggml_tensor* logits, std::int64_t tokens, cleave::Routing& routing) const {
  if (logits != nullptr)
    return cleave::route(view(logits), experts_per_token_, cleave::GateMode::kSoftmax, routing);
  routing.num_tokens = tokens;
  routing.experts_per_token = 1;
  routing.ids.assign(tokens, 0);
  routing.weights.assign(tokens, 1.0f);
}

// All threads are in here at once, each with its own `ith`.
void FfnOp::compute(ggml_tensor* y, int ith, int nth, void* op) try {
  const auto& self = *static_cast<const FfnOp*>(op);
  Member member{self.shared_.barrier, ith, nth};
  const cleave::ParallelFor parallel{&run_own_range, &member, nth};
  // Each thread routes for itself: K comparisons per token cost less than another meeting.
  thread_local cleave::Routing routing;
  self.route(y->src[1], y->ne[1], routing);
  const cleave::MatrixView<float> out = view(y);
  parallel(out.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    std::fill(out.row(begin), out.row(end), 0.0f);  // the kernel adds
  });
  cleave::moe_ffn(self.experts_, routing, 1.0f, view(y->src[0]), out, self.shared_.workspace,
                  parallel);
} catch (const std::exception& error) {
  // ggml is C: no exception may pass, and the other threads would wait for ever.
  std::fprintf(stderr, "FfnOp: %s\n", error.what());
  std::abort();
}
