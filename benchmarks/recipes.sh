#!/usr/bin/env bash
# The seventh search of docs/results-history.md, how hot BCJR is to be: bash benchmarks/recipes.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --cuda-graphs --train latents,scales,norms --scale-lr 5e-3 --start 0.5 --batch 16"
tokens="$common --evaluate-every 1000000 --measure-every 60 --steps 240"
long="$common --evaluate-every 400 --measure-every 0 --lr-end 0 --reencode-every 100 --minutes 7"
hot="--t-init 0.4 --t-min 0.03"
soft="--estimator soft $hot" mixed="--estimator mixed --mix 0.25 $hot"
hotter="--estimator soft --t-init 0.8 --t-min 0.03"
run experiment "--L 12" \
    "recipes/soft-0.4-1e-2=$tokens $soft --lr 1e-2" \
    "recipes/soft-0.8-1e-2=$tokens $hotter --lr 1e-2" \
    "recipes/mixed-0.4-1.5e-2=$tokens $mixed --lr 1.5e-2"
run experiment "--L 12" --save "$out/saved" \
    "best/soft-0.4-7min@recipes/soft-0.4-1e-2=$long $soft --lr 5.5e-3" \
    "best/soft-0.8-7min@recipes/soft-0.8-1e-2=$long $hotter --lr 5.5e-3" \
    "best/mixed-7min@recipes/mixed-0.4-1.5e-2=$long $mixed --lr 8.2e-3"
run experiment "--L 12" \
    "recipes/soft-0.4-1e-2@recipes/soft-0.4-1e-2=$tokens $soft --lr 1e-2" \
    "recipes/soft-0.8-1e-2@recipes/soft-0.8-1e-2=$tokens $hotter --lr 1e-2" \
    "recipes/mixed-0.4-1.5e-2@recipes/mixed-0.4-1.5e-2=$tokens $mixed --lr 1.5e-2" --seeds 1 2
run experiment "--L 12" \
    "recipes/soft-0.4-2e-2=$tokens $soft --lr 2e-2" \
    "recipes/soft-0.4-stride-4=$tokens $soft --bcjr-stride 4 --lr 1e-2"
run experiment "--L 12" --save "$out/saved" "best/soft-stride-4-7min=$long $soft --bcjr-stride 4 --lr 4e-3"
run experiment "--L 12" "recipes/mixed-0.25-1.5e-2=$tokens --estimator mixed --mix 0.25 $cooling --lr 1.5e-2" --seeds 1 2
run experiment "--L 12" \
    "minutes/soft-0.4=$tokens --steps 100000 --minutes 2 $soft --lr 1e-2" \
    "minutes/mixed-0.1-stride-4=$tokens --steps 100000 --minutes 2 --estimator mixed --mix 0.25 $cooling --bcjr-stride 4 --lr 1.2e-2"
