#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>

#include "cleave/convert.h"
#include "cleave/error.h"
#include "cleave/export.h"
#include "cleave/factorize.h"
#include "cleave/model.h"
#include "support/hand_split.h"
#include "support/paths.h"
#include "support/tiny_encoder.h"
#include "support/tiny_model.h"

namespace cleave {
namespace {

using namespace testing;
namespace fs = std::filesystem;

constexpr std::int64_t kEncoderLayers = 3;

std::string content_of(const fs::path& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

/// The FFNs of the tiny encoder (H 40) split by hand: each layer by settings of its own.
class EncoderExport : public ::testing::Test {
 protected:
  EncoderExport() {
    fs::copy(tiny_encoder_dir(), dir_.path() / "dense");
    write_text(dir_.path() / "dense" / "tokenizer.json", "{\"not\": \"read here\"}\n");
    write_text(dir_.path() / "dense" / "modules.json", "[]\n");
    fs::create_directory(dir_.path() / "dense" / "1_Pooling");
    write_text(dir_.path() / "dense" / "1_Pooling" / "config.json", "{\"pooling\": 1}\n");
  }

  Checkpoint dense() const { return Checkpoint::open(dir_.path() / "dense"); }
  Model load(const fs::path& path, const ModelSpec& spec = {}) const {
    return Model::load(Checkpoint::open(path), spec);
  }

  Conversion split(const std::vector<HandSplit>& splits) {
    Model model = load(dir_.path() / "dense");
    Conversion conversion;
    conversion.partition = "contiguous";
    conversion.router = "random";
    for (std::int64_t l = 0; l < kEncoderLayers; ++l)
      conversion.layers.push_back(
          split_by_hand(model.dense_ffn(l).view(), splits[l % std::ssize(splits)]));
    return conversion;
  }
  fs::path write(const Conversion& conversion, const WriteSpec& spec = {.overwrite = true}) {
    write_conversion(dir_.path() / "moe", dense(), conversion, "", spec);
    return dir_.path() / "moe";
  }

  void expect_near(const std::vector<float>& actual, const std::vector<float>& expected,
                   std::size_t tokens) {
    ASSERT_EQ(actual.size(), expected.size());
    const double bound = hidden_tolerance(dense().config(), tokens);
    for (std::size_t i = 0; i < actual.size(); ++i)
      ASSERT_NEAR(actual[i], expected[i], bound) << "cell " << i;
  }
  /// The golden windows, through a model that should compute what the dense one does.
  void expect_dense(Model& model) {
    for (const EncoderWindow& window : windows_)
      expect_near(hidden_of(model, window.ids), window.hidden, window.ids.size());
  }

  std::string error_of(const std::function<void()>& call) {
    try {
      call();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  void expect_error(const std::function<void()>& call, const char* part) {
    const std::string error = error_of(call);
    EXPECT_NE(error.find(part), std::string::npos) << error;
  }

  TempDir dir_;
  const std::vector<EncoderWindow> windows_ = tiny_encoder_windows();
};

TEST_F(EncoderExport, AllExpertsOnEqualTheDenseModel) {
  const std::vector<std::vector<HandSplit>> cases = {
      {{.shared = 0, .num_experts = 8, .experts_per_token = 8}},
      {{.shared = 0, .num_experts = 5, .experts_per_token = 5, .gate = GateMode::kHard}},
      {{.shared = 8, .num_experts = 4, .experts_per_token = 4}},
      {{.shared = 7, .num_experts = 11, .experts_per_token = 11, .gate = GateMode::kHard}},
      {{.shared = 40 - 33, .num_experts = 3, .experts_per_token = 3}},
  };
  for (std::size_t i = 0; i < cases.size(); ++i) {
    SCOPED_TRACE(i);
    const Conversion conversion = split(cases[i]);
    Model model = load(dir_.path() / "dense");
    for (std::int64_t l = 0; l < kEncoderLayers; ++l) model.set_moe(l, conversion.layers[l]);
    expect_dense(model);
    Model written = load(write(conversion));
    EXPECT_EQ(written.config().family, Family::kBertMoe);
    EXPECT_EQ(written.num_experts(0), cases[i][0].num_experts);
    expect_dense(written);
  }
}

TEST_F(EncoderExport, SharedSlicesKeepTheirOwnWidths) {
  // 4 experts of 5 neurons in all layers; what is shared differs, and one layer has none.
  Conversion conversion = split({{.shared = 20}, {.shared = 20}, {.shared = 20}});
  Model model = load(dir_.path() / "dense");
  conversion.layers[0].shared = contiguous_bank(model.dense_ffn(0).view(), 3, 1, 11);
  conversion.layers[1].shared = ExpertBank();
  const fs::path out = write(conversion);
  const Checkpoint written = Checkpoint::open(out);
  EXPECT_EQ(written.config().shared_widths, (std::vector<std::int64_t>{11, 0, 20}));
  EXPECT_EQ(written.config().shared_intermediate_size, 20);
  EXPECT_FALSE(written.contains(BertMoeNames::shared_input(1)));
  EXPECT_NE(content_of(out / "README.md").find("0 to 20 shared neurons"), std::string::npos);
  for (std::int64_t l = 0; l < kEncoderLayers; ++l) model.set_moe(l, conversion.layers[l]);
  Model reread = Model::load(written);
  for (const EncoderWindow& window : windows_)
    expect_near(hidden_of(reread, window.ids), hidden_of(model, window.ids), window.ids.size());
}

TEST_F(EncoderExport, AWrittenModelRoutesAsItsLayersDo) {
  for (const GateMode gate : {GateMode::kSoftmax, GateMode::kHard}) {
    const Conversion conversion = split({{.gate = gate, .seed = 3}});
    Model model = load(dir_.path() / "dense");
    for (std::int64_t l = 0; l < kEncoderLayers; ++l) model.set_moe(l, conversion.layers[l]);
    Model written = load(write(conversion));
    const EncoderWindow& window = windows_[3];
    const std::vector<float> expected = hidden_of(model, window.ids);
    const std::vector<float> actual = hidden_of(written, window.ids);
    double apart = 0.0;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      // Weights of a hard gate are written as a softmax of logits times 2^-10.
      ASSERT_NEAR(actual[i], expected[i], gate == GateMode::kHard ? 2e-2 : 1e-4) << "cell " << i;
      apart = std::max(apart, std::abs(double{expected[i]} - window.hidden[i]));
    }
    EXPECT_GT(apart, 0.05);  // half the experts are not all of them
  }
}

TEST_F(EncoderExport, OtherNumbersOfExpertsKeepHardGatesAndTheOutputBias) {
  Conversion conversion = split({{.gate = GateMode::kHard, .seed = 3}});  // 2 of 4 experts
  Model written = load(write(conversion));
  EXPECT_EQ(written.moe_layer(1).gate, GateMode::kSoftmax);
  written.set_active_experts(3);
  Model model = load(dir_.path() / "dense");
  for (std::int64_t l = 0; l < kEncoderLayers; ++l) {
    SCOPED_TRACE(l);
    MoeLayer& was = conversion.layers[l];
    const MoeLayer is = written.moe_layer(l);
    EXPECT_EQ(is.gate, GateMode::kHard);
    EXPECT_EQ(is.experts_per_token, 3);
    EXPECT_EQ(is.experts.up, was.experts.up);
    EXPECT_EQ(is.experts.up_bias, was.experts.up_bias);
    EXPECT_EQ(is.experts.down_bias, model.dense_ffn(l).down_bias);  // no factor of 2 in this
    for (std::size_t i = 0; i < was.experts.down_t.size(); ++i)
      ASSERT_EQ(is.scale * is.experts.down_t[i], was.experts.down_t[i]);
    EXPECT_EQ(is.shared.up_bias, was.shared.up_bias);
    EXPECT_EQ(is.shared.down_t, was.shared.down_t);
    was.experts_per_token = 3;
    model.set_moe(l, was);
  }
  for (const EncoderWindow& window : windows_)
    expect_near(hidden_of(written, window.ids), hidden_of(model, window.ids), window.ids.size());
  written.set_active_experts(4);  // a weight of 1 each: the dense FFN
  expect_dense(written);
}

TEST_F(EncoderExport, WriteThenReadIsBitwiseEqual) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    SCOPED_TRACE(dtype_name(dtype));
    std::vector<NamedTensor> stored;  // the same model, rounded
    const Checkpoint golden = Checkpoint::open(tiny_encoder_dir());
    for (const TensorInfo& info : golden.tensors())
      stored.push_back(
          {info.name, info.shape, [&golden, &info] { return golden.read(info.name); }});
    stored.push_back({"pooler.dense.bias", {24}, [] { return std::vector<float>(24, 0.5f); }});
    write_safetensors(dir_.path() / "dense" / "model.safetensors", stored, dtype);
    const Checkpoint source = dense();
    const Conversion conversion = split({{}});
    write(conversion);
    const Checkpoint moe = Checkpoint::open(dir_.path() / "moe");
    EXPECT_EQ(moe.config().dtype, dtype);  // a scale of 2, and the source's own numbers
    for (const NamedTensor& tensor : bert_moe_tensors(source, conversion.layers)) {
      if (tensor.name.find("router") != std::string::npos) continue;  // may be rounded
      EXPECT_EQ(moe.read(tensor.name), tensor.load()) << tensor.name;
    }
    EXPECT_EQ(moe.read("pooler.dense.bias"), std::vector<float>(24, 0.5f));
    EXPECT_EQ(moe.read("encoder.layer.1.attention.output.dense.bias"),
              source.read("encoder.layer.1.attention.output.dense.bias"));
    EXPECT_EQ(moe.read(BertMoeNames::output_bias(2)),
              source.read("encoder.layer.2.output.dense.bias"));
    EXPECT_FALSE(moe.contains("encoder.layer.2.output.dense.bias"));
    const fs::path again = dir_.path() / "again";
    write_conversion(again, source, conversion, "", {.overwrite = true});
    EXPECT_EQ(content_of(again / "model.safetensors"),
              content_of(dir_.path() / "moe" / "model.safetensors"));
  }
}

TEST_F(EncoderExport, CarriesTheFilesBesideTheWeights) {
  const fs::path out = write(split({{}}));
  for (const char* file : {"tokenizer.json", "modules.json", "1_Pooling/config.json"})
    EXPECT_EQ(content_of(out / file), content_of(dir_.path() / "dense" / file)) << file;
  EXPECT_FALSE(fs::exists(out / "generation_config.json"));
  const auto provenance = read_provenance(out);
  ASSERT_TRUE(provenance.has_value());
  EXPECT_EQ(provenance->num_experts, 4);
  EXPECT_EQ(provenance->shared_neurons.size(), 3u);
  const auto config = nlohmann::json::parse(content_of(out / "config.json"));
  EXPECT_EQ(config["model_type"], "cleave_bert_moe");
  EXPECT_EQ(config["layer_norm_eps"], 1e-3);
  EXPECT_NE(content_of(out / "README.md").find("no stock class"), std::string::npos);
}

TEST_F(EncoderExport, MappedWeightsGiveTheSameHiddenStates) {
  Conversion conversion = split({{.shared = 20}});
  conversion.layers[1].shared = ExpertBank();
  for (const fs::path& path : {dir_.path() / "dense", write(conversion)})
    for (const WeightType type :
         {WeightType::kF32, WeightType::kBF16, WeightType::kInt8, WeightType::kInt4}) {
      SCOPED_TRACE(path.string() + " " + weight_type_name(type));
      ModelSpec spec{.threads = 2, .weights = type};
      Model packed = load(path, spec);
      spec.cache.file = dir_.path() / "weights.packed";
      Model first = load(path, spec);
      EXPECT_TRUE(first.cached());
      Model second = load(path, spec);
      EXPECT_TRUE(second.cached());
      const std::vector<float> expected = hidden_of(packed, windows_[2].ids);
      EXPECT_EQ(hidden_of(first, windows_[2].ids), expected);
      EXPECT_EQ(hidden_of(second, windows_[2].ids), expected);
      EXPECT_EQ(second.weight_bytes(), packed.weight_bytes());
    }
}

TEST_F(EncoderExport, PrunedFfnsAreAStockBert) {
  Model model = load(dir_.path() / "dense");
  std::vector<DenseFfn> ffns;
  for (std::int64_t l = 0; l < kEncoderLayers; ++l) {  // all neurons, in another order
    const DenseFfn ffn = model.dense_ffn(l);
    NeuronPartition partition{.num_experts = 1, .expert_of_neuron = std::vector<std::int32_t>(40)};
    ffns.push_back(to_dense(factorize(ffn.view(), partition)));
    for (std::int64_t j = 0; j < 20; ++j) {
      std::swap(ffns[l].up_bias[j], ffns[l].up_bias[39 - j]);
      for (std::int64_t d = 0; d < 24; ++d) {
        std::swap(ffns[l].up[j * 24 + d], ffns[l].up[(39 - j) * 24 + d]);
        std::swap(ffns[l].down[d * 40 + j], ffns[l].down[d * 40 + 39 - j]);
      }
    }
  }
  const fs::path out = dir_.path() / "pruned";
  write_bert_dense(out, dense(), ffns, {}, {});
  Model whole = load(out);
  EXPECT_EQ(whole.config().family, Family::kBert);
  expect_dense(whole);

  for (DenseFfn& ffn : ffns) ffn = first_neurons(ffn, 12);
  write_bert_dense(out, dense(), ffns, {}, {.overwrite = true});
  EXPECT_EQ(Checkpoint::open(out).config().intermediate_size, 12);
  Model narrow = load(out);
  for (std::int64_t l = 0; l < kEncoderLayers; ++l) EXPECT_EQ(narrow.dense_ffn(l).up, ffns[l].up);
  ffns[1].gate = ffns[1].up;
  expect_error([&] { write_bert_dense(out, dense(), ffns, {}, {.overwrite = true}); }, "a gate");
  ffns[1] = first_neurons(ffns[1], 11);
  expect_error([&] { write_bert_dense(out, dense(), ffns, {}, {.overwrite = true}); },
               "layer 1 has 11 neurons");
}

TEST_F(EncoderExport, ConvertSplitsAndWritesAnEncoder) {
  ConvertSpec spec;
  spec.partition = {.method = PartitionMethod::kKMeans, .num_experts = 8, .seed = 5};
  spec.experts_per_token = 8;
  const Conversion conversion = convert(dense(), spec, nullptr);
  for (std::int64_t l = 0; l < kEncoderLayers; ++l) {
    const DenseFfn ffn = load(dir_.path() / "dense").dense_ffn(l);
    const DenseFfn back = to_dense(conversion.layers[l].experts);
    EXPECT_EQ(back.up, ffn.up);
    EXPECT_EQ(back.up_bias, ffn.up_bias);
    EXPECT_EQ(back.down, ffn.down);
    EXPECT_EQ(back.down_bias, ffn.down_bias);
  }
  Model written = load(write(conversion));
  expect_dense(written);
}

TEST_F(EncoderExport, TargetsOfDecodersRefuseAnEncoder) {
  const Checkpoint source = dense();
  const Conversion conversion = split({{.shared = 0}});
  expect_error([&] { mixtral_tensors(source, conversion.layers); }, "an encoder");
  expect_error([&] { granite_moe_shared_tensors(source, conversion.layers); }, "an encoder");
  const std::vector<DenseFfn> ffns(kEncoderLayers, load(dir_.path() / "dense").dense_ffn(0));
  expect_error([&] { write_llama_dense(dir_.path() / "x", source, ffns, {}, {}); }, "an encoder");
  EXPECT_FALSE(fs::exists(dir_.path() / "x"));

  write_tiny_model(dir_.path() / "llama");
  const Checkpoint llama = Checkpoint::open(dir_.path() / "llama");
  expect_error([&] { bert_moe_tensors(llama, conversion.layers); }, "expected a BERT");
  expect_error([&] { write_bert_dense(dir_.path() / "x", llama, ffns, {}, {}); },
               "expected a BERT");
}

TEST_F(EncoderExport, RefusesLayersThatDoNotFit) {
  const Checkpoint source = dense();
  const auto good = split({{}}).layers;
  auto broken = good;
  broken[1].experts.gate = broken[1].experts.up;
  expect_error([&] { bert_moe_tensors(source, broken); }, "experts have a gate matrix");
  broken = good;
  broken[2].experts.activation = Activation::kRelu;
  expect_error([&] { bert_moe_tensors(source, broken); }, "activation relu");
  broken = good;
  broken.pop_back();
  expect_error([&] { bert_moe_tensors(source, broken); }, "2 layers given");
  const auto tensors = bert_moe_tensors(source, good);
  const fs::path out = dir_.path() / "bad";
  expect_error(
      [&] {
        write_bert_moe(out, source, {4, 5, 8, {8, 8, 8}}, tensors, {}, {});
      },
      "K = 5");
  expect_error(
      [&] {
        write_bert_moe(out, source, {4, 2, 8, {8, 8}}, tensors, {}, {});
      },
      "of 2 layers");
  expect_error(
      [&] {
        write_bert_moe(out, source, {4, 2, 8, {8, 9, 8}}, tensors, {}, {});
      },
      "expected [9, 24]");
  EXPECT_FALSE(fs::exists(out));
}

TEST_F(EncoderExport, ReadsTheEncoderOfAModelWithAHead) {
  const Checkpoint golden = Checkpoint::open(tiny_encoder_dir());
  const auto replace = [](std::string name, const char* from, const char* to) {
    const auto at = name.find(from);
    return at == std::string::npos ? name : name.replace(at, std::string(from).size(), to);
  };
  std::vector<NamedTensor> stored;
  for (const TensorInfo& info : golden.tensors()) {
    std::string name = replace(info.name, "LayerNorm.weight", "LayerNorm.gamma");
    name = "bert." + replace(name, "LayerNorm.bias", "LayerNorm.beta");
    stored.push_back({name, info.shape, [&golden, &info] { return golden.read(info.name); }});
  }
  stored.push_back({"cls.predictions.bias", {64}, [] { return std::vector<float>(64); }});
  const fs::path file = dir_.path() / "dense" / "model.safetensors";
  write_safetensors(file, stored, DType::kF32);
  Model model = load(dir_.path() / "dense");
  expect_dense(model);

  stored.push_back({"embeddings.LayerNorm.bias", {24}, [] { return std::vector<float>(24); }});
  write_safetensors(file, stored, DType::kF32);
  expect_error([&] { dense(); }, "'embeddings.LayerNorm.bias' with and without");
}

TEST_F(EncoderExport, RefusesAPoolerOfAnotherShape) {
  const Checkpoint golden = Checkpoint::open(tiny_encoder_dir());
  std::vector<NamedTensor> stored;
  for (const TensorInfo& info : golden.tensors())
    stored.push_back({info.name, info.shape, [&golden, &info] { return golden.read(info.name); }});
  stored.push_back({"pooler.dense.weight", {24, 23}, [] { return std::vector<float>(24 * 23); }});
  write_safetensors(dir_.path() / "dense" / "model.safetensors", stored, DType::kF32);
  expect_error([&] { write(split({{}})); },
               "'pooler.dense.weight' has shape [24, 23]; expected [24, 24]");
  EXPECT_FALSE(fs::exists(dir_.path() / "moe"));
}

TEST_F(EncoderExport, RefusesDamagedFiles) {
  write(split({{}}));
  for (const char* name : {"dense", "moe"}) {
    const fs::path path = dir_.path() / name, file = path / "model.safetensors";
    const Checkpoint whole = Checkpoint::open(path);
    for (const TensorInfo& left_out : whole.tensors()) {
      std::vector<NamedTensor> missing, misshapen;
      for (const TensorInfo& info : whole.tensors()) {
        const auto read = [&whole, &info] { return whole.read(info.name); };
        std::vector<std::int64_t> shape = info.shape;
        if (info.name == left_out.name)
          shape.insert(shape.begin(), 1);
        else
          missing.push_back({info.name, info.shape, read});
        misshapen.push_back({info.name, shape, read});
      }
      const fs::path bad = dir_.path() / "bad";
      fs::create_directories(bad);
      fs::copy_file(path / "config.json", bad / "config.json",
                    fs::copy_options::overwrite_existing);
      write_safetensors(bad / "model.safetensors", missing, DType::kF32);
      expect_error([&] { Checkpoint::open(bad); }, ("'" + left_out.name + "' is missing").c_str());
      write_safetensors(bad / "model.safetensors", misshapen, DType::kF32);
      expect_error([&] { Checkpoint::open(bad); }, ("'" + left_out.name + "' has shape").c_str());
    }
  }
  const fs::path file = dir_.path() / "moe" / "model.safetensors";
  const auto size = fs::file_size(file);
  for (const auto kept : {size - 1, size / 2, std::uintmax_t{100}, std::uintmax_t{0}}) {
    fs::resize_file(file, kept);
    EXPECT_THROW(Checkpoint::open(dir_.path() / "moe"), FileError) << kept;
  }
}

}  // namespace
}  // namespace cleave
