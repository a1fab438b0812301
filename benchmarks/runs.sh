# What search.sh, joint.sh, best.sh, recipes.sh, finish.sh and claims.sh share, which are called with MODEL C4 TRAIN TEST FOLDER.
# Processes with one FOLDER, of one script or several, share the runs: start some on every GPU, with its CUDA_VISIBLE_DEVICES.
# Runs of so many minutes wait until they have a GPU alone.
# Results are lines of FOLDER/runs-*.jsonl; runs whose names lie in FOLDER/claims are left out. Whatever a script asks for is
# collected, and run at its end by one process, which loads the model and its texts once.
set -eu
model=$1 calibration=$2 train=$3 test=$4 out=$5
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH}
commands=$out/commands-$$
: > "$commands"
trap 'python3 benchmarks/several.py "$commands"' EXIT
cooling="--t-init 0.1 --t-min 0.03"

# later SCRIPT OPTION ...
later() {
    printf '%q ' "$@" >> "$commands"
    echo >> "$commands"
}

# run SCRIPT OPTIONS_OF_QUANTIZE [OPTION ...] NAME=OPTIONS ...
run() {
    local script=$1 quantize=$2
    shift 2
    later "$script.py" "$model" --calibration "$calibration" --test "$test" --train "documents:$train" --windows 8192 \
        --quantize "$quantize" --claims "$out/claims" --json "$out/runs-$$.jsonl" "$@"
}
