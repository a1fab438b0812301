#!/usr/bin/env bash
# The rows of docs/ptq.md: bash benchmarks/ptq.sh MODEL CALIBRATION_TEXT TEST_TEXT FOLDER [DEVICE] [ROW ...]
# Quantizes MODEL once per row and seed and scores it on all windows of 2048 tokens of the test text.
set -eu
model=${1:?a model} text=${2:?a calibration text} heldout=${3:?a test text} out=${4:?a folder}
device=${5:-cuda}
shift $(($# < 5 ? $# : 5))
rows=("$@")
mkdir -p "$out"

row() { # NAME SEEDS OPTION...
    local name=$1 seeds=$2
    shift 2
    if [ ${#rows[@]} -gt 0 ] && [[ " ${rows[*]} " != *" $name "* ]]; then
        return
    fi
    for seed in $seeds; do
        local folder="$out/$name-$seed"
        if [ ! -d "$folder" ]; then
            { time python3 -m softtrellis quantize "$model" -o "$folder" --data "$text" \
                --ctx 2048 --windows 128 --batch 8 --device "$device" --seed "$seed" "$@"; } \
                >"$folder.log" 2>&1
        fi
        python3 -m softtrellis eval "$folder" --data "$heldout" --ctx 2048 --device "$device" \
            --json "$folder.json" | sed -n 3p
        grep real "$folder.log"
    done
}

row hyb-2bit '0 1 2'
row hyb-2bit-tuned '0 1 2' --fine-tune
row hyb-2bit-tuned-whole '0' --fine-tune --end-to-end 2
row hyb-3bit '0 1 2' --bits 3
row hyb-4bit '0 1 2' --bits 4
row hyb-2bit-original '0' --inputs original
row hyb-2bit-no-hessian '0' --no-hessian
row 1mad-2bit '0' --code 1mad
row 3inst-2bit '0' --code 3inst
row mul1-2bit '0' --code mul1
row hyb-2bit-L14 '0' --L 14
row hyb-2bit-L12 '0' --L 12
