#!/usr/bin/env bash
# The fourth search of docs/results-history.md, and the fifth, its last six: bash benchmarks/search.sh MODEL C4 TRAIN TEST FOLDER
source "$(dirname "$0")/runs.sh"
common="--compile --evaluate-every 1000000 --measure-every 60 --train latents,scales,norms --scale-lr 5e-3"
soft="$common --estimator soft $cooling"
identity="$common --estimator identity"
tokens="--batch 16 --steps 240" minutes="--minutes 2 --start 0.5"
run experiment "--L 12" \
    "tokens/identity-1.5e-2=$identity $tokens --lr 1.5e-2 --start 0" \
    "tokens/identity-1.5e-2-start-0.5=$identity $tokens --lr 1.5e-2 --start 0.5" \
    "tokens/identity-7e-3-start-0.5=$identity $tokens --lr 7e-3 --start 0.5" \
    "tokens/soft-4e-2=$soft $tokens --lr 4e-2 --start 0" \
    "tokens/soft-3e-2-start-0.5=$soft $tokens --lr 3e-2 --start 0.5" \
    "tokens/soft-1.5e-2-start-0.5=$soft $tokens --lr 1.5e-2 --start 0.5" \
    "minutes/identity-7e-3=$identity --viterbi-every 4 --batch 8 $minutes --lr 7e-3" \
    "minutes/soft-1.6e-2=$soft --batch 32 $minutes --lr 1.6e-2" \
    "minutes/identity-1e-2=$identity --viterbi-every 4 --batch 8 $minutes --lr 1e-2" \
    "minutes/soft-8e-3=$soft --batch 32 $minutes --lr 8e-3" \
    "minutes/identity-16-9e-3=$identity --batch 16 $minutes --lr 9e-3" \
    "minutes/soft-4e-3=$soft --batch 32 $minutes --lr 4e-3" \
    "tokens/identity-2.2e-2-start-0.5=$identity $tokens --lr 2.2e-2 --start 0.5" \
    "tokens/soft-7.5e-3-start-0.5=$soft $tokens --lr 7.5e-3 --start 0.5" \
    "tokens/identity-3e-2-start-0.5=$identity $tokens --lr 3e-2 --start 0.5" \
    "tokens/soft-4e-3-start-0.5=$soft $tokens --lr 4e-3 --start 0.5"
