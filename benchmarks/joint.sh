#!/usr/bin/env bash
# The whole model at equal tokens and minutes: bash benchmarks/joint.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --evaluate-every 0 --measure-every 0 --train latents,scales,norms --scale-lr 5e-3"
tokens="--batch 16 --steps 240" minutes="--minutes 2"
# The best of the search, which has seed 0.
soft="$common --estimator soft $cooling $tokens --lr 4e-2"
identity="$common --estimator identity $tokens --lr 1.5e-2"
soft_minutes="$common --estimator soft $cooling $minutes --batch 32 --lr 6e-2"
identity_minutes="$common --estimator identity --viterbi-every 4 $minutes --batch 8 --lr 1e-2"
through="$common --estimator straight_through $cooling --lr 3e-2"
run experiment "--L 12" "tokens/soft=$soft" "tokens/identity=$identity" \
    "minutes/soft=$soft_minutes" "minutes/identity=$identity_minutes" --seeds 1 2
run experiment "--L 12" "ldlq" --seeds 0 1 2
run experiment "--L 12" "tokens/through=$through $tokens" "minutes/through=$through --batch 32 $minutes"
run experiment "--code scalar --L 8" "scalar" "tokens/scalar=$identity" "minutes/scalar=$identity_minutes"
native="--batch 16 --scale-lr 5e-3"
run group_qat "" "tokens/native-3e-3=$native --lr 3e-3 --steps 240" "tokens/native-1e-2=$native --lr 1e-2 --steps 240" \
    "minutes/native=$native --lr 3e-3 $minutes"
