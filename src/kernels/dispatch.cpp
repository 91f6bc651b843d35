#include "kernels/dispatch.h"

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "cleave/error.h"

namespace cleave {
namespace {

struct Isa {
  const char* name;
  const IsaKernels* kernels;
  const PanelKernels* panels;
  const RowKernels* rows;
  const GramKernels* grams;
  bool supported;
};

/// Without an allocation: route() looks here at its first call.
struct Isas {
  void push_back(const Isa& isa) { isas[count++] = isa; }
  const Isa* begin() const { return isas; }
  const Isa* end() const { return isas + count; }

  Isa isas[8];
  int count = 0;
};

// Widest first. A set counts only with every feature that its objects are compiled for
// (cmake/isa.cmake).
Isas all_isas() {
  Isas isas;
#ifdef CLEAVE_HAVE_X86_ISA
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  isas.push_back({"avx512bf16", &avx512::kernels(), &avx512::bf16_panel_kernels(),
                  &avx512::row_kernels(), &avx512::gram_kernels(),
                  vnni && __builtin_cpu_supports("avx512bf16")});
  isas.push_back({"avx512vnni", &avx512::kernels(), &avx512::vnni_panel_kernels(),
                  &avx512::row_kernels(), &avx512::gram_kernels(), vnni});
  isas.push_back({"avx512", &avx512::kernels(), &avx512::panel_kernels(), &avx512::row_kernels(),
                  &avx512::gram_kernels(), avx512});
  isas.push_back({"avx2", &avx2::kernels(), &avx2::panel_kernels(), &avx2::row_kernels(),
                  &avx2::gram_kernels(), avx2});
#endif
#ifdef CLEAVE_HAVE_NEON_ISA  // which every 64-bit ARM has
  isas.push_back({"neon", &neon::kernels(), &neon::panel_kernels(), &neon::row_kernels(),
                  &neon::gram_kernels(), true});
#endif
  isas.push_back({"scalar", &scalar::kernels(), &scalar::panel_kernels(), &scalar::row_kernels(),
                  &scalar::gram_kernels(), true});
  return isas;
}

Isa choose_isa() {
  const char* wanted = std::getenv("CLEAVE_ISA");
  std::string usable;
  for (const Isa& isa : all_isas()) {
    if (!isa.supported) continue;
    if (wanted == nullptr || *wanted == '\0' || std::strcmp(isa.name, wanted) == 0) return isa;
    usable += usable.empty() ? isa.name : std::string(", ") + isa.name;
  }
  throw InvalidArgument(fmt::format(
      "CLEAVE_ISA: '{}' is not an instruction set this machine and build have; use one of {}, or "
      "unset it",
      wanted, usable));
}

const Isa& chosen_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace

const char* isa_name() { return chosen_isa().name; }

const IsaKernels& isa_kernels() { return *chosen_isa().kernels; }
const PanelKernels& panel_kernels() { return *chosen_isa().panels; }
const RowKernels& row_kernels() { return *chosen_isa().rows; }
const GramKernels& gram_kernels() { return *chosen_isa().grams; }

const IsaKernels* find_isa_kernels(const char* name) {
  for (const Isa& isa : all_isas())
    if (isa.supported && std::strcmp(isa.name, name) == 0) return isa.kernels;
  return nullptr;
}

const PanelKernels* find_panel_kernels(const char* name) {
  for (const Isa& isa : all_isas())
    if (isa.supported && std::strcmp(isa.name, name) == 0) return isa.panels;
  return nullptr;
}

const RowKernels* find_row_kernels(const char* name) {
  for (const Isa& isa : all_isas())
    if (isa.supported && std::strcmp(isa.name, name) == 0) return isa.rows;
  return nullptr;
}

const GramKernels* find_gram_kernels(const char* name) {
  for (const Isa& isa : all_isas())
    if (isa.supported && std::strcmp(isa.name, name) == 0) return isa.grams;
  return nullptr;
}

}  // namespace cleave
