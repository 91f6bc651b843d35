#!/bin/sh
# includes.sh SOURCE_DIR: who may include what. Fails with the offending lines.
cd "$1" || exit 2
[ -f include/cleave/cleave.h ] || { echo "$1 is not the source folder"; exit 2; }
status=0
check() { # check RULE LINES
  [ -z "$2" ] && return
  printf '%s:\n%s\n' "$1" "$2"
  status=1
}
include() { # include PATTERN PATH...: the lines that include it
  pattern=$1
  shift
  grep -rnE "^ *# *include *[<\"]($pattern)" "$@" --include=*.h --include=*.cpp
}
check "only paths with /train/ in them may include torch" \
  "$(include '(torch|ATen|c10)/' include src | grep -vE '^[^:]*/train/')"
check "core must not include train" \
  "$(include 'cleave/train/|train/' include src | grep -vE '^[^:]*/(train|cli)/')"
check "public headers must not show fmt, Eigen or JSON" \
  "$(include 'fmt/|Eigen/|nlohmann/' include)"
exit $status
