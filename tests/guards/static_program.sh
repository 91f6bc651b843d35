#!/bin/sh
# static_program.sh PROGRAM: fails if it needs a library, or a loader, of the machine that it runs on.
headers=$(readelf -lW "$1" 2>/dev/null) && dynamic=$(readelf -dW "$1") || { echo "readelf cannot read $1"; exit 2; }
found=$(printf '%s\n' "$headers" "$dynamic" | grep -E 'INTERP|\(NEEDED\)')
[ -z "$found" ] && exit 0
echo "$1 must run by itself, but needs:"
echo "$found"
exit 1
