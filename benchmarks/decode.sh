#!/usr/bin/env bash
# Checks and times the decoding kernels, on a machine with a GPU: bash benchmarks/decode.sh FOLDER
# Tests come first, and what fails or hangs ends after its limit; everything goes to FOLDER/NAME.txt.
set -u
out=${1:?a folder for the results}
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
step() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1
    printf '%s: exit %d after %d s\n' "$name" "$?" "$((SECONDS - start))" | tee -a "$out/steps.txt"
}
tests="tests/transforms/test_rotation.py tests/modules/test_joint_linear.py tests/modules/test_decode.py"
# shellcheck disable=SC2086
step tests 150 python3 -m pytest -q -x -m gpu -p no:cacheprovider $tests
step check 60 python3 benchmarks/bench_decode.py check
step rotations 60 python3 benchmarks/bench_decode.py rotations
step rank 90 python3 benchmarks/bench_decode_kernels.py rank
step table 120 python3 benchmarks/bench_decode.py table
step model 90 python3 benchmarks/bench_decode_model.py
step profile 80 python3 benchmarks/bench_decode_kernels.py profile
step races 120 compute-sanitizer --report-api-errors no --tool racecheck \
    python3 -m pytest -q -m gpu -p no:cacheprovider tests/transforms/test_rotation.py -k cut_in_other_ways
tail -n 40 "$out"/*.txt
