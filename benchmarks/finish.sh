#!/usr/bin/env bash
# BCJR for the end of a run of identity: bash benchmarks/finish.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
then_soft="--compile --evaluate-every 1000000 --measure-every 60 --train latents,scales,norms --scale-lr 5e-3 \
    --estimator identity --finish soft --t-init 0.05 --t-min 0.03 --lr 1.5e-2 --start 0.5 --batch 16 --steps 240"
run experiment "--L 12" \
    "tokens/then-soft-0.2=$then_soft --finish-share 0.2" \
    "tokens/then-soft-0.4=$then_soft --finish-share 0.4"
