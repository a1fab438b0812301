#!/usr/bin/env bash
# The tenth search of docs/results-history.md, mixed gradients without the average: bash benchmarks/recipes.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --cuda-graphs --train latents,scales,norms --scale-lr 5e-3 --start 0.5"
tokens="$common --batch 16 --evaluate-every 1000000 --measure-every 60 --steps 240"
long="$common --batch 32 --evaluate-every 400 --measure-every 0 --lr-end 0 --reencode-every 100"
mixed="--estimator mixed $cooling"
run experiment "--L 12" "recipes/mixed-0.25-1.5e-2=$tokens $mixed --lr 1.5e-2" --seeds 0 1 2
run experiment "--L 12" --save "$out/saved" "best/mixed-32-7min=$long --minutes 7 $mixed --lr 7.6e-3"
run experiment "--L 12" "best/mixed-32-1167=$long --steps 1167 $mixed --lr 6.8e-3" --seeds 1 2
run experiment "--L 12" "best/identity-32-12min=$long --minutes 12 --estimator identity" --seeds 0 1 2
