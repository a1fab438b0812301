# What search.sh, joint.sh, best.sh, recipes.sh, finish.sh and claims.sh share, which are called with MODEL C4 TRAIN TEST FOLDER.
# Processes with one FOLDER share the runs: start one on every GPU, each with its CUDA_VISIBLE_DEVICES.
# Results are lines of FOLDER/runs-*.jsonl; runs whose names lie in FOLDER/claims are left out.
set -eu
model=$1 calibration=$2 train=$3 test=$4 out=$5
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
cooling="--t-init 0.1 --t-min 0.03"

# run SCRIPT OPTIONS_OF_QUANTIZE [OPTION ...] NAME=OPTIONS ...
run() {
    local script=$1 quantize=$2
    shift 2
    python3 "benchmarks/$script.py" "$model" --calibration "$calibration" --test "$test" \
        --train "documents:$train" --windows 8192 --quantize "$quantize" --claims "$out/claims" \
        --json "$out/runs-$$.jsonl" "$@"
}
