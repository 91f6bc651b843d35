/* A layer of eight experts, called from C: packed once, then run in the two ways in which an engine
 * has threads. Checked against plain loops.
 *
 *   cc -std=c99 main.c $(pkg-config --cflags --libs cleave) -pthread -lm
 */
#define _POSIX_C_SOURCE 200112L /* pthread barriers and posix_memalign */
#include <cleave/c_api.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

/* T tokens, D wide; E experts of I neurons, K of them per token. */
enum { T = 5, D = 96, E = 8, I = 48, K = 2, THREADS = 3 };

/* The weights as engines keep them; float32 here, bf16 and f16 are taken as well. */
static float w13[E][2 * I][D]; /* gate rows, then up rows */
static float w2[E][D][I];
static float logits[T][E], x[T][D], y[T][D], expected[T][D];
static int32_t ids[T][K];
static float weights[T][K];

static void fill(float* values, size_t count, float size) {
  static uint32_t state = 1;
  size_t i;
  for (i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    values[i] = size * ((float)(state >> 8) / 8388608.0f - 1.0f);
  }
}

/* Every call returns a status; the message is the thread's. */
static void check(cleave_status status) {
  if (status == CLEAVE_OK) return;
  fprintf(stderr, "%s\n", cleave_last_error());
  exit(1);
}

static double dot(const float* a, const float* b, int n) {
  double sum = 0.0;
  int i;
  for (i = 0; i < n; ++i) sum += (double)a[i] * b[i];
  return sum;
}

/* What cleave_experts_run() computes, from y = 0. */
static void compute_expected(void) {
  int t, k, i, d;
  for (t = 0; t < T; ++t)
    for (k = 0; k < K; ++k) {
      const int e = ids[t][k];
      for (i = 0; i < I; ++i) {
        const double gate = dot(w13[e][i], x[t], D), up = dot(w13[e][I + i], x[t], D);
        const double hidden = gate / (1.0 + exp(-gate)) * up;
        for (d = 0; d < D; ++d) expected[t][d] += (float)(weights[t][k] * hidden * w2[e][d][i]);
      }
    }
}

static int report(const char* what) {
  double largest = 0.0, difference = 0.0;
  int t, d;
  for (t = 0; t < T; ++t)
    for (d = 0; d < D; ++d) {
      largest = fmax(largest, fabs(expected[t][d]));
      difference = fmax(difference, fabs(expected[t][d] - y[t][d]));
    }
  printf("%-22s largest value %.4f, largest difference %.1e\n", what, largest, difference);
  return difference < 1e-5 * largest;
}

/* An engine whose threads all enter an operation together (ith of nth, as in ggml). */
typedef struct {
  const cleave_experts* experts;
  cleave_ffn_call call;
  cleave_threads threads;
  cleave_status status;
} worker;

static void wait_for_all(void* barrier) { pthread_barrier_wait((pthread_barrier_t*)barrier); }

static void* work(void* argument) {
  worker* w = (worker*)argument;
  w->call.threads = &w->threads;
  w->status = cleave_experts_run(w->experts, &w->call);
  return NULL;
}

static int run_together(const cleave_experts* experts, const cleave_ffn_call* call) {
  pthread_barrier_t barrier;
  pthread_t thread[THREADS];
  worker workers[THREADS];
  int i, ok = 1;
  pthread_barrier_init(&barrier, NULL, THREADS);
  for (i = 0; i < THREADS; ++i) {
    workers[i].experts = experts;
    workers[i].call = *call;
    workers[i].threads = cleave_threads_init();
    workers[i].threads.kind = CLEAVE_THREADS_SPMD;
    workers[i].threads.num_threads = THREADS;
    workers[i].threads.thread_index = i;
    workers[i].threads.barrier = wait_for_all;
    workers[i].threads.context = &barrier;
    if (pthread_create(&thread[i], NULL, work, &workers[i]) != 0) exit(1);
  }
  for (i = 0; i < THREADS; ++i) {
    pthread_join(thread[i], NULL);
    ok = ok && workers[i].status == CLEAVE_OK;
  }
  pthread_barrier_destroy(&barrier);
  return ok;
}

int main(void) {
  cleave_experts_desc desc = cleave_experts_desc_init();
  cleave_route_call route = cleave_route_call_init();
  cleave_ffn_call call = cleave_ffn_call_init();
  cleave_experts* experts = NULL;
  int ok;

  fill(&w13[0][0][0], sizeof w13 / sizeof(float), 0.1f);
  fill(&w2[0][0][0], sizeof w2 / sizeof(float), 0.1f);
  fill(&x[0][0], sizeof x / sizeof(float), 1.0f);
  fill(&logits[0][0], sizeof logits / sizeof(float), 2.0f);

  /* Once per layer: pack. w13 and w2 may be freed afterwards. */
  desc.num_experts = E;
  desc.d_model = D;
  desc.width = I;
  desc.gated = 1;
  desc.activation = CLEAVE_SILU;
  desc.weight_dtype = CLEAVE_F32;
  desc.packed_dtype = CLEAVE_F32; /* CLEAVE_BF16, CLEAVE_INT8 and CLEAVE_INT4 are smaller */
  desc.w13 = w13;
  desc.w2 = w2;
  check(cleave_experts_create(&desc, &experts));
  printf("cleave %s on %s: %d experts, %zu kB packed\n", cleave_version(), cleave_isa(), E,
         cleave_experts_bytes(experts) / 1024);

  /* Once per engine: the memory that a call needs beside its operands, for the largest T. */
  check(cleave_experts_workspace_size(experts, T, K, THREADS, &call.workspace_size));
  if (posix_memalign(&call.workspace, CLEAVE_WORKSPACE_ALIGNMENT, call.workspace_size) != 0)
    return 1;

  /* Per layer and step: route, then add the experts' output to y. */
  route.num_tokens = T;
  route.num_experts = E;
  route.experts_per_token = K;
  route.logits = &logits[0][0];
  route.topk_ids = &ids[0][0];
  route.topk_weights = &weights[0][0];
  check(cleave_route(&route));
  compute_expected();

  call.num_tokens = T;
  call.experts_per_token = K;
  call.x = &x[0][0];
  call.y = &y[0][0];
  call.topk_ids = &ids[0][0];
  call.topk_weights = &weights[0][0];
  check(cleave_experts_run(experts, &call)); /* no threads given: this one */
  ok = report("this thread alone:");

  memset(y, 0, sizeof y);
  ok = run_together(experts, &call) && ok;
  ok = report("three of our threads:") && ok;

  /* A mistake is a status and a line of text. */
  ids[3][1] = E;
  if (cleave_experts_run(experts, &call) == CLEAVE_INVALID_ARGUMENT)
    printf("as it should be:       %s\n", cleave_last_error());
  else
    ok = 0;

  free(call.workspace);
  cleave_experts_destroy(experts);
  return ok ? 0 : 1;
}
