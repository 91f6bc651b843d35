#!/usr/bin/env bash
# The quality figures of docs/benchmarks.md: SmolLM2-135M converted at three budgets, written, read again and
# measured beside every baseline on three texts that the conversion did not see.
#
#   bench/quality.sh TEXTS OUT [SEED...]
#
# TEXTS holds wikitext-2.valid.txt, tinystories.calib.txt, tinystories.heldout.txt and war-and-peace.txt. OUT receives the cut texts, the
# models and a report per budget and seed (default: seed 0). Environment:
# CLEAVE (the program, default build/bin/cleave), MODEL, CALIBRATION (a text; default: two fifths of wikitext),
# CALIBRATION_TOKENS (32768), CONTEXT (1024), EVAL_TOKENS (6144 of each text), RHOS ("0.75 0.5 0.25"),
# ALLOCATION_RHOS (0.5; budgets that are also divided among the layers by KL),
# BASELINES (all; of the first seed), SEED_BASELINES (none; of the other seeds), TUNE_STEPS (0: no tuning; the published rows have
# 450, and take an hour each).
#
# An encoder (MODEL=models/all-MiniLM-L6-v2 CONTEXT=128 EVAL_TOKENS=16384) writes no text, so rows that differ in text of the model's
# own are left out; the figures are cosine distances in place of KL (docs/methods/conversion.md, "Encoders").
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -ge 2 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | grep -v '^set' >&2; exit 2; }
texts=$1 out=$2
shift 2
seeds=("${@:-0}")
cleave=${CLEAVE:-build/bin/cleave}
model=${MODEL:-models/SmolLM2-135M-Instruct.Q4_1.gguf}
context=${CONTEXT:-1024} calibration_tokens=${CALIBRATION_TOKENS:-32768} eval_tokens=${EVAL_TOKENS:-6144}
read -r hidden writes_text < <("$cleave" inspect "$model" --json |
  python3 -c 'import json, sys; m = json.load(sys.stdin); print(m["intermediate_size"], m["causal"] and m["has_head"])')
if [ "${TUNE_STEPS:-0}" -gt 0 ] && [ "$writes_text" != True ]; then
  echo "quality.sh: TUNE_STEPS is $TUNE_STEPS, and $model is an encoder, which cleave train cannot tune; leave it out" >&2
  exit 2
fi
mkdir -p "$out"

# By lines, so that no character is cut. Wikitext: the first two fifths for calibration; of the rest every eighth block
# of 40 lines, so that few windows see many articles. War and Peace: the last 5 %.
lines() { wc -l < "$1"; }
wiki=$texts/wikitext-2.valid.txt peace=$texts/war-and-peace.txt
head -n $(($(lines "$wiki") * 2 / 5)) "$wiki" > "$out/wikitext.calibration.txt"
tail -n $(($(lines "$wiki") * 3 / 5)) "$wiki" | awk 'int(NR / 40) % 8 == 4' > "$out/wikitext.heldout.txt"
tail -n $(($(lines "$peace") / 20)) "$peace" > "$out/war-and-peace.heldout.txt"
cp "$texts/tinystories.heldout.txt" "$out/stories.heldout.txt"
head -n $(($(lines "$peace") * 9 / 10)) "$peace" > "$out/war-and-peace.calibration.txt"
# To tune on: the rest of wikitext; or equal parts of it and of what goes before the other two.
tail -n $(($(lines "$wiki") * 3 / 5)) "$wiki" | awk 'int(NR / 40) % 8 != 4' > "$out/wikitext.rest.txt"
head -c 400000 "$out/wikitext.rest.txt" > "$out/wikitext.part.txt"
head -c 400000 "$texts/tinystories.calib.txt" > "$out/stories.part.txt"
head -c 400000 "$peace" > "$out/war-and-peace.part.txt"
calibration=${CALIBRATION:-$out/wikitext.calibration.txt}
held_out=("$out"/wikitext.heldout.txt "$out"/stories.heldout.txt "$out"/war-and-peace.heldout.txt)

convert_without_text() { # name, then options
  local name=$1
  shift
  [ -d "$out/$name" ] || "$cleave" convert "$model" "$out/$name" \
    --calibration-tokens "$calibration_tokens" --context "$context" "$@"
}
convert() { convert_without_text "$@" --calibration "$calibration"; }
against_dense() { # name: KL on every text
  local text
  for text in "${held_out[@]}"; do
    "$cleave" eval "$out/$1" --against "$model" --text "$text" --context "$context" \
      --limit-tokens "$eval_tokens" --weights f32 --json --quiet > "$out/$1.$(basename "$text" .heldout.txt).json"
  done
}

baselines=${BASELINES:-all}
for seed in "${seeds[@]}"; do
  for rho in ${RHOS:-0.75 0.5 0.25}; do
    name=moe-$rho-seed$seed
    convert "$name" --active-share "$rho" --seed "$seed"
    "$cleave" report "$out/$name" "$model" --text "${held_out[@]}" --context "$context" \
      --limit-tokens "$eval_tokens" --calibration "$calibration" \
      --calibration-tokens "$calibration_tokens" --baselines "$baselines" --seed "$seed" \
      --out "$out/report-$rho-seed$seed"
  done
  baselines=${SEED_BASELINES:-none}
done

# What routing, refit and shared experts each are worth, at the first seed: routing off at the same budget and with the
# same refit; no refit; experts alone (stock Mixtral). And without the text that the model writes itself, and with
# nothing else.
for rho in ${RHOS:-0.75 0.5 0.25}; do
  units=$(python3 -c "print(round($hidden / 16 * $rho))") # experts of 16 neurons
  convert "static-$rho" --active-share "$rho" --seed "${seeds[0]}" --shared "$units"
  convert "unrepaired-$rho" --active-share "$rho" --seed "${seeds[0]}" --refit off
  convert "mixtral-$rho" --active-share "$rho" --seed "${seeds[0]}" --shared 0
  if [ "$writes_text" = True ]; then
    convert "read-$rho" --active-share "$rho" --seed "${seeds[0]}" --self-calibration 0
    convert_without_text "textless-$rho" --active-share "$rho" --seed "${seeds[0]}"
  fi
  # A third each of three domains, with refit and without.
  mixture=(--calibration "$out/wikitext.calibration.txt" "$texts/tinystories.calib.txt" "$out/war-and-peace.calibration.txt")
  convert_without_text "mixed-$rho" --active-share "$rho" --seed "${seeds[0]}" "${mixture[@]}"
  convert_without_text "mixed-unrepaired-$rho" --active-share "$rho" --seed "${seeds[0]}" "${mixture[@]}" --refit off
  variants=(static unrepaired mixtral mixed mixed-unrepaired)
  [ "$writes_text" = True ] && variants+=(read textless)
  for variant in "${variants[@]}"; do against_dense "$variant-$rho"; done
done

# A width of the shared slice per layer, which takes ten minutes.
for rho in ${ALLOCATION_RHOS-0.5}; do
  convert "kl-$rho" --active-share "$rho" --seed "${seeds[0]}" --allocation kl
  against_dense "kl-$rho"
done

# Light tuning of a conversion to half of the FFN, layer by layer: of the default on a mixture, and on wikitext alone of
# one without text of the model's own.
tune() { # name, start, texts
  local name=$1 start=$2
  shift 2
  [ -d "$out/$name" ] || OMP_WAIT_POLICY=passive "$cleave" train "$out/$start" "$out/$name" \
    --teacher "$model" --data "$@" --recipe layerwise --steps "$TUNE_STEPS" --lr 4e-3 --held-out-windows 0
  against_dense "$name"
}
if [ "${TUNE_STEPS:-0}" -gt 0 ]; then
  convert "moe-0.5-seed${seeds[0]}" --active-share 0.5 --seed "${seeds[0]}"
  convert read-0.5 --active-share 0.5 --seed "${seeds[0]}" --self-calibration 0
  tune tuned-mixture "moe-0.5-seed${seeds[0]}" "$out"/{wikitext,stories,war-and-peace}.part.txt
  tune tuned-wikitext read-0.5 "$out/wikitext.calibration.txt" "$out/wikitext.rest.txt"
fi
