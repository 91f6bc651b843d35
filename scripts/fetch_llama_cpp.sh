#!/usr/bin/env bash
# Brings llama.cpp, which cleave is compared with, into .venv-oracle/llama.cpp (ignored by git), and builds
# its CPU libraries. Does nothing twice. Used by examples/llama_cpp_custom_op and bench/.
#
#   .venv-oracle/llama.cpp/source    the sources in the Python source package llama-cpp-python (MIT, 75 MB)
#   .venv-oracle/llama.cpp/build     libllama.a and the ggml libraries, by its own CMake, for this CPU
#
# It takes some five minutes on two cores. Exit code 1 when the package cannot be had or built.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

llama_version=0.3.36
llama_sha256=832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e
llama="$cleave_root/.venv-oracle/llama.cpp"
libraries=(src/libllama.a ggml/src/libggml.a ggml/src/libggml-cpu.a ggml/src/libggml-base.a)

is_built() {
  local library
  [ "$(cat "$llama/version" 2>/dev/null)" = "$llama_version" ] || return 1
  for library in "${libraries[@]}"; do [ -f "$llama/build/$library" ] || return 1; done
}

fetch_sources() {
  [ "$(cat "$llama/source/version" 2>/dev/null)" != "$llama_version" ] || return 0
  say "fetching llama.cpp from the Python source package llama-cpp-python $llama_version (some 75 MB)"
  mkdir -p "$llama"
  local scratch package
  scratch="$(mktemp -d "$llama/.fetch.XXXXXX")"
  trap "rm -rf '$scratch'" EXIT
  "$(python_with_pip "$scratch")" -m pip download --quiet --disable-pip-version-check --no-deps \
    --no-binary llama-cpp-python --retries 2 --timeout 30 --dest "$scratch" \
    "llama-cpp-python==$llama_version" >&2 || fail "the package llama-cpp-python cannot be had"
  package="$scratch/llama_cpp_python-$llama_version.tar.gz"
  echo "$llama_sha256  $package" | sha256sum --check --status ||
    fail "llama-cpp-python $llama_version has another SHA-256 than expected"
  mkdir "$scratch/source"
  tar -xzf "$package" -C "$scratch/source" --strip-components=3 --exclude="*/llama.cpp/models" \
    --exclude="*/llama.cpp/docs" "llama_cpp_python-$llama_version/vendor/llama.cpp"
  echo "$llama_version" >"$scratch/source/version"
  rm -rf "$llama/source"
  mv "$scratch/source" "$llama/source"
}

build_libraries() {
  # What its own users get: Release, this CPU's instructions, OpenMP, its own matrix products.
  local options=(-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DGGML_NATIVE=ON) part
  for part in COMMON TESTS TOOLS EXAMPLES SERVER APP; do options+=("-DLLAMA_BUILD_$part=OFF"); done
  export CCACHE_BASEDIR="$cleave_root" CCACHE_NOHASHDIR=1
  say "building llama.cpp in .venv-oracle/llama.cpp with $(build_jobs) jobs"
  cmake -S "$llama/source" -B "$llama/build" -G Ninja "${options[@]}" >&2 || fail "cmake failed"
  cmake --build "$llama/build" --target llama --parallel "$(build_jobs)" >&2 || fail "the build failed"
  echo "$llama_version" >"$llama/version"
}

if is_built; then say "llama.cpp is there: .venv-oracle/llama.cpp"; exit 0; fi
fetch_sources
build_libraries
is_built || fail "the build left no ${libraries[*]} in $llama/build"
