#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "cleave/error.h"
#include "cleave/train/data.h"
#include "cleave/train/recipes.h"
#include "support/paths.h"
#include "train/tiny_model.h"

namespace cleave::train {
namespace {

using cleave::testing::TempDir;
using cleave::testing::TinySpec;

Transformer load(const std::filesystem::path& dir) {
  return Transformer(TransformerImpl::load(Checkpoint::open(dir)));
}

double largest_difference(const at::Tensor& a, const at::Tensor& b) {
  return (a - b).abs().max().item<double>();
}

TEST(ParsePhases, ReadsWordsAndSchedules) {
  const auto one = parse_phases("experts", 7);
  ASSERT_EQ(one.size(), 1u);
  EXPECT_EQ(one[0].trainable, Trainable::kExperts);
  EXPECT_EQ(one[0].steps, 7);
  const auto two = parse_phases("router:50,joint:150", 7);
  ASSERT_EQ(two.size(), 2u);
  EXPECT_EQ(two[0].trainable, Trainable::kRouter);
  EXPECT_EQ(two[0].steps, 50);
  EXPECT_EQ(two[1].steps, 150);
  for (const char* bad : {"", "routers", "router:", "router:0", "router:-1", "router:5x",
                          "router,joint:5", "router:5,", "router:5,,joint:5"})
    EXPECT_THROW(parse_phases(bad, 7), InvalidArgument) << bad;
}

TEST(DenseTeacher, EqualsTheDenseModel) {
  const at::Tensor tokens = at::randint(64, {2, 9}, at::kLong);
  for (const GateMode gate : {GateMode::kSoftmax, GateMode::kHard})
    for (const double folded : {4.0, 2.0, 1.7}) {
      TempDir dir;
      const TinySpec tiny{.gate = gate, .folded_scale = folded};
      cleave::testing::write_tiny(dir.path(), tiny, cleave::testing::tiny_dense(tiny));
      Transformer student = load(dir.path() / "moe");
      Transformer teacher = dense_teacher(student);
      const at::NoGradGuard no_grad;
      EXPECT_LT(
          largest_difference(teacher->forward(tokens), load(dir.path() / "dense")->forward(tokens)),
          2e-5)
          << "folded scale " << folded;
      EXPECT_EQ(student->moe_layers().size(), 2u) << "the student keeps its experts";
    }
}

TEST(DenseTeacher, NeedsToKnowHowTheExpertsWereMade) {
  TempDir dir;
  const TinySpec tiny{.provenance = false};
  cleave::testing::write_tiny(dir.path(), tiny, cleave::testing::tiny_dense(tiny));
  EXPECT_THROW(dense_teacher(load(dir.path() / "moe")), InvalidArgument);
}

TEST(FactorLlm, ChangingTheGateKeepsAnEvenLayer) {
  TempDir dir;
  const TinySpec tiny{.K = 4};  // all experts on; zero routers weigh them evenly
  cleave::testing::write_tiny(dir.path(), tiny, cleave::testing::tiny_dense(tiny));
  Transformer student = load(dir.path() / "moe");
  for (auto& moe : student->moe_layers()) moe->w_router.zero_();
  const at::Tensor tokens = at::randint(64, {2, 9}, at::kLong);
  const at::NoGradGuard no_grad;
  const at::Tensor soft = student->forward(tokens);
  FactorLlmSpec spec;
  spec.gate = GateMode::kHard;
  factorllm(student, dense_teacher(student), spec);
  EXPECT_LT(largest_difference(student->forward(tokens), soft), 2e-5);
}

TEST(FactorLlm, ExportFollowsTheGateInUse) {
  for (const GateMode stored : {GateMode::kSoftmax, GateMode::kHard})
    for (const GateMode used : {GateMode::kSoftmax, GateMode::kHard}) {
      TempDir dir;
      const TinySpec tiny{.gate = stored};
      const auto dense = cleave::testing::tiny_dense(tiny);
      cleave::testing::write_tiny(dir.path(), tiny, dense);
      Transformer student = load(dir.path() / "moe");
      FactorLlmSpec spec;
      spec.gate = used;
      factorllm(student, dense_teacher(student), spec);
      // What a freshly converted model with that gate would hold.
      const auto expected = cleave::testing::tiny_split(dense, {.gate = used});
      for (const auto& tensor : student->named_tensors())
        EXPECT_EQ(tensor.load(), expected.at(tensor.name).values) << tensor.name;
    }
}

TEST(FactorLlm, TheTeacherMayBeACheckpoint) {
  TempDir dir;
  const TinySpec tiny;
  cleave::testing::write_tiny(dir.path(), tiny, cleave::testing::tiny_dense(tiny));
  const auto student = Checkpoint::open(dir.path() / "moe");
  const auto dense = Checkpoint::open(dir.path() / "dense");
  const auto text = cleave::testing::tiny_text(64, 16, 8, 1);
  FactorLlmSpec method;
  method.phases = parse_phases("joint", 3);
  method.distill_weight = 0.5;
  method.pa_tokens = 10;
  const TrainSpec spec{.batch = 2, .threads = 1};
  const auto with = train_factorllm(student, &dense, text, nullptr, method, spec);
  const auto without = train_factorllm(student, nullptr, text, nullptr, method, spec);
  ASSERT_EQ(with.last.parts.size(), 4u);
  for (std::size_t i = 0; i < with.last.parts.size(); ++i)
    EXPECT_NEAR(with.last.parts[i].second, without.last.parts[i].second, 1e-4)
        << with.last.parts[i].first;
  EXPECT_THROW(train_factorllm(student, &student, text, nullptr, method, spec), InvalidArgument)
      << "a teacher with experts";
}

TEST(FactorLlm, RefusesSettingsWithoutMeaning) {
  TempDir dir;
  const TinySpec tiny;
  cleave::testing::write_tiny(dir.path(), tiny, cleave::testing::tiny_dense(tiny));
  Transformer student = load(dir.path() / "moe");
  Transformer teacher = dense_teacher(student);
  FactorLlmSpec none;
  none.lm_weight = none.pa_weight = none.balance_weight = 0.0;
  EXPECT_THROW(factorllm(student, teacher, none), InvalidArgument);
  EXPECT_THROW(factorllm(student, Transformer(nullptr), {}), InvalidArgument) << "PA needs one";
  EXPECT_THROW(factorllm(teacher, teacher, {}), InvalidArgument) << "no experts to train";
  EXPECT_THROW(factorllm(student, teacher, {.lm_weight = -1.0}), InvalidArgument);
  EXPECT_THROW(factorllm(student, teacher, {.phases = {}}), InvalidArgument);
}

/// Token t belongs to cluster t % E. Its embedding lives in the dimensions of that cluster, and
/// only the neurons of block t % E answer to them. Attention is silent.
testing::TinyTensors planted_dense(const TinySpec& s) {
  auto t = testing::tiny_dense(s);
  const std::int64_t dims = s.D / s.E, width = s.H / s.E;
  const auto keep = [](testing::TinyTensor& m, auto&& inside) {
    for (std::int64_t r = 0; r < m.shape[0]; ++r)
      for (std::int64_t c = 0; c < m.shape[1]; ++c)
        if (!inside(r, c)) m.at(r, c) *= 0.02f;  // some noise stays
  };
  auto& embedding = t["model.embed_tokens.weight"];
  keep(embedding, [&](auto token, auto d) { return d / dims == token % s.E; });
  // Around a centre: a linear router cannot tell x from -x.
  for (std::int64_t token = 0; token < s.V; ++token)
    for (std::int64_t d = 0; d < dims; ++d)
      embedding.at(token, token % s.E * dims + d) =
          1.0f + 0.3f * embedding.at(token, token % s.E * dims + d);
  for (std::int64_t l = 0; l < s.L; ++l) {
    const std::string p = "model.layers." + std::to_string(l) + ".";
    for (float& v : t[p + "self_attn.o_proj.weight"].values) v = 0.0f;
    for (const char* name : {"mlp.gate_proj.weight", "mlp.up_proj.weight"})
      keep(t[p + name], [&](auto j, auto d) { return d / dims == j / width; });
    keep(t[p + "mlp.down_proj.weight"], [&](auto d, auto j) { return d / dims == j / width; });
  }
  return t;
}

/// Share of tokens that go to the expert which owns their cluster's neurons.
double planted_agreement(Transformer model, const TinySpec& s) {
  const at::NoGradGuard no_grad;
  const at::Tensor tokens = at::arange(s.V, at::kLong).view({1, s.V});
  model->forward(tokens);
  double sum = 0.0;
  for (const auto& moe : model->moe_layers())
    sum += moe->last()
               .ids.select(1, 0)
               .eq(tokens.flatten() % s.E)
               .to(at::kFloat)
               .mean()
               .item<double>();
  return sum / static_cast<double>(s.L);
}

// Folded scale K: the served layer adds its experts up as the dense FFN does (alpha = 1). With the
// unbiased E / K the label of a token that one expert answers alone is *not* that expert, because
// E / K times its output overshoots: docs/methods/factorllm.md.
TEST(FactorLlm, FindsPlantedRouting) {
  TempDir dir;
  const TinySpec s{.K = 1, .folded_scale = 1.0, .seed = 5};
  testing::write_tiny(dir.path(), s, planted_dense(s));
  const auto student = Checkpoint::open(dir.path() / "moe");
  FactorLlmSpec method;
  method.phases = parse_phases("router", 80);
  method.labels = LabelKind::kExhaustive;
  method.lm_weight = method.balance_weight = 0.0;
  method.pa_weight = 1.0;
  const TrainSpec spec{.batch = 4, .learning_rate = 0.03, .warmup_steps = 5, .threads = 1};
  const double before = planted_agreement(load(dir.path() / "moe"), s);
  const auto text = testing::tiny_text(64, 16, 20, 3);
  for (const PaForm form : {PaForm::kRouterFirst, PaForm::kTargetFirst, PaForm::kCrossEntropy}) {
    method.pa_form = form;
    const auto result = train_factorllm(student, nullptr, text, nullptr, method, spec);
    EXPECT_GT(planted_agreement(result.model, s), 0.95) << pa_form_name(form);
  }
  EXPECT_LT(before, 0.5) << "chance is 0.25";
}

// Ten steps of FactorLLM on a 2-layer toy: three of the router, seven joint. Losses and gradient
// norms were written by scripts/golden/make_training.py (plain PyTorch, every expert computed
// densely, torch.optim.AdamW). If they move, a formula moved: find out which before updating them.
TEST(FactorLlm, TenStepsEqualPyTorchs) {
  const auto dir = testing::source_dir() / "tests" / "golden" / "factorllm_tiny";
  std::ifstream in(dir / "run.json");
  ASSERT_TRUE(in) << "tests/golden/factorllm_tiny/run.json is missing";
  const auto golden = nlohmann::json::parse(in);
  TokenWindows text;
  text.context = golden["context"];
  text.tokens = golden["tokens"].get<std::vector<std::int32_t>>();
  FactorLlmSpec method;
  method.phases = {{Trainable::kRouter, golden["router_steps"]},
                   {Trainable::kJoint, golden["joint_steps"]}};
  method.pa_weight = golden["pa_weight"];
  method.balance_weight = golden["balance_weight"];
  const TrainSpec spec{
      .batch = golden["batch"],
      .learning_rate = golden["learning_rate"],
      .min_lr_ratio = golden["min_lr_ratio"],
      .warmup_steps = golden["warmup_steps"],
      .adamw = {golden["beta1"], golden["beta2"], golden["epsilon"], golden["weight_decay"]},
      .clip_norm = golden["clip_norm"],
      .seed = golden["seed"],
      .threads = 1};
  TrainIo io;
  io.progress = [&](const StepReport& report) {
    const auto& expected = golden["steps"][static_cast<std::size_t>(report.step - 1)];
    SCOPED_TRACE("step " + std::to_string(report.step));
    // The first step is one forward pass: rounding only. Later, Adam turns the rounding of small
    // gradients into steps of the size of the learning rate, so differences grow.
    const double tolerance = report.step == 1 ? 1e-5 : 1e-3;
    EXPECT_NEAR(report.loss, expected["loss"].get<double>(), tolerance);
    for (const auto& [name, value] : report.parts)
      EXPECT_NEAR(value, expected[name].get<double>(), tolerance) << name;
    const double norm = expected["grad_norm"];
    EXPECT_NEAR(report.grad_norm, norm, tolerance * norm);
  };
  const auto student = Checkpoint::open(dir / "moe");
  const auto teacher = Checkpoint::open(dir / "dense");
  const auto result = train_factorllm(student, &teacher, text, nullptr, method, spec, io);
  EXPECT_EQ(result.step, 10);
}

}  // namespace
}  // namespace cleave::train
