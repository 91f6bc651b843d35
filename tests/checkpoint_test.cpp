#include "cleave/checkpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "cleave/error.h"
#include "support/paths.h"
#include "support/tiny_model.h"

namespace cleave {
namespace {

TEST(Checkpoint, OpensAHuggingFaceDirectory) {
  CLEAVE_SKIP_WITHOUT(testing::tinystories_dir());
  const Checkpoint model = Checkpoint::open(testing::tinystories_dir());
  EXPECT_EQ(model.format(), Checkpoint::Format::kSafetensors);
  EXPECT_EQ(model.config().hidden_size, 128);
  EXPECT_TRUE(model.config().tie_word_embeddings);
  // The file stores the tied matrix as lm_head.weight only.
  EXPECT_EQ(model.read("model.embed_tokens.weight", {2048, 128}).size(), 2048u * 128u);
  EXPECT_FALSE(model.contains("lm_head.weight"));
  EXPECT_EQ(model.read("model.norm.weight", {128}).size(), 128u);
  EXPECT_THROW(model.read("model.norm.weight", {64, 2}), FileError);
  EXPECT_THROW(model.read("absent"), FileError);
  EXPECT_FALSE(model.tokenizer_json().empty());
  EXPECT_EQ(model.companion_files().size(), 3u);
}

/// The message of the FileError that opening gives; "" where it opens.
std::string error_of(const std::filesystem::path& path) {
  try {
    Checkpoint::open(path);
  } catch (const FileError& error) {
    return error.what();
  }
  return "";
}

void expect_part(const std::string& error, const char* part) {
  EXPECT_NE(error.find(part), std::string::npos) << "gave: " << error;
}

TEST(Checkpoint, EveryWayToNameAModelOpensIt) {
  testing::TempDir dir;
  testing::write_tiny_model(dir.path());
  for (const auto& path : {dir.path(), dir.path() / "model.safetensors", dir.path() / ""}) {
    const Checkpoint model = Checkpoint::open(path);
    EXPECT_EQ(model.path(), path);
    EXPECT_EQ(model.tensors().size(), 20u);
    EXPECT_TRUE(std::filesystem::equivalent(model.directory(), dir.path()));
  }
}

TEST(Checkpoint, RefusalsSayWhatIsMissing) {
  testing::TempDir dir;
  expect_part(error_of(dir.path() / "nothing"), "no such file");
  expect_part(error_of(dir.path()), "neither model.safetensors nor");
  testing::write_text(dir.path() / "pytorch_model.bin", "x");
  expect_part(error_of(dir.path()), "convert them to safetensors");
  testing::write_tiny_model(dir.path());
  std::filesystem::remove(dir.path() / "config.json");
  expect_part(error_of(dir.path()), "no config.json");
  testing::write_text(dir.path() / "config.json",
                      testing::tiny_config_json("float32", "\"head_dim\": 4, "));
  expect_part(error_of(dir.path()), "'model.layers.0.self_attn.q_proj.weight' has shape [8, 8]");
  testing::write_text(dir.path() / "config.json",
                      testing::tiny_config_json("float32", "\"attention_bias\": true, "));
  expect_part(error_of(dir.path()), "'model.layers.0.self_attn.q_proj.bias' is missing");
  testing::write_text(dir.path() / "notes.txt", "x");
  expect_part(error_of(dir.path() / "notes.txt"), "is no model");
}

TEST(Checkpoint, AnIndexReachesOnlyItsOwnFolder) {
  testing::TempDir dir;
  testing::write_tiny_model(dir.path());
  std::filesystem::rename(dir.path() / "model.safetensors", dir.path() / "part.safetensors");
  const auto with_map = [&](const std::string& map) {
    testing::write_text(dir.path() / "model.safetensors.index.json",
                        "{\"weight_map\": {" + map + "}}");
    return error_of(dir.path());
  };
  expect_part(with_map(R"("a": "../part.safetensors")"), "inside the model's folder");
  expect_part(with_map(R"("a": "/etc/passwd")"), "inside the model's folder");
  expect_part(with_map(R"("a": "absent.safetensors")"), "absent.safetensors");
  expect_part(with_map(R"("a": "part.safetensors")"), "'a' is said to lie in");
  expect_part(with_map(R"("model.norm.weight": "part.safetensors")"),
              "'model.embed_tokens.weight' is missing");
  expect_part(with_map(""), "weight_map");
}

TEST(Checkpoint, ReadingNamesTheFirstValueThatIsNotFinite) {
  testing::TempDir dir;
  testing::write_tiny_model(dir.path());
  const std::size_t size = std::filesystem::file_size(dir.path() / "model.safetensors");
  {
    // The last tensor by name is model.norm.weight: 8 floats, of which the third becomes NaN.
    std::fstream file(dir.path() / "model.safetensors",
                      std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(size - 6 * 4));
    const float nan = std::nanf("");
    file.write(reinterpret_cast<const char*>(&nan), sizeof nan);
  }
  const Checkpoint model = Checkpoint::open(dir.path());
  EXPECT_NO_THROW(model.read("model.embed_tokens.weight"));
  try {
    model.read("model.norm.weight");
    FAIL() << "a NaN was read";
  } catch (const FileError& error) {
    expect_part(error.what(), "'model.norm.weight' holds nan at element 2");
  }
}

TEST(Checkpoint, HashIsThatOfTheFile) {
  testing::TempDir dir;
  testing::write_tiny_model(dir.path());
  // A text of known digest in the place of the weights (FIPS 180-2, example B.1) cannot be opened,
  // so the digest is compared with the one sha256sum prints for the written file.
  const std::string command = "sha256sum " + (dir.path() / "model.safetensors").string();
  FILE* pipe = popen(command.c_str(), "r");
  ASSERT_NE(pipe, nullptr);
  char digest[65] = {};
  const std::size_t got = std::fread(digest, 1, 64, pipe);
  pclose(pipe);
  if (got != 64) GTEST_SKIP() << "sha256sum is not installed";
  EXPECT_EQ(Checkpoint::open(dir.path()).sha256(), digest);
}

TEST(LargeCheckpoint, SmolLm2LooksLikeItsHuggingFaceDirectory) {
  CLEAVE_SKIP_WITHOUT(testing::smollm2_gguf());
  const Checkpoint model = Checkpoint::open(testing::smollm2_gguf());
  const ModelConfig& config = model.config();
  EXPECT_EQ(model.format(), Checkpoint::Format::kGguf);
  EXPECT_EQ(config.num_layers, 30);
  EXPECT_EQ(config.hidden_size, 576);
  EXPECT_EQ(config.intermediate_size, 1536);
  EXPECT_EQ(config.num_heads, 9);
  EXPECT_EQ(config.num_kv_heads, 3);
  EXPECT_EQ(config.head_dim, 64);
  EXPECT_EQ(config.vocab_size, 49152);
  EXPECT_EQ(config.max_position_embeddings, 8192);
  EXPECT_EQ(config.rms_norm_eps, 1e-5);
  EXPECT_EQ(config.rope.theta, 100000.0);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.bos_token_id, 1);
  EXPECT_EQ(config.eos_token_ids, std::vector<std::int32_t>{2});
  EXPECT_EQ(config.dtype, DType::kQ4_1);
  EXPECT_EQ(model_cost(config).parameters, 134515008);
  EXPECT_TRUE(model.has_tokenizer());
  EXPECT_NE(model.tokenizer_json().find("\"BPE\""), std::string::npos);
  std::vector<std::string> names;
  for (const auto& [name, text] : model.companion_files()) names.push_back(name);
  EXPECT_NE(std::find(names.begin(), names.end(), "tokenizer_config.json"), names.end());
  EXPECT_NE(std::find(names.begin(), names.end(), "chat_template.jinja"), names.end());
  for (const TensorInfo& info : model.tensors())
    EXPECT_EQ(static_cast<std::int64_t>(model.read(info.name).size()), info.num_elements());
}

}  // namespace
}  // namespace cleave
