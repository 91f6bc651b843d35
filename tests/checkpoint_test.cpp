#include "cleave/checkpoint.h"

#include <gtest/gtest.h>

#include "cleave/error.h"
#include "support/paths.h"

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
  for (const TensorInfo& info : model.tensors())
    EXPECT_EQ(static_cast<std::int64_t>(model.read(info.name).size()), info.num_elements());
}

}  // namespace
}  // namespace cleave
