#!/bin/sh
# valgrind.sh PROGRAM: fails at any error or leak that valgrind finds. Status 77: there is no valgrind.
command -v valgrind >/dev/null || { echo "valgrind is absent; scripts/setup.sh installs it"; exit 77; }
# valgrind knows no AVX-512.
CLEAVE_ISA=avx2 exec valgrind --quiet --error-exitcode=1 --leak-check=full \
  --errors-for-leak-kinds=definite,indirect,possible "$1"
