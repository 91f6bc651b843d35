#!/bin/sh
# bench_test.sh MOE_FFN END_TO_END MODEL WORK_DIR: the benchmark programs run on a small shape and the bundled model, print
# and write their rows, leave nothing behind, and refuse what makes no sense in one line.
moe_ffn=$1 end_to_end=$2 model=$3 work=$4
. "$(dirname "$0")/../cli/expect.sh"
enter "$work"
mkdir tmp && export TMPDIR="$work/tmp"
refused() { # refused CODE WORD COMMAND...
  code=$1 word=$2
  shift 2
  expect "$code" "$@"
  says err.txt "$word"
  [ "$(wc -l <err.txt)" -eq 1 ] || fail "not one line of error: $*"
}

expect 0 "$moe_ffn" --d-model 64 --hidden 128 --tokens 1,4 --repeats 3 --baselines all --json table.json
says out.txt '^ *4  *[0-9.]*  *[0-9.]*  *[0-9.]*x  ([0-9.]*-[0-9.]*)  *[0-9.]*'
says table.json '"speedup_quartiles"'
says table.json '"instruction_set"'

# Without a model, as the folder has none; the row of random layers has its shape of a real model.
expect 0 "$moe_ffn" --suite --only C5,E1 --json suite.json
says out.txt '^C5  *half of 1024 tokens.*  [0-9.]*  *0.93  *0.98'
says out.txt '^E1 .* not measured: no models/SmolLM2.*fetch_models.sh'
for key in ours quartiles rounds ours_s compared_with_s at_least aim below read_bytes_per_s not_measured; do
  says suite.json "^      \"$key\":"  # of a row
done
for key in date cleave commit compiler flags processor instruction_set threads rows; do says suite.json "^  \"$key\":"; done

expect 0 "$moe_ffn" --suite --only E1 --model "$model"
says out.txt '^E1  *converted, bf16: times our dense  *[0-9.]*  *1.50  *1.75'
[ -z "$(ls -A tmp)" ] || fail "the suite left files: $(ls -A tmp)"

expect 0 "$end_to_end" "$model" --rounds 1 --prompt 32 --generate 8 --json models.json
says out.txt '^dense  *cleave  *4-bit'
says out.txt '^C7 .* not measured: '
says out.txt '^E1 .* not measured: no converted model was given'
says models.json '"generated_tokens_per_s"'

refused 2 C9 "$moe_ffn" --suite --only C9
refused 2 suite "$moe_ffn" --only C5
refused 2 tokens "$moe_ffn" --suite --tokens 4
refused 2 absent "$moe_ffn" --json absent/table.json
refused 2 'active <= experts' "$moe_ffn" --active 9
refused 2 repeats "$moe_ffn" --repeats 0
refused 1 absent.gguf "$moe_ffn" --suite --model absent.gguf
refused 2 'cleave convert' "$moe_ffn" --suite --model "$model" --converted "$model"
refused 1 absent.gguf "$end_to_end" absent.gguf
refused 2 rounds "$end_to_end" "$model" --rounds 0
exit $status
