#!/bin/sh
# The kernels' tests and those of the C interface on one instruction set:
# ops_on_isa.sh ISA CLEAVE_CORE_TESTS CLEAVE_C_API_TESTS. Exit code 77, which CTest counts as skipped, where this
# machine or build does not have it.
set -u
export CLEAVE_ISA="$1"
core=$2 c_api=$3
if "$core" --gtest_filter=Dispatch.TheSetInUseHasAName 2>&1 | grep -q "is not an instruction set this machine and build have"; then
  echo "this machine or build has no $CLEAVE_ISA"
  exit 77
fi
status=0
"$core" --gtest_filter='Dispatch.*:Route.*:GroupTokens.*:Linear*.*:MoeFfn*.*:MoeLayer*.*:DenseFfn*.*:Packed*.*:Attention*.*:Encoder.*:EncoderExport.*' || status=1
"$c_api" || status=1
exit $status
