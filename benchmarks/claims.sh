#!/usr/bin/env bash
# Rows 1 to 4 of docs/results.md: bash benchmarks/claims.sh MODEL C4 TRAIN TEST FOLDER
# Results are lines of FOLDER/claims-*.jsonl; best started some to a GPU.
source "$(dirname "$0")/runs.sh"

# claim CLAIM [OPTION ...]
claim() {
    later claims.py "$1" "$model" --calibration "$calibration" --test "$test" --train "documents:$train" \
        --claims "$out/claims" --json "$out/claims-$$.jsonl" --layers 4 12 20 "${@:2}"
}
all="--trainable latents,scales,norms --seeds 0 1 2" one="--trainable latents,scales,norms --seeds 0"
best="identity@1e-2 soft-0.3@3e-2"
claim pairs $one --starts viterbi --settings $best
claim overshoot --trainable latents --starts viterbi --settings soft-0.1@1e-1 soft-0.3@3e-2 soft-1.0@1e-1
claim drift --trainable latents --layers 4 --settings identity@1e-4,1e-3,1e-2,3e-2,4.5e-2,5.5e-2,1e-1 soft-0.1@1e-3,3e-3,1e-2,3e-2,1e-1
claim single $all --starts viterbi --settings identity@1e-2,1.7e-2,3e-2 soft-0.1@3e-2,1e-1 soft-0.3@1e-2,3e-2,1e-1 soft-1.0@1e-2,3e-2,1e-1
claim single --trainable latents --starts viterbi --steps 10 --settings soft-0.3@2e-4 identity@2e-4 # the paper's
claim single --trainable latents --starts viterbi --settings $best
claim pairs $all --starts viterbi --settings $best
claim overshoot --trainable latents --starts viterbi --settings soft-0.3@1e-1
claim single $all --starts ldlq --settings identity@1e-2 soft-0.1@1e-1 soft-0.3@3e-2
claim pairs $all --starts ldlq --settings identity@1e-2 soft-0.1@1e-1
