#!/usr/bin/env bash
# The search of docs/results.md: bash benchmarks/search.sh MODEL C4 TRAIN TEST FOLDER
# Processes with one FOLDER share the runs: start one on every GPU, each with its CUDA_VISIBLE_DEVICES.
# Results are lines of FOLDER/runs-*.jsonl; runs whose names lie in FOLDER/claims are left out.
set -eu
model=$1 calibration=$2 train=$3 test=$4 out=$5
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
common="--steps 60 --batch 16 --micro-batch 8 --evaluate-every 20 --measure-every 20"
common="$common --train latents,scales,norms"
runs=(ptq)
soft="$common --estimator soft --t-init 0.05 --t-min 0.02"
identity="$common --estimator identity"
for lr in 6e-2 3e-2 1.2e-1; do
    for scale in 1e-2 2e-2; do
        runs+=("soft-$lr-$scale=$soft --lr $lr --scale-lr $scale")
        runs+=("identity-$lr-$scale=$identity --lr $lr --scale-lr $scale")
    done
done
runs+=(
    "soft-finish=$soft --lr 6e-2 --scale-lr 1e-2 --finish identity"
    "soft-T0.1=$common --estimator soft --t-init 0.1 --t-min 0.03 --lr 6e-2 --scale-lr 1e-2"
    "identity-start=$identity --lr 6e-2 --scale-lr 1e-2 --start 0.1"
    "identity-6e-2-5e-3=$identity --lr 6e-2 --scale-lr 5e-3"
)
python3 benchmarks/experiment.py "$model" --calibration "$calibration" --train "documents:$train" \
    --test "$test" --test-windows 16 --quantize "--L 12" --claims "$out/claims" \
    --json "$out/runs-$$.jsonl" "${runs[@]}"
