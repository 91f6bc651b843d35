#include "packed_cache.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <random>

#include <sys/stat.h>
#include <unistd.h>

#include "cleave/error.h"
#include "hash64.h"
#include "kernels/packed_format.h"
#include "quants.h"
#include "support/paths.h"
#include "support/random_llama.h"
#include "support/tiny_model.h"
#include "support/tiny_models.h"

namespace cleave {
namespace {

using namespace testing;
namespace fs = std::filesystem;

constexpr WeightType kAllTypes[] = {WeightType::kF32, WeightType::kBF16, WeightType::kF16,
                                    WeightType::kInt8, WeightType::kInt4};

/// A model in a folder of its own, and what loading it with a cache file tells.
struct CachedModel {
  explicit CachedModel(const fs::path& source) {
    fs::copy(source, dir.path() / "model", fs::copy_options::recursive);
  }
  CachedModel() { write_random_llama(dir.path() / "model", {}); }

  Model load(WeightType type = WeightType::kBF16, bool write = true) {
    notices.clear();
    ModelSpec spec{.threads = 2, .weights = type, .cache = {.file = file, .write = write}};
    spec.notice = [this](const std::string& line) { notices.push_back(line); };
    return Model::load(Checkpoint::open(dir.path() / "model"), spec);
  }
  std::string notice() const { return notices.empty() ? std::string() : notices.front(); }

  TempDir dir;
  fs::path file = dir.path() / "weights.packed";
  std::vector<std::string> notices;
};

const std::vector<std::int32_t> kIds = {3, 1, 4, 1, 5, 9, 2, 6};

TEST(PackedCache, MappedWeightsGiveTheSameLogits) {
  for (const char* name : {"llama", "llama_long", "mixtral", "granitemoeshared"})
    for (const WeightType type : kAllTypes) {
      SCOPED_TRACE(fmt::format("{} {}", name, weight_type_name(type)));
      const TinyGolden golden = tiny_golden(name);
      CachedModel cached(golden.directory);
      Model packed =
          Model::load(Checkpoint::open(golden.directory), {.threads = 2, .weights = type});
      EXPECT_FALSE(packed.cached());
      const std::vector<float> expected = all_logits(packed, golden.ids);
      for (const char* state : {"written", "mapped"}) {
        SCOPED_TRACE(state);
        Model model = cached.load(type);
        EXPECT_TRUE(model.cached());
        EXPECT_EQ(model.weight_bytes(), packed.weight_bytes());
        EXPECT_EQ(all_logits(model, golden.ids), expected);
      }
      EXPECT_EQ(cached.notices.size(), 0u) << "a file that fits needs no notice";
    }
}

// Mapped and packed alike: float32 with float32 and float16 weights, bfloat16 with all others.
TEST(PackedCache, RoutersAreFloat32OrBfloat16) {
  const TinyGolden golden = tiny_golden("mixtral");
  for (const WeightType type : kAllTypes) {
    SCOPED_TRACE(weight_type_name(type));
    CachedModel cached(golden.directory);
    const bool exact = type == WeightType::kF32 || type == WeightType::kF16;
    const std::vector<float> stored =
        Checkpoint::open(golden.directory).read("model.layers.1.block_sparse_moe.gate.weight");
    for (const bool mapped : {false, true}) {
      cached.load(type);
      const Model model =
          mapped ? cached.load(type)
                 : Model::load(Checkpoint::open(golden.directory), {.threads = 2, .weights = type});
      const std::vector<float> router = model.moe_layer(1).router.weight;
      ASSERT_EQ(router.size(), stored.size());
      for (std::size_t i = 0; i < stored.size(); ++i)
        ASSERT_EQ(router[i], exact ? stored[i] : bf16_to_float(float_to_bf16(stored[i]))) << i;
    }
  }
}

TEST(PackedCache, TheFirstLoadWritesAndSaysSo) {
  CachedModel cached;
  cached.load();
  EXPECT_TRUE(fs::exists(cached.file));
  ASSERT_EQ(cached.notices.size(), 1u);
  EXPECT_NE(cached.notice().find(cached.file.string()), std::string::npos) << cached.notice();
}

TEST(PackedCache, IsNotWrittenUnasked) {
  CachedModel cached;
  EXPECT_FALSE(cached.load(WeightType::kBF16, /*write=*/false).cached());
  EXPECT_FALSE(fs::exists(cached.file));
  EXPECT_TRUE(cached.notices.empty());
  cached.load();
  EXPECT_TRUE(cached.load(WeightType::kBF16, /*write=*/false).cached());
}

/// Loads with a file that is of no use: it is used neither unasked nor asked, is replaced only when
/// asked, and the logits are right each time.
void expect_made_again(CachedModel& cached, const std::string& reason,
                       WeightType type = WeightType::kBF16) {
  const std::string before = read_all(cached.file);
  Model plain =
      Model::load(Checkpoint::open(cached.dir.path() / "model"), {.threads = 2, .weights = type});
  const std::vector<float> expected = logits_of(plain, kIds);
  {
    Model model = cached.load(type, /*write=*/false);
    EXPECT_FALSE(model.cached());
    EXPECT_NE(cached.notice().find(reason), std::string::npos) << cached.notice();
    EXPECT_EQ(logits_of(model, kIds), expected);
    EXPECT_EQ(read_all(cached.file), before);
  }
  Model model = cached.load(type);
  EXPECT_TRUE(model.cached());
  ASSERT_EQ(cached.notices.size(), 2u);
  EXPECT_NE(cached.notice().find(reason), std::string::npos) << cached.notice();
  EXPECT_EQ(logits_of(model, kIds), expected);
  EXPECT_TRUE(cached.load(type).cached());
  EXPECT_TRUE(cached.notices.empty());
}

TEST(PackedCache, AnotherWeightTypeIsMadeAgain) {
  CachedModel cached;
  cached.load(WeightType::kInt8);
  expect_made_again(cached, "int8 weights");
}

TEST(PackedCache, AChangedSourceIsMadeAgain) {
  CachedModel cached;
  cached.load();
  write_random_llama(cached.dir.path() / "model", {.seed = 2});
  expect_made_again(cached, "has changed since");
}

TEST(PackedCache, ASourceWithAnotherTimeOrConfigurationIsMadeAgain) {
  CachedModel cached;
  cached.load();
  const fs::path weights = cached.dir.path() / "model" / "model.safetensors";
  fs::last_write_time(weights, fs::last_write_time(weights) + std::chrono::nanoseconds(1000));
  expect_made_again(cached, "has changed since");
  const fs::path config = cached.dir.path() / "model" / "config.json";
  std::string text = read_all(config);
  text.replace(text.find("10000.0"), 7, "20000.0");
  write_text(config, text);
  expect_made_again(cached, "has changed since");
}

TEST(PackedCache, AnotherVersionIsMadeAgain) {
  CachedModel cached;
  cached.load();
  std::string bytes = read_all(cached.file);
  const std::string key = fmt::format(R"("version":"{}")", kPackedCacheVersion);
  const std::size_t at = bytes.find(key);
  ASSERT_NE(at, std::string::npos);
  overwrite_byte(cached.file, at + key.size() - 2, '0');
  expect_made_again(cached, "format version 0");
}

TEST(PackedCache, TruncatedFilesAreMadeAgain) {
  CachedModel cached;
  cached.load();
  const std::string whole = read_all(cached.file);
  for (const std::size_t size : {std::size_t{0}, std::size_t{7}, std::size_t{100},
                                 std::size_t{4096}, whole.size() / 2, whole.size() - 1}) {
    SCOPED_TRACE(size);
    write_text(cached.file, whole.substr(0, size));
    expect_made_again(cached, cached.file.string());
  }
}

TEST(PackedCache, AFileOfAnotherKindIsMadeAgain) {
  CachedModel cached;
  fs::copy_file(cached.dir.path() / "model" / "model.safetensors", cached.file);
  expect_made_again(cached, "holds no packed weights");
  write_text(cached.file, "something else entirely");
  expect_made_again(cached, cached.file.string());
}

// Whatever byte is damaged: the file is refused with one line, or the byte was one of the spaces of
// the header, and the weights are what they were.
TEST(PackedCache, NoDamagedByteGoesUnnoticed) {
  CachedModel cached;
  Model model = cached.load();
  const std::vector<float> expected = logits_of(model, kIds);
  const std::string whole = read_all(cached.file);
  std::mt19937 rng(1);
  std::uint64_t header = 0;
  std::memcpy(&header, whole.data(), sizeof header);
  for (int i = 0; i < 400; ++i) {
    // Half of the damages go where the header has its text.
    const std::size_t at = i < 200 ? rng() % whole.find("  ") : rng() % whole.size();
    const char value = static_cast<char>(whole[at] ^ static_cast<char>(1 << rng() % 8));
    overwrite_byte(cached.file, at, value);
    Model read = cached.load(WeightType::kBF16, /*write=*/false);
    if (read.cached()) {
      EXPECT_LT(at, header + 8) << "a damaged weight was mapped";
    } else {
      EXPECT_EQ(cached.notices.size(), 1u);
    }
    ASSERT_EQ(logits_of(read, kIds), expected) << "byte " << at;
    overwrite_byte(cached.file, at, whole[at]);
  }
}

TEST(PackedCache, ADamagedWeightIsNamed) {
  CachedModel cached;
  cached.load();
  const std::string whole = read_all(cached.file);
  overwrite_byte(cached.file, whole.size() * 3 / 4,
                 static_cast<char>(~whole[whole.size() * 3 / 4]));
  expect_made_again(cached, "is damaged");
}

TEST(PackedCache, AFolderThatCannotBeWrittenIsNoFault) {
  CachedModel cached;
  cached.file = cached.dir.path() / "missing" / "weights.packed";
  Model model = cached.load();
  EXPECT_FALSE(model.cached());
  EXPECT_NE(cached.notice().find("stay in memory"), std::string::npos) << cached.notice();
  if (::geteuid() == 0) GTEST_SKIP() << "root writes anywhere";
  const fs::path sealed = cached.dir.path() / "sealed";
  fs::create_directory(sealed);
  fs::permissions(sealed, fs::perms::owner_read | fs::perms::owner_exec);
  cached.file = sealed / "weights.packed";
  EXPECT_FALSE(cached.load().cached());
  EXPECT_NE(cached.notice().find("stay in memory"), std::string::npos) << cached.notice();
  fs::permissions(sealed, fs::perms::owner_all);
}

TEST(PackedCache, AModelOutlivesTheNameOfItsFile) {
  CachedModel cached;
  Model first = cached.load();
  const std::vector<float> expected = logits_of(first, kIds);
  write_random_llama(cached.dir.path() / "model", {.seed = 2});
  Model second = cached.load();  // another file under the name
  EXPECT_NE(logits_of(second, kIds), expected);
  fs::remove(cached.file);
  EXPECT_EQ(logits_of(first, kIds), expected);
}

TEST(PackedCache, NothingIsLeftBehindWhereTheSourceIsBroken) {
  CachedModel cached;
  const fs::path weights = cached.dir.path() / "model" / "model.safetensors";
  const std::string bytes = read_all(weights);
  for (std::size_t at = bytes.size() - 4; at < bytes.size(); ++at)
    overwrite_byte(weights, at, static_cast<char>(0xff));  // NaN, in the last tensor
  EXPECT_THROW(cached.load(), FileError);
  EXPECT_EQ(std::distance(fs::directory_iterator(cached.dir.path()), fs::directory_iterator()), 1);
}

TEST(PackedCache, LiesBesideTheModel) {
  CachedModel cached;
  const fs::path model = cached.dir.path() / "model";
  EXPECT_EQ(default_cache_file(Checkpoint::open(model), WeightType::kInt4),
            model / "cleave.int4.packed");
  const fs::path gguf = source_dir() / "tests" / "golden" / "gguf_tiny.gguf";
  EXPECT_EQ(default_cache_file(Checkpoint::open(gguf), WeightType::kBF16),
            fs::path(gguf.string() + ".bf16.packed"));
}

// The bytes that a cache file holds for given weights. If this fails, packed weights mean something
// else than before: raise kPackedCacheVersion, then write the new hashes here.
TEST(PackedCache, TheVersionNamesTheseBytes) {
  // Not from <random>, whose distributions differ between standard libraries.
  const auto values = [](std::uint32_t n, std::uint32_t seed) {
    std::vector<float> v(n);
    for (std::uint32_t i = 0; i < n; ++i)
      v[i] = static_cast<float>((seed + i) * 2654435761u >> 16) * 0x1p-16f - 0.5f;
    return v;
  };
  DenseFfn ffn;
  ffn.hidden = 40;
  ffn.d_model = 70;
  ffn.gate = values(40 * 70, 1);
  ffn.up = values(40 * 70, 10000);
  ffn.down = values(40 * 70, 20000);
  std::vector<std::uint64_t> hashes;
  for (const WeightType type : kAllTypes) {
    const PackedExperts experts(ffn.view(), type);
    const PackedLinear matrix({ffn.up.data(), 40, 70}, type);
    hashes.push_back(hash64({experts.expert(0), static_cast<std::size_t>(experts.bytes())}));
    hashes.push_back(hash64({matrix.data(), static_cast<std::size_t>(matrix.bytes())}));
  }
  // Panels that would lie a power of two apart are followed by a gap.
  EXPECT_EQ(ExpertLayout(WeightType::kBF16, true, 2048).bytes(), 198656);
  EXPECT_EQ(ExpertLayout(WeightType::kBF16, true, 576).bytes(), 55296);
  EXPECT_EQ(kPackedCacheVersion, 5);
  const std::vector<std::uint64_t> expected = {
      5782653931727376200u,  3129911873024360173u, 16290272059884264363u, 9146397794057263907u,
      15266565610653862966u, 8014583004373438550u, 1675623153806550888u,  8116668216320295476u,
      3268719279099418729u,  12831769441255490486u};
  EXPECT_EQ(hashes, expected);
}

TEST(Checkpoint, RowsEqualTheWhole) {
  const Checkpoint gguf = Checkpoint::open(source_dir() / "tests" / "golden" / "gguf_tiny.gguf");
  int interleaved = 0;
  for (const TensorInfo& tensor : gguf.tensors()) {
    if (tensor.shape.size() != 2) continue;
    const std::vector<float> whole = gguf.read(tensor.name);
    const std::int64_t rows = tensor.shape[0], cols = tensor.shape[1];
    const std::int64_t first = rows / 3, count = rows - rows / 3;
    std::vector<float> some(static_cast<std::size_t>(count * cols));
    gguf.release(tensor.name);  // and back again
    gguf.read_rows(tensor.name, first, {some.data(), count, cols});
    EXPECT_TRUE(std::equal(some.begin(), some.end(), whole.begin() + first * cols)) << tensor.name;
    interleaved += tensor.name.find("q_proj") != std::string::npos ? 1 : 0;
    EXPECT_THROW(gguf.read_rows(tensor.name, rows - count + 1, {some.data(), count, cols}),
                 InvalidArgument);
    EXPECT_THROW(gguf.read_rows(tensor.name, 0, {some.data(), 1, cols - 1}), InvalidArgument);
  }
  EXPECT_GT(interleaved, 0);
}

TEST(Checkpoint, FingerprintTellsSourcesApart) {
  const TempDir dir;
  write_random_llama(dir.path() / "a", {});
  const std::string first = Checkpoint::open(dir.path() / "a").fingerprint();
  EXPECT_EQ(Checkpoint::open(dir.path() / "a").fingerprint(), first);
  EXPECT_EQ(first.size(), 16u);
  write_random_llama(dir.path() / "b", {.seed = 2});
  EXPECT_NE(Checkpoint::open(dir.path() / "b").fingerprint(), first);
}

}  // namespace
}  // namespace cleave
