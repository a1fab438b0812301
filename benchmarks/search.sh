#!/usr/bin/env bash
# The third search of docs/results.md: bash benchmarks/search.sh MODEL C4 TRAIN TEST FOLDER
# Processes with one FOLDER share the runs: start one on every GPU, each with its CUDA_VISIBLE_DEVICES.
# Results are lines of FOLDER/runs-*.jsonl; runs whose names lie in FOLDER/claims are left out.
set -eu
model=$1 calibration=$2 train=$3 test=$4 out=$5
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
common="--steps 60 --batch 64 --micro-batch 32 --evaluate-every 20 --measure-every 20"
common="$common --train latents,scales,norms"
cooling="--t-init 0.1 --t-min 0.03"
soft="$common --estimator soft $cooling"
identity="$common --estimator identity"
runs=(
    "soft-3e-2=$soft --lr 3e-2 --scale-lr 5e-3"
    "identity-2e-2=$identity --lr 2e-2 --scale-lr 5e-3"
    "soft-1e-2=$soft --lr 1e-2 --scale-lr 5e-3"
    "identity-1e-2=$identity --lr 1e-2 --scale-lr 5e-3"
    "soft-6e-2=$soft --lr 6e-2 --scale-lr 5e-3"
    "identity-3e-2=$identity --lr 3e-2 --scale-lr 5e-3"
    "straight_through-1e-2=$common --estimator straight_through $cooling --lr 1e-2 --scale-lr 5e-3"
    "identity-2e-2-1e-2=$identity --lr 2e-2 --scale-lr 1e-2"
)
python3 benchmarks/experiment.py "$model" --calibration "$calibration" --train "documents:$train" \
    --test "$test" --test-windows 16 --windows 8192 --quantize "--L 12" --claims "$out/claims" \
    --json "$out/runs-$$.jsonl" "${runs[@]}"
