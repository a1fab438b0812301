#!/usr/bin/env bash
# The eighth search of docs/results-history.md, mixed gradients and long runs: bash benchmarks/recipes.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --cuda-graphs --train latents,scales,norms --scale-lr 5e-3 --start 0.5"
tokens="$common --batch 16 --evaluate-every 1000000 --measure-every 60 --steps 240"
long="$common --batch 32 --evaluate-every 400 --measure-every 0 --lr-end 0 --reencode-every 100"
mixed="--estimator mixed --mix 0.25 $cooling"
run experiment "--L 12" "recipes/mixed-0.25-1.5e-2=$tokens $mixed --lr 1.5e-2" --seeds 1 2
run experiment "--L 12" "recipes/mixed-0.25-0.2=$tokens --estimator mixed --mix 0.25 --t-init 0.2 --t-min 0.03 --lr 1.5e-2"
run experiment "--L 12" --save "$out/saved" "best/mixed-32-15min=$long --minutes 15 $mixed --lr 6.1e-3"
run experiment "--L 12" --save "$out/saved" \
    "best/soft-0.2-32-15min=$long --minutes 15 --estimator soft --t-init 0.2 --t-min 0.03 --lr 3.1e-3"
run experiment "--L 12" --save "$out/saved" "best/mixed-32-7min=$long --minutes 7 $mixed --lr 8.9e-3"
