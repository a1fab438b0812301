#!/usr/bin/env bash
# The third search of docs/results.md: bash benchmarks/search.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--steps 60 --batch 64 --micro-batch 32 --evaluate-every 20 --measure-every 20"
common="$common --train latents,scales,norms"
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
run experiment "--L 12" --test-windows 16 "${runs[@]}"
