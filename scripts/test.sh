#!/usr/bin/env bash
# Installs what is missing (scripts/setup.sh), builds, and runs the tests through ctest.
#
#   scripts/test.sh          the quick tests, on the bundled model (labels quick and guards)
#   scripts/test.sh --all    all tests: fetches SmolLM2, Transformers and llama.cpp (into .venv-oracle), and a compiler for
#                            ARM and its emulator (scripts/check_neon.sh); builds the benchmarks, too; then what uses
#                            threads again under ThreadSanitizer, in build-tsan/
#
# CLEAVE_TRAIN=OFF builds and tests the core alone, without LibTorch.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | grep -v '^set'; }
all=no
for argument in "$@"; do
  case "$argument" in
    --all) all=yes ;;
    -h|--help) usage; exit 0 ;;
    *) fail "unknown option $argument; try --help" ;;
  esac
done

# The oracle checks find this environment by its name (tests/oracles/check.sh).
prepare_oracles() {
  local venv="$cleave_root/.venv-oracle" python
  if [ -x "$venv/bin/python" ] && "$venv/bin/python" -c 'import transformers, gguf' 2>/dev/null; then
    say "Transformers is there: .venv-oracle"; return
  fi
  say "installing Transformers into .venv-oracle"
  python="$(find_python)"
  "$python" -m venv "$venv"
  install_torch_wheel "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    -r "$cleave_root/tests/oracles/requirements.txt" >&2 || fail "pip could not install Transformers"
}

# In a build of its own: core alone, the tests that the preset names.
check_threads() (
  cleave_preset=tsan cleave_build="$cleave_root/build-tsan" cleave_options=()
  say "ThreadSanitizer: what uses threads, in a build of its own"
  build cleave_core_tests cleave_c_api_tests c_api
  cd "$cleave_root" && ctest --preset tsan --no-tests=error ||
    fail "ThreadSanitizer: the tests above failed or race (again: ctest --preset tsan)"
)

setup
selection=(--label-exclude 'large|slow|oracle')
if [ "$all" = yes ]; then
  "$cleave_root/scripts/fetch_models.sh"
  prepare_oracles
  "$cleave_root/scripts/fetch_llama_cpp.sh"
  "$cleave_root/scripts/check_neon.sh" --setup || say "going on without the ARM compiler; its test will be skipped"
  selection=()
  cleave_options=(-DCLEAVE_BENCH=ON)
fi
build
say "running the tests"
# The slow ones use all cores themselves.
jobs="$(nproc)"
[ "$all" = no ] || jobs=1
ctest --test-dir "$cleave_build" ${selection[@]+"${selection[@]}"} --parallel "$jobs" \
  --output-on-failure --no-tests=error
[ "$all" = no ] || check_threads
