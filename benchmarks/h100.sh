#!/usr/bin/env bash
# The figures of benchmarks/README.md, on a machine with a GPU: bash benchmarks/h100.sh FOLDER
set -u
out=${1:?a folder for the results}
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
bench() {
    local name=$1
    shift
    python3 -m softtrellis bench --device cuda --json "$out/$name.json" "$@" | tee "$out/$name.txt"
}
bench default
bench encode_v2 --code hyb --operation viterbi --tiles 36,108,512,10000
bench encode_v1 --code mul1 --operation viterbi --tiles 36,108,512,10000
bench layers --code hyb --operation forward-backward --temperature 0.05 --tiles 237568,414720
bench L14 --code hyb --L 14 --operation forward-backward
bench L12 --code hyb --L 12 --operation forward-backward
