#include "sha256.h"

#include <memory>

#include <openssl/evp.h>

#include "fail.h"
#include "mapped_file.h"

namespace cleave {

std::string sha256_of_files(std::span<const std::filesystem::path> files) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(),
                                                                        &EVP_MD_CTX_free);
  bool good = context && EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) == 1;
  for (const auto& path : files) {
    const MappedFile file = MappedFile::open(path);
    good = good && EVP_DigestUpdate(context.get(), file.bytes().data(), file.bytes().size()) == 1;
  }
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  good = good && EVP_DigestFinal_ex(context.get(), digest, &length) == 1;
  // OpenSSL can be built or configured without an algorithm.
  if (!good) throw Error("sha256: this build of OpenSSL cannot compute SHA-256");
  std::string hex;
  for (unsigned int i = 0; i < length; ++i) hex += fmt::format("{:02x}", digest[i]);
  return hex;
}

}  // namespace cleave
