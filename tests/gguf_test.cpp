#include "gguf.h"

#include <gtest/gtest.h>

#include <cstring>

#include "cleave/checkpoint.h"
#include "cleave/error.h"
#include "support/paths.h"
#include "support/tiny_model.h"

// Golden files: scripts/golden/make_gguf_golden.py (the Python package `gguf`).

namespace cleave {
namespace {

namespace fs = std::filesystem;

fs::path golden(const char* name) { return testing::source_dir() / "tests" / "golden" / name; }

class GgufDamage : public ::testing::Test {
 protected:
  std::string error_of(const std::string& content) const {
    testing::write_text(file_, content);
    return error_of_file();
  }
  std::string error_of_file() const {
    try {
      const Checkpoint opened = Checkpoint::open(file_);
      for (const TensorInfo& info : opened.tensors()) opened.read(info.name);
    } catch (const FileError& error) {
      return error.what();
    }
    return "";
  }
  const std::string whole_ = testing::read_all(golden("gguf_tiny.gguf"));
  testing::TempDir dir_;
  const fs::path file_ = dir_.path() / "x.gguf";
};

TEST(Gguf, MetadataKeepsItsTypes) {
  const GgufFile file = GgufFile::open(golden("gguf_tiny.gguf"));
  EXPECT_EQ(file.string("general.architecture"), "llama");
  EXPECT_EQ(file.integer("llama.block_count"), 1);
  EXPECT_EQ(file.number("llama.block_count"), 1.0);
  EXPECT_EQ(file.number("llama.rope.freq_base"), 500000.0);
  ASSERT_NE(file.floats("test.floats"), nullptr);
  EXPECT_EQ(*file.floats("test.floats"), (std::vector<double>{0.5, -1.25}));
  EXPECT_TRUE(file.has("test.large"));
  EXPECT_THROW(file.integer("test.large"), FileError);
  EXPECT_THROW(file.string("llama.block_count"), FileError);
  EXPECT_EQ(file.string("absent"), std::nullopt);
  EXPECT_FALSE(file.strings("absent"));
  EXPECT_EQ(file.find("absent"), nullptr);
}

TEST(Gguf, EveryTypeDequantisesAsThePythonPackageDoes) {
  const Checkpoint model = Checkpoint::open(golden("gguf_tiny.gguf"));
  const SafetensorsFile expected = SafetensorsFile::open(golden("gguf_tiny.safetensors"));
  ASSERT_EQ(model.tensors().size(), expected.tensors().size());
  for (const TensorInfo& info : expected.tensors()) {
    SCOPED_TRACE(info.name);
    EXPECT_EQ(model.info(info.name).shape, info.shape);
    EXPECT_EQ(model.read(info.name), expected.read(info.name));  // bitwise: same float32 products
  }
  EXPECT_FALSE(model.config().tie_word_embeddings);
  EXPECT_EQ(model.config().rms_norm_eps, 1e-6);
  EXPECT_EQ(model.config().vocab_size, 11);
}

TEST_F(GgufDamage, EveryTruncationIsRefused) {
  ASSERT_EQ(error_of(whole_), "");
  for (std::size_t size = whole_.size(); size > 0;) {
    size -= size > 3000 ? 997 : 1;
    fs::resize_file(file_, size);
    ASSERT_NE(error_of_file(), "") << "truncated to " << size;
  }
}

TEST_F(GgufDamage, AnyFlippedBitThrowsOrOpens) {
  // Any value a flip can make: a layer count of 2^30 must end in a message, not in memory.
  std::mt19937 rng(2);
  // The header, keys and tensor list lie in the first 3000 bytes.
  testing::write_text(file_, whole_);
  for (std::size_t at = 0; at < std::min<std::size_t>(3000, whole_.size()); ++at) {
    testing::overwrite_byte(file_, at, static_cast<char>(whole_[at] ^ (1 << rng() % 8)));
    error_of_file();  // anything but a FileError escapes and fails the test
    testing::overwrite_byte(file_, at, whole_[at]);
  }
}

TEST_F(GgufDamage, MessagesNameTheFault) {
  const auto expect = [&](std::size_t at, const void* bytes, std::size_t size, const char* part) {
    std::string damaged = whole_;
    std::memcpy(damaged.data() + at, bytes, size);
    const std::string error = error_of(damaged);
    EXPECT_NE(error.find(part), std::string::npos) << error;
  };
  const std::uint32_t version = 2;
  const std::uint64_t count = std::uint64_t{1} << 60;
  expect(0, "GGML", 4, "does not start with 'GGUF'");
  expect(4, &version, 4, "version 2");
  expect(8, &count, 8, "1152921504606846976 tensors");
  // A tensor's entry: name, u32 rank, 2 x u64 extents, u32 type, u64 offset.
  const std::string name = "blk.0.ffn_up.weight";
  const std::size_t type = whole_.find(name) + name.size() + 4 + 16;
  const std::uint32_t q6_k = 14;
  expect(type, &q6_k, 4, "'blk.0.ffn_up.weight' has type Q6_K");
  const std::uint64_t odd = 31;
  expect(type + 4, &odd, 8, "'blk.0.ffn_up.weight' starts at offset 31");
  const std::uint64_t far = std::uint64_t{1} << 40;
  expect(type + 4, &far, 8, "'blk.0.ffn_up.weight' needs bytes");
  const std::uint64_t first = 0;
  expect(type + 4, &first, 8, "overlap");
  expect(whole_.find("blk.0.ffn_up") + 11, "q", 1, "'blk.0.ffn_uq.weight'");
}

TEST(LargeGguf, SmolLm2DequantisesAsThePythonPackageDoes) {
  CLEAVE_SKIP_WITHOUT(testing::smollm2_gguf());
  const Checkpoint model = Checkpoint::open(testing::smollm2_gguf());
  const SafetensorsFile expected = SafetensorsFile::open(golden("gguf_smollm2.safetensors"));
  for (const TensorInfo& info : expected.tensors()) {
    SCOPED_TRACE(info.name);
    const std::vector<float> actual = model.read(info.name);
    const std::vector<float> rows = expected.read(info.name);  // first and last row
    const std::size_t width = rows.size() / 2;
    ASSERT_GE(actual.size(), width);
    EXPECT_TRUE(std::equal(rows.begin(), rows.begin() + width, actual.begin()));
    EXPECT_TRUE(std::equal(rows.begin() + width, rows.end(), actual.end() - width));
  }
}

}  // namespace
}  // namespace cleave
