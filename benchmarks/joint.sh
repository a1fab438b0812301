#!/usr/bin/env bash
# The whole model at equal tokens and minutes, after search.sh, which has seed 0 of equal tokens:
#     bash benchmarks/joint.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --evaluate-every 0 --measure-every 0 --train latents,scales,norms --scale-lr 5e-3"
tokens="--batch 16 --steps 240" minutes="--minutes 2"
soft="$common --estimator soft $cooling $tokens --lr 7.5e-3 --start 0.5"
identity="$common --estimator identity $tokens --lr 1.5e-2 --start 0.5"
soft_minutes="$common --estimator soft $cooling $minutes --batch 32 --lr 8e-3 --start 0.5"
identity_minutes="$common --estimator identity $minutes --batch 16 --lr 9e-3 --start 0.5"
through="$common --estimator straight_through $cooling $tokens --lr 1.5e-2 --start 0.5"
native="--batch 16 --scale-lr 5e-3"
through_minutes="$common --estimator straight_through $cooling $minutes --batch 32 --lr 8e-3 --start 0.5"
# What a process compiles first is not to be part of its two minutes.
warm="--steps 3 --lr 1e-5 --start 0.5"
run experiment "--L 12" "warm-$$/through=$common --estimator straight_through $cooling --batch 32 $warm" \
    "minutes/through-32=$through_minutes"
run experiment "--code scalar --L 8" "warm-$$/scalar=$common --estimator identity --batch 16 $warm" "minutes/scalar=$identity_minutes"
run group_qat "" "minutes/native=$native $minutes --lr 1.5e-2"
run experiment "--L 12" "warm-$$/identity=$common --estimator identity --batch 16 $warm" \
    "warm-$$/soft=$common --estimator soft $cooling --batch 32 $warm" \
    "minutes/identity-16=$identity_minutes" "minutes/soft-32=$soft_minutes" "minutes/through-32=$through_minutes" --seeds 0 1 2
run experiment "--L 12" "tokens/through=$through"
run experiment "--L 12" "ldlq" --seeds 0 1 2
run experiment "--L 12 --fine-tune --output-windows 32 --end-to-end 2" "tuned"
run experiment "--code scalar --L 8" "scalar" "tokens/scalar=$identity"
run group_qat "" "tokens/native-1.5e-2=$native --steps 240 --lr 1.5e-2" "tokens/native-3e-3=$native --steps 240 --lr 3e-3"
run experiment "--L 12" "tokens/identity-1.5e-2-start-0.5=$identity" "tokens/soft-7.5e-3-start-0.5=$soft" --seeds 1 2
