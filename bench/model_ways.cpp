#include "model_ways.h"

#include <fmt/format.h>

#include <chrono>
#include <random>

namespace cleave::bench {
namespace {

double seconds(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Of a file's own weights; "4-bit" is what the goal compares.
const char* file_label(DType dtype) {
  return dtype == DType::kQ4_0 || dtype == DType::kQ4_1 ? "4-bit" : dtype_name(dtype);
}

}  // namespace

std::span<const ModelGoal> model_goals() {
  static const ModelGoal goals[] = {
      {{"C7", "dense, bf16: times llama.cpp", 1.3, 1.6}, "dense", "bf16", "llama.cpp", "bf16"},
      {{"C7", "dense, 4-bit: times llama.cpp", 1.3, 1.6}, "dense", "4-bit", "llama.cpp", "4-bit"},
      {{"E1", "converted, bf16: times our dense", 1.5, 1.75},
       "converted",
       "bf16",
       "cleave",
       "bf16"},
      {{"E1", "converted, bf16: times llama.cpp's dense", 2.0, 2.8},
       "converted",
       "bf16",
       "llama.cpp",
       "bf16"}};
  return goals;
}

void check_models(const Checkpoint& dense, const Checkpoint* converted) {
  const ModelConfig& config = dense.config();
  if (config.is_moe())
    throw InvalidArgument(
        fmt::format("{}: holds experts; expected the dense model here", dense.path().string()));
  if (converted == nullptr) return;
  const ModelConfig& other = converted->config();
  if (!other.is_moe() || other.vocab_size != config.vocab_size ||
      other.num_layers != config.num_layers || other.hidden_size != config.hidden_size)
    throw InvalidArgument(fmt::format("{}: expected what `cleave convert` made of {}",
                                      converted->path().string(), dense.path().string()));
}

void ModelWays::add(const char* model, const char* runtime, const char* weights,
                    std::unique_ptr<DecoderWay> way) {
  if (way == nullptr) return;
  fmt::print(stderr, "loaded: {}, {}, {}\n", model, runtime, weights);
  ways_.push_back({model, runtime, weights, std::move(way)});
}

void ModelWays::add_dense(const Checkpoint& dense) {
  const DecoderSpec spec{run_.threads, run_.prompt + run_.generate};
  vocab_size_ = dense.config().vocab_size;
  add("dense", "cleave", "bf16", cleave_way(dense, WeightType::kBF16, spec));
  add("dense", "llama.cpp", "bf16", llama_bf16_way(dense, spec));
  add("dense", "cleave", "4-bit", cleave_way(dense, WeightType::kInt4, spec));
  if (dense.format() == Checkpoint::Format::kGguf)
    add("dense", "llama.cpp", file_label(dense.config().dtype), llama_file_way(dense.path(), spec));
}

void ModelWays::add_converted(const Checkpoint& converted, bool with_llama) {
  const DecoderSpec spec{run_.threads, run_.prompt + run_.generate};
  add("converted", "cleave", "bf16", cleave_way(converted, WeightType::kBF16, spec));
  if (with_llama) add("converted", "llama.cpp", "bf16", llama_bf16_way(converted, spec));
}

void ModelWays::measure() {
  std::vector<std::int32_t> tokens(run_.prompt);
  std::mt19937_64 rng(0);
  for (std::int32_t& id : tokens) id = static_cast<std::int32_t>(rng() % vocab_size_);
  std::vector<std::vector<double>> prompt(ways_.size()), generate(ways_.size());
  for (int round = -1; round < run_.rounds; ++round)
    for (std::size_t i = 0; i < ways_.size(); ++i) {
      wait_for_quiet();
      DecoderWay& way = *ways_[i].way;
      const double p = seconds([&] { way.prompt(tokens); });
      const double g = seconds([&] { way.generate(run_.generate); });
      if (round < 0) continue;  // the first one warms up
      prompt[i].push_back(p / static_cast<double>(run_.prompt));
      generate[i].push_back(g / static_cast<double>(run_.generate));
    }
  for (std::size_t i = 0; i < ways_.size(); ++i) {
    ways_[i].prompt = summary(std::move(prompt[i]));
    ways_[i].generate = summary(std::move(generate[i]));
  }
}

const ModelWay* ModelWays::find(const std::string& model, const std::string& runtime,
                                const std::string& weights) const {
  for (const ModelWay& way : ways_)
    if (way.model == model && way.runtime == runtime && way.weights == weights) return &way;
  return nullptr;
}

void ModelWays::report(GoalTable& table, const ParallelFor& parallel, const ModelGoal& goal) const {
  const ModelWay* ours = find(goal.our_model, "cleave", goal.our_weights);
  const ModelWay* other = find("dense", goal.other_runtime, goal.other_weights);
  if (ours == nullptr)
    table.add_not_measured(goal.goal, "no converted model was given");
  else if (other == nullptr)
    table.add_not_measured(goal.goal, !llama_cpp_version().empty()
                                          ? "llama.cpp takes 4 bits from a GGUF file of "
                                            "type Q4_0 or Q4_1, and the model is none"
                                          : kNoLlamaCpp);
  else
    table.add(goal.goal, paired_ratio(other->generate, ours->generate), measure_limits(parallel));
}

}  // namespace cleave::bench
