#include "cleave/report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>

#include "cleave/convert.h"
#include "cleave/error.h"
#include "support/paths.h"
#include "support/random_llama.h"
#include "svg_plot.h"

namespace cleave {
namespace {

using testing::read_all;
using testing::TempDir;
using testing::write_random_llama;

QualityRow quality(const char* method, double kl, bool deployable, bool routed, bool ours = false) {
  QualityRow row;
  row.method = method;
  row.rho = row.active_share = 0.5;
  row.deployable = deployable;
  row.routed = routed;
  row.ours = ours;
  row.kl = kl;
  row.perplexity = 20.0 * std::exp(kl);
  row.top1_agreement = 0.5;
  return row;
}

/// Two texts; pruning has KL `pruning` on the second.
ConversionReport example_report(double pruning) {
  ConversionReport report;
  report.model = "moe <1> & co";
  report.dense = "dense";
  report.tool_version = "1.2.3";
  report.settings = R"({"k": 4})";
  report.calibration = "calibration.txt";
  report.calibration_tokens = 1024;
  report.rho = 0.5;
  report.timings_s = {{"all", 1.5}};
  report.threads = 2;
  report.instruction_set = "scalar";
  for (const char* name : {"wiki", "stories | more"}) {
    TextReport text;
    text.name = name;
    text.windows = 2;
    text.context = 8;
    text.tokens = 16;
    QualityRow dense = quality("dense", 0.0, true, false);
    dense.rho = dense.active_share = 1.0;
    text.rows = {dense, quality("this conversion", 0.5, true, true, true),
                 quality("FLAP-style pruning", text.name == "wiki" ? 1.1 : pruning, true, false),
                 quality("static mask", 1.2, true, false),
                 quality("neuron oracle", 0.03, false, true)};
    report.texts.push_back(text);
  }
  report.layers = {{0, 0.1, {0.5, 0.25, 0.25}, 1.04, 0.8, 0.9}, {2, 0.2, {1, 0, 0}, 0, 0.6, 0.7}};
  return report;
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

TEST(Report, SaysFirstWhetherStaticPruningWins) {
  const ConversionReport good = example_report(0.9), bad = example_report(0.4);
  EXPECT_EQ(verdict(good),
            "This conversion beats static pruning on every text: at 50 % of the FFN its KL is "
            "0.500 against 1.100 of FLAP-style pruning on wiki; 0.500 against 0.900 of FLAP-style "
            "pruning on stories | more.");
  EXPECT_EQ(verdict(bad),
            "Static pruning wins: at 50 % of the FFN this conversion has KL 0.500 against 0.400 of "
            "FLAP-style pruning on stories | more; prune instead, or calibrate on text like this. "
            "It loses elsewhere: 0.500 against 1.100 of FLAP-style pruning on wiki.");
  for (const ConversionReport& report : {good, bad}) {
    EXPECT_EQ(first_line(report_markdown(report)), verdict(report));
    EXPECT_EQ(nlohmann::json::parse(report_json(report)).at("verdict"), verdict(report));
    EXPECT_NE(report_html(report).find("<p class=\"verdict\">" + escape_markup(verdict(report))),
              std::string::npos);
  }
}

TEST(Report, PruningWithTheSameRepairCounts) {
  ConversionReport report = example_report(0.9);
  for (TextReport& text : report.texts)
    text.rows.push_back(
        quality("static mask, refitted", text.name == "wiki" ? 0.7 : 0.45, true, false));
  EXPECT_EQ(verdict(report),
            "Static pruning wins: at 50 % of the FFN this conversion has KL 0.500 against 0.450 of "
            "static mask, refitted on stories | more; prune instead, or calibrate on text like "
            "this. It loses elsewhere: 0.500 against 0.700 of static mask, refitted on wiki.");
}

TEST(Report, AnOracleOrALargerBudgetIsNoPruningThatWins) {
  ConversionReport report = example_report(0.9);
  for (TextReport& text : report.texts) {
    QualityRow larger = quality("static mask of three quarters", 0.2, true, false);
    larger.rho = 0.75;
    text.rows.push_back(larger);
  }
  EXPECT_TRUE(verdict(report).starts_with("This conversion beats static pruning on every text"));
  report.texts[0].rows.push_back(quality("CMoE", 0.45, true, true));
  EXPECT_NE(verdict(report).find("Another split does better: KL 0.500 against 0.450 of CMoE on "
                                 "wiki."),
            std::string::npos);
}

TEST(Report, OfPruningItComparesWithOtherPruning) {
  ConversionReport report = example_report(0.9);
  for (TextReport& text : report.texts) {
    text.rows[1].routed = false;
    text.rows.push_back(quality("static mask, refitted", 0.4999, true, false));  // the same model
  }
  EXPECT_EQ(verdict(report),
            "No other pruning does better: at 50 % of the FFN this conversion, which routes "
            "nothing, has KL 0.500 against 0.500 of static mask, refitted on wiki; 0.500 against "
            "0.500 of static mask, refitted on stories | more.");
  report.texts[1].rows.back().kl = 0.45;
  EXPECT_EQ(verdict(report),
            "Other pruning wins: at 50 % of the FFN this conversion, which routes nothing, has KL "
            "0.500 against 0.450 of static mask, refitted on stories | more.");
  for (TextReport& text : report.texts) text.rows.resize(2);
  EXPECT_TRUE(verdict(report).ends_with("no other pruning was measured beside it."));
}

TEST(Report, OtherNumbersOfExpertsAreACurve) {
  ConversionReport report = example_report(0.9);
  report.layers.clear();
  EXPECT_EQ(report_html(report).find("class=\"line ours\""), std::string::npos);
  report.texts[0].sweep = {{{50.0, 1.5, 0.25}, 4, 0.25, 0.26},
                           {{30.0, 0.5, 0.5}, 8, 0.5, 0.51},
                           {{22.0, 0.125, 0.75}, 16, 1.0, 1.01}};
  const std::string html = report_html(report), line = "<path class=\"line ours\" d=\"M";
  const auto at = html.find(line);
  ASSERT_NE(at, std::string::npos);
  EXPECT_EQ(html.find(line, at + 1), std::string::npos);  // the other text has none
  const std::string path = html.substr(at, html.find('/', at) - at);
  EXPECT_EQ(std::count(path.begin(), path.end(), 'L'), 2) << path;
  EXPECT_NE(html.find("<title>K = 16: KL 0.125</title>"), std::string::npos);
  const auto sweep = nlohmann::json::parse(report_json(report)).at("texts").at(0).at("sweep");
  ASSERT_EQ(sweep.size(), 3u);
  EXPECT_EQ(sweep[2].at("experts_per_token"), 16);
  EXPECT_EQ(sweep[2].at("kl"), 0.125);
  EXPECT_EQ(sweep[2].at("active_share"), 1.01);
  EXPECT_NE(report_markdown(report).find("| 16 | 1 | 101 % | 22.000 | 0.125 | 0.750 |"),
            std::string::npos);
}

TEST(Report, WithoutBaselinesItClaimsNothing) {
  ConversionReport report = example_report(0.9);
  for (TextReport& text : report.texts) text.rows.resize(2);
  EXPECT_EQ(verdict(report),
            "KL 0.500 on wiki; 0.500 on stories | more at 50 % of the FFN; no static pruning was "
            "measured beside it, so whether routing pays is open.");
}

TEST(Report, JsonHoldsEverything) {
  const auto json = nlohmann::json::parse(report_json(example_report(0.9)));
  EXPECT_EQ(json.at("settings").at("k"), 4);
  EXPECT_EQ(json.at("texts").size(), 2u);
  const auto& row = json.at("texts")[1].at("rows")[2];
  EXPECT_EQ(row.at("method"), "FLAP-style pruning");
  EXPECT_EQ(row.at("kl"), 0.9);
  EXPECT_EQ(row.at("deployable"), true);
  EXPECT_EQ(json.at("layers")[1].at("layer"), 2);
  EXPECT_EQ(json.at("layers")[0].at("load").size(), 3u);
  EXPECT_EQ(json.at("timings_s").at("all"), 1.5);
  ConversionReport report = example_report(0.9);
  report.settings = "[1";
  EXPECT_THROW(report_json(report), InvalidArgument);
  report = example_report(0.9);
  report.texts[0].rows[2].kl = std::numeric_limits<double>::quiet_NaN();
  report.model = "broken \xff name";
  EXPECT_TRUE(nlohmann::json::parse(report_json(report)).at("texts")[0]["rows"][2]["kl"].is_null());
}

TEST(Report, HtmlStandsAlone) {
  const std::string html = report_html(example_report(0.4));
  for (const char* outside : {"http", "<script", "<link", "src=", "@import", "url("})
    EXPECT_EQ(html.find(outside), std::string::npos) << outside;
  EXPECT_NE(html.find("prefers-color-scheme"), std::string::npos);
  EXPECT_NE(html.find("moe &lt;1&gt; &amp; co"), std::string::npos);
  EXPECT_EQ(html.find("<1>"), std::string::npos);
  for (const char* broken : {"nan", "inf\"", "{}"}) EXPECT_EQ(html.find(broken), std::string::npos);
  const auto count = [&](const std::string& what) {
    int found = 0;
    for (auto at = html.find(what); at != std::string::npos; at = html.find(what, at + 1)) ++found;
    return found;
  };
  EXPECT_EQ(count("<svg"), 5);  // two texts, error, recall, load
  EXPECT_EQ(count("<svg"), count("</svg>"));
  EXPECT_EQ(count("class=\"cell\""), 6);
  EXPECT_EQ(count("<tr class=\"ours\""), 2);
}

TEST(Report, MarkdownTablesSurviveBars) {
  const std::string markdown = report_markdown(example_report(0.9));
  EXPECT_NE(markdown.find("## stories \\| more"), std::string::npos);
  EXPECT_NE(markdown.find("| **this conversion** | this conversion | 0.5 | 50 % |"),
            std::string::npos);
  EXPECT_NE(markdown.find("| neuron oracle | oracle |"), std::string::npos);
}

TEST(Report, ARouterThatNoStockClassHoldsIsNoOracle) {
  ConversionReport report = example_report(0.9);
  EXPECT_EQ(report_markdown(report).find("## Routers of the baselines"), std::string::npos);
  QualityRow row = quality("regression MLP router", 0.01, false, true);
  row.stock = false;
  row.router = RouterQuality{0.75, 0.875};
  row.router_share = 0.0625;
  for (TextReport& text : report.texts) text.rows.push_back(row);
  EXPECT_EQ(verdict(report), verdict(example_report(0.9)));  // nothing that one could use instead
  const std::string markdown = report_markdown(report);
  EXPECT_NE(markdown.find("| regression MLP router | no stock class | 0.5 |"), std::string::npos);
  EXPECT_NE(markdown.find("| regression MLP router | no stock class | 6.25 % | 0.750 | 0.875 |"),
            std::string::npos);
  EXPECT_NE(report_html(report).find("<td>6.25 %</td><td>0.750</td><td>0.875</td>"),
            std::string::npos);
  const auto rows = nlohmann::json::parse(report_json(report)).at("texts").at(0).at("rows");
  EXPECT_EQ(rows.back().at("stock"), false);
  EXPECT_EQ(rows.back().at("deployable"), false);
  EXPECT_EQ(rows.back().at("router_recall"), 0.75);
  EXPECT_EQ(rows.back().at("captured_energy"), 0.875);
  EXPECT_EQ(rows.back().at("router_share"), 0.0625);
  EXPECT_EQ(rows.at(4).at("stock"), true);  // the oracle: it lacks not the class but the knowledge
  EXPECT_FALSE(rows.at(4).contains("router_recall"));
}

TEST(Report, TicksAreRoundAndInside) {
  EXPECT_EQ(axis_ticks({"", 0.3, 12.0, true}), (std::vector<double>{0.5, 1.0, 2.0, 5.0, 10.0}));
  const auto ticks = axis_ticks({"", 0.0, 1.1});
  ASSERT_GE(ticks.size(), 4u);
  for (const double tick : ticks) {
    EXPECT_GE(tick, 0.0);
    EXPECT_LE(tick, 1.1 + 1e-9);
  }
}

class ReportOfAModel : public ::testing::Test {
 protected:
  ReportOfAModel() {
    write_random_llama(dir_.path() / "dense", {.hidden = 64});
    text_.name = "random";
    text_.windows.context = 16;
    std::mt19937 rng(5);
    for (int i = 0; i < 4 * 16; ++i)
      text_.windows.tokens.push_back(static_cast<std::int32_t>(rng() % 40));
  }
  Model dense() const {
    return Model::load(Checkpoint::open(dir_.path() / "dense"), {.threads = 2});
  }
  Model converted(std::int64_t active) const {
    const Checkpoint source = Checkpoint::open(dir_.path() / "dense");
    const ConvertSpec spec{.partition = {.num_experts = 8},
                           .experts_per_token = active,
                           .gate = GateMode::kHard,
                           .scale = ScalePolicy::kActive,
                           .threads = 2};
    WriteSpec write;
    write.overwrite = true;
    write_conversion(dir_.path() / "moe", source, convert(source, spec, &text_.windows), "{}",
                     write);
    return Model::load(Checkpoint::open(dir_.path() / "moe"), {.threads = 2});
  }
  TempDir dir_;
  NamedText text_;
};

TEST_F(ReportOfAModel, MeasuresTheWrittenModelAndItsBaselines) {
  Model moe = converted(4), teacher = dense();
  const double expected = evaluate(moe, text_.windows, &teacher).kl;
  const ConversionReport report = make_report(moe, teacher, {&text_, 1}, &text_.windows, {});
  EXPECT_DOUBLE_EQ(report.rho, 0.5);
  ASSERT_EQ(report.texts.size(), 1u);
  const auto& rows = report.texts[0].rows;
  ASSERT_EQ(rows.size(), 11u);
  EXPECT_EQ(rows[0].kl, 0.0);
  EXPECT_TRUE(rows[1].ours);
  EXPECT_NEAR(rows[1].kl, expected, 1e-12);
  EXPECT_GT(rows[1].kl, 0.0);
  for (const QualityRow& row : rows) {
    EXPECT_DOUBLE_EQ(row.rho, row.method == "dense" ? 1.0 : 0.5) << row.method;
  }
  ASSERT_EQ(report.layers.size(), 2u);
  for (const LayerReport& layer : report.layers) {
    EXPECT_NEAR(std::accumulate(layer.load.begin(), layer.load.end(), 0.0), 1.0, 1e-12);
    EXPECT_GT(layer.relative_error, 0.0);
    EXPECT_GT(layer.router_recall, 0.5);  // chance: K / E
    EXPECT_LT(layer.router_recall, 1.0);
    EXPECT_GT(layer.captured_energy, layer.router_recall * 0.5);
    EXPECT_LE(layer.captured_energy, 1.0 + 1e-9);
  }
  write_report(dir_.path() / "out" / "deep", report);
  EXPECT_EQ(read_all(dir_.path() / "out" / "deep" / "report.json"), report_json(report));
  EXPECT_EQ(read_all(dir_.path() / "out" / "deep" / "report.md"), report_markdown(report));
  EXPECT_EQ(read_all(dir_.path() / "out" / "deep" / "report.html"), report_html(report));
  EXPECT_THROW(write_report(dir_.path() / "out" / "deep" / "report.md", report), FileError);
}

TEST_F(ReportOfAModel, AllExpertsOnHaveNoError) {
  Model moe = converted(8), teacher = dense();
  const ConversionReport report =
      make_report(moe, teacher, {&text_, 1}, nullptr, {.baselines = BaselineSet::kNone});
  EXPECT_LT(report.texts[0].rows[1].kl, 1e-6);
  for (const LayerReport& layer : report.layers) {
    EXPECT_LT(layer.relative_error, 1e-8);
    EXPECT_EQ(layer.router_recall, 1.0);
    EXPECT_NEAR(layer.captured_energy, 1.0, 1e-9);
    EXPECT_NEAR(layer.load_entropy, std::log(8.0), 1e-9);
  }
}

TEST_F(ReportOfAModel, RefusesModelsThatDoNotBelongTogether) {
  Model moe = converted(4), teacher = dense(), again = dense();
  EXPECT_THROW(make_report(teacher, again, {&text_, 1}, nullptr, {}), InvalidArgument);
  EXPECT_THROW(make_report(moe, moe, {&text_, 1}, nullptr, {}), InvalidArgument);
  EXPECT_THROW(make_report(moe, teacher, {}, nullptr, {}), InvalidArgument);
  write_random_llama(dir_.path() / "other", {.vocab = 50, .hidden = 64});
  Model other = Model::load(Checkpoint::open(dir_.path() / "other"), {.threads = 1});
  EXPECT_THROW(make_report(moe, other, {&text_, 1}, nullptr, {}), InvalidArgument);
}

TEST_F(ReportOfAModel, MoeLayersCanBeTakenOut) {
  Model moe = converted(4), teacher = dense();
  const MoeLayer layer = moe.moe_layer(1);
  EXPECT_EQ(layer.experts.num_experts(), 8);
  EXPECT_EQ(layer.experts_per_token, 4);
  const HiddenStates expected = hidden_states(moe, text_.windows);
  Model rebuilt = dense();
  rebuilt.set_moe(0, moe.moe_layer(0));
  rebuilt.set_moe(1, layer);
  const HiddenStates states = hidden_states(rebuilt, text_.windows);
  for (std::size_t i = 0; i < states.values.size(); ++i)
    ASSERT_NEAR(states.values[i], expected.values[i], 1e-6) << i;
  EXPECT_THROW(teacher.moe_layer(0), InvalidArgument);
}

}  // namespace
}  // namespace cleave
