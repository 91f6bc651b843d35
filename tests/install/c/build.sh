#!/bin/sh
# build.sh C_COMPILER PREFIX WORK_DIR [FLAG...]: builds and runs main.c against the cleave installed in
# PREFIX, by what pkg-config says: with libcleave.so, and without it, statically.
set -e
cc=$1 prefix=$2 work=$3 source=$(dirname "$0")
shift 3
pc=$(find "$prefix" -name cleave.pc)
PKG_CONFIG_PATH=$(dirname "$pc") && export PKG_CONFIG_PATH
library=$(pkg-config --variable=libdir cleave)
set -- -std=c99 -pedantic -Wall -Wextra -Werror "$@" "$source/main.c"

# shellcheck disable=SC2046
$cc "$@" $(pkg-config --cflags --libs cleave) -o "$work/shared"
LD_LIBRARY_PATH=$library "$work/shared"
readelf -d "$work/shared" | grep -q 'NEEDED.*libcleave.so.1'

rm "$library"/libcleave.so*
# shellcheck disable=SC2046
$cc "$@" $(pkg-config --static --cflags --libs cleave) -o "$work/static"
"$work/static"
