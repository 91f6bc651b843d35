#!/bin/sh
# encoder_test.sh CLEAVE MODEL TEXT WORK_DIR: what the commands do with an encoder. MODEL is a tiny random BERT of 64 tokens without
# a tokenizer; it is given one here, of letters.
cleave=$1 source=$2 text=$3 work=$4
. "$(dirname "$0")/expect.sh"
enter "$work"
mkdir bert && cp "$source"/config.json "$source"/model.safetensors bert/
{
  printf '{"version": "1.0", "added_tokens": [], "normalizer": {"type": "BertNormalizer", "clean_text": true,
    "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "post_processor": {"type": "BertProcessing", "sep": ["[SEP]", 3], "cls": ["[CLS]", 2]},
    "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
      "max_input_chars_per_word": 100, "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3'
  id=4
  for letter in a b c d e f g h i j k l m n o p q r s t u v w x y z; do
    printf ', "%s": %d, "##%s": %d' $letter $id $letter $((id + 1))
    id=$((id + 2))
  done
  printf '}}}\n'
} >bert/tokenizer.json
head -c 3000 "$text" >short.txt
head -c 6000 "$text" | tail -c 3000 >other.txt
convert="$cleave convert bert out --overwrite --experts 10 --calibration short.txt --context 20 --calibration-tokens 1000"

# Default options, but for the size of the experts: the window is as long as there are positions.
expect 0 $cleave convert bert auto --active-share 0.5 --experts 10 --calibration short.txt --json
says out.txt '"expert_width": 4'
grep -q 'writing calibration text' err.txt && fail "an encoder wrote text"
says auto/cleave.json '"context":40'
says auto/cleave.json '"self_calibration_tokens":0'
says auto/config.json 'cleave_bert_moe'
expect 2 $cleave convert bert none --active-share 0.5 --experts 10
says err.txt 'an encoder, which cannot write its own; give --calibration FILE'
expect 2 $cleave convert bert none --active-share 0.5 --experts 10 --calibration short.txt --self-calibration 400 --context 20
says err.txt '--self-calibration: bert is an encoder, which writes no text'
expect 2 $cleave convert bert none --experts 10 --self-calibration 400 --context 20 # a conversion as FactorLLM does
says err.txt '--self-calibration: bert is an encoder'
[ -e none ] && fail "a refused conversion wrote something"

expect 0 $convert --active-share 0.5 --allocation kl
says out.txt 'allocation kl: cosine distance [0-9.]* on [0-9]* calibration windows held apart'
expect 0 $convert --active-share 0.5 --rare-tokens 0.5 # a vocabulary larger than the number of positions
expect 0 $convert --active-share 0.5 --partition expertweaver --router representative --refit off
expect 0 $convert --active-share 0.5 --shared 5 # nothing is routed: a BERT with narrower FFNs
expect 0 $cleave eval out --against bert --text other.txt --context 20 --json --quiet
expect 0 $convert --active-share 0.5

expect 2 $cleave eval out --text other.txt --context 20
says err.txt 'out has no head, so there is no perplexity; give --against DENSE'
expect 0 $cleave eval out --against bert --text other.txt --context 20
says out.txt '^cosine_distance   0\.[0-9]*$'
says out.txt '^pooled_distance   0\.[0-9]*$'
says out.txt 'windows; disjoint, with their special tokens'
says err.txt 'cosine distance 0'
grep -q 'perplexity' out.txt && fail "an encoder has a perplexity"
expect 0 $cleave eval out --against bert --text other.txt --json --quiet
says out.txt '"cosine_distance": 0\.'
says out.txt '"pooled_distance": 0\.'
says out.txt '"context": 40'
grep -q '"kl"\|"perplexity"\|"top1_agreement"' out.txt && fail "an encoder has figures of a head"
expect 0 $cleave eval bert --against bert --text other.txt --json --quiet
says out.txt '"cosine_distance": 0\.0,'
expect 0 $cleave eval out --against bert --text other.txt --context 20 --average-active 1.5 --calibration short.txt

report="$cleave report out bert --text other.txt --calibration short.txt --context 20 --calibration-tokens 1000"
expect 0 $report --baselines all --out report --quiet
says out.txt 'its cosine distance is\|wins: at'
says out.txt '^method  *rho cosine distance    pooled$'
says report/report.md '| cosine distance | pooled |$'
says report/report.html '<th>cosine distance</th><th>pooled</th>'
says report/report.json '"pooled_distance"'
for row in 'CMoE' 'FLAP-style pruning, refitted' 'mass router' 'regression MLP' 'compensation' 'neuron oracle' 'oracle router'; do
  says report/report.md "$row"
done
expect 2 $report --self-calibration 400
says err.txt 'DENSE is an encoder, which writes no text'
expect 0 $cleave calibrate bert stats.safetensors --text short.txt --calibration-tokens 1000
says out.txt 'in 25 windows'

for command in "run out --prompt a" "generate bert --prompt a" "bench bert"; do
  expect 2 $cleave $command
  says err.txt 'is an encoder: it has no head'
done
expect 0 $cleave inspect out --json
says out.txt '"has_head": false'
says out.txt '"causal": false'
says out.txt '"rope": null'
expect 0 $cleave inspect bert --json
says out.txt '"family": "bert"'
says out.txt '"cleave_bert_moe"' # of export_targets
grep -q '"mixtral"\|"granitemoeshared"' out.txt && fail "a decoder's target is offered to an encoder"
expect 0 $cleave inspect out
says out.txt '^out: cleave_bert_moe (safetensors, F32)'
says out.txt 'can be written as: cleave_bert_moe (opens in cleave;'
says out.txt '^  speed-up at most'

expect 0 $cleave logits out --tokens 2,5,3
says out.txt '^     1  token        5  hidden -\?[0-9.]* \.\.\. -\?[0-9.]*$'
expect 0 $cleave logits bert --tokens 2,5,3 --json
says out.txt '"hidden_size": 24'
says out.txt '"hidden": \['
grep -q '"logits"\|"vocab_size"' out.txt && fail "an encoder has logits"
expect 2 $cleave logits bert --tokens 2,64,3
says err.txt 'token 1 has id 64; expected 0 to 63'

# That it is an encoder goes before what a text of its own would have to be.
expect 2 $cleave convert bert none --active-share 0.5 --experts 10 --calibration-tokens 600
says err.txt 'an encoder, which cannot write its own; give --calibration FILE'
expect 2 $cleave convert bert none --active-share 0.5 --experts 10 --calibration short.txt --self-calibration 400
says err.txt '--self-calibration: bert is an encoder, which writes no text'
expect 2 $cleave report out bert --text other.txt --calibration short.txt --self-calibration 400
says err.txt 'DENSE is an encoder, which writes no text'
head -c 20 "$text" >tiny.txt
expect 1 $cleave eval out --against bert --text tiny.txt --context 40
says err.txt 'fewer than the 38 that one window of 40 holds beside 2 special ones'
expect 0 $convert --active-share 0.5 --allocation kl --json
says out.txt '"measure": *"cosine distance"'
exit $status
