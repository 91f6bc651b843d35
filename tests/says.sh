#!/bin/sh
# says.sh PATTERN PROGRAM ARGUMENT...: fails unless the program ends with code 0 and a line of its output matches.
# (CTest's PASS_REGULAR_EXPRESSION passes whatever the code is.)
pattern=$1
shift
output=$("$@" 2>&1)
code=$?
printf '%s\n' "$output"
[ $code -eq 0 ] || { echo "FAILED: code $code"; exit 1; }
printf '%s\n' "$output" | grep -qE -- "$pattern" || { echo "FAILED: no line matches $pattern"; exit 1; }
