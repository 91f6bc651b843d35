#!/bin/sh
# tune_test.sh CLEAVE MODEL WORK_DIR: `cleave train` on a conversion to a budget of the bundled model.
cleave=$1 source=$2 work=$3
. "$(dirname "$0")/expect.sh"
enter "$work"
text="$source/sample.txt"
train="$cleave train budget tuned --overwrite --data $text --limit-tokens 4096 --context 128 --steps 3 --batch 2"

expect 0 $cleave convert "$source" budget --active-share 0.5 --calibration "$text" --calibration-tokens 1024 \
  --context 256 --quiet
expect 0 $train --teacher "$source" --recipe distill
says out.txt 'held-out perplexity .* KL'
says tuned/config.json 'GraniteMoeSharedForCausalLM'
says tuned/cleave.json '"recipe": *"distill"'
says tuned/cleave.json '"router_weight"'
[ -s tuned/metrics.jsonl ] || fail "no metrics"
expect 0 $cleave run tuned --prompt Once --max-tokens 4
expect 0 $train --teacher "$source" --recipe distill --parts ffn,norms --lm-weight 0.1 --json
says out.txt '"recipe": *"distill"'

expect 0 $train --teacher "$source"
says out.txt '12 steps, 768 tokens a layer'
says tuned/cleave.json '"layerwise"'
says tuned/metrics.jsonl '"phase":"layer 3"'
expect 0 $cleave run tuned --prompt Once --max-tokens 4
expect 2 $train --teacher "$source" --lm-weight 0.1
says err.txt '--lm-weight: an option of the recipe factorllm and distill, but this is layerwise (the default'
expect 2 $train --teacher "$source" --parts ffn,attention
says err.txt 'use the recipe distill'

expect 2 $train
says err.txt 'refitted'
expect 2 $train --teacher "$source" --pa-weight 0.1
says err.txt '--pa-weight: an option of the recipe factorllm'
expect 2 $train --teacher "$source" --recipe factorllm
says err.txt 'use the recipe distill'
expect 2 $train --teacher "$source" --recipe factorllm --parts router
says err.txt '--parts: an option of the recipe distill'
expect 2 $train --teacher "$source" --parts routers
says err.txt 'is none of ffn'
expect 2 $train --teacher "$source" --recipe other
says err.txt 'choose auto, factorllm, distill or layerwise'
exit $status
