#!/bin/sh
# self_test.sh COMPILER GUARDS_DIR WORK_DIR C_COMPILER: shows every guard a violation and a clean file; a guard
# that lets the violation pass, or stops the clean file, fails this test.
compiler=$1 guards=$2 work=$3 cc=$4
rm -rf "$work" && mkdir -p "$work" && cd "$work" || exit 2
status=0
object() { # object NAME CODE [OPTIMISATION]
  printf '%s\n' "$2" >"$1.cpp" && $compiler -std=c++20 "${3:--O0}" -c "$1.cpp" -o "$1.o" || exit 2
}
expect() { # expect 0|1 COMMAND...
  expected=$1
  shift
  "$@" >output.txt 2>&1
  actual=$?
  [ $actual -eq "$expected" ] && return
  echo "expected status $expected, got $actual: $*"
  cat output.txt
  status=1
}
object clean 'namespace cleave::avx2 { inline int f() { return 1; } int g() { return f(); } }'
object torch 'namespace at { int numel(); } int f() { return at::numel(); }'
object prints '#include <iostream>
void f() { std::cout << 1; }'
object exits '#include <cstdlib>
void f() { std::exit(1); }'
object checked '#undef _FORTIFY_SOURCE
#define _FORTIFY_SOURCE 2
#include <cstdio>
void f(int i) { std::printf("%d", i); }' -O2
object formatted 'namespace fmt { inline namespace v9 { void vprint(int); } }
void f() { fmt::vprint(1); }'
object threads '#include <thread>
void f() { std::thread([] {}).join(); }'
object weak 'namespace cleave { inline int f() { return 1; } int g() { return f(); } }'
expect 0 sh "$guards/no_torch_symbol.sh" clean.o
expect 1 sh "$guards/no_torch_symbol.sh" torch.o
mkdir -p throws/src/cli throws/include terminates/src terminates/include
echo '#include <exception>
void f() { std::terminate(); }' | tee throws/src/cli/main.cpp >terminates/src/a.cpp
for name in torch threads; do expect 0 sh "$guards/no_print_or_exit.sh" $name.o throws; done
for name in prints exits checked formatted; do expect 1 sh "$guards/no_print_or_exit.sh" $name.o throws; done
expect 1 sh "$guards/no_print_or_exit.sh" torch.o terminates
expect 2 sh "$guards/no_print_or_exit.sh" torch.o missing
expect 0 sh "$guards/no_weak_symbol.sh" avx2 clean.o
expect 1 sh "$guards/no_weak_symbol.sh" avx512 clean.o
expect 1 sh "$guards/no_weak_symbol.sh" avx2 weak.o
expect 2 sh "$guards/no_torch_symbol.sh" missing.o
expect 2 sh "$guards/no_print_or_exit.sh" missing.o throws
expect 2 sh "$guards/no_weak_symbol.sh" avx2 missing.o

# A library under the name of LibTorch's, and a program that loads it.
echo 'int torch() { return 1; }' >libtorch.cpp
echo 'int torch(); int main() { return torch() - 1; }' >program.cpp
$compiler -shared -fPIC libtorch.cpp -o libtorch.so &&
  $compiler program.cpp -o loads -L. -ltorch -Wl,-rpath,"$PWD" &&
  echo 'int main() {}' >empty.cpp && $compiler empty.cpp -o loads_not || exit 2
expect 0 sh "$guards/no_torch_linked.sh" ./loads_not
expect 1 sh "$guards/no_torch_linked.sh" ./loads
echo 'int torch(); int more() { return torch(); }' >library.cpp
$compiler -shared -fPIC library.cpp -o libmore.so -L. -ltorch -Wl,-rpath,"$PWD" || exit 2
expect 1 sh "$guards/no_torch_linked.sh" ./libmore.so
expect 2 sh "$guards/no_torch_linked.sh" ./missing
expect 1 sh "$guards/static_program.sh" ./loads_not
expect 1 sh "$guards/static_program.sh" ./libmore.so
expect 2 sh "$guards/static_program.sh" ./missing
if $compiler -static empty.cpp -o loads_nothing 2>/dev/null; then expect 0 sh "$guards/static_program.sh" ./loads_nothing; fi
echo 'char big[100000] = {1};' >big.cpp && $compiler -fPIC -c big.cpp -o big.o && ar rc libbig.a big.o || exit 2
expect 0 sh "$guards/library_size.sh" "$compiler" libbig.a 200000 size
expect 1 sh "$guards/library_size.sh" "$compiler" libbig.a 100000 size
expect 1 sh "$guards/library_size.sh" "$compiler" libtorch.so 100 size
expect 2 sh "$guards/library_size.sh" "$compiler" missing.so 100 size

mkdir -p tree/include/cleave/train tree/src/train
echo '#include <torch/nn/module.h>' >tree/include/cleave/train/a.h
echo '#pragma once' >tree/include/cleave/cleave.h
echo '#include <Eigen/Core>' >tree/src/a.cpp
expect 0 sh "$guards/includes.sh" tree
expect 0 sh "$guards/headers_alone.sh" "$compiler" tree/include
for line in '#include <fmt/format.h>' '#include <Eigen/Core>' '#include <nlohmann/json.hpp>' \
  '#include <torch/torch.h>' '#include <ATen/ATen.h>' '#include "cleave/train/a.h"'; do
  echo "$line" >tree/include/cleave/bad.h
  expect 1 sh "$guards/includes.sh" tree
done
rm tree/include/cleave/bad.h
echo '#include <c10/core/Device.h>' >tree/src/bad.cpp
expect 1 sh "$guards/includes.sh" tree
echo 'std::string name();' >tree/include/cleave/bad.h
expect 1 sh "$guards/headers_alone.sh" "$compiler" tree/include

mkdir -p c/cleave
printf '%s\n' '#define CLEAVE_C_API' 'CLEAVE_C_API const char* cleave_a(void);' \
  'CLEAVE_C_API int cleave_b(int value,' '  int other);' >c/cleave/c_api.h
library() { # library CODE: libc.so
  printf '%s\n' "$1" >c.cpp && $compiler -shared -fPIC c.cpp -o libc.so || exit 2
}
a='extern "C" const char* cleave_a() { return ""; }' b='extern "C" int cleave_b(int, int) { return 1; }'
library "$a $b"
expect 0 sh "$guards/c_symbols.sh" libc.so c
library "$a $b int extra() { return 1; }"
expect 1 sh "$guards/c_symbols.sh" libc.so c
library "$a"
expect 1 sh "$guards/c_symbols.sh" libc.so c
expect 2 sh "$guards/c_symbols.sh" missing.so c
echo 'extern int c;' >c/cleave/c_dlpack.h
expect 0 sh "$guards/c_headers.sh" "$cc" "$compiler" c
echo 'inline int three() { return 3; } bool b;' >c/cleave/c_dlpack.h
expect 1 sh "$guards/c_headers.sh" "$cc" "$compiler" c
exit $status
