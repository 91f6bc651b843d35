#!/bin/sh
# c_headers.sh C_COMPILER CXX_COMPILER INCLUDE_DIR [DLPACK_HEADER]: the headers of the C interface are
# C99 and C++11, without a warning, alone and (given one) before and after the real dlpack.h.
cc=$1 cxx=$2 include=$3 dlpack=$4
[ -f "$include/cleave/c_api.h" ] || { echo "$include is not the include folder"; exit 2; }
status=0
compile() { # compile HEADER...: as C and as C++
  for header in "$@"; do echo "#include \"$header\""; done >"$source"
  $cc -std=c99 -pedantic -Wall -Wextra -Wstrict-prototypes -Werror -fsyntax-only -I "$include" \
    -x c "$source" || { echo "not C99: $*"; status=1; }
  $cxx -std=c++11 -pedantic -Wall -Wextra -Werror -fsyntax-only -I "$include" -x c++ "$source" ||
    { echo "not C++11: $*"; status=1; }
}
source=$(mktemp) || exit 2
trap 'rm -f "$source"' EXIT
compile cleave/c_api.h cleave/c_api.h
compile cleave/c_dlpack.h cleave/c_dlpack.h
if [ -n "$dlpack" ]; then
  compile "$dlpack" cleave/c_dlpack.h
  compile cleave/c_dlpack.h "$dlpack"
fi
exit $status
