// fmt's library made of its headers, where the distribution has it as a shared object only (Debian
// and Ubuntu): every function that these two need, and that others then find here. To be compiled
// with -fno-inline, or some would only be parts of others.
#define FMT_HEADER_ONLY 1
#include <fmt/format.h>

namespace {

[[gnu::used]] void use_fmt(std::FILE* file, fmt::string_view format, fmt::format_args arguments) {
  fmt::vprint(file, format, arguments);
  (void)fmt::vformat(format, arguments);
}

}  // namespace
