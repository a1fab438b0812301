#!/usr/bin/env bash
# The sixth search of docs/results-history.md, other recipes of BCJR: bash benchmarks/recipes.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --cuda-graphs --evaluate-every 1000000 --measure-every 60 --train latents,scales,norms --scale-lr 5e-3 --start 0.5 --batch 16"
tokens="$common --steps 240"
mixed="$tokens --estimator mixed $cooling" soft="$tokens --estimator soft --lr 7.5e-3"
minutes="$common --minutes 2 --estimator mixed $cooling"
run experiment "--L 12" --held-out 16 \
    "recipes/mixed-1.5e-2=$mixed --lr 1.5e-2" \
    "recipes/mixed-1e-2=$mixed --lr 1e-2" \
    "recipes/mixed-stride-4-1e-2=$mixed --mix-stride 4 --lr 1e-2"
run experiment "--L 12" --held-out 16 "recipes/mixed-1e-2=$mixed --lr 1e-2" --seeds 1 2
run experiment "--L 12" --held-out 16 \
    "minutes/mixed-stride-4=$minutes --mix-stride 4 --lr 7.9e-3" \
    "minutes/mixed=$minutes --lr 1e-2" \
    "recipes/mixed-7e-3=$mixed --lr 7e-3" \
    "recipes/mixed-2.2e-2=$mixed --lr 2.2e-2" \
    "recipes/mixed-0.25-1e-2=$mixed --mix 0.25 --lr 1e-2" \
    "recipes/soft-0.2-0.03=$soft --t-init 0.2 --t-min 0.03" \
    "recipes/through-7.5e-3=$tokens --estimator straight_through $cooling --lr 7.5e-3" \
    "recipes/soft-0.05-constant=$soft --t-init 0.05 --t-min 0.05" \
    "recipes/soft-then-identity=$soft $cooling --lr 1.5e-2 --finish identity --finish-share 0.4"
