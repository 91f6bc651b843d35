// One dense FFN in, eight experts out; with all eight on they are the dense FFN again.
#include <cleave/cleave.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>

int main() {
  // The FFN: y = down (silu(gate x) .* (up x)), H hidden neurons, D wide. Yours comes from a file.
  const std::int64_t H = 1536, D = 576, E = 8;
  std::mt19937 rng(0);
  std::normal_distribution<float> normal(0.0f, 0.04f);
  cleave::DenseFfn ffn;
  ffn.hidden = H;
  ffn.d_model = D;
  for (auto* matrix : {&ffn.gate, &ffn.up, &ffn.down})
    for (std::int64_t i = 0; i < H * D; ++i) matrix->push_back(normal(rng));

  // Which neuron goes to which expert: balanced k-means on the rows of `gate`. Then cut.
  const auto partition = cleave::partition_neurons(ffn.view(), {.num_experts = E});
  const cleave::MoeLayer layer{.experts = cleave::factorize(ffn.view(), partition),
                               .router = cleave::zero_router(E, D),
                               .experts_per_token = E,
                               .scale = static_cast<float>(E)};

  // The same tokens through both.
  const std::int64_t T = 4;
  std::vector<float> x(T * D), dense(T * D), sparse(T * D);
  for (float& value : x) value = normal(rng) / 0.04f;
  cleave::dense_ffn(ffn.view(), {x.data(), T, D}, {dense.data(), T, D}, {});
  layer.forward({x.data(), T, D}, {sparse.data(), T, D}, {});

  float largest = 0.0f, difference = 0.0f;
  for (std::int64_t i = 0; i < T * D; ++i) {
    largest = std::max(largest, std::abs(dense[i]));
    difference = std::max(difference, std::abs(dense[i] - sparse[i]));
  }
  std::printf("%d experts of %d neurons; largest output %.3f, largest difference %.1e\n",
              static_cast<int>(E), static_cast<int>(H / E), largest, difference);
  return difference < 1e-5f * largest ? 0 : 1;
}
