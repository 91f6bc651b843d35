#!/bin/sh
# no_torch_linked.sh PROGRAM_OR_LIBRARY: fails if it would load LibTorch when it starts.
libraries=$(ldd "$1") && [ -n "$libraries" ] || { echo "ldd found no library of $1"; exit 2; }
found=$(printf '%s\n' "$libraries" | grep -E 'lib(torch|c10|caffe2)')
[ -z "$found" ] && exit 0
echo "$1 must run without LibTorch, but loads:"
echo "$found"
exit 1
