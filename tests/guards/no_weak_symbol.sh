#!/bin/sh
# no_weak_symbol.sh ISA OBJECT...: fails if an object that is compiled for one instruction set holds
# a weak symbol whose name does not carry the set: the linker might keep that copy for everybody.
# (DW.ref.* is a pointer to the exception personality: data, the same in every object.)
isa=$1
shift
[ $# -gt 0 ] || { echo "no object given"; exit 2; }
symbols=$(nm -C "$@") && [ -n "$symbols" ] || { echo "nm found no symbol in $*"; exit 2; }
found=$(printf '%s\n' "$symbols" | grep -E '^[0-9a-f]+ [WVu] ' |
  grep -vE "Eigen_$isa::|cleave::$isa::| DW\.ref\." | sort -u | head -20)
[ -z "$found" ] && exit 0
echo "objects of $isa hold weak symbols that other code could be linked to:"
echo "$found"
exit 1
