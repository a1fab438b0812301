#!/usr/bin/env bash
# The whole model at equal tokens and minutes: bash benchmarks/joint.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--batch 64 --micro-batch 32 --compile --evaluate-every 0 --measure-every 0"
common="$common --train latents,scales,norms --scale-lr 5e-3"
# The best of the search, at equal tokens and at equal minutes.
soft="$common --estimator soft $cooling --lr 6e-2"
identity="$common --estimator identity --lr 3e-2"
soft_longer="$common --estimator soft $cooling --lr 6e-2"
longer="$common --estimator identity --viterbi-every 4 --lr 1e-2"
through="$common --estimator straight_through $cooling --lr 6e-2"
run experiment "--L 12" "ldlq" "soft-tokens=$soft --steps 60" "identity-tokens=$identity --steps 60" \
    "soft-minutes=$soft_longer --minutes 2" "identity-minutes=$longer --minutes 2" --seeds 0 1 2
run experiment "--L 12" "through-tokens=$through --steps 60" "through-minutes=$through --minutes 2"
run experiment "--L 12 --fine-tune --output-windows 32 --end-to-end 2" "tuned"
run experiment "--code scalar --L 8" "scalar" "scalar-tokens=$identity --steps 60" \
    "scalar-minutes=$longer --minutes 2"
native="--batch 64 --micro-batch 32 --scale-lr 5e-3"
run group_qat "" "native-tokens-1e-2=$native --lr 1e-2 --steps 60" "native-tokens-3e-2=$native --lr 3e-2 --steps 60" \
    "native-minutes=$native --lr 1e-2 --minutes 2"
