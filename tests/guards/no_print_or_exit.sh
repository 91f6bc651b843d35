#!/bin/sh
# no_print_or_exit.sh LIBRARY SOURCE_DIR: fails if the library wants a symbol that prints or ends the process, also
# under the names that _FORTIFY_SOURCE gives it. A failed assert() may still abort: that is __assert_fail, in builds with
# asserts only. std::terminate is looked for in the sources: the destructor of std::thread wants it of every library.
symbols=$(nm -u "$1") && [ -n "$symbols" ] || { echo "nm found no symbol in $1"; exit 2; }
[ -d "$2/src" ] || { echo "$2 is not the source folder"; exit 2; }
ends='abort|exit|_exit|_Exit|quick_exit|raise|kill|errx?|verrx?'
prints='v?f?printf|v?dprintf|__v?f?printf_chk|__v?dprintf_chk|f?puts|f?putc|putchar|_IO_putc|perror|psignal|warnx?|vwarnx?'
prints="$prints|v?syslog|__v?syslog_chk|stdout|stderr|_ZSt4cout|_ZSt4cerr|_ZSt4clog|_ZN3fmt[0-9]+v[0-9]+6vprintE[A-Za-z0-9_]*"
found=$(printf '%s\n' "$symbols" | grep -wE "$ends|$prints" | sort -u
  grep -rnwE '(std::)?terminate' "$2/src" "$2/include" --include=*.h --include=*.cpp | grep -v '^[^:]*/cli/')
[ -z "$found" ] && exit 0
echo "the library throws; it never prints and never exits. But $1 wants, or its sources name:"
echo "$found"
exit 1
