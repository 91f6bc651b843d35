#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "cleave/checkpoint.h"
#include "cleave/error.h"
#include "quants.h"
#include "support/paths.h"
#include "support/tiny_model.h"

namespace cleave {
namespace {

namespace fs = std::filesystem;

/// A file of this header and so many bytes of data.
std::string file_of(const std::string& header, std::size_t data_bytes) {
  std::string file(8, '\0');
  const std::uint64_t length = header.size();
  std::memcpy(file.data(), &length, sizeof length);
  return file + header + std::string(data_bytes, '\0');
}

class Safetensors : public ::testing::Test {
 protected:
  fs::path file() const { return dir_.path() / "x.safetensors"; }
  /// The message of the FileError that opening `content` gives; "" where it opens.
  std::string error_of(const std::string& content) const {
    testing::write_text(file(), content);
    return error_of_file();
  }
  std::string error_of_file() const {
    try {
      SafetensorsFile::open(file());
    } catch (const FileError& error) {
      EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
      return error.what();
    }
    return "";
  }
  void expect_error(const std::string& header, std::size_t data_bytes,
                    const std::string& part) const {
    const std::string error = error_of(file_of(header, data_bytes));
    EXPECT_NE(error.find(part), std::string::npos) << header << "\n  gave: " << error;
  }
  testing::TempDir dir_;
};

TEST_F(Safetensors, ReadsEveryPlainType) {
  const std::string header = R"({"a":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},)"
                             R"("b":{"dtype":"F64","shape":[],"data_offsets":[8,16]},)"
                             R"("c":{"dtype":"BOOL","shape":[1],"data_offsets":[16,17]},)"
                             R"("d":{"dtype":"F32","shape":[0,4],"data_offsets":[17,17]}})";
  std::string content = file_of(header, 17);
  const std::int32_t ints[] = {-7, 70000};
  const double number = -0.125;
  char* data = content.data() + 8 + header.size();
  std::memcpy(data, ints, 8);
  std::memcpy(data + 8, &number, 8);
  data[16] = 1;
  EXPECT_EQ(error_of(content), "");
  const SafetensorsFile opened = SafetensorsFile::open(file());
  EXPECT_EQ(opened.read("a"), (std::vector<float>{-7.0f, 70000.0f}));
  EXPECT_EQ(opened.read("b"), (std::vector<float>{-0.125f}));
  EXPECT_EQ(opened.read("c"), (std::vector<float>{1.0f}));
  EXPECT_TRUE(opened.read("d").empty());
  EXPECT_THROW(opened.read("e"), FileError);
}

TEST_F(Safetensors, RefusesEveryKindOfDamageByName) {
  std::string huge(16, '\0');
  const std::uint64_t length = std::uint64_t{1} << 60;
  std::memcpy(huge.data(), &length, sizeof length);
  EXPECT_NE(error_of(huge).find("1152921504606846976"), std::string::npos);
  EXPECT_NE(error_of("abc").find("truncated"), std::string::npos);
  EXPECT_NE(error_of(file_of("", 0)).find("does not start with"), std::string::npos);
  EXPECT_NE(error_of(file_of("[]", 0)).find("does not start with"), std::string::npos);

  const auto one = [](const std::string& dtype, const std::string& shape,
                      const std::string& offsets) {
    return R"({"w":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" +
           offsets + "}}";
  };
  expect_error(one("F31", "[1]", "[0,4]"), 4, "'w': key 'dtype'");
  expect_error(one("F32", "[2]", "[0,4]"), 4, "'w': its shape needs 8 bytes");
  expect_error(one("F32", "[-1]", "[0,4]"), 4, "'w': key 'shape'");
  expect_error(one("F32", "[1.5]", "[0,4]"), 4, "'w': key 'shape'");
  expect_error(one("F32", "[4294967296,4294967296]", "[0,4]"), 4, "'w': the product");
  expect_error(one("F32", "[4611686018427387904,4]", "[0,0]"), 0, "'w': the product");
  expect_error(one("F32", "[2]", "[0,8]"), 4, "'w': data_offsets [0, 8)");
  expect_error(one("F32", "[2]", "[8,0]"), 8, "'w': data_offsets");
  expect_error(one("F32", "[2]", "[0]"), 8, "'w': key 'data_offsets'");
  expect_error(one("F32", "[1]", "[4,8]"), 8, "'w' begins at byte 4");
  expect_error(one("F32", "[1]", "[0,4]"), 8, "the file holds 8");
  expect_error(R"({"w":3})", 0, "'w'");
  expect_error(R"({"w":{"shape":[1],"data_offsets":[0,4]}})", 4, "'w': has no dtype");
  expect_error(R"({"__metadata__":{"format":1}})", 0, "__metadata__");
  expect_error(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
               R"("w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
               8, "'w' occurs twice");
  expect_error(R"({"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
               R"("w":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
               12, "overlap");
  expect_error(R"({"w":)", 0, "not valid JSON");
}

TEST_F(Safetensors, AnyTruncationOrFlippedHeaderByteThrowsOrParses) {
  testing::write_tiny_model(dir_.path() / "m");
  const std::string whole = testing::read_all(dir_.path() / "m" / "model.safetensors");
  std::uint64_t length = 0;
  std::memcpy(&length, whole.data(), sizeof length);
  testing::write_text(file(), whole);
  std::mt19937 rng(1);
  for (std::size_t at = 0; at < 8 + length; ++at) {
    testing::overwrite_byte(file(), at, static_cast<char>(whole[at] ^ (1 << rng() % 8)));
    if (error_of_file().empty()) {  // any exception but a FileError fails the test
      const SafetensorsFile opened = SafetensorsFile::open(file());
      for (const TensorInfo& info : opened.tensors()) opened.read(info.name);
    }
    testing::overwrite_byte(file(), at, whole[at]);
  }
  ASSERT_EQ(error_of_file(), "");
  fs::resize_file(file(), whole.size() - 1);
  ASSERT_NE(error_of_file(), "");
  for (std::size_t size = 8 + length; size-- > 0;) {
    fs::resize_file(file(), size);
    ASSERT_NE(error_of_file(), "") << "truncated to " << size;
  }
}

TEST_F(Safetensors, SameTensorsGiveTheSameBytesInAnyOrder) {
  auto tensors = testing::tiny_tensors();
  write_safetensors(dir_.path() / "a", tensors, DType::kF32);
  std::reverse(tensors.begin(), tensors.end());
  write_safetensors(dir_.path() / "b", tensors, DType::kF32);
  EXPECT_EQ(testing::read_all(dir_.path() / "a"), testing::read_all(dir_.path() / "b"));
  const std::string bytes = testing::read_all(dir_.path() / "a");
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), sizeof length);
  EXPECT_EQ(length % 8, 0u);
}

TEST_F(Safetensors, WriteThenReadRoundsToTheNearest) {
  const std::vector<float> values = {1.0f, -2.5f, 1.0f / 3.0f, 0.0f, 1e-30f};
  const NamedTensor tensor{"t", {5}, [&] { return values; }};
  for (const auto dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    write_safetensors(file(), {&tensor, 1}, dtype);
    const auto read = SafetensorsFile::open(file()).read("t");
    const double half_ulp = dtype == DType::kF32 ? 0.0 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
    // 1e-30 is below half of binary16's smallest number, 2^-24.
    for (std::size_t i = 0; i < values.size(); ++i)
      EXPECT_NEAR(read[i], values[i], half_ulp * std::abs(values[i]) + 1e-29) << dtype_name(dtype);
  }
}

TEST_F(Safetensors, WriterRefusesWhatItCannotHold) {
  const auto write = [&](std::vector<NamedTensor> tensors, DType dtype) {
    write_safetensors(file(), tensors, dtype);
  };
  const auto of = [](float value) {
    return NamedTensor{"t", {2}, [value] { return std::vector<float>{0.0f, value}; }};
  };
  EXPECT_THROW(write({of(std::nanf(""))}, DType::kF32), InvalidArgument);
  EXPECT_THROW(write({of(std::numeric_limits<float>::infinity())}, DType::kF32), InvalidArgument);
  EXPECT_THROW(write({of(65520.0f)}, DType::kF16), InvalidArgument);
  EXPECT_THROW(write({of(3.4e38f)}, DType::kBF16), InvalidArgument);
  EXPECT_THROW(write({of(1.0f), of(1.0f)}, DType::kF32), InvalidArgument);
  EXPECT_THROW(write({of(1.0f)}, DType::kQ8_0), InvalidArgument);
  EXPECT_THROW(write({{"t", {3}, [] { return std::vector<float>(2); }}}, DType::kF32),
               InvalidArgument);
  EXPECT_TRUE(fs::is_empty(dir_.path())) << "a failed write left a file behind";
  EXPECT_NO_THROW(write({of(65519.0f)}, DType::kF16));
}

TEST(Half, EveryBitPatternSurvivesTheRoundTrip) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float value = half_to_float(half);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(half_to_float(float_to_half(value))));
    } else {
      ASSERT_EQ(float_to_half(value), half);
    }
    const float wide = bf16_to_float(half);
    if (!std::isnan(wide)) {
      ASSERT_EQ(float_to_bf16(wide), half);
    }
  }
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::nanf("")))));
}

TEST(Half, RoundsToTheNearestAndTiesToEven) {
  // Between two neighbours the nearer wins; in the middle the one with an even last bit.
  for (std::uint32_t bits = 0; bits < 0x7bff; ++bits) {
    const float low = half_to_float(static_cast<std::uint16_t>(bits));
    const float high = half_to_float(static_cast<std::uint16_t>(bits + 1));
    const float middle = 0.5f * (low + high);  // exact: float32 has 13 bits to spare
    ASSERT_EQ(float_to_half(middle), bits + (bits & 1));
    ASSERT_EQ(float_to_half(std::nextafter(middle, low)), bits);
    ASSERT_EQ(float_to_half(std::nextafter(middle, high)), bits + 1);
  }
}

}  // namespace
}  // namespace cleave
