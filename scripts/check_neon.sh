#!/usr/bin/env bash
# Cross-compiles core and its tests for 64-bit ARM in build-neon/ and runs those of the kernels under
# qemu-user: what can be known about NEON without such a machine. Right or wrong, that is, not fast or slow.
#
#   scripts/check_neon.sh             installs what is missing, builds, runs the tests
#   scripts/check_neon.sh --all       the same with all tests of core but the large ones
#   scripts/check_neon.sh --setup     installs what is missing
#   scripts/check_neon.sh --if-ready  installs nothing; exit code 77 where something is missing
#
# Debian and its derivatives only: the compiler and qemu come from apt, arm64's libraries are downloaded
# as packages and unpacked below build-neon/; apt's own state on this machine does not change.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | grep -v '^set'; }
mode=run
tests='*Kernels*:*IsaTest*:Isa.*:Linear*:Packed*:MoeFfn*:MoeLayer*:DenseFfn*:GroupTokens*:Route*:Attention*:Rope*'
tests+=':Generate*:OutputFit*:KMeans*:Sampler*:Hash64*:ThreadPool*:WeightMemory*'
for argument in "$@"; do
  case "$argument" in
    --all) tests='*' ;;
    --setup) mode=setup ;;
    --if-ready) mode=if-ready ;;
    -h|--help) usage; exit 0 ;;
    *) fail "unknown option $argument; try --help" ;;
  esac
done

cleave_preset=neon cleave_build="$cleave_root/build-neon"
libraries="$cleave_build/arm64"  # CLEAVE_ARM64_ROOT of the preset
cleave_packages+=(g++-aarch64-linux-gnu qemu-user)
arm64_packages=(libfmt-dev libpcre2-dev libssl-dev libgtest-dev libgmock-dev nlohmann-json3-dev libeigen3-dev)

missing() {  # what there is to install, or nothing
  command -v aarch64-linux-gnu-g++ >/dev/null || { echo "aarch64-linux-gnu-g++"; return; }
  command -v qemu-aarch64 >/dev/null || { echo "qemu-aarch64"; return; }
  [ -f "$libraries/complete" ] || echo "${libraries#"$cleave_root"/}"
}

# A private state of apt that knows arm64 only; the sources and keys are the machine's.
fetch_libraries() {
  local apt="$cleave_build/apt"
  rm -rf "$libraries" "$apt"
  mkdir -p "$libraries" "$apt/lists/partial" "$apt/cache/archives/partial" "$apt/packages"
  : >"$apt/status"
  cat >"$apt/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "";
Dir::State "$apt";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
CONF
  say "downloading arm64 packages: ${arm64_packages[*]}"
  # The shared libraries themselves are in packages whose names change from release to release.
  (cd "$apt/packages" && export APT_CONFIG="$apt/apt.conf" && apt-get update -q >&2 &&
    apt-get download -q "${arm64_packages[@]}" \
      $(apt-cache depends --important "${arm64_packages[@]}" | awk '$1 == "Depends:" && $2 ~ /^lib/ {print $2}' | sort -u) >&2) ||
    fail "apt-get could not download arm64's packages"
  local package
  for package in "$apt"/packages/*.deb; do dpkg-deb -x "$package" "$libraries"; done
  rm -rf "$apt"
  : >"$libraries/complete"
}

run_tests() {
  local log="$cleave_build/tests.log"
  say "running the tests under qemu-aarch64"
  qemu-aarch64 -L /usr/aarch64-linux-gnu "$cleave_build/bin/cleave_core_tests" \
    --gtest_filter="$tests:-Large*:*DeathTest*" 2>&1 | tee "$log" || return 1
  ctest --test-dir "$cleave_build" -R 'isa_objects_hold_no_weak_symbol' --no-tests=error --output-on-failure || return 1
  # What loops over instruction sets skips those that a machine lacks.
  grep -q 'OK \].*IsaTest.*neon' "$log" || fail "the kernels of NEON were not run; see $log"
}

setup_neon() {
  if [ -n "$(missing)" ]; then
    install_packages
    [ -f "$libraries/complete" ] || fetch_libraries
  fi
}

if [ "$mode" = if-ready ]; then
  what="$(missing)"
  [ -z "$what" ] || { echo "skipped: $what is missing (scripts/check_neon.sh --setup)"; exit 77; }
else
  setup_neon
fi
[ "$mode" != setup ] || exit 0
build cleave_core_tests
run_tests
