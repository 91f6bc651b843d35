#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

// Where tests find their files. Nothing here is copied: a file that is absent makes its test skip.
namespace cleave::testing {

inline std::filesystem::path source_dir() { return CLEAVE_SOURCE_DIR; }

/// Files kept beside the checkout (texts and a small model); CLEAVE_SHARED_DIR overrides.
inline std::filesystem::path shared_dir() {
  const char* dir = std::getenv("CLEAVE_SHARED_DIR");
  return dir != nullptr ? std::filesystem::path(dir) : source_dir().parent_path() / "shared";
}

/// Models that scripts/fetch_models.sh brings; CLEAVE_MODELS_DIR overrides.
inline std::filesystem::path models_dir() {
  const char* dir = std::getenv("CLEAVE_MODELS_DIR");
  return dir != nullptr ? std::filesystem::path(dir) : source_dir() / "models";
}

inline std::filesystem::path smollm2_gguf() {
  return models_dir() / "SmolLM2-135M-Instruct.Q4_1.gguf";
}
inline std::filesystem::path minilm_dir() { return models_dir() / "all-MiniLM-L6-v2"; }
inline std::filesystem::path tinystories_dir() {
  return shared_dir() / "models" / "tinystories-656K";
}
inline std::filesystem::path demo_llama_dir() {
  return source_dir() / "examples" / "models" / "demo-llama";
}

inline std::string read_all(const std::filesystem::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

/// A fresh empty directory, removed with the object.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "cleave_test_XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) std::abort();
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace cleave::testing

#define CLEAVE_SKIP_WITHOUT(path)                                                      \
  do {                                                                                 \
    if (!std::filesystem::exists(path)) GTEST_SKIP() << "absent: " << (path).string(); \
  } while (false)
