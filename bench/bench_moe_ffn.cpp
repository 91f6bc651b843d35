// What does running K of E experts cost, next to the dense FFN they were cut from?
//
// All ways run in this process on the same shape and threads, in turn, so that a machine whose
// speed drifts hurts all alike; the table gives medians and their ratio. The ideal is E / K.
// Routings are uniform and independent: at small T they touch most experts, which no kernel can
// avoid (at T = 8 and K / E = 1/4, 90 % of the weights are read).
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "atomic_file.h"
#include "baselines.h"
#include "ffn_setup.h"
#include "program.h"
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
  std::vector<std::string> baselines;
  int threads = 2;
  int repeats = 15;
  bool suite = false;
  SuiteOptions goals;
  std::string json;
};

const std::map<std::string, std::pair<std::int64_t, std::int64_t>> kShapes = {
    {"smollm2", {576, 1536}},
    {"tinyllama", {2048, 5632}},
    {"llama2-7b", {4096, 11008}},
    {"llama3-8b", {4096, 14336}}};

FfnShape shape_of(const Options& o) {
  FfnShape shape = o.ffn;
  std::tie(shape.d_model, shape.hidden) = kShapes.at(o.shape);
  if (o.d_model > 0) shape.d_model = o.d_model;
  if (o.hidden > 0) shape.hidden = o.hidden;
  shape.type = *parse_weight_type(o.dtype);
  // Eight times a large cache in all, so that the weights of every call come from memory.
  constexpr std::int64_t kWeights = 320 << 20;
  shape.layers = std::clamp<std::int64_t>(kWeights / (3 * shape.d_model * shape.hidden), 1, 64);
  return shape;
}

void check(const Options& o) {
  const FfnShape shape = shape_of(o);
  if (shape.experts > shape.hidden || shape.active > shape.experts || shape.shared > shape.active)
    throw InvalidArgument(
        fmt::format("{} experts of which {} are active and {} of those shared, of {} neurons: "
                    "expected shared <= active <= experts <= hidden",
                    shape.experts, shape.active, shape.shared, shape.hidden));
  if (!o.baselines.empty() && shape.hidden % shape.experts != 0)
    throw InvalidArgument(fmt::format(
        "--baselines: {} neurons in {} experts; other libraries take equal ones, so the number "
        "must divide",
        shape.hidden, shape.experts));
}

/// The values of --baselines; "all" are those that can be had.
const std::vector<std::string> kBaselines = {"onednn-f32", "onednn-bf16", "openblas-f32",
                                             "libtorch-f32", "libtorch-bf16"};

FfnShape dense_of(FfnShape shape) {
  shape.experts = shape.active = 1;
  shape.shared = 0;
  return shape;
}

/// Dense and sparse, ours and (where asked for) other libraries', over token counts.
class Comparison {
 public:
  explicit Comparison(const Options& o)
      : o_(o),
        pool_(o.threads),
        shape_(shape_of(o)),
        sparse_(shape_, pool_.parallel_for()),
        dense_(dense_of(shape_), pool_.parallel_for()) {
    const bool all = std::count(o.baselines.begin(), o.baselines.end(), "all") > 0;
    for (const std::string& name : all ? kBaselines : o.baselines)
      if (const std::string why = add_baseline(name); !why.empty()) {
        if (!all) throw std::runtime_error(fmt::format("--baselines: no {}: {}", name, why));
        fmt::print(stderr, "{} not measured: {}\n", name, why);
        not_measured_[name] = why;
      }
    ideal_ = static_cast<double>(shape_.experts) / static_cast<double>(shape_.active);
  }

  void run() {
    fmt::print(
        "D {} H {}, {} of {} experts, {}, {} threads, {}, median of {} (quartiles)\n"
        "{}tokens   dense ms  sparse ms  speed-up  (quartiles)    of ideal",
        shape_.d_model, shape_.hidden, shape_.active, shape_.experts, o_.dtype, pool_.threads(),
        isa_name(), o_.repeats,
        dense_others_.empty() && sparse_others_.empty()
            ? ""
            : "Other libraries: ms of the dense FFN; LibTorch's of the sparse one.\n");
    for (const auto& b : dense_others_) fmt::print("  {:>13}", b->name());
    for (const auto& b : sparse_others_) fmt::print("  {:>13}", b->name());
    fmt::print("\n");
    for (const std::int64_t T : o_.tokens) run_row(T);
    if (!o_.json.empty()) write_file_atomically(o_.json, to_json().dump(2) + "\n");
  }

 private:
  using Task = std::function<void(std::int64_t)>;

  /// @returns why it cannot be had; "": it was added
  std::string add_baseline(const std::string& name) {
    const BaselineShape s{shape_.d_model, shape_.hidden, shape_.layers, pool_.threads()};
    const auto add = [&](auto baseline, auto& to, const char* why) -> std::string {
      if (baseline == nullptr) return why;
      to.push_back(std::move(baseline));
      return {};
    };
    const bool bf16 = name.ends_with("bf16");
    if (name.starts_with("onednn"))
      return add(onednn_baseline(s, bf16), dense_others_,
                 onednn_version().empty() ? kNoOneDnn : "not on this processor");
    if (name.starts_with("openblas")) return add(openblas_baseline(s), dense_others_, kNoOpenBlas);
    return add(torch_baseline(s, shape_.experts, bf16), sparse_others_, kNoTorch);
  }

  void run_row(std::int64_t T) {
    const auto x = random_values(T * shape_.d_model, 4);
    std::vector<float> y(x.size());
    Workspace workspace;
    const Routing routing = random_routing(shape_, T, 5);
    const auto task = [&](const FfnSetup& setup) {
      return [&, used = random_routing(setup.shape(), T, 5)](std::int64_t round) {
        moe_ffn(setup.layer(round), used, 1.0f, {x.data(), T, shape_.d_model},
                {y.data(), T, shape_.d_model}, workspace, pool_.parallel_for());
      };
    };
    std::vector<Task> tasks{task(dense_), task(sparse_)};
    for (const auto& b : dense_others_)
      tasks.push_back([&](std::int64_t r) { b->run(r % shape_.layers, T, x.data(), y.data()); });
    for (const auto& b : sparse_others_)
      tasks.push_back(
          [&](std::int64_t r) { b->run(r % shape_.layers, routing, x.data(), y.data()); });
    const auto times = time_in_turn(tasks, o_.repeats);
    const Measured ratio = paired_ratio(times[0], times[1]);
    nlohmann::ordered_json row{{"tokens", T},
                               {"dense_s", times[0].median_s},
                               {"dense_quartiles_s", {times[0].low_s, times[0].high_s}},
                               {"sparse_s", times[1].median_s},
                               {"sparse_quartiles_s", {times[1].low_s, times[1].high_s}},
                               {"speedup", ratio.median},
                               {"speedup_quartiles", {ratio.low, ratio.high}},
                               {"touched", touched(shape_, routing)},
                               {"others", nlohmann::ordered_json::object()}};
    fmt::print("{:6}  {:9.3f}  {:9.3f}  {:7.2f}x  {:<13}  {:7.2f}", T, 1e3 * times[0].median_s,
               1e3 * times[1].median_s, ratio.median,
               fmt::format("({:.2f}-{:.2f})", ratio.low, ratio.high), ratio.median / ideal_);
    for (std::size_t i = 2; i < times.size(); ++i) {
      const std::size_t d = i - 2;
      const std::string name = d < dense_others_.size()
                                   ? dense_others_[d]->name() + " dense"
                                   : sparse_others_[d - dense_others_.size()]->name() + " sparse";
      row["others"][name] = {{"median_s", times[i].median_s},
                             {"quartiles_s", {times[i].low_s, times[i].high_s}}};
      fmt::print("  {:13.3f}", 1e3 * times[i].median_s);
    }
    fmt::print("\n");
    std::fflush(stdout);
    rows_.push_back(std::move(row));
  }

  nlohmann::ordered_json to_json() const {
    nlohmann::ordered_json json = provenance(pool_.threads());
    json["onednn"] = onednn_version();
    json["openblas"] = openblas_version();
    json["libtorch"] = torch_version();
    json["d_model"] = shape_.d_model;
    json["hidden"] = shape_.hidden;
    json["experts"] = shape_.experts;
    json["active"] = shape_.active;
    json["shared"] = shape_.shared;
    json["dtype"] = o_.dtype;
    json["layers"] = shape_.layers;
    json["repeats"] = o_.repeats;
    json["ideal"] = ideal_;
    json["not_measured"] = not_measured_;
    json["rows"] = rows_;
    return json;
  }

  const Options& o_;
  ThreadPool pool_;
  FfnShape shape_;
  FfnSetup sparse_, dense_;
  std::vector<std::unique_ptr<DenseBaseline>> dense_others_;
  std::vector<std::unique_ptr<SparseBaseline>> sparse_others_;
  std::map<std::string, std::string> not_measured_;  // why, by baseline
  double ideal_ = 1.0;
  nlohmann::ordered_json rows_ = nlohmann::ordered_json::array();
};

constexpr const char* kLayerGroup = "One layer, by number of tokens";

void add_layer_options(CLI::App& app, Options& o) {
  using Names = std::vector<std::string>;
  app.add_option("--shape", o.shape, "Shape of a real model")
      ->capture_default_str()
      ->check(CLI::IsMember(Names{"smollm2", "tinyllama", "llama2-7b", "llama3-8b"}));
  const auto count = [&](const char* name, auto& value, const char* text) {
    return app.add_option(name, value, text)->check(kCount);
  };
  count("--d-model", o.d_model, "D, instead of the shape's");
  count("--hidden", o.hidden, "H, instead of the shape's");
  count("--experts", o.ffn.experts, "E")->capture_default_str();
  count("--active", o.ffn.active, "K")->capture_default_str();
  app.add_option("--shared", o.ffn.shared, "Of the active ones, always on")
      ->capture_default_str()
      ->check(CLI::NonNegativeNumber);
  app.add_option("--dtype", o.dtype, "Weights")
      ->capture_default_str()
      ->check(CLI::IsMember(Names{"f32", "bf16", "f16", "int8", "int4"}));
  count("--tokens", o.tokens, "Token counts, T")->delimiter(',')->capture_default_str();
  count("--repeats", o.repeats, "Runs per row")->capture_default_str();
  Names baselines = kBaselines;
  baselines.push_back("all");
  app.add_option("--baselines", o.baselines,
                 "Other libraries, too: dense by oneDNN and OpenBLAS, experts by LibTorch's eager "
                 "operators; all: those that can be had")
      ->delimiter(',')
      ->check(CLI::IsMember(baselines));
}

void add_suite_options(CLI::App& app, Options& o) {
  CLI::Option* suite =
      app.add_flag("--suite", o.suite, "Print the table of goals instead (docs/benchmarks.md)");
  app.add_option("--only", o.goals.only, "These rows of it")
      ->delimiter(',')
      ->check(CLI::IsMember(kSuiteRows));
  app.add_option("--model", o.goals.model,
                 "Dense model of its rows C7 and E1, directory or GGUF file; without: "
                 "models/SmolLM2-135M-Instruct.Q4_1.gguf");
  app.add_option("--converted", o.goals.converted,
                 "What cleave convert made of it, 2 of 8 experts; without: converted for the run");
  for (const char* name : {"--only", "--model", "--converted"}) app.get_option(name)->needs(suite);
}

}  // namespace

int main(int argc, char** argv) {
  Options o;
  CLI::App app{"MoE FFN against the dense FFN it was cut from"};
  app.option_defaults()->group(kLayerGroup);
  add_layer_options(app, o);
  app.option_defaults()->group("The table of goals");
  add_suite_options(app, o);
  app.option_defaults()->group("Options");
  app.add_option("--threads", o.threads, "Threads; 0: as many as the machine has cores")
      ->capture_default_str();
  app.add_option("--json", o.json,
                 "Write the result to this file, too; without --suite for bench/plot.py")
      ->check(kFileToWrite);
  return run_program(app, argc, argv, [&] {
    if (!o.suite) {
      check(o);
      return Comparison(o).run();
    }
    for (const CLI::Option* option : app.get_options())
      if (option->get_group() == kLayerGroup && option->count() > 0)
        throw InvalidArgument(fmt::format("--suite has shapes and numbers of its own; leave out {}",
                                          option->get_name()));
    o.goals.threads = o.threads;
    o.goals.json = o.json;
    run_suite(o.goals);
  });
}
