/* A C project outside that uses the installed package. */
#include <cleave/c_api.h>
#include <cleave/c_dlpack.h>

int main(void) {
  /* One expert, D = 1, I = 1: y += 3 * relu(2 * x). */
  const float w1[1] = {2.0f}, w2[1] = {3.0f}, x[1] = {5.0f};
  float y[1] = {7.0f};
  cleave_experts_desc desc = cleave_experts_desc_init();
  cleave_ffn_call call = cleave_ffn_call_init();
  cleave_experts* experts = NULL;
  static unsigned char memory[1 << 20];
  if (cleave_abi_version() != CLEAVE_ABI_VERSION) return 1;
  desc.num_experts = desc.d_model = desc.width = 1;
  desc.activation = CLEAVE_RELU;
  desc.w13 = w1;
  desc.w2 = w2;
  if (cleave_experts_create(&desc, &experts) != CLEAVE_OK) return 2;
  call.num_tokens = 1;
  call.x = x;
  call.y = y;
  call.workspace = memory + (64 - (size_t)memory % 64) % 64;
  call.workspace_size = sizeof memory - 64;
  if (cleave_dense_run(experts, &call) != CLEAVE_OK) return 3;
  cleave_experts_destroy(experts);
  if (cleave_ffn_call_from_dlpack(&call, NULL, NULL, NULL, NULL, NULL) == CLEAVE_OK) return 4;
  return y[0] == 37.0f ? 0 : 5;
}
