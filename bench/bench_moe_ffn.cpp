// What does running K of E experts cost, next to the dense FFN they were cut from?
//
// Both run in this process on the same weights and threads, in turn (dense, sparse, dense, ...), so
// that a machine whose speed drifts hurts both alike; the table gives medians and their ratio. The
// ideal is E / K. Routings are uniform and independent: at small T they touch most experts, which
// no kernel can avoid (at T = 8 and K / E = 1/4, 90 % of the weights are read).
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "cleave/cleave.h"
#include "support/thread_pool.h"

namespace {

struct Options {
  std::int64_t d_model = 576;  // SmolLM2-135M
  std::int64_t hidden = 1536;
  std::int32_t experts = 8;
  std::int64_t active = 4;
  std::vector<std::int64_t> tokens = {1, 8, 64, 512, 1024};
  int threads = 2;
  int repeats = 15;
  bool json = false;
};

std::vector<float> random_values(std::size_t n, std::mt19937& rng) {
  std::normal_distribution<float> normal(0.0f, 0.05f);
  std::vector<float> values(n);
  for (float& value : values) value = normal(rng);
  return values;
}

double seconds(const auto& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

struct Row {
  std::int64_t tokens;
  double dense_s, sparse_s;
};

Row measure(const Options& o, const cleave::DenseFfn& ffn, const cleave::ExpertBank& bank,
            std::int64_t T, const cleave::ParallelFor& parallel, std::mt19937& rng) {
  const std::vector<float> x = random_values(T * o.d_model, rng);
  const std::vector<float> logits = random_values(T * o.experts, rng);
  std::vector<float> y(T * o.d_model);
  cleave::Routing routing;
  cleave::route({logits.data(), T, o.experts}, o.active, cleave::GateMode::kSoftmax, routing);
  const cleave::MatrixView<const float> in(x.data(), T, o.d_model);
  const cleave::MatrixView<float> out(y.data(), T, o.d_model);
  const auto dense = [&] { cleave::dense_ffn(ffn.view(), in, out, parallel); };
  const auto sparse = [&] { cleave::moe_ffn(bank, routing, 1.0f, in, out, parallel); };
  dense();  // warm caches and threads
  sparse();
  std::vector<double> dense_s, sparse_s;
  for (int r = 0; r < o.repeats; ++r) {
    dense_s.push_back(seconds(dense));
    sparse_s.push_back(seconds(sparse));
  }
  return {T, median(dense_s), median(sparse_s)};
}

void print(const Options& o, const std::vector<Row>& rows) {
  const double ideal = static_cast<double>(o.experts) / static_cast<double>(o.active);
  nlohmann::ordered_json json{
      {"d_model", o.d_model}, {"hidden", o.hidden},   {"experts", o.experts},
      {"active", o.active},   {"threads", o.threads}, {"instruction_set", cleave::isa_name()},
      {"repeats", o.repeats}, {"ideal", ideal},       {"rows", nlohmann::ordered_json::array()}};
  std::string text = fmt::format(
      "D {} H {}, {} of {} experts, float32, {} threads, {}, median of {}\n"
      "tokens   dense ms  sparse ms  speed-up  of ideal\n",
      o.d_model, o.hidden, o.active, o.experts, o.threads, cleave::isa_name(), o.repeats);
  for (const Row& row : rows) {
    const double ratio = row.dense_s / row.sparse_s;
    json["rows"].push_back({{"tokens", row.tokens},
                            {"dense_s", row.dense_s},
                            {"sparse_s", row.sparse_s},
                            {"speedup", ratio}});
    text += fmt::format("{:6}  {:9.3f}  {:9.3f}  {:7.2f}x  {:7.2f}\n", row.tokens,
                        1e3 * row.dense_s, 1e3 * row.sparse_s, ratio, ratio / ideal);
  }
  fmt::print("{}\n", o.json ? json.dump(2) : text);
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app{"MoE FFN against the dense FFN it was cut from"};
  app.add_option("--d-model", o.d_model, "D")->capture_default_str();
  app.add_option("--hidden", o.hidden, "H")->capture_default_str();
  app.add_option("--experts", o.experts, "E")->capture_default_str();
  app.add_option("--active", o.active, "K")->capture_default_str();
  app.add_option("--tokens", o.tokens, "Token counts, T")->delimiter(',')->capture_default_str();
  app.add_option("--threads", o.threads, "Threads")->capture_default_str();
  app.add_option("--repeats", o.repeats, "Runs per row")->capture_default_str();
  app.add_flag("--json", o.json, "One JSON object instead of the table");
  CLI11_PARSE(app, argc, argv);

  try {
    std::mt19937 rng(0);
    cleave::DenseFfn ffn;
    ffn.hidden = o.hidden;
    ffn.d_model = o.d_model;
    for (auto* matrix : {&ffn.gate, &ffn.up, &ffn.down})
      *matrix = random_values(o.hidden * o.d_model, rng);
    const cleave::ExpertBank bank = cleave::factorize(
        ffn.view(),
        cleave::partition_neurons(ffn.view(), {.method = cleave::PartitionMethod::kContiguous,
                                               .num_experts = o.experts}));
    cleave::ThreadPool pool(o.threads);
    std::vector<Row> rows;
    for (std::int64_t T : o.tokens)
      rows.push_back(measure(o, ffn, bank, T, pool.parallel_for(), rng));
    print(o, rows);
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_moe_ffn: {}\n", error.what());
    return 1;
  }
  return 0;
}
