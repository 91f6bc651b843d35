// Writes what other implementations are to open, without the converter and its settings:
//
//   split_by_hand MODEL OUT shared SHARED EXPERTS ACTIVE softmax|hard
//   split_by_hand MODEL OUT pruned NEURONS
//
// shared: the first SHARED neurons of every FFN always run, the others are contiguous experts with
// random routers (zero with all of them on). pruned: the first NEURONS alone, with a down bias.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "cleave/convert.h"
#include "cleave/export.h"
#include "cleave/model.h"
#include "cleave/version.h"
#include "support/hand_split.h"

namespace {

using namespace cleave;

std::int64_t count_of(const char* text) {
  char* end = nullptr;
  const long long value = std::strtoll(text, &end, 10);
  if (end == text || *end != '\0' || value < 0)
    throw std::invalid_argument(std::string(text) + ": expected a number");
  return value;
}

void write_shared(const Checkpoint& source, const char* out, const testing::HandSplit& split) {
  const Model model = Model::load(source);
  Conversion conversion;
  conversion.router = split.experts_per_token == split.num_experts ? "zero" : "random";
  for (std::int64_t l = 0; l < source.config().num_layers; ++l) {
    testing::HandSplit own = split;
    own.seed += static_cast<std::uint64_t>(l);
    conversion.layers.push_back(testing::split_by_hand(model.dense_ffn(l).view(), own));
  }
  conversion.partition = partition_method_name(PartitionMethod::kContiguous);
  write_conversion(out, source, conversion, "{}", {});
}

void write_pruned(const Checkpoint& source, const char* out, std::int64_t neurons) {
  const Model model = Model::load(source);
  std::vector<DenseFfn> ffns;
  for (std::int64_t l = 0; l < source.config().num_layers; ++l) {
    ffns.push_back(testing::first_neurons(model.dense_ffn(l), neurons));
    ffns.back().down_bias =
        testing::random_values(source.config().hidden_size, static_cast<std::uint64_t>(l), 0.05);
  }
  Provenance made;
  made.tool_version = kVersion;
  made.source = source.path().filename().string();
  made.source_sha256 = source.sha256();
  made.partition = "first";
  made.router = "none";
  write_llama_dense(out, source, ffns, made, {});
}

int run(int argc, char** argv) {
  const std::string what = argc > 3 ? argv[3] : "";
  if (!(what == "shared" && argc == 8) && !(what == "pruned" && argc == 5)) {
    std::fprintf(stderr,
                 "usage: split_by_hand MODEL OUT shared SHARED EXPERTS ACTIVE softmax|hard\n"
                 "       split_by_hand MODEL OUT pruned NEURONS\n");
    return 2;
  }
  const Checkpoint source = Checkpoint::open(argv[1]);
  if (what == "pruned") {
    write_pruned(source, argv[2], count_of(argv[4]));
    return 0;
  }
  testing::HandSplit split{.shared = count_of(argv[4]),
                           .num_experts = count_of(argv[5]),
                           .experts_per_token = count_of(argv[6])};
  if (argv[7] == std::string("hard")) split.gate = GateMode::kHard;
  const std::int64_t routed = source.config().intermediate_size - split.shared;
  if (split.num_experts < 1 || routed < 1 || routed % split.num_experts != 0)
    throw std::invalid_argument("EXPERTS must divide the neurons that are not shared");
  write_shared(source, argv[2], split);
  return 0;
}

}  // namespace

int main(int argc, char** argv) try {
  return run(argc, argv);
} catch (const std::exception& error) {
  std::fprintf(stderr, "split_by_hand: %s\n", error.what());
  return 1;
}
