// What does running K of E experts cost, next to the dense FFN they were cut from?
//
// All ways run in this process on the same shape and threads, in turn, so that a machine whose
// speed drifts hurts all alike; the table gives medians and their ratio. The ideal is E / K.
// Routings are uniform and independent: at small T they touch most experts, which no kernel can
// avoid (at T = 8 and K / E = 1/4, 90 % of the weights are read).
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <map>
#include <nlohmann/json.hpp>

#include "ffn_setup.h"
#include "suite.h"
#include "support/thread_pool.h"

namespace {

using namespace cleave;
using namespace cleave::bench;

struct Options {
  std::string shape = "smollm2";
  std::int64_t d_model = 0, hidden = 0;
  FfnShape ffn;
  std::string dtype = "bf16";
  std::vector<std::int64_t> tokens = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024};
  int threads = 2;
  int repeats = 15;
  bool json = false, suite = false;
  std::string only;
};

const std::map<std::string, std::pair<std::int64_t, std::int64_t>> kShapes = {
    {"smollm2", {576, 1536}},
    {"tinyllama", {2048, 5632}},
    {"llama2-7b", {4096, 11008}},
    {"llama3-8b", {4096, 14336}}};

void compare(const Options& o) {
  ThreadPool pool(o.threads);
  FfnShape shape = o.ffn;
  std::tie(shape.d_model, shape.hidden) = kShapes.at(o.shape);
  if (o.d_model > 0) shape.d_model = o.d_model;
  if (o.hidden > 0) shape.hidden = o.hidden;
  shape.type = *parse_weight_type(o.dtype);
  FfnShape dense_shape = shape;
  dense_shape.experts = dense_shape.active = 1;
  dense_shape.shared = 0;
  // Eight times a large cache in all, so that the weights of every call come from memory.
  constexpr std::int64_t kBytes = 320 << 20;
  const std::int64_t layer_bytes = 3 * shape.d_model * shape.hidden;
  shape.layers = dense_shape.layers = std::clamp<std::int64_t>(kBytes / layer_bytes, 1, 64);
  const FfnSetup sparse(shape, pool.parallel_for()), dense(dense_shape, pool.parallel_for());

  const double ideal = static_cast<double>(shape.experts) / static_cast<double>(shape.active);
  nlohmann::ordered_json json{{"d_model", shape.d_model},
                              {"hidden", shape.hidden},
                              {"experts", shape.experts},
                              {"active", shape.active},
                              {"dtype", o.dtype},
                              {"threads", o.threads},
                              {"instruction_set", isa_name()},
                              {"repeats", o.repeats},
                              {"ideal", ideal},
                              {"rows", nlohmann::ordered_json::array()}};
  if (!o.json)
    fmt::print(
        "D {} H {}, {} of {} experts, {}, {} threads, {}, median of {}\n"
        "tokens   dense ms  sparse ms  speed-up  of ideal\n",
        shape.d_model, shape.hidden, shape.active, shape.experts, o.dtype, o.threads, isa_name(),
        o.repeats);
  for (const std::int64_t T : o.tokens) {
    const auto x = random_values(T * shape.d_model, 4);
    std::vector<float> y(x.size());
    Workspace workspace;
    const auto task = [&](const FfnSetup& setup) {
      return [&, routing = random_routing(setup.shape(), T, 5)](std::int64_t round) {
        moe_ffn(setup.layer(round), routing, 1.0f, {x.data(), T, shape.d_model},
                {y.data(), T, shape.d_model}, workspace, pool.parallel_for());
      };
    };
    const auto times = time_in_turn({task(dense), task(sparse)}, o.repeats);
    const double ratio = paired_ratio(times[0], times[1]);
    json["rows"].push_back({{"tokens", T},
                            {"dense_s", times[0].median_s},
                            {"sparse_s", times[1].median_s},
                            {"sparse_quartiles_s", {times[1].low_s, times[1].high_s}},
                            {"speedup", ratio}});
    if (!o.json)
      fmt::print("{:6}  {:9.3f}  {:9.3f}  {:7.2f}x  {:7.2f}\n", T, 1e3 * times[0].median_s,
                 1e3 * times[1].median_s, ratio, ratio / ideal);
    std::fflush(stdout);
  }
  if (o.json) fmt::print("{}\n", json.dump(2));
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app{"MoE FFN against the dense FFN it was cut from"};
  app.add_option("--shape", o.shape, "Shape of a real model")
      ->capture_default_str()
      ->check(CLI::IsMember(
          std::vector<std::string>{"smollm2", "tinyllama", "llama2-7b", "llama3-8b"}));
  app.add_option("--d-model", o.d_model, "D, instead of the shape's");
  app.add_option("--hidden", o.hidden, "H, instead of the shape's");
  app.add_option("--experts", o.ffn.experts, "E")->capture_default_str();
  app.add_option("--active", o.ffn.active, "K")->capture_default_str();
  app.add_option("--shared", o.ffn.shared, "Of the active ones, always on")->capture_default_str();
  app.add_option("--dtype", o.dtype, "Weights")
      ->capture_default_str()
      ->check(CLI::IsMember(std::vector<std::string>{"f32", "bf16", "f16", "int8", "int4"}));
  app.add_option("--tokens", o.tokens, "Token counts, T")->delimiter(',')->capture_default_str();
  app.add_option("--threads", o.threads, "Threads")->capture_default_str();
  app.add_option("--repeats", o.repeats, "Runs per row")->capture_default_str();
  app.add_flag("--suite", o.suite, "The table of goals instead (docs/benchmarks.md)");
  app.add_option("--only", o.only, "With --suite: rows whose name begins so, such as C1");
  app.add_flag("--json", o.json, "One JSON object instead of the table");
  CLI11_PARSE(app, argc, argv);
  try {
    if (o.suite)
      run_suite(o.threads, o.only.c_str(), o.json);
    else
      compare(o);
  } catch (const std::exception& error) {
    fmt::print(stderr, "bench_moe_ffn: {}\n", error.what());
    return 1;
  }
  return 0;
}
