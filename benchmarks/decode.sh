#!/usr/bin/env bash
# Checks and times the decoding kernels, on a machine with a GPU: bash benchmarks/decode.sh FOLDER
# Tests come first, and what fails or hangs ends after its limit, in all after 235 s; everything goes
# to FOLDER/NAME.txt. By themselves: bench_decode.py rotations; bench_decode_kernels.py profile.
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
step tests 80 python3 -m pytest -q -m gpu -k "not triton" -p no:cacheprovider $tests
step check 15 python3 benchmarks/bench_decode.py check
step rank 40 python3 benchmarks/bench_decode_kernels.py rank
step table 40 python3 benchmarks/bench_decode.py table
step model 60 python3 benchmarks/bench_decode_model.py
tail -n 40 "$out"/*.txt
