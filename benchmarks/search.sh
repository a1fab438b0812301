#!/usr/bin/env bash
# The fourth search of docs/results.md: bash benchmarks/search.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--micro-batch 32 --compile --evaluate-every 1000000 --measure-every 60"
common="$common --train latents,scales,norms"
soft="$common --estimator soft $cooling"
identity="$common --estimator identity --viterbi-every 4"
runs=()
for lr in 6e-2 1e-1 1.5e-1; do runs+=("tokens/soft-$lr=$soft --batch 64 --steps 60 --lr $lr --scale-lr 5e-3"); done
for lr in 3e-2 4e-2 6e-2; do
    runs+=("tokens/identity-$lr=$common --estimator identity --batch 64 --steps 60 --lr $lr --scale-lr 5e-3")
done
for lr in 1e-2 1.5e-2 2e-2; do
    runs+=("minutes/identity-$lr=$identity --batch 64 --minutes 2 --lr $lr --scale-lr 5e-3")
done
for lr in 6e-2 1e-1; do runs+=("minutes/soft-$lr=$soft --batch 64 --minutes 2 --lr $lr --scale-lr 5e-3"); done
runs+=("minutes/soft-256-1e-1=$soft --batch 256 --minutes 2 --lr 1e-1 --scale-lr 5e-3")
run experiment "--L 12" --test-windows 16 "${runs[@]}"
