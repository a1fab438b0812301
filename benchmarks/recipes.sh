#!/usr/bin/env bash
# The sixth search of docs/results-history.md, other recipes of BCJR: bash benchmarks/recipes.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --evaluate-every 1000000 --measure-every 60 --train latents,scales,norms --scale-lr 5e-3 --start 0.5 --batch 16"
tokens="$common --steps 240 --lr 7.5e-3"
mixed="$tokens --estimator mixed $cooling" soft="$tokens --estimator soft"
minutes="$common --minutes 2 --estimator mixed $cooling"
run experiment "--L 12" \
    "recipes/mixed-1.5e-2=$mixed --lr 1.5e-2" \
    "recipes/mixed-1e-2=$mixed --lr 1e-2" \
    "recipes/mixed-2.2e-2=$mixed --lr 2.2e-2" \
    "recipes/mixed-0.25-1.5e-2=$mixed --mix 0.25 --lr 1.5e-2" \
    "recipes/mixed-0.75-1.5e-2=$mixed --mix 0.75 --lr 1.5e-2" \
    "warm-$$/mixed=$minutes --minutes 1 --steps 3" \
    "recipes/mixed-minutes-9e-3=$minutes --lr 9e-3" \
    "recipes/mixed-minutes-1.3e-2=$minutes --lr 1.3e-2"
run experiment "--L 12" "recipes/mixed-1.5e-2=$mixed --lr 1.5e-2" --seeds 1 2
run experiment "--L 12" \
    "recipes/soft-0.05-0.02=$soft --t-init 0.05 --t-min 0.02" \
    "recipes/soft-0.2-0.03=$soft --t-init 0.2 --t-min 0.03" \
    "recipes/soft-0.05-constant=$soft --t-init 0.05 --t-min 0.05" \
    "recipes/soft-then-identity=$soft $cooling --lr 1.5e-2 --finish identity --finish-share 0.4" \
    "recipes/soft-table=$soft $cooling --train latents,scales,norms,table --table-lr 2e-3" \
    "recipes/through-7.5e-3=$tokens --estimator straight_through $cooling" \
    "recipes/identity-table=$tokens --estimator identity --lr 1.5e-2 --train latents,scales,norms,table --table-lr 2e-3"
