#!/bin/sh
# library_size.sh COMPILER LIBRARY LIMIT WORK_DIR: fails if all of the library (or a program), linked (an
# archive is made a shared object of first) and stripped, takes LIMIT bytes or more.
compiler=$1 library=$2 limit=$3 work=$4
mkdir -p "$work" || exit 2
linked=$library
case $library in
*.a)
  linked=$work/whole.so
  $compiler -shared -o "$linked" -Wl,--whole-archive "$library" -Wl,--no-whole-archive || exit 2
  ;;
esac
strip -o "$work/stripped" "$linked" || exit 2
size=$(wc -c <"$work/stripped")
rm -f "$work/stripped" "$work/whole.so"
[ "$size" -lt "$limit" ] && { echo "$size bytes"; exit 0; }
echo "$library takes $size bytes linked and stripped; expected less than $limit"
exit 1
