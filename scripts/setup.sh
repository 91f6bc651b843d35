#!/usr/bin/env bash
# Installs what cleave's build needs and is missing; says what it does; does nothing twice.
#
#   scripts/setup.sh                     run it: packages and LibTorch
#   source scripts/setup.sh              get its functions: setup, build, say (demo.sh, test.sh)
#
# Environment
#   CLEAVE_TRAIN=OFF    no LibTorch: the library's core, convert, eval and generate alone
#   Torch_DIR, CMAKE_PREFIX_PATH   where LibTorch is, if it is not in .venv or the active Python

cleave_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cleave_torch_version=2.13.0
# Used by whoever sources this file: where `build` builds, and the command line it makes.
if [ "${CLEAVE_TRAIN:-ON}" = OFF ]; then cleave_preset=core; cleave_build="$cleave_root/build-core"
else cleave_preset=default; cleave_build="$cleave_root/build"; fi
cleave_binary="$cleave_build/bin/cleave"

say() { printf '==> %s\n' "$*" >&2; }
fail() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

cleave_packages=(g++ cmake ninja-build ccache libeigen3-dev libfmt-dev libcli11-dev
  nlohmann-json3-dev libgtest-dev libpcre2-dev libssl-dev pkg-config python3-venv valgrind)

is_installed() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'install ok installed'; }

can_be_root() { [ "$(id -u)" = 0 ] || command -v sudo >/dev/null; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

install_packages() {
  if ! command -v apt-get >/dev/null; then
    say "no apt-get here: expecting a C++20 compiler, CMake, Ninja, Eigen, fmt, CLI11, nlohmann-json, GoogleTest, PCRE2 and OpenSSL"
    return
  fi
  local package missing=()
  for package in "${cleave_packages[@]}"; do is_installed "$package" || missing+=("$package"); done
  # The format check is CI's; a distribution without version 14 can build and test all the same.
  if ! command -v clang-format-14 >/dev/null && apt-cache show clang-format-14 2>/dev/null | grep -q .; then
    missing+=(clang-format-14)
  elif ! command -v clang-format-14 >/dev/null && ! command -v clang-format >/dev/null; then
    say "clang-format-14 is not in this distribution; installing clang-format (only the format check uses it)"
    missing+=(clang-format)
  fi
  [ ${#missing[@]} -gt 0 ] || return 0
  say "installing with apt: ${missing[*]}"
  can_be_root || fail "neither root nor sudo here; please run this as root, then start again:
    apt-get update && apt-get install -y --no-install-recommends ${missing[*]}"
  as_root apt-get update -q >&2 || say "apt-get update failed; going on with the lists that are here"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends \
    "${missing[@]}" >&2 || fail "apt could not install: ${missing[*]}"
}

# A Python that LibTorch's wheels and venv support.
find_python() {
  local python
  for python in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    if command -v "$python" >/dev/null && "$python" -c '
import sys, venv, ensurepip
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then
      command -v "$python"; return
    fi
  done
  fail "no Python from 3.10 to 3.14 with the venv module; install python3-venv"
}

# A Python with pip: .venv's, the active one, or one of an environment made in the given folder.
python_with_pip() {  # SCRATCH
  local python
  for python in "$cleave_root/.venv/bin/python" python3; do
    if "$python" -m pip --version >/dev/null 2>&1; then echo "$python"; return; fi
  done
  "$(find_python)" -m venv "$1/venv" && echo "$1/venv/bin/python"
}

# Folder of TorchConfig.cmake below one of the given prefixes.
torch_below() {
  local prefix
  for prefix in "$@"; do
    for prefix in "$prefix/Torch" "$prefix/share/cmake/Torch" "$prefix/lib/cmake/Torch"; do
      if [ -f "$prefix/TorchConfig.cmake" ]; then echo "$prefix"; return 0; fi
    done
  done
  return 1
}

# Prints where LibTorch was found; the order is that of cmake/dependencies.cmake.
find_libtorch() {
  if [ -n "${Torch_DIR:-}" ]; then echo "$Torch_DIR"; return 0; fi
  local prefixes python
  IFS=: read -r -a prefixes <<<"${CMAKE_PREFIX_PATH:-}"
  torch_below "${prefixes[@]}" && return 0
  for python in "$cleave_root/.venv/bin/python" python3; do
    "$python" -c '
import torch, sys
if int(torch.__version__.split(".")[0]) < 2: sys.exit(1)
print(torch.utils.cmake_prefix_path + "/Torch")' 2>/dev/null && return 0
  done
  return 1
}

install_torch_wheel() {  # VENV
  # The extra index offers 2.13.0+cpu, which pip ranks above PyPI's 2.13.0 with its gigabytes of CUDA
  # packages. Asked for torch alone, an index that cannot be reached costs one time-out; what torch
  # itself needs then comes from PyPI, and depends on which of the two it was.
  local pip=("$1/bin/python" -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 15)
  { "${pip[@]}" --no-deps --extra-index-url https://download.pytorch.org/whl/cpu \
      "torch==$cleave_torch_version" && "${pip[@]}" "torch==$cleave_torch_version" numpy; } >&2 ||
    fail "pip could not install torch==$cleave_torch_version; give another LibTorch with Torch_DIR, or set CLEAVE_TRAIN=OFF to go without training"
}

install_libtorch() {
  if [ "${CLEAVE_TRAIN:-ON}" = OFF ]; then say "CLEAVE_TRAIN=OFF: no LibTorch needed"; return; fi
  if [ -n "${Torch_DIR:-}" ] && [ ! -f "$Torch_DIR/TorchConfig.cmake" ]; then
    fail "Torch_DIR=$Torch_DIR holds no TorchConfig.cmake"
  fi
  local found
  if found="$(find_libtorch)"; then say "LibTorch: $found"; return; fi
  local venv="$cleave_root/.venv" python
  python="$(find_python)"
  say "installing LibTorch $cleave_torch_version from its Python wheel into .venv (some 200 MB)"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || fail "$python -m venv $venv failed"
  install_torch_wheel "$venv"
  find_libtorch >/dev/null || fail "torch was installed into $venv but cannot be imported"
}

setup() { install_packages && install_libtorch; }

# Files that include torch take a gigabyte each to compile.
build_jobs() {
  local cores memory_gb
  cores="$(nproc)"
  memory_gb="$(awk '/MemAvailable/ {print int($2 / 1048576 / 1.5)}' /proc/meminfo 2>/dev/null)"
  [ "${memory_gb:-0}" -ge 1 ] || memory_gb=1
  echo $((cores < memory_gb ? cores : memory_gb))
}

build() {  # [TARGET...]; cleave_options: more for CMake
  local options=(${cleave_options[@]+"${cleave_options[@]}"})
  [ -z "${Torch_DIR:-}" ] || options+=("-DTorch_DIR=$Torch_DIR")
  if command -v ccache >/dev/null; then
    options+=(-DCMAKE_CXX_COMPILER_LAUNCHER=ccache)
    # A base folder makes a clone elsewhere hit the cache; the sloppiness is what ccache's manual asks
    # for with precompiled headers.
    export CCACHE_BASEDIR="$cleave_root" CCACHE_NOHASHDIR=1
    export CCACHE_SLOPPINESS=pch_defines,time_macros,include_file_mtime,include_file_ctime
  fi
  say "building in ${cleave_build#"$cleave_root"/} with $(build_jobs) jobs"
  (cd "$cleave_root" && cmake --preset "$cleave_preset" "${options[@]}" >&2) || fail "cmake failed"
  cmake --build "$cleave_build" ${1:+--target "$@"} --parallel "$(build_jobs)" >&2 || fail "the build failed"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  setup
  say "everything is there; scripts/demo.sh runs the demonstration, scripts/test.sh the tests"
fi
