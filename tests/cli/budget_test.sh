#!/bin/sh
# budget_test.sh CLEAVE MODEL WORK_DIR: `cleave convert --active-share`, and `cleave report` on what it wrote, on the
# bundled model.
cleave=$1 source=$2 work=$3
. "$(dirname "$0")/expect.sh"
enter "$work"
text="$source/sample.txt"
head -c 4000 "$text" >short.txt
convert="$cleave convert $source out --overwrite --calibration $text --calibration-tokens 1024 --context 256"

expect 0 $convert --active-share 0.5
says out.txt '24 experts of 16 neurons, 8 active per token, 128 neurons always on'
says out.txt '% of the energy captured (oracle .* %), router recall .* %; the router costs 1.56 % of the dense FFN'
says err.txt 'writing calibration text 256/256' # a quarter as much as is read
says err.txt 'note: layers 0 to 3 are under-determined: in layer 0 a routed neuron sees 427 of the 1280'
says out/cleave.json '"notices":\["layers 0 to 3 are under-determined'
says out/config.json 'GraniteMoeSharedForCausalLM'
expect 0 $cleave report out "$source" --text "$text" --calibration "$text" --calibration-tokens 1024 \
  --limit-tokens 512 --context 256 --baselines quick --out report --quiet
for file in report.json report.md report.html; do [ -s report/$file ] || fail "no report/$file"; done
says report/report.md 'FLAP'
for file in report.json report.md report.html; do says report/$file 'layers 0 to 3 are under-determined'; done
report="$cleave report out $source --text short.txt --calibration $text --calibration-tokens 512 --limit-tokens 512
  --context 256 --out report"
expect 0 $report --self-calibration 300
says err.txt 'writing calibration text 256/256'
says report/report.md "Baselines: 768 tokens of sample.txt, the model's own text, seed 0"
expect 2 $report --self-calibration 100
says err.txt 'less than one window of 256'
expect 2 $report --self-calibration 512 --baselines none
says err.txt 'writes text for the baselines'
expect 0 $convert --active-share 0.5 --quiet --json --baselines quick --text short.txt
says out.txt '"verdict"'
says out.txt '^    "layers 0 to 3 are under-determined' # "notices" of the conversion
says out/report/report.md 'FLAP'
says out/report/report.md 'this conversion, oracle router'
says out/report/report.md 'static mask, refitted'
sed -n '/"calibration": {/,/}/p' out.txt | grep -q '"tokens": 1280' || fail "the baselines learned from another text"
expect 0 $cleave run out --prompt Once --max-tokens 4
evaluate="$cleave eval out --text short.txt --context 256 --quiet --json"
expect 0 $evaluate --active 12
says out.txt '"active_experts": 12.0'
expect 0 $evaluate --active-share 0.625
says out.txt '"active_experts": 12.0'
expect 0 $evaluate --average-active 8 --calibration short.txt
says out.txt '"active_experts": \(7\.[6-9]\|8\.[0-3]\)'
expect 2 $evaluate --active 25
says err.txt 'must be in \[1, E = 24\]'
expect 2 $evaluate --average-active 8
says err.txt 'give --calibration'
expect 2 $evaluate --calibration short.txt
says err.txt 'give that as well'

expect 0 $convert --active-share 0.5 --shared 16 --quiet --json --baselines quick --text short.txt
says out/config.json 'LlamaForCausalLM'
says out.txt 'this conversion, which routes nothing, has KL'
expect 0 $convert --active-share 0.5 --shared 0 --quiet --refit off --router ridge
says out/config.json 'MixtralForCausalLM'
expect 0 $convert --active-share 0.25 --experts 16 --quiet --json
says out.txt '"shared_width": 64'
says out.txt '"router_share": 0.00911' # 14 rows of D = 128 over 3 * 128 * 512
for list in captured_energy oracle_energy router_recall; do
  [ "$(sed -n "/\"$list\"/,/]/p" out.txt | grep -c '^    0\.')" -eq 4 ] || fail "$list does not have a share for each layer"
done
small="$cleave convert $source out --overwrite --calibration $text --calibration-tokens 512 --context 256 --active-share 0.5
  --quiet --json"
expect 0 $small --router low-rank:4 --partition cmoe
says out.txt '"router": "low-rank"'
says out.txt '"partition": "cmoe"'
expect 0 $small --gate softmax
says out/cleave.json '"gate": "softmax"'
says out/cleave.json '"router_epsilon": 1.0'
expect 0 $small --refit-rounds 2 --router ridge
says out/cleave.json '"refit_rounds": *2'
expect 2 $small --refit-rounds 2 --refit off
says err.txt 'nothing is repaired'
for setting in --penalty --correction; do
  expect 2 $small --refit off $setting 0.5
  says err.txt "$setting is a setting of the refit"
done
expect 0 $small --penalty 1 --correction 0 --router ridge
says out/cleave.json '"correction":0.0'
says out/cleave.json '"penalty":1.0'
expect 0 $small --calibration-mode parallel --router ridge
says out/cleave.json '"calibration_mode":"parallel"'
expect 2 $small --calibration-mode parallel --correction 0.5
says err.txt 'leave one out'
expect 2 $small --calibration-mode both
says err.txt 'choose one of sequential, parallel'
expect 2 $small --gate soft
says err.txt 'choose one of auto, softmax, hard'
expect 0 $small --router representative --partition expertweaver
says out.txt '"router": "representative"'

# Several texts: equal parts, or as their weights say; a short one gives what it has, and that is told.
head -c 40000 "$text" >long.txt
head -c 1500 "$text" >tiny.txt
two="$cleave convert $source out --overwrite --calibration long.txt tiny.txt --calibration-tokens 2048 --context 256
  --self-calibration 0 --active-share 0.5 --router ridge"
expect 0 $two
says err.txt 'tiny.txt has [123] windows of 256 tokens, fewer than its share of 4'
expect 0 $two --calibration-weights 7,1 --json
says out.txt '"calibration_tokens": 2048'
says out/cleave.json '"calibration_weights":\[7.0,1.0\]'
# A report's baselines learn from the same: their numbers are those of the conversion's own report.
expect 0 $two --calibration-weights 5,3 --baselines quick --text short.txt --quiet
sed '/^## Time/,$d' out/report/report.md >converted.md
expect 0 $cleave report out "$source" --calibration long.txt tiny.txt --calibration-tokens 2048 --context 256 \
  --calibration-weights 5,3 --text short.txt --out report
says err.txt 'note: tiny.txt has [12] windows of 256 tokens, fewer than its share of 3'
sed '/^## Time/,$d' report/report.md | cmp -s - converted.md || fail 'the report on two texts differs from the one of their conversion'
expect 2 $cleave report out "$source" --calibration long.txt tiny.txt --context 256 --calibration-weights 5 --text short.txt
says err.txt '1 weights for 2 texts'
expect 2 $two --calibration-weights 7
says err.txt '1 weights for 2 texts'
expect 2 $two --calibration-weights 7,-1
says err.txt '--calibration-weights'
expect 2 $two --calibration-weights 7,nan
says err.txt 'nan is not a weight'
expect 2 $two --calibration-weights 1e308,1e308
says err.txt 'of a finite sum'
# 0.7 + 0.1 is less than 0.8 in binary; the second text gets its window all the same.
expect 0 $cleave convert "$source" out --overwrite --calibration long.txt long.txt long.txt --calibration-tokens 2560 \
  --context 256 --self-calibration 0 --active-share 0.5 --router ridge --calibration-weights 0.7,0.1,0.2 --json --quiet
says out.txt '"calibration_tokens": 2560'
expect 2 $two --calibration-weights 1,99
says err.txt 'long.txt gets none'
expect 2 $cleave convert "$source" out --overwrite --calibration long.txt short.txt --calibration-tokens 0 --active-share 0.5 \
  --calibration-weights 7,1
says err.txt '0 takes all of each'
expect 2 $cleave convert "$source" out --overwrite --calibration long.txt --calibration-weights 1
says err.txt 'give --active-share as well'

# Text that the model writes itself: beside the one given, and where none is.
expect 0 $convert --active-share 0.5 --self-calibration 600
says err.txt 'writing calibration text 512/512'
says out/cleave.json '"self_calibration_tokens": *600'
expect 0 $convert --active-share 0.5 --self-calibration 512 --quiet --json
says out.txt '"calibration_tokens": 1536'
expect 0 $convert --active-share 0.5 --self-calibration 0 --quiet --json
says out.txt '"calibration_tokens": 1024'
expect 0 $cleave convert "$source" out --overwrite --active-share 0.5 --calibration-tokens 512 --context 256 --quiet --json
says out.txt '"calibration_tokens": 512'
own="$cleave report out $source --text short.txt --context 256 --out report_own"
expect 0 $own --self-calibration 512
says report_own/report.md "Baselines: 512 tokens of the model's own text, seed 0"
expect 2 $own
says err.txt 'or --self-calibration N'
expect 0 $cleave convert "$source" out --overwrite --experts 8 --self-calibration 512 --context 256 --quiet --json
says out.txt '"calibration_tokens": 510' # without the first of each window

# The shared neurons divided among the layers; all commands take the padded result.
expect 0 $convert --active-share 0.5 --allocation kl --router ridge
says out.txt 'allocation kl: KL [0-9.]* on 2 calibration windows held apart'
says out/cleave.json '"allocation_choice"'
expect 0 $convert --active-share 0.5 --allocation kl --router ridge --quiet --json
says out.txt '"screening_kl"'
says out.txt '"shared_widths"'
says out.txt '"stock_macs_per_token"'
expect 0 $cleave inspect out --json
says out.txt '"shared_widths"'
expect 0 $cleave inspect out
says out.txt 'shared neurons always'
expect 0 $cleave run out --prompt Once --max-tokens 4 --cache on
expect 0 $cleave run out --prompt Once --max-tokens 4 --cache auto --weights f16
expect 0 $cleave bench out --quiet --prompt-tokens 32 --generate 4 --repeats 1
expect 0 $cleave eval out --text short.txt --context 256 --quiet --json --active-share 0.625
says out.txt '"active_experts": 12.0'
expect 0 $cleave report out "$source" --text short.txt --calibration "$text" --calibration-tokens 512 \
  --limit-tokens 512 --context 256 --baselines quick --out report_kl --quiet
expect 2 $convert --active-share 0.5 --allocation most
says err.txt 'choose one of uniform, kl'
expect 2 $convert --allocation kl
says err.txt 'give --active-share as well'
expect 2 $convert --active-share 0.5 --shared 0 --allocation kl
says err.txt 'none do; give another --shared'
expect 2 $convert --active-share 0.5 --shared 16 --allocation kl
says err.txt 'all that run do; give another --shared'
expect 2 $small --allocation kl
says err.txt 'holds 2 windows apart from the fit'

expect 2 $convert --active-share 0.5 --router nearest
says err.txt 'choose one of trained, ridge'
expect 2 $convert --active-share 0.5 --router ridge:4
says err.txt 'only low-rank'
expect 2 $convert --active-share 0.5 --router low-rank:25
says err.txt 'rank 25 for 24 experts'
expect 2 $convert --active-share 0.5 --partition metis
says err.txt 'choose one of captured, profiles'
expect 2 $convert --active-share 0.5 --baselines quick
says err.txt 'give --text'
expect 2 $convert --active-share 0.5 --text "$text"
says err.txt 'give --baselines'
expect 2 $convert --active-share 1 --shared 32 --baselines quick --text "$text"
says err.txt 'smaller --active-share'
expect 2 $convert --active-share 0.5 --baselines many --text "$text"
says err.txt 'choose one of none, quick, all'
expect 2 $convert --active-share 0.016
says err.txt 'give at least 0.03125'
expect 2 $convert --active-share 0.5 --experts 7
says err.txt 'nearest divisors'
expect 2 $convert --active-share 0.5 --shared 17
says err.txt 'give 16 or fewer'
expect 2 $convert --active-share 0.5 --active 4
says err.txt 'exclude each other'
expect 2 $convert --refit on
says err.txt 'give --active-share'
expect 2 $cleave convert "$source" out --overwrite --active-share 0.5 --self-calibration 0
says err.txt 'needs a text'
expect 2 $convert --active-share 0.5 --self-calibration 100
says err.txt 'less than one window of 256'
expect 2 $convert --active-share 0.5 --self-calibration many
says err.txt "neither a whole number nor 'auto'"
expect 2 $cleave convert "$source" out --overwrite --active-share 0.5 --calibration "$text" "$text" \
  --calibration-tokens 300 --context 256
says err.txt 'fewer than one window'
exit $status
