#pragma once

#include <cleave/cleave.h>
#include <ggml.h>

#include <filesystem>
#include <vector>

/// Writes a Llama, or a Mixtral that cleave wrote, as a GGUF file for llama.cpp: matrices in
/// `type`, norms and routers in float32, token ids without a vocabulary. Every matrix is first
/// rounded to bfloat16, so that files of both types hold the same values.
/// @param type  GGML_TYPE_F32 or GGML_TYPE_BF16
/// @throws std::runtime_error  biases or scaled rotary positions, or the disk is full
void write_gguf(const cleave::Checkpoint& model, ggml_type type, const std::filesystem::path& file);

/// Such a file in the folder for temporary files, gone at the end.
class TemporaryGguf {
 public:
  TemporaryGguf(const cleave::Checkpoint& model, ggml_type type);
  ~TemporaryGguf();
  TemporaryGguf(const TemporaryGguf&) = delete;
  TemporaryGguf& operator=(const TemporaryGguf&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// The experts of a layer, or its dense FFN as one expert, with the values of write_gguf().
cleave::ExpertBank read_experts(const cleave::Checkpoint& model, std::int64_t layer);
