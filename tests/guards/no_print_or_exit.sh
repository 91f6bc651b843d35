#!/bin/sh
# no_print_or_exit.sh LIBRARY: fails if the library wants a symbol that prints or ends the process.
# A failed assert() may still abort: that is __assert_fail, in builds with asserts only.
symbols=$(nm -u "$1") && [ -n "$symbols" ] || { echo "nm found no symbol in $1"; exit 2; }
found=$(printf '%s\n' "$symbols" | grep -wE 'abort|exit|_exit|_Exit|quick_exit|printf|vprintf|puts|putchar|perror|stdout|stderr|_ZSt4cout|_ZSt4cerr|_ZSt4clog' | sort -u)
[ -z "$found" ] && exit 0
echo "the library throws; it never prints and never exits. But $1 wants:"
echo "$found"
exit 1
