#!/bin/sh
# The kernels' tests on one instruction set: ops_on_isa.sh CLEAVE_CORE_TESTS ISA. Exit code 77, which
# CTest counts as skipped, where this machine or build does not have it.
set -u
export CLEAVE_ISA="$2"
if "$1" --gtest_filter=Dispatch.TheSetInUseHasAName 2>&1 | grep -q "is not an instruction set this machine and build have"; then
  echo "this machine or build has no $2"
  exit 77
fi
exec "$1" --gtest_filter='Dispatch.*:Route.*:GroupTokens.*:Linear*.*:MoeFfn*.*:DenseFfn*.*:Packed*.*:Attention*.*'
