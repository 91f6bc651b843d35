#!/bin/sh
# memory_test.sh CLEAVE MODEL WORK_DIR: what `cleave run` takes of the memory at most, loading included,
# is within 1.1 x the weights + the KV cache (docs/decisions/0008-packed-cache.md).
cleave=$1 model=$2 work=$3
. "$(dirname "$0")/expect.sh"
[ -e "$model" ] || { echo "absent: $model"; exit 77; }
enter "$work"
number() { sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" out.txt; }

# fits TYPE SLACK OPTIONS...: SLACK bytes more are allowed.
fits() {
  type=$1 slack=$2
  shift 2
  # 5 + 251 tokens: whole blocks of the KV cache, 30 layers x 3 heads x 64 x 2 x 4 bytes a token.
  expect 0 $cleave run "$model" --prompt "The capital of France is" --max-tokens 251 --ignore-eos \
    --weights "$type" --json --quiet "$@"
  kv=$(( ($(number prompt_tokens) + $(number tokens)) * 46080 ))
  most=$(( $(number weight_bytes) * 11 / 10 + kv + slack ))
  peak=$(number peak_resident_bytes)
  echo "$type $*: $peak bytes at most, $most allowed"
  [ "$peak" -le "$most" ] || fail "$type $*: $peak bytes, more than $most"
}

fits f32 0 --cache off
fits bf16 0 --cache off
fits f16 0 --cache off
fits int8 0 --cache off
# Here a tenth of the weights is less than the program, its libraries and the tokenizer take.
fits int4 5000000 --cache off
expect 0 $cleave run "$model" --prompt "The" --max-tokens 1 --weights int8 --cache int8.packed --quiet
fits int8 0 --cache int8.packed
says out.txt '"cached": true'
exit $status
