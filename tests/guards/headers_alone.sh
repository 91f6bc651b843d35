#!/bin/sh
# headers_alone.sh COMPILER INCLUDE_DIR: every public core header compiles on its own, with nothing
# but the standard library. (Train's headers come first in their own sources, which shows the same.)
compiler=$1
cd "$2" || exit 2
[ -f cleave/cleave.h ] || { echo "$2 is not the include folder"; exit 2; }
status=0
for header in cleave/*.h; do
  printf '#include "%s"\n#include "%s"\n' "$header" "$header" |
    $compiler -std=c++20 -fsyntax-only -Wall -Wextra -Werror -I . -x c++ - ||
    { echo "$header does not compile alone"; status=1; }
done
exit $status
