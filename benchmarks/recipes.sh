#!/usr/bin/env bash
# The ninth search of docs/results-history.md, mixed gradients in turn: bash benchmarks/recipes.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --train latents,scales,norms --scale-lr 5e-3 --start 0.5"
tokens="$common --cuda-graphs --batch 16 --evaluate-every 1000000 --measure-every 60 --steps 240 --lr 1.5e-2"
minutes="$common --batch 16 --evaluate-every 1000000 --measure-every 60 --minutes 2 --lr 9e-3"
long="$common --cuda-graphs --batch 16 --evaluate-every 400 --measure-every 0 --lr-end 0 --reencode-every 100 --minutes 7"
turns="--estimator mixed --bcjr-stride 8"
run experiment "--L 12" "recipes/turns-8=$tokens $turns $cooling" --seeds 0 1 2
run experiment "--L 12" --save "$out/saved" "best/turns-8-7min=$long $turns $cooling"
run experiment "--L 12" "recipes/turns-8-0.2=$tokens $turns --t-init 0.2 --t-min 0.03"
run experiment "--L 12" "best/turns-8-7min=$long $turns $cooling" --seeds 1
run experiment "--L 12" "minutes/turns-8=$minutes $turns $cooling" --seeds 0 1 2
