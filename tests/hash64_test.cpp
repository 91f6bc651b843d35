#include "hash64.h"

#include <gtest/gtest.h>

#include <string>

namespace cleave {
namespace {

std::uint64_t hash_of(const std::string& text) {
  return hash64(std::as_bytes(std::span(text.data(), text.size())));
}

std::string counting_bytes(std::size_t size) {
  std::string text(size, '\0');
  for (std::size_t i = 0; i < size; ++i) text[i] = static_cast<char>(i * 7 + 1);
  return text;
}

// Values of the `xxhash` Python package 4.1.0: xxhash.xxh64(data).hexdigest().
TEST(Hash64, EqualsXxh64) {
  EXPECT_EQ(hash_of(""), 0xef46db3751d8e999u);
  EXPECT_EQ(hash_of("a"), 0xd24ec4f1a98c6e5bu);
  EXPECT_EQ(hash_of("abc"), 0x44bc2cf5ad770999u);
  EXPECT_EQ(hash_of(counting_bytes(4)), 0x22eda2cf6af4c124u);
  EXPECT_EQ(hash_of(counting_bytes(12)), 0x9178b724dce384c0u);
  EXPECT_EQ(hash_of(counting_bytes(31)), 0x6ab1c40e29f50073u);
  EXPECT_EQ(hash_of(counting_bytes(32)), 0x5a0756fbe9ecd3d1u);
  EXPECT_EQ(hash_of(counting_bytes(33)), 0xdc50cdc37bb9c183u);
  EXPECT_EQ(hash_of(counting_bytes(100)), 0xd248bfc5208b0b16u);
  EXPECT_EQ(hash_of(counting_bytes(4099)), 0x322144df5662eadbu);
}

TEST(Hash64, EveryByteAndTheLengthCount) {
  for (const std::size_t size : {1, 31, 32, 33, 63, 64, 100}) {
    const std::string text = counting_bytes(size);
    for (std::size_t i = 0; i < size; ++i) {
      std::string other = text;
      other[i] = static_cast<char>(other[i] ^ 4);
      EXPECT_NE(hash_of(other), hash_of(text)) << size << " bytes, byte " << i;
    }
    EXPECT_NE(hash_of(text + '\0'), hash_of(text));
  }
}

}  // namespace
}  // namespace cleave
