#!/bin/sh
# c_symbols.sh SHARED_LIBRARY INCLUDE_DIR: the library shows exactly the functions that the headers of
# the C interface declare with CLEAVE_C_API.
declared=$(grep -hv '^ *#' "$2"/cleave/c_*.h | tr '\n' ' ' | grep -oE 'CLEAVE_C_API [^;(]*\(' |
  sed -E 's/.*[ *]([a-z0-9_]+)\($/\1/' | sort)
exported=$(nm -D --defined-only "$1" | awk '{print $3}' | sort) && [ -n "$exported" ] ||
  { echo "nm found no symbol in $1"; exit 2; }
[ -n "$declared" ] || { echo "no declaration found in $2"; exit 2; }
[ "$declared" = "$exported" ] && exit 0
echo "declared but not exported, or (+) exported but not declared:"
printf '%s\n' "$declared" >"${TMPDIR:-/tmp}/declared.$$"
printf '%s\n' "$exported" | diff -U0 "${TMPDIR:-/tmp}/declared.$$" - | grep '^[-+][^-+]'
rm -f "${TMPDIR:-/tmp}/declared.$$"
exit 1
