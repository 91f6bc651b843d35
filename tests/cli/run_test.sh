#!/bin/sh
# run_test.sh CLEAVE MODEL WORK_DIR: what `cleave run`, its cache file and --router-threshold promise,
# on the bundled model.
cleave=$1 source=$2 work=$3
. "$(dirname "$0")/expect.sh"
enter "$work" && cp -r "$source" model || exit 2
run="$cleave run model --prompt Once --max-tokens 8 --weights bf16"

expect 0 $run
cp out.txt plain.txt
says out.txt '^Once'
for text in '^prompt  *[0-9]* tokens' '^generation  *8 tokens' 'bf16' 'threads' 'resident'; do
  says err.txt "$text"
done
expect 0 $cleave generate model --prompt Once --max-tokens 8 --weights bf16 --quiet
cmp -s out.txt plain.txt || fail "generate and run differ"
[ -s err.txt ] && fail "--quiet is not"
expect 0 $run --config /dev/null
printf '[run]\nmax-tokens = 8\n' >run.toml
expect 0 $cleave generate model --prompt Once --weights bf16 --config run.toml
cmp -s out.txt plain.txt || fail "a table [run] is not read"

[ -e model/cleave.bf16.packed ] && fail "a cache file was written unasked"
expect 0 $run --cache on
says err.txt 'cleave.bf16.packed: holds the packed weights now'
cmp -s out.txt plain.txt || fail "another text as the cache is written"
[ -s model/cleave.bf16.packed ] || fail "--cache on wrote nothing"
expect 0 $run
says err.txt 'mapped from the cache file'
cmp -s out.txt plain.txt || fail "another text with the cache"
expect 0 $run --cache off --json
says out.txt '"cached": false'
head -c 100000 model/cleave.bf16.packed >cut && mv cut model/cleave.bf16.packed
expect 0 $run
says err.txt 'the model is packed without it'
cmp -s out.txt plain.txt || fail "another text with half a cache"
expect 0 $run --cache elsewhere.packed --json
says out.txt '"cached": true'
expect 0 $run --cache missing/weights.packed
says err.txt 'stay in memory'
expect 2 $run --cache ""
expect 2 $run --router-threshold 0.5
says err.txt 'has no experts'

expect 0 $cleave convert model moe --experts 8 --active 4 --calibration model/sample.txt \
  --calibration-tokens 2048 --quiet
eval="$cleave eval moe --text model/sample.txt --limit-tokens 1024 --context 256 --quiet"
expect 0 $eval
says out.txt 'active experts  *4 of 8'
expect 0 $eval --router-threshold 0.98
says out.txt 'active experts  *[123]\.[0-9]* of 8'
expect 0 $eval --router-threshold 1 --json
says out.txt '"active_experts": 1.0'
expect 2 $eval --router-threshold 1.5

calibrate="$cleave calibrate model stats.safetensors --text model/sample.txt --calibration-tokens 2048 --context 256"
expect 0 $calibrate --gram --quiet --json
says out.txt '"tokens": 2040'
[ -s stats.safetensors ] || fail "calibrate wrote nothing"
expect 2 $calibrate
says err.txt 'use --overwrite'
expect 0 $calibrate --overwrite --layers 0 --quiet
says out.txt '1 of [0-9]* layers'
expect 2 $calibrate --overwrite --text-weights 1 2
expect 2 $calibrate --overwrite --text-weights nan
says err.txt 'nan is not a weight'
expect 2 $calibrate --overwrite --layers 99
says err.txt 'layer 99'
expect 2 $cleave calibrate moe other.safetensors --text model/sample.txt --context 256
says err.txt 'mixture of experts'
[ -e other.safetensors ] && fail "a failed calibration left a file"

# An instruction set that nobody has, and one that this kind of machine has not.
unsupported=neon
case $(uname -m) in aarch64 | arm64) unsupported=avx2 ;; esac
for isa in sse9 $unsupported; do
  for command in "run model --prompt Once" "eval model --text model/sample.txt --quiet" "convert model never \
    --experts 8 --active 4 --calibration model/sample.txt --calibration-tokens 2048 --quiet"; do
    expect 2 env CLEAVE_ISA=$isa $cleave $command
    says err.txt "^cleave: CLEAVE_ISA: '$isa' is not an instruction set this machine and build have; use one of .*scalar"
    [ "$(wc -l <err.txt)" -eq 1 ] || fail "CLEAVE_ISA=$isa: more than one line: $(cat err.txt)"
    [ -s out.txt ] && fail "CLEAVE_ISA=$isa: $command wrote before it failed"
  done
done
[ -e never ] && fail "a conversion without kernels left a directory"

# Interrupted in the middle: what is there stays, the summary comes, the code is that of Ctrl-C.
$cleave run model --prompt Once --max-tokens 20000 --ignore-eos >out.txt 2>err.txt &
pid=$!
for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  [ "$(wc -c <out.txt)" -gt 20 ] && break
  sleep 0.2
done
kill -TERM $pid
wait $pid
code=$?
[ $code -eq 130 ] || fail "interrupted: code $code"
says err.txt '^generation'
says err.txt 'interrupted'
exit $status
