#include "allocate_budget.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cleave/error.h"
#include "cleave/export.h"
#include "cleave/tokenizer.h"
#include "support/paths.h"
#include "support/random_llama.h"

namespace cleave {
namespace {

using testing::logits_of;
using testing::TempDir;
using Widths = std::vector<std::int64_t>;

TEST(PickWindows, ShortenTheTextBetweenSpecialTokens) {
  const TokenWindows from =
      make_windows({1, 2, 3, 4, 5, 6, 7, 8, 9}, 5, 0, "text", WindowFrame{{20}, {30}});
  const TokenWindows picked = pick_windows(from, {0, 2}, 4);
  EXPECT_EQ(picked.tokens, (std::vector<std::int32_t>{20, 1, 2, 30, 20, 7, 8, 30}));
  EXPECT_EQ(picked.context, 4);
  EXPECT_EQ(picked.before + picked.after, 2);
  EXPECT_EQ(pick_windows(make_windows({1, 2, 3, 4, 5, 6}, 3, 0, "text"), {1}, 2).tokens,
            (std::vector<std::int32_t>{4, 5}));
}

std::int64_t sum_of(const Widths& widths) {
  return std::accumulate(widths.begin(), widths.end(), std::int64_t{0});
}

TEST(ExchangeWidths, EqualLayersStayEqual) {
  EXPECT_TRUE(exchange_widths(std::vector<LayerCost>(5, {0.1, 0.2}), {12, 6, 18}).empty());
  EXPECT_TRUE(exchange_widths(std::vector<LayerCost>(5, {0.0, 0.2}), {12, 6, 18}).empty());
  EXPECT_TRUE(exchange_widths(std::vector<LayerCost>(5, {0.1, 0.0}), {12, 6, 18}).empty());
}

TEST(ExchangeWidths, EveryMoveKeepsTheBudgetAndLowersTheCost) {
  const std::vector<LayerCost> costs{{0.02, 0.05}, {0.5, 0.1}, {0.1, 0.0}, {0.08, 0.03}};
  const WidthRange range{12, 6, 18};
  const auto total = [&](const Widths& widths) {
    double sum = 0.0;
    for (std::size_t l = 0; l < costs.size(); ++l)
      sum += costs[l].kl * std::exp(-costs[l].slope * static_cast<double>(widths[l] - 12));
    return sum;
  };
  const auto moves = exchange_widths(costs, range);
  ASSERT_FALSE(moves.empty());
  double before = total(Widths(4, 12));
  for (const Widths& widths : moves) {
    EXPECT_EQ(sum_of(widths), 4 * 12);
    EXPECT_GE(*std::min_element(widths.begin(), widths.end()), range.least);
    EXPECT_LE(*std::max_element(widths.begin(), widths.end()), range.most);
    EXPECT_LT(total(widths), before);
    before = total(widths);
  }
  EXPECT_EQ(moves.back()[1], 18);
  EXPECT_EQ(moves.back()[2], 6);  // more does not help it, so less does not hurt
}

TEST(ExchangeWidths, EndsAtTheLeastCost) {
  const std::vector<LayerCost> costs{{0.3, 0.4}, {0.2, 0.2}, {0.05, 0.3}};
  const Widths end = exchange_widths(costs, {3, 0, 6}).back();
  double least = 1e9;
  Widths best;
  for (std::int64_t a = 0; a <= 6; ++a)
    for (std::int64_t b = std::max<std::int64_t>(0, 3 - a); b <= std::min<std::int64_t>(6, 9 - a);
         ++b) {
      const Widths widths{a, b, 9 - a - b};
      double sum = 0.0;
      for (std::size_t l = 0; l < 3; ++l)
        sum += costs[l].kl * std::exp(-costs[l].slope * static_cast<double>(widths[l] - 3));
      if (sum < least) least = sum, best = widths;
    }
  EXPECT_EQ(end, best);
}

/// The bundled model (L 4, D 128, H 512) on windows of 128 tokens; half of the FFN, 128 neurons
/// shared in the mean.
class Allocated : public ::testing::Test {
 protected:
  static constexpr std::int64_t kContext = 128;
  Allocated() : source_(Checkpoint::open(testing::demo_llama_dir())) {
    const auto file = testing::demo_llama_dir() / "sample.txt";
    const TokenWindows all = make_windows(
        Tokenizer::from_checkpoint(source_).encode(read_text(file)), kContext, 0, "sample.txt");
    text_.context = kContext;
    text_.tokens.assign(all.tokens.begin(), all.tokens.begin() + 8 * kContext);
    spec_.router_method = RouterMethod::kRidge;
    spec_.rounds = 1;
    spec_.allocation = Allocation::kKl;
  }
  /// The bundled model with each layer's `down` times a factor.
  Checkpoint scaled(const std::vector<float>& factors) {
    Model dense = Model::load(source_);
    std::vector<DenseFfn> ffns;
    Provenance provenance;
    for (std::size_t l = 0; l < factors.size(); ++l) {
      ffns.push_back(dense.dense_ffn(static_cast<std::int64_t>(l)));
      for (float& value : ffns.back().down) value *= factors[l];
      provenance.neuron_order.emplace_back(static_cast<std::size_t>(ffns.back().hidden));
      std::iota(provenance.neuron_order.back().begin(), provenance.neuron_order.back().end(), 0);
    }
    write_llama_dense(dir_.path() / "scaled", source_, ffns, provenance, {.dtype = DType::kF32});
    return Checkpoint::open(dir_.path() / "scaled");
  }
  Conversion with_widths(const Widths& widths) {
    Model model = Model::load(source_);
    return convert_layers(model, spec_, widths, text_, {});
  }
  std::string read_all(const std::string& name) const {
    std::ifstream file(dir_.path() / name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  TempDir dir_;
  Checkpoint source_;
  TokenWindows text_;
  BudgetSpec spec_;
};

TEST_F(Allocated, NeuronsAreKeptLeftOutOrPadded) {
  const Conversion conversion = with_widths({192, 64, 128, 128});
  for (std::size_t l = 0; l < 4; ++l) {
    const MoeLayer& layer = conversion.layers[l];
    const std::int64_t shared = Widths{192, 64, 128, 128}[l];
    EXPECT_EQ(layer.shared.rows(), shared);
    EXPECT_EQ(layer.experts.num_experts(), 24);
    EXPECT_EQ(layer.experts.rows(), 384);
    std::vector<std::int32_t> all = layer.experts.neuron_order;
    const auto padding = std::count(all.begin(), all.end(), ExpertBank::kPadding);
    EXPECT_EQ(padding, std::max<std::int64_t>(0, shared - 128));
    for (std::int64_t r = 0; r < 384; ++r) {
      if (all[static_cast<std::size_t>(r)] != ExpertBank::kPadding) continue;
      for (const auto* rows : {&layer.experts.gate, &layer.experts.up, &layer.experts.down_t})
        for (std::int64_t d = 0; d < 128; ++d) ASSERT_EQ((*rows)[r * 128 + d], 0.0f);
    }
    all.insert(all.end(), layer.shared.neuron_order.begin(), layer.shared.neuron_order.end());
    all.erase(std::remove(all.begin(), all.end(), ExpertBank::kPadding), all.end());
    std::sort(all.begin(), all.end());
    EXPECT_EQ(std::adjacent_find(all.begin(), all.end()), all.end());
    EXPECT_EQ(static_cast<std::int64_t>(all.size()), std::min<std::int64_t>(512, 384 + shared));
    EXPECT_GE(all.front(), 0);
    EXPECT_LT(all.back(), 512);
  }
  EXPECT_GT(conversion.captured_energy[0], conversion.captured_energy[1]);
}

/// Experts of nothing but padding, and the share of the choices that fall on them.
std::pair<int, double> empty_experts(const Conversion& conversion, std::size_t l) {
  const ExpertBank& bank = conversion.layers[l].experts;
  int count = 0;
  double load = 0.0, all = 0.0;
  for (std::int64_t e = 0; e < bank.num_experts(); ++e) {
    const auto row = bank.neuron_order.begin();
    const double own = conversion.expert_load[l][static_cast<std::size_t>(e)];
    all += own;
    if (std::count(row + bank.begin[e], row + bank.begin[e + 1], ExpertBank::kPadding) <
        bank.width(e))
      continue;
    ++count;
    load += own;
  }
  return {count, load / all};
}

TEST_F(Allocated, PaddingGathersInExpertsThatAreNotChosen) {
  spec_.router.steps = 20;
  spec_.router.batch = 256;
  for (const RouterMethod method : {RouterMethod::kRidge, RouterMethod::kTrained}) {
    spec_.router_method = method;
    const auto [count, share] = empty_experts(with_widths({192, 64, 128, 128}), 0);
    EXPECT_GE(count, 3) << router_method_name(method);  // of the 4 that 64 rows fill
    EXPECT_LT(share, 0.01) << router_method_name(method);
  }
}

TEST_F(Allocated, WithoutTheRefitEveryRowIsTheDenseModels) {
  text_.tokens.resize(2 * kContext);
  // Without the refit the weights are the dense model's own: what runs, then, is exactly known.
  spec_.refit = false;
  const Conversion conversion = with_widths({192, 64, 128, 128});
  Model dense = Model::load(source_);
  for (std::size_t l = 0; l < 4; ++l) {
    const DenseFfn ffn = dense.dense_ffn(static_cast<std::int64_t>(l));
    const MoeLayer& layer = conversion.layers[l];
    for (const ExpertBank* bank : {&layer.experts, &layer.shared})
      for (std::int64_t r = 0; r < bank->rows(); ++r) {
        const std::int32_t j = bank->neuron_order[static_cast<std::size_t>(r)];
        if (j == ExpertBank::kPadding) continue;
        for (std::int64_t d = 0; d < 128; ++d) {
          ASSERT_EQ(bank->gate[r * 128 + d], ffn.gate[j * 128 + d]);
          ASSERT_EQ(bank->up[r * 128 + d], ffn.up[j * 128 + d]);
          ASSERT_EQ(bank->down_t[r * 128 + d], ffn.down[d * 512 + j]);
        }
      }
  }
}

TEST_F(Allocated, PaddedDirectoryReadsBackAsTheUnpaddedModel) {
  const Widths widths{192, 0, 176, 144};
  const Conversion conversion = with_widths(widths);
  write_conversion(dir_.path() / "out", source_, conversion, "{}", {});
  const Checkpoint written = Checkpoint::open(dir_.path() / "out");
  EXPECT_EQ(written.config().shared_intermediate_size, 192);
  EXPECT_EQ(written.config().shared_widths, widths);
  EXPECT_EQ(written.info(GraniteMoeNames::shared_output(1)).shape, (Widths{128, 192}));
  const auto gate_up = written.read(GraniteMoeNames::shared_input(2));
  const auto down = written.read(GraniteMoeNames::shared_output(2));
  for (std::int64_t j = 176; j < 192; ++j)
    for (std::int64_t d = 0; d < 128; ++d) {
      ASSERT_EQ(gate_up[j * 128 + d], 0.0f);
      ASSERT_EQ(gate_up[(192 + j) * 128 + d], 0.0f);
      ASSERT_EQ(down[d * 192 + j], 0.0f);
    }

  Model in_memory = Model::load(source_), re_read = Model::load(written);
  for (std::int64_t l = 0; l < 4; ++l) {
    in_memory.set_moe(l, conversion.layers[static_cast<std::size_t>(l)]);
    EXPECT_EQ(re_read.moe_layer(l).shared.rows(), widths[static_cast<std::size_t>(l)]);
  }
  const auto expected = logits_of(in_memory, text_.window(0));
  const auto logits = logits_of(re_read, text_.window(0));
  double off = 0.0, size = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    off += std::pow(logits[i] - expected[i], 2);
    size += std::pow(expected[i], 2);
  }
  EXPECT_LT(off / size, 1e-4);  // gates are 1 / K up to the router's epsilon

  // From the packed cache, written and mapped; the same weights, so the same bits.
  const ModelSpec cached{.cache = {.file = dir_.path() / "out.packed"}};
  EXPECT_EQ(logits_of(*std::make_unique<Model>(Model::load(written, cached)), text_.window(0)),
            logits);
  Model mapped = Model::load(written, cached);
  EXPECT_TRUE(mapped.cached());
  EXPECT_EQ(logits_of(mapped, text_.window(0)), logits);
  re_read.set_active_experts(24);
  EXPECT_EQ(re_read.moe_layer(1).experts_per_token, 24);
}

TEST_F(Allocated, CostIsThatOfTheUniformModel) {
  text_.tokens.resize(2 * kContext);
  write_conversion(dir_.path() / "uniform", source_, with_widths({128, 128, 128, 128}), "{}", {});
  write_conversion(dir_.path() / "varied", source_, with_widths({192, 64, 160, 96}), "{}", {});
  const ModelConfig uniform = Checkpoint::open(dir_.path() / "uniform").config();
  const ModelConfig varied = Checkpoint::open(dir_.path() / "varied").config();
  EXPECT_TRUE(uniform.shared_widths.empty());
  EXPECT_EQ(model_cost(varied).macs_per_token, model_cost(uniform).macs_per_token);
  EXPECT_EQ(model_cost(varied).active_parameters, model_cost(uniform).active_parameters);
  EXPECT_EQ(model_cost(varied).whole_ffn_macs, model_cost(uniform).whole_ffn_macs);
  ModelConfig stock = varied;
  stock.shared_widths.clear();
  EXPECT_EQ(model_cost(stock).shared_macs_per_token, 3 * 128 * 4 * 192);
  EXPECT_NE(read_all("varied/README.md").find("64 to 192 shared neurons and rows of zeros"),
            std::string::npos);
  EXPECT_EQ(read_all("uniform/README.md").find("rows of zeros"), std::string::npos);
  const auto made = read_provenance(dir_.path() / "varied");
  ASSERT_TRUE(made.has_value());
  EXPECT_EQ(made->shared_width, 192);
  EXPECT_EQ(made->shared_neurons[1].size(), 64u);
  EXPECT_EQ(
      std::count(made->neuron_order[0].begin(), made->neuron_order[0].end(), ExpertBank::kPadding),
      64);
}

TEST_F(Allocated, EveryRouterAndPartitionTakesPaddingAndGaps) {
  text_.tokens.resize(2 * kContext);
  spec_.router.steps = 5;
  spec_.router.batch = 64;
  const Widths widths{192, 64, 128, 128};
  for (const auto method : {RouterMethod::kTrained, RouterMethod::kLogistic, RouterMethod::kLowRank,
                            RouterMethod::kMeanGate, RouterMethod::kRepresentative}) {
    spec_.router_method = method;
    const Conversion conversion = with_widths(widths);
    EXPECT_EQ(conversion.layers[0].shared.rows(), 192) << router_method_name(method);
    EXPECT_GT(conversion.captured_energy[0], 0.3) << router_method_name(method);
  }
  spec_.router_method = RouterMethod::kRidge;
  for (int i = 1; i <= static_cast<int>(BudgetPartition::kContiguous); ++i) {
    spec_.partition = static_cast<BudgetPartition>(i);
    const Conversion conversion = with_widths(widths);
    EXPECT_EQ(conversion.layers[0].shared.rows(), 192) << budget_partition_name(spec_.partition);
    EXPECT_EQ(conversion.layers[1].shared.rows(), 64) << budget_partition_name(spec_.partition);
  }
}

TEST_F(Allocated, TheLayerThatMattersGetsMore) {
  const Checkpoint source = scaled({0.02f, 0.02f, 1.0f, 0.02f});
  const Conversion conversion = convert_to_budget(source, spec_, text_);
  ASSERT_TRUE(conversion.allocation.has_value());
  const AllocationChoice& choice = *conversion.allocation;
  EXPECT_EQ(choice.windows, 2);
  ASSERT_GT(choice.candidates.size(), 1u);
  EXPECT_EQ(choice.candidates[0].shared_widths, Widths(4, 128));
  for (const AllocationCandidate& candidate : choice.candidates)
    EXPECT_EQ(sum_of(candidate.shared_widths), 4 * 128);
  EXPECT_EQ(
      std::max_element(choice.layer_kl.begin(), choice.layer_kl.end()) - choice.layer_kl.begin(),
      2);
  ASSERT_GT(choice.chosen, 0u);
  const AllocationCandidate& chosen = choice.candidates[choice.chosen];
  EXPECT_LT(*chosen.kl, *choice.candidates[0].kl);
  for (const std::size_t l : {0u, 1u, 3u})
    EXPECT_LT(chosen.shared_widths[l], chosen.shared_widths[2]);
  EXPECT_EQ(choice.candidates.back().shared_widths[2], 192);  // as far as a layer may go
  for (std::size_t l = 0; l < 4; ++l)
    EXPECT_EQ(conversion.layers[l].shared.rows(), chosen.shared_widths[l]);
  EXPECT_EQ(conversion.calibration_tokens, 6 * kContext);
  write_conversion(dir_.path() / "out", source, conversion, "{}", {});
  EXPECT_NE(read_all("out/cleave.json").find("\"screening_kl\""), std::string::npos);
}

TEST_F(Allocated, UniformWhereNothingIsToBeGained) {
  text_.tokens.resize(3 * kContext);
  const Conversion conversion = convert_to_budget(scaled({0.0f, 0.0f, 0.0f, 0.0f}), spec_, text_);
  ASSERT_TRUE(conversion.allocation.has_value());
  EXPECT_EQ(conversion.allocation->candidates.size(), 1u);
  EXPECT_EQ(conversion.allocation->chosen, 0u);
  for (const MoeLayer& layer : conversion.layers) EXPECT_EQ(layer.shared.rows(), 128);
}

TEST_F(Allocated, RefusesWhatCannotBeDivided) {
  const auto refused = [&](const std::string& part) {
    try {
      convert_to_budget(source_, spec_, text_);
      ADD_FAILURE() << "not refused: " << part;
    } catch (const InvalidArgument& error) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
    }
  };
  spec_.shared_share = 0.0;
  refused("none always run");
  spec_.shared_share = 1.0;
  refused("nothing is routed");
  spec_.shared_share = 0.5;
  text_.tokens.resize(2 * kContext);
  refused("holds 2 windows apart");
}

}  // namespace
}  // namespace cleave
