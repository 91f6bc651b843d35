// The claim of a conversion to a budget, on a real model.

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cleave/baselines.h"
#include "cleave/convert.h"
#include "cleave/evaluate.h"
#include "cleave/tokenizer.h"
#include "support/paths.h"

namespace cleave {
namespace {

// 8 windows of calibration text in place of the default's 32, and no text of the model's own: the
// margin is smaller then, and the test a minute long.
TEST(LargeBudget, HalfTheFfnIsNearerToTheDenseModelThanFlap) {
  const auto text = testing::shared_dir() / "text" / "wikitext-2.valid.txt";
  CLEAVE_SKIP_WITHOUT(testing::smollm2_gguf());
  CLEAVE_SKIP_WITHOUT(text);
  const Checkpoint source = Checkpoint::open(testing::smollm2_gguf());
  const auto tokens = Tokenizer::from_checkpoint(source).encode(read_text(text));
  const auto windows = [&](std::size_t from, std::int64_t count) {
    constexpr std::int64_t kContext = 1024;
    return make_windows({tokens.begin() + static_cast<std::ptrdiff_t>(from), tokens.end()},
                        kContext, count * kContext, "wikitext");
  };
  const TokenWindows calibration = windows(0, 8), held_out = windows(tokens.size() - 2500, 2);

  Model dense = Model::load(source);
  auto rows = baseline_specs(BaselineSet::kQuick, dense.config().intermediate_size, 0.5);
  std::erase_if(rows, [](const BaselineSpec& row) {
    return row.score != BaselineScore::kFluctuation || row.router != BaselineRouter::kNone;
  });
  ASSERT_EQ(rows.size(), 2u);  // as published, and with the conversion's own repair
  EXPECT_TRUE(rows[0].compensate);
  EXPECT_TRUE(rows[1].refit);
  const auto flap = prepare_baselines(dense, calibration, rows);
  const HiddenStates states = hidden_states(dense, held_out);
  const auto measured = measure_baselines(dense, flap, held_out, states);

  const Conversion conversion = convert_to_budget(source, {.active_share = 0.5}, calibration);
  Model converted = Model::load(source);
  for (std::size_t l = 0; l < conversion.layers.size(); ++l)
    converted.set_moe(static_cast<std::int64_t>(l), conversion.layers[l]);
  const EvalResult ours =
      evaluate(converted, held_out, EvalSpec{.reference = &dense, .reference_states = &states});
  EXPECT_LT(ours.kl, 0.6 * measured[0].kl);  // 0.706 and 1.727 when this was written
  EXPECT_LT(ours.kl, measured[1].kl);
  RecordProperty("kl", std::to_string(ours.kl));
  RecordProperty("flap_kl", std::to_string(measured[0].kl));
  RecordProperty("flap_refit_kl", std::to_string(measured[1].kl));
}

}  // namespace
}  // namespace cleave
