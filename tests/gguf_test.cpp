#include "gguf.h"

#include <gtest/gtest.h>

#include "cleave/error.h"
#include "support/paths.h"

namespace cleave {
namespace {

TEST(LargeGguf, OpensSmolLm2) {
  CLEAVE_SKIP_WITHOUT(testing::smollm2_gguf());
  const GgufFile file = GgufFile::open(testing::smollm2_gguf());
  EXPECT_EQ(file.tensors().size(), 272u);
  EXPECT_EQ(file.string("general.architecture"), "llama");
  EXPECT_EQ(file.integer("llama.block_count"), 30);
  EXPECT_EQ(file.number("llama.rope.freq_base"), 100000.0);
  EXPECT_EQ(file.boolean("tokenizer.ggml.add_bos_token"), false);
  ASSERT_NE(file.strings("tokenizer.ggml.tokens"), nullptr);
  EXPECT_EQ(file.strings("tokenizer.ggml.tokens")->size(), 49152u);
  EXPECT_EQ(file.integers("tokenizer.ggml.token_type")->size(), 49152u);
  EXPECT_EQ(file.strings("absent"), nullptr);
  EXPECT_THROW(file.integer("general.architecture"), FileError);
  const GgufTensor* embedding = file.find("token_embd.weight");
  ASSERT_NE(embedding, nullptr);
  EXPECT_EQ(embedding->shape, (std::vector<std::int64_t>{49152, 576}));
  EXPECT_EQ(embedding->dtype, DType::kQ8_0);
}

}  // namespace
}  // namespace cleave
