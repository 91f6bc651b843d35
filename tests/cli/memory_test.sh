#!/bin/sh
# memory_test.sh CLEAVE MODEL WORK_DIR TYPE...: what `cleave run` takes of the memory at most, loading
# included, is within 1.1 x the weights + the KV cache (docs/decisions/0008-packed-cache.md).
cleave=$1 model=$2 work=$3
shift 3
. "$(dirname "$0")/expect.sh"
[ -e "$model" ] || { echo "absent: $model"; exit 77; }
enter "$work"
number() { sed -n "s/.*\"$1\": \([0-9]*\).*/\1/p" out.txt; }

# fits TYPE TOKENS OPTIONS...: on two threads; each more has 0.16 MB of activations of its own.
fits() {
  type=$1 tokens=$2
  shift 2
  # With the 5 of the prompt, whole blocks of the KV cache: 30 layers x 3 heads x 64 x 2 x 4 bytes a token.
  expect 0 $cleave run "$model" --prompt "The capital of France is" --max-tokens "$tokens" --ignore-eos \
    --weights "$type" --threads 2 --json --quiet "$@"
  kv=$(( ($(number prompt_tokens) + $(number tokens)) * 46080 ))
  most=$(( $(number weight_bytes) * 11 / 10 + kv ))
  peak=$(number peak_resident_bytes)
  echo "$type, $tokens tokens, $*: $peak bytes at most, $most allowed"
  [ "$peak" -le "$most" ] || fail "$type $*: $peak bytes, more than $most"
}

for type in "$@"; do
  fits $type 251 --cache off
  fits $type 123 --cache off  # packing is the most
  expect 0 $cleave run "$model" --prompt "The" --max-tokens 1 --weights $type --cache $type.packed --quiet
  fits $type 251 --cache $type.packed
  says out.txt '"cached": true'
  rm -f $type.packed
done
exit $status
