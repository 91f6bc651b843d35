#!/bin/sh
# no_torch_symbol.sh LIBRARY: fails if the library defines or wants a symbol of LibTorch.
symbols=$(nm -C "$1") && [ -n "$symbols" ] || { echo "nm found no symbol in $1"; exit 2; }
found=$(printf '%s\n' "$symbols" | grep -E '[ (<,*&](at|c10|torch)::' | head -5)
[ -z "$found" ] && exit 0
echo "cleave::core must not know LibTorch, but $1 has:"
echo "$found"
exit 1
