#!/usr/bin/env bash
# One oracle check as a test: check.sh CLEAVE WORK_FOLDER CASE. Exit code 77 (skipped) where Transformers
# or the model is missing; scripts/test.sh --all installs the one and fetches the other.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
cleave="$1" work="$2/$3" case="$3"

python=""
for candidate in "$root/.venv-oracle/bin/python" "$root/.venv/bin/python" python3; do
  if "$candidate" -c 'import transformers, gguf' 2>/dev/null; then python="$candidate"; break; fi
done
[ -n "$python" ] || { echo "skipped: no Python with transformers and gguf (scripts/test.sh --all)"; exit 77; }

demo="$root/examples/models/demo-llama"
smollm2="$root/models/SmolLM2-135M-Instruct.Q4_1.gguf"
case "$case" in
  smollm2_*)
    for file in "$smollm2" "$root/models/jargon.heldout.txt"; do
      [ -f "$file" ] || { echo "skipped: $file is missing (scripts/fetch_models.sh)"; exit 77; }
    done ;;
esac
rm -rf "$work"
mkdir -p "$work"

check() { "$python" "$here/transformers_check.py" "$@" --cleave "$cleave"; }
convert_demo() {
  "$cleave" convert "$demo" "$work/converted" --experts 8 --active 4 --calibration "$demo/sample.txt" "$@"
}

case "$case" in
  dense) check "$demo" --expect LlamaForCausalLM --text "$demo/sample.txt" ;;
  converted) convert_demo; check "$work/converted" --text "$demo/sample.txt" ;;
  hard_gate) convert_demo --gate hard; check "$work/converted" --text "$demo/sample.txt" ;;
  tuned)
    convert_demo
    "$cleave" train "$work/converted" "$work/tuned" --recipe factorllm --data "$demo/sample.txt" \
      --steps 10 --batch 2 --context 128
    check "$work/tuned" --text "$demo/sample.txt" ;;
  smollm2_converted)
    "$cleave" convert "$smollm2" "$work/converted" --experts 8 --active 4 \
      --calibration "$root/models/jargon.train.txt" --calibration-tokens 4096
    check "$work/converted"
    rm -rf "$work/converted" ;;
  smollm2_perplexity)
    "$python" "$here/perplexity_check.py" "$smollm2" "$root/models/jargon.heldout.txt" --context 1024 \
      --limit-tokens 16384 --cleave "$cleave" ;;
  *) echo "check.sh: unknown case $case"; exit 2 ;;
esac
