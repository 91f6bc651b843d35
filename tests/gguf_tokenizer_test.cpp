#include "gguf_tokenizer.h"

#include <gtest/gtest.h>

#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>

#include "cleave/error.h"
#include "cleave/tokenizer.h"
#include "gguf.h"
#include "gguf_vocabulary.h"
#include "support/paths.h"

namespace cleave {
namespace {

using nlohmann::json;
using Texts = std::vector<std::string>;
using Ids = std::vector<std::int32_t>;

/// Writes a GGUF v3 file that holds nothing but metadata.
class GgufWriter {
 public:
  void put(const std::string& key, const std::string& value) {
    begin(key, 8);
    text(value);
  }
  void put(const std::string& key, bool value) {
    begin(key, 7);
    entries_.push_back(value ? 1 : 0);
  }
  void put_id(const std::string& key, std::uint32_t value) {
    begin(key, 4);
    raw(value);
  }
  void put(const std::string& key, const Texts& values) {
    array(key, 8, values.size());
    for (const std::string& value : values) text(value);
  }
  void put(const std::string& key, const std::vector<float>& values) {
    array(key, 6, values.size());
    for (const float value : values) raw(value);
  }
  void put(const std::string& key, const Ids& values) {
    array(key, 5, values.size());
    for (const std::int32_t value : values) raw(value);
  }
  GgufFile file(const std::filesystem::path& folder) const {
    const auto path = folder / "vocabulary.gguf";
    std::ofstream out(path, std::ios::binary);
    const auto number = [&](auto value) {
      out.write(reinterpret_cast<const char*>(&value), sizeof(value));
    };
    out << "GGUF";
    number(std::uint32_t{3});
    number(std::uint64_t{0});
    number(count_);
    out << entries_;
    out << std::string(64, '\0');
    out.close();
    return GgufFile::open(path);
  }

 private:
  template <class T>
  void raw(T value) {
    entries_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  void text(const std::string& value) {
    raw(std::uint64_t{value.size()});
    entries_ += value;
  }
  void begin(const std::string& key, std::uint32_t type) {
    ++count_;
    text(key);
    raw(type);
  }
  void array(const std::string& key, std::uint32_t type, std::uint64_t size) {
    begin(key, 9);
    raw(type);
    raw(size);
  }
  std::string entries_;
  std::uint64_t count_ = 0;
};

const Texts kTokens = {"<unk>", "<s>", "</s>", "<0x0A>",  "\u2581",   "a",    "b",      "\u00E9",
                       "ab",    "ba",  "aba",  "\u2581a", "\u2581ab", "abab", "\u00E9a"};
const std::vector<float> kScores = {0, 0, 0, 0, -9, -9, -9, -9, -1, -2, -4, -3, -4, -4, -5};

GgufWriter llama_vocabulary() {
  GgufWriter writer;
  writer.put("general.architecture", std::string("llama"));
  writer.put("tokenizer.ggml.model", std::string("llama"));
  writer.put("tokenizer.ggml.tokens", kTokens);
  writer.put("tokenizer.ggml.scores", kScores);
  writer.put("tokenizer.ggml.token_type", Ids{2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1});
  writer.put_id("tokenizer.ggml.bos_token_id", 1);
  writer.put_id("tokenizer.ggml.eos_token_id", 2);
  writer.put_id("tokenizer.ggml.unknown_token_id", 0);
  return writer;
}

// Written by transformers.tokenization_utils_base.generate_merges (5.23) for these lists.
TEST(GgufTokenizer, RecoversMergesAsTransformersDoes) {
  const GgufVocabulary::MergeList expected = {
      {"a", "b"},  {"b", "a"},       {"\u2581", "a"}, {"aba", "b"},     {"ab", "ab"},
      {"ab", "a"}, {"\u2581a", "b"}, {"a", "ba"},     {"\u2581", "ab"}, {"\u00E9", "a"}};
  EXPECT_EQ(merges_from_scores(kTokens, std::vector<double>(kScores.begin(), kScores.end())),
            expected);
}

TEST(GgufTokenizer, ReadsTheLlamaKind) {
  const testing::TempDir folder;
  const auto files = gguf_tokenizer_files(llama_vocabulary().file(folder.path()));
  const Tokenizer tokenizer = Tokenizer::from_json(files.tokenizer_json, "gguf");
  EXPECT_EQ(tokenizer.encode("ab a\n", true), (Ids{1, 12, 11, 3}));  // BOS is the default
  EXPECT_EQ(tokenizer.encode("?</s>"), (Ids{4, 0, 2}));
  EXPECT_EQ(tokenizer.decode(Ids{1, 12, 11, 3}), "ab a\n");
  EXPECT_EQ(tokenizer.vocab_size(), 15);
  EXPECT_EQ(json::parse(files.generation_config_json),
            (json{{"bos_token_id", 1}, {"eos_token_id", 2}}));
  EXPECT_EQ(files.chat_template, "");
}

TEST(GgufTokenizer, HonoursAddSpacePrefixAndAddBos) {
  const testing::TempDir folder;
  GgufWriter writer = llama_vocabulary();
  writer.put("tokenizer.ggml.add_space_prefix", false);
  writer.put("tokenizer.ggml.add_bos_token", false);
  const auto files = gguf_tokenizer_files(writer.file(folder.path()));
  const Tokenizer tokenizer = Tokenizer::from_json(files.tokenizer_json, "gguf");
  EXPECT_EQ(tokenizer.encode("ab a", true), (Ids{8, 11}));
  EXPECT_EQ(tokenizer.decode(Ids{11, 8}), " aab");
}

GgufWriter byte_vocabulary(const std::string& pre) {
  GgufWriter writer;
  writer.put("tokenizer.ggml.model", std::string("gpt2"));
  writer.put("tokenizer.ggml.pre", pre);
  writer.put("tokenizer.ggml.tokens", Texts{"1", "2", "12", "122", "\u0120", "<e>", "<u>", "\u00C3",
                                            "\u00A9", "\u00C3\u00A9"});
  writer.put("tokenizer.ggml.merges", Texts{"1 2", "12 2", "\u00C3 \u00A9"});
  writer.put("tokenizer.ggml.token_type", Ids{1, 1, 1, 1, 1, 3, 4, 1, 1, 1});
  writer.put_id("tokenizer.ggml.bos_token_id", 5);
  writer.put("tokenizer.chat_template", std::string("{{ x }}"));
  return writer;
}

TEST(GgufTokenizer, ChoosesThePreTokenizerByItsName) {
  const auto encode = [](const std::string& pre, const std::string& text) {
    const testing::TempDir folder;
    const auto files = gguf_tokenizer_files(byte_vocabulary(pre).file(folder.path()));
    EXPECT_EQ(files.chat_template, "{{ x }}");
    return Tokenizer::from_json(files.tokenizer_json, pre).encode(text, true);
  };
  const std::string text = "122122<e><u>";
  EXPECT_EQ(encode("gpt-2", text), (Ids{3, 3, 5, 6}));
  EXPECT_EQ(encode("default", text), (Ids{3, 3, 5, 6}));
  EXPECT_EQ(encode("smollm", text), (Ids{0, 1, 1, 0, 1, 1, 5, 6}));
  EXPECT_EQ(encode("qwen2", text), (Ids{0, 1, 1, 0, 1, 1, 5, 6}));
  EXPECT_EQ(encode("llama-bpe", text), (Ids{5, 3, 3, 5, 6}));  // Llama 3 wants a BOS
  EXPECT_EQ(encode("llama-bpe", "1212"), (Ids{5, 2, 0, 1}));   // "121", "2"
  EXPECT_EQ(encode("qwen2", "e\u0301"), (Ids{9}));             // composed first
  EXPECT_EQ(encode("gpt-2", "\u00E9"), (Ids{9}));
}

TEST(GgufTokenizer, ErrorsNameTheKey) {
  const auto message = [](const std::function<void(GgufWriter&)>& change) -> std::string {
    const testing::TempDir folder;
    GgufWriter writer;
    change(writer);
    try {
      gguf_tokenizer_files(writer.file(folder.path()));
    } catch (const FileError& error) {
      return error.what();
    }
    return "no error";
  };
  const auto names = [&](const std::string& key, const std::function<void(GgufWriter&)>& change) {
    const std::string text = message(change);
    EXPECT_NE(text.find(key), std::string::npos) << text;
  };
  names("tokenizer.ggml.model", [](GgufWriter&) {});
  names("tokenizer.ggml.tokens",
        [](GgufWriter& w) { w.put("tokenizer.ggml.model", std::string("gpt2")); });
  names("tokenizer.ggml.pre", [](GgufWriter& w) { w = byte_vocabulary("flux"); });
  names("tokenizer.ggml.scores", [](GgufWriter& w) {
    w.put("tokenizer.ggml.model", std::string("llama"));
    w.put("tokenizer.ggml.tokens", Texts{"a"});
  });
  names("tokenizer.ggml.merges[0]", [](GgufWriter& w) {
    w.put("tokenizer.ggml.model", std::string("gpt2"));
    w.put("tokenizer.ggml.tokens", Texts{"a"});
    w.put("tokenizer.ggml.merges", Texts{"ab"});
  });
  names("eos_token_id", [](GgufWriter& w) {
    w = byte_vocabulary("gpt-2");
    w.put_id("tokenizer.ggml.eos_token_id", 10);
  });
}

}  // namespace
}  // namespace cleave
