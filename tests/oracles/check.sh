#!/usr/bin/env bash
# One oracle check as a test: check.sh CLEAVE WORK_FOLDER CASE. Exit code 77 (skipped) where Transformers,
# llama.cpp or the model is missing; scripts/test.sh --all brings all three.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd "$here/../.." && pwd)"
cleave="$1" work="$2/$3" case="$3"

split="$(dirname "$cleave")/split_by_hand"  # shared experts and pruned models, at fixed settings
llama="$(dirname "$cleave")/llama_cpp_custom_op"
python=""

skip() { echo "skipped: $*"; exit 77; }
find_llama_cpp() { [ -x "$llama" ] || skip "built without llama.cpp (scripts/test.sh --all)"; }
find_transformers() {
  local candidate
  for candidate in "$root/.venv-oracle/bin/python" "$root/.venv/bin/python" python3; do
    if "$candidate" -c 'import transformers, gguf' 2>/dev/null; then python="$candidate"; return; fi
  done
  skip "no Python with transformers and gguf (scripts/test.sh --all)"
}
case "$case" in
  *llama_cpp) find_llama_cpp ;;
  *) find_transformers ;;
esac

demo="$root/examples/models/demo-llama"
bert="$root/tests/golden/encoder/bert"
minilm="$root/models/all-MiniLM-L6-v2"
smollm2="$root/models/SmolLM2-135M-Instruct.Q4_1.gguf"
case "$case" in
  smollm2_*)
    for file in "$smollm2" "$root/models/jargon.heldout.txt"; do
      [ -f "$file" ] || skip "$file is missing (scripts/fetch_models.sh)"
    done ;;
esac
case "$case" in
  minilm) [ -f "$minilm/model.safetensors" ] || skip "$minilm is missing (sentence-transformers/all-MiniLM-L6-v2)" ;;
esac
rm -rf "$work"
mkdir -p "$work"

check() { "$python" "$here/transformers_check.py" "$@" --cleave "$cleave"; }
convert_demo() {
  "$cleave" convert "$demo" "$work/converted" --experts 8 --active 4 --calibration "$demo/sample.txt" "$@"
}

case "$case" in
  dense) check "$demo" --expect LlamaForCausalLM --text "$demo/sample.txt" ;;
  converted) convert_demo; check "$work/converted" --expect MixtralForCausalLM --text "$demo/sample.txt" ;;
  hard_gate)
    convert_demo --gate hard
    check "$work/converted" --expect MixtralForCausalLM --text "$demo/sample.txt" ;;
  shared|shared_hard_gate)
    gate=softmax
    [ "$case" = shared ] || gate=hard
    "$split" "$demo" "$work/converted" shared 64 7 3 "$gate"
    check "$work/converted" --expect GraniteMoeSharedForCausalLM --text "$demo/sample.txt" ;;
  budget)  # shared slice and fine experts, written by the converter itself
    "$cleave" convert "$demo" "$work/converted" --active-share 0.5 --calibration "$demo/sample.txt" \
      --calibration-tokens 8192 --context 256
    check "$work/converted" --expect GraniteMoeSharedForCausalLM --text "$demo/sample.txt" ;;
  pruned)
    "$split" "$demo" "$work/pruned" pruned 200
    check "$work/pruned" --expect LlamaForCausalLM --text "$demo/sample.txt" ;;
  tuned)
    convert_demo
    "$cleave" train "$work/converted" "$work/tuned" --recipe factorllm --data "$demo/sample.txt" \
      --steps 10 --batch 2 --context 128
    check "$work/tuned" --expect MixtralForCausalLM --text "$demo/sample.txt" ;;
  llama_cpp)  # our FFN as a node of llama.cpp's graph: dense, and its own experts
    convert_demo
    for model in "$demo" "$work/converted"; do
      "$llama" "$model" --threads 2 --generate 16
      "$llama" "$model" --threads 3 --tokens 37 --generate 4 --repeats 1
    done ;;
  smollm2_llama_cpp) "$llama" "$smollm2" --generate 16 --repeats 3 ;;
  smollm2_converted)
    "$cleave" convert "$smollm2" "$work/converted" --experts 8 --active 4 \
      --calibration "$root/models/jargon.train.txt" --calibration-tokens 4096
    check "$work/converted" --expect MixtralForCausalLM
    rm -rf "$work/converted" ;;
  smollm2_shared)
    "$split" "$smollm2" "$work/converted" shared 256 10 8 softmax
    check "$work/converted" --expect GraniteMoeSharedForCausalLM
    rm -rf "$work/converted" ;;
  smollm2_budget)
    "$cleave" convert "$smollm2" "$work/converted" --active-share 0.5 \
      --calibration "$root/models/jargon.train.txt" --calibration-tokens 4096
    check "$work/converted" --expect GraniteMoeSharedForCausalLM
    rm -rf "$work/converted" ;;
  smollm2_perplexity)
    "$python" "$here/perplexity_check.py" "$smollm2" "$root/models/jargon.heldout.txt" --context 1024 \
      --limit-tokens 16384 --cleave "$cleave" ;;
  encoder) "$python" "$here/encoder_check.py" "$bert" --cleave "$cleave" ;;
  minilm) "$python" "$here/encoder_check.py" "$minilm" --cleave "$cleave" ;;
  *) echo "check.sh: unknown case $case"; exit 2 ;;
esac
