#include "sha256.h"

// For SHA256_Update and its like, which OpenSSL 3 deprecates in favour of EVP. EVP finds its
// algorithms by name, in providers: a static program carries 4.1 MB of them for one digest, and
// 28 KB of these.
#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>

#include "fail.h"
#include "mapped_file.h"

namespace cleave {

std::string sha256_of_files(std::span<const std::filesystem::path> files) {
  SHA256_CTX context;
  bool good = SHA256_Init(&context) == 1;
  for (const auto& path : files) {
    const MappedFile file = MappedFile::open(path);
    good = good && SHA256_Update(&context, file.bytes().data(), file.bytes().size()) == 1;
  }
  unsigned char digest[SHA256_DIGEST_LENGTH];
  good = good && SHA256_Final(digest, &context) == 1;
  if (!good) throw Error("sha256: this build of OpenSSL cannot compute SHA-256");
  std::string hex;
  for (const unsigned char byte : digest) hex += fmt::format("{:02x}", byte);
  return hex;
}

}  // namespace cleave
