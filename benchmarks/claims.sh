#!/usr/bin/env bash
# Rows 1 to 4 of docs/results.md: bash benchmarks/claims.sh MODEL C4 TRAIN TEST FOLDER [SEED ...]
# Processes with one FOLDER share the runs: start one on every GPU, each with its CUDA_VISIBLE_DEVICES.
# Results are lines of FOLDER/claims-*.jsonl; runs whose names lie in FOLDER/claims are left out.
set -eu
model=$1 calibration=$2 train=$3 test=$4 out=$5
shift 5
seeds=${*:-0}
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
rates="identity@1e-2,2e-2,3e-2,4.5e-2 soft-0.1@3e-2,1e-1,2e-1"

# claim CLAIM [OPTION ...]
claim() {
    python3 benchmarks/claims.py "$1" "$model" --calibration "$calibration" --test "$test" \
        --train "documents:$train" --claims "$out/claims" --json "$out/claims-$$.jsonl" \
        --layers 4 12 20 --seeds $seeds "${@:2}"
}
hot="soft-0.3@3e-2,6e-2,1e-1 soft-1.0@1e-2,3e-2,1e-1"
for trainable in latents,scales,norms latents; do
    claim single --trainable $trainable --starts viterbi ldlq --settings $rates $hot
    claim pairs --trainable $trainable --starts viterbi --settings $rates
done
claim single --trainable scales,norms --starts viterbi ldlq --settings identity@1e-2 # no codes
claim drift --trainable latents --layers 4
claim overshoot --trainable latents --starts viterbi ldlq --settings soft-0.1@1e-1 $hot
