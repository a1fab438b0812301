#!/usr/bin/env bash
# The setting of the BCJR-QAT paper (arXiv 2605.10655): decoder layer 4 of Llama-3.2-1B at 2 bits, from plain
# Viterbi without Hessians, ten steps at a learning rate of 2e-4, T from 0.3 to 0.05.
#
#   PATH=.venv/bin:$PATH bash examples/paper_llama.sh meta-llama/Llama-3.2-1B HELD_OUT FOLDER [cuda|cpu [TEXT]]
#
# TEXT is trained on (wikitext2 by default) and HELD_OUT evaluated on; both are what --data takes, and of
# wikitext2 each has its own part. Needs the model's weights, which ask for a licence. `softtrellis plan` says
# first whether such a run can change a code at all. Quantizing with Hessians instead (leave --no-hessian out)
# is the stronger start.
set -eu
model=${1:?a model} heldout=${2:?a text to evaluate on} out=${3:?a folder}
device=${4:-cuda} text=${5:-wikitext2}
mkdir -p "$out"
softtrellis quantize "$model" -o "$out/ptq" --layers 4 --no-hessian --device "$device"
softtrellis plan "$out/ptq" --lr 2e-4 --steps 10 --warmup 0 --temperature 0.3 --device "$device"
softtrellis train "$out/ptq" --teacher "$model" -o "$out/qat" --mode single --layers 4 \
    --estimator soft --start 0 --train latents --data "$text" --ctx 1024 --batch 4 \
    --lr 2e-4 --steps 10 --warmup 0 --t-init 0.3 --t-min 0.05 --evaluate-every 0 --device "$device"
softtrellis eval "$model" "$out/ptq" "$out/qat" --data "$heldout" --device "$device" \
    --json "$out/qat/results.json"
softtrellis report "$out/qat"
