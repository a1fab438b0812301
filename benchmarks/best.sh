#!/usr/bin/env bash
# The best whole models: bash benchmarks/best.sh MODEL C4 TRAIN TEST FOLDER
# FOLDER/saved gets the models; every process needs five minutes once for the tuned PTQ.
source "$(dirname "$0")/runs.sh"
common="--estimator identity --compile --lr-end 0 --measure-every 0 --train latents,scales,norms --scale-lr 5e-3"
small="$common --batch 16 --start 0.5 --cuda-graphs --reencode-every 100 --evaluate-every 400"
large="$common --batch 32 --start 0.5 --reencode-every 100 --evaluate-every 200"
long="$common --batch 32 --micro-batch 16 --start 0.25 --scale-lr 3e-3 --lr 8e-3 --reencode-every 50 --evaluate-every 100"
tuned="--fine-tune --epochs 4 --output-windows 32 --progressive 48 --progressive-lr 3e-3 --progressive-ctx 2048 \
    --progressive-batch 8 --progressive-micro-batch 8 --progressive-data documents:$train"
saved="--held-out 16 --save $out/saved"
half="--train documents:$train teacher --windows 16384"
more="--train documents:$train teacher --windows 32768 --teacher-share 0.75"

run experiment "--L 12" $half $saved "best/mixed-7min=$small --minutes 7" --seeds 0 1 2
run experiment "--L 12" $half $saved "best/mixed-estimator-7min=${small/--cuda-graphs /} --minutes 7 --estimator mixed $cooling"
run experiment "--L 12" $half $saved "best/mixed-15min=$large --minutes 15"
run experiment "--L 12" --train "documents:$train" teacher --windows 8192 $saved "best/mixed-same-amount-7min=$small --minutes 7"
run experiment "--L 12" $more $saved "best/mixed-0.75-7min=$small --minutes 7"
run experiment "--L 12" --train teacher --windows 16384 $saved "best/teacher-7min=$small --minutes 7"
run experiment "--L 12" $saved "best/text-7min=$small --minutes 7" "best/text-7min-same-windows=$small --minutes 7 --no-shift-windows" --seeds 0 1 2
run experiment "--L 12" $saved "best/text-32-7min=$large --minutes 7" "best/text-15min=$large --minutes 15"
run experiment "--L 16 $tuned" --ctx 2048 --windows 4096 $saved "best/tuned16" "best/tuned16-7min=$long --minutes 7"
run experiment "--L 16 $tuned" --ctx 2048 $half --windows 8192 $saved "best/tuned16-mixed-7min=$long --minutes 7"
