#include "cleave/export.h"

#include <gtest/gtest.h>

#include <csignal>
#include <cstring>

#include <sys/resource.h>
#include <nlohmann/json.hpp>

#include "cleave/error.h"
#include "support/paths.h"
#include "support/tiny_model.h"

namespace cleave {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kD = 8, kH = 12, kE = 4, kI = 3, kLayers = 2;

/// Contiguous experts from the source's own FFN, filled by hand.
MoeLayer make_layer(const Checkpoint& source, std::int64_t layer, GateMode gate) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".mlp.";
  MoeLayer moe;
  moe.experts.d_model = kD;
  moe.experts.dense_hidden = kH;
  for (std::int64_t e = 0; e <= kE; ++e) moe.experts.begin.push_back(e * kI);
  for (std::int32_t j = 0; j < kH; ++j) moe.experts.neuron_order.push_back(j);
  moe.experts.gate = source.read(prefix + "gate_proj.weight");
  moe.experts.up = source.read(prefix + "up_proj.weight");
  const auto down = source.read(prefix + "down_proj.weight");
  moe.experts.down_t.resize(down.size());
  for (std::int64_t c = 0; c < kD; ++c)
    for (std::int64_t j = 0; j < kH; ++j) moe.experts.down_t[j * kD + c] = down[c * kH + j];
  moe.router.num_experts = kE;
  moe.router.d_model = kD;
  for (std::int64_t i = 0; i < kE * kD; ++i)
    moe.router.weight.push_back(0.25f * static_cast<float>(i % 7 - 3));
  moe.experts_per_token = 2;
  moe.gate = gate;
  moe.scale = gate == GateMode::kSoftmax ? static_cast<float>(kE) : static_cast<float>(kE) / 2;
  return moe;
}

class Export : public ::testing::Test {
 protected:
  void load(DType dtype, GateMode gate = GateMode::kSoftmax) {
    testing::write_tiny_model(dir_.path() / "dense", dtype);
    source_ = std::make_unique<Checkpoint>(Checkpoint::open(dir_.path() / "dense"));
    layers_.clear();
    for (std::int64_t l = 0; l < kLayers; ++l) layers_.push_back(make_layer(*source_, l, gate));
    provenance_ = {.tool_version = "1.2.3",
                   .source = "dense",
                   .source_sha256 = source_->sha256(),
                   .num_experts = kE,
                   .experts_per_token = 2,
                   .partition = "contiguous",
                   .seed = 0xffffffffffffffffull,
                   .gate = gate,
                   .folded_scale = static_cast<double>(kE),
                   .router_epsilon = gate == GateMode::kHard ? kHardGateEpsilon : 1.0,
                   .router = "trained",
                   .neuron_order = {{0, 1, 2}, {2, 1, 0}},
                   .spec_json = R"({"k": 2})"};
  }
  void write(const WriteSpec& spec = {}) {
    const auto tensors = mixtral_tensors(*source_, layers_);
    write_mixtral(out_, *source_, {kE, 2, kI}, tensors, provenance_, spec);
  }
  /// Names in the folder that holds the output, hidden ones too.
  std::vector<std::string> folder() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(dir_.path()))
      names.push_back(entry.path().filename().string());
    std::sort(names.begin(), names.end());
    return names;
  }

  testing::TempDir dir_;
  fs::path out_ = dir_.path() / "moe";
  std::unique_ptr<Checkpoint> source_;
  std::vector<MoeLayer> layers_;
  Provenance provenance_;
};

TEST_F(Export, WriteThenReadIsBitwiseEqual) {
  for (const auto dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    SCOPED_TRACE(dtype_name(dtype));
    load(dtype);
    write({.overwrite = true});
    const Checkpoint moe = Checkpoint::open(out_);
    EXPECT_EQ(moe.config().family, Family::kMixtral);
    EXPECT_EQ(moe.config().dtype, dtype);  // E is a power of two: nothing has to be rounded
    // Every weight of the source, times E for down, is a value of its own type; so are the
    // router's.
    for (const NamedTensor& tensor : mixtral_tensors(*source_, layers_))
      EXPECT_EQ(moe.read(tensor.name), tensor.load()) << tensor.name;
    EXPECT_EQ(moe.read("lm_head.weight"), source_->read("model.embed_tokens.weight"));
    const auto down = source_->read("model.layers.1.mlp.down_proj.weight");
    const auto expert = moe.read(MixtralNames::down(1, 2), {kD, kI});
    for (std::int64_t c = 0; c < kD; ++c)
      for (std::int64_t j = 0; j < kI; ++j)
        ASSERT_EQ(expert[c * kI + j], 4.0f * down[c * kH + 2 * kI + j]);
  }
}

TEST_F(Export, ShardsHoldTheSameTensors) {
  load(DType::kF32);
  write({.max_shard_bytes = 1000});
  EXPECT_TRUE(fs::exists(out_ / "model.safetensors.index.json"));
  EXPECT_FALSE(fs::exists(out_ / "model.safetensors"));
  const Checkpoint moe = Checkpoint::open(out_);
  for (const NamedTensor& tensor : mixtral_tensors(*source_, layers_))
    EXPECT_EQ(moe.read(tensor.name), tensor.load()) << tensor.name;
  const auto index =
      nlohmann::json::parse(testing::read_all(out_ / "model.safetensors.index.json"));
  const std::string first = index["weight_map"]["model.norm.weight"];
  fs::remove(out_ / first);
  EXPECT_THROW(Checkpoint::open(out_), FileError);
}

TEST_F(Export, HardGateIsScaledForAStockSoftmax) {
  load(DType::kF32, GateMode::kHard);
  write();
  const Checkpoint moe = Checkpoint::open(out_);
  const auto router = moe.read(MixtralNames::router(0), {kE, kD});
  for (std::size_t i = 0; i < router.size(); ++i)
    ASSERT_EQ(router[i], layers_[0].router.weight[i] / 1024.0f);
  // The mask weighs each of K experts by scale = E / K; the softmax by 1 / K: down times E.
  const auto down = source_->read("model.layers.0.mlp.down_proj.weight");
  EXPECT_EQ(moe.read(MixtralNames::down(0, 0))[0], 4.0f * down[0]);
}

TEST_F(Export, CarriesTokenizerConfigurationAndProvenance) {
  load(DType::kBF16);
  write();
  for (const char* name : {"tokenizer.json", "tokenizer_config.json"})
    EXPECT_EQ(testing::read_all(out_ / name), testing::read_all(dir_.path() / "dense" / name))
        << name;
  const auto config = nlohmann::json::parse(testing::read_all(out_ / "config.json"));
  EXPECT_EQ(config["architectures"][0], "MixtralForCausalLM");
  EXPECT_EQ(config["intermediate_size"], kI);
  EXPECT_EQ(config["tie_word_embeddings"], false);
  EXPECT_EQ(config["torch_dtype"], "bfloat16");
  EXPECT_EQ(config["dtype"], "bfloat16");
  EXPECT_EQ(config["rope_theta"], 10000.0);
  EXPECT_EQ(config["rope_parameters"]["rope_theta"], 10000.0);
  EXPECT_EQ(config["eos_token_id"], (std::vector<int>{2, 3}));
  EXPECT_EQ(config["pad_token_id"], 0);
  const auto generation = nlohmann::json::parse(testing::read_all(out_ / "generation_config.json"));
  EXPECT_EQ(generation["bos_token_id"], 1);

  const auto read = read_provenance(out_);
  ASSERT_TRUE(read.has_value());
  EXPECT_EQ(read->source_sha256, provenance_.source_sha256);
  EXPECT_EQ(read->seed, provenance_.seed);
  EXPECT_EQ(read->gate, provenance_.gate);
  EXPECT_EQ(read->neuron_order, provenance_.neuron_order);
  EXPECT_EQ(read->spec_json, R"({"k":2})");
  EXPECT_EQ(testing::read_all(out_ / "README.md").rfind("---\nbase_model: \"dense\"\n", 0), 0u);
  EXPECT_EQ(read_provenance(dir_.path() / "dense"), std::nullopt);
  testing::write_text(out_ / "cleave.json", R"({"format_version": 2})");
  EXPECT_THROW(read_provenance(out_), FileError);
}

TEST_F(Export, ReplacesOnlyWhatItIsToldTo) {
  load(DType::kF32);
  write();
  EXPECT_THROW(write(), InvalidArgument);
  testing::write_text(out_ / "mine.txt", "x");
  write({.overwrite = true});
  EXPECT_FALSE(fs::exists(out_ / "mine.txt"));
  EXPECT_EQ(folder(), (std::vector<std::string>{"dense", "moe"}));

  fs::create_directories(dir_.path() / "photos" / "2024");
  out_ = dir_.path() / "photos";
  EXPECT_THROW(write({.overwrite = true}), InvalidArgument);
  EXPECT_TRUE(fs::exists(out_ / "2024"));
  out_ = dir_.path() / "no" / "such" / "folder";
  EXPECT_THROW(write(), FileError);
}

TEST_F(Export, AnOutputMayReplaceItsOwnSource) {
  load(DType::kF32);
  const auto expected = source_->read("model.embed_tokens.weight");
  out_ = dir_.path() / "dense";
  write({.overwrite = true});
  EXPECT_EQ(Checkpoint::open(out_).read("lm_head.weight"), expected);
}

TEST_F(Export, AFullDiskLeavesNothingBehind) {
  load(DType::kF32);
  const rlimit unlimited = [] {
    rlimit limit{};
    getrlimit(RLIMIT_FSIZE, &limit);
    return limit;
  }();
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  for (const rlim_t bytes : {0, 100, 4000}) {  // in the header, in the data of model.safetensors
    const rlimit limited{bytes, unlimited.rlim_max};
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limited), 0);
    std::string error;
    try {
      write();
    } catch (const FileError& caught) {
      error = caught.what();
    }
    setrlimit(RLIMIT_FSIZE, &unlimited);
    EXPECT_NE(error.find("File too large"), std::string::npos) << bytes << ": " << error;
    EXPECT_EQ(folder(), std::vector<std::string>{"dense"}) << bytes;
  }
  std::signal(SIGXFSZ, old_handler);
}

TEST_F(Export, RefusesWhatMixtralCannotHold) {
  load(DType::kF32);
  auto broken = layers_;
  broken[1].experts.up_bias.resize(kH);
  EXPECT_THROW(mixtral_tensors(*source_, broken), InvalidArgument);
  broken = layers_;
  broken[1].experts.gate.clear();
  EXPECT_THROW(mixtral_tensors(*source_, broken), InvalidArgument);
  broken = layers_;
  broken[1].experts_per_token = 1;
  EXPECT_THROW(mixtral_tensors(*source_, broken), InvalidArgument);
  broken = layers_;
  broken[0].experts.begin = {0, 2, 6, 9, 12};
  EXPECT_THROW(mixtral_tensors(*source_, broken), InvalidArgument);
  broken.pop_back();
  EXPECT_THROW(mixtral_tensors(*source_, broken), InvalidArgument);

  auto tensors = mixtral_tensors(*source_, layers_);
  tensors.push_back({"extra", {1}, [] { return std::vector<float>(1); }});
  EXPECT_THROW(write_mixtral(out_, *source_, {kE, 2, kI}, tensors, provenance_, {}),
               InvalidArgument);
  tensors.resize(tensors.size() - 2);
  EXPECT_THROW(write_mixtral(out_, *source_, {kE, 2, kI}, tensors, provenance_, {}),
               InvalidArgument);
  layers_[0].router.weight[3] = std::nanf("");
  EXPECT_THROW(write(), InvalidArgument);
  EXPECT_EQ(folder(), std::vector<std::string>{"dense"});
}

TEST(DefaultWriteDtype, KeepsTheSourceTypeOnlyWhereNothingIsRounded) {
  ModelConfig config;
  config.dtype = DType::kBF16;
  EXPECT_EQ(default_write_dtype(config, 8.0), DType::kBF16);
  EXPECT_EQ(default_write_dtype(config, 0.5), DType::kBF16);
  EXPECT_EQ(default_write_dtype(config, 6.0), DType::kF32);
  config.dtype = DType::kQ4_1;
  EXPECT_EQ(default_write_dtype(config, 8.0), DType::kF32);
}

}  // namespace
}  // namespace cleave
