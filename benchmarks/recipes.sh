#!/usr/bin/env bash
# The sixth search of docs/results-history.md, other recipes of BCJR: bash benchmarks/recipes.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --evaluate-every 1000000 --measure-every 60 --train latents,scales,norms --scale-lr 5e-3 \
    --start 0.5 --batch 16 --steps 240 --lr 7.5e-3"
soft="$common --estimator soft"
run experiment "--L 12" \
    "recipes/soft-0.05-0.02=$soft --t-init 0.05 --t-min 0.02" \
    "recipes/soft-0.2-0.03=$soft --t-init 0.2 --t-min 0.03" \
    "recipes/soft-0.05-constant=$soft --t-init 0.05 --t-min 0.05" \
    "recipes/soft-then-identity=$soft $cooling --lr 1.5e-2 --finish identity --finish-share 0.4" \
    "recipes/soft-table=$soft $cooling --train latents,scales,norms,table --table-lr 2e-3" \
    "recipes/through-7.5e-3=$common --estimator straight_through $cooling" \
    "recipes/identity-table=$common --estimator identity --lr 1.5e-2 --train latents,scales,norms,table --table-lr 2e-3"
