// Whether all that `cleave` is made of can be linked statically here: something of every library.
#include <fmt/format.h>

#include <iostream>
#include <thread>

#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/sha.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

// Before 2.34, threads were a library of their own, of which a static program got parts.
#ifdef __GLIBC__
#if !__GLIBC_PREREQ(2, 34)
#error "glibc before 2.34"
#endif
#endif

int main() {
  SHA256_CTX context;
  std::thread([&] { SHA256_Init(&context); }).join();
  int error = 0;
  PCRE2_SIZE at = 0;
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>("a"), 1, PCRE2_UTF, &error, &at, nullptr);
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  pcre2_code_free(code);
  fmt::print(stderr, "{:.1f}\n", 1.5);
  std::cout << fmt::format("{} {}", error, "text");
}
