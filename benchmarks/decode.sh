#!/usr/bin/env bash
# Checks and times the decoding kernels, on a machine with a GPU: bash benchmarks/decode.sh FOLDER [STEP ...]
# Tests come first, but those that compile many Triton kernels. What fails or hangs ends after its
# limit, some 500 s are expected in all; everything goes to FOLDER/STEP.txt. Apart from these there
# is bench_decode_kernels.py profile.
set -u
out=${1:?a folder for the results}
shift
wanted=" $* "
mkdir -p "$out"
export PYTHONPATH=src${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
step() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    [[ $wanted == "  " || $wanted == *" $name "* ]] || return 0
    timeout "$limit" "$@" >"$out/$name.txt" 2>&1
    printf '%s: exit %d after %d s\n' "$name" "$?" "$((SECONDS - start))" | tee -a "$out/steps.txt"
}
tests="tests/transforms/test_rotation.py tests/modules/test_joint_linear.py tests/modules/test_decode.py"
# shellcheck disable=SC2086
step tests 150 python3 -m pytest -q -m gpu -p no:cacheprovider $tests -k "not triton and not product_at_full_size"
step layers 80 python3 benchmarks/bench_decode_layers.py
step timeline 35 python3 benchmarks/bench_decode_timeline.py
step integrations 60 python3 -m pytest -q -m gpu -p no:cacheprovider tests/integrations tests/cli/test_generate.py tests/io tests/modules/test_decoded_linear.py
step table 25 python3 benchmarks/bench_decode.py table
step rows 30 python3 benchmarks/bench_decode.py rows
step codes 90 python3 benchmarks/bench_decode.py codes
step model 40 python3 benchmarks/bench_decode_model.py --ways bf16 nothing "hyb, cuda" "mul1, cuda" "hyb, cuda, separate" "hyb, cuda, trained"
step generate 60 python3 benchmarks/generate.py llama-3.1-8b --device cuda --dtype bfloat16 --tokens 64
step static 150 python3 benchmarks/generate.py llama-3.1-8b --device cuda --dtype bfloat16 --tokens 64 --cache static
step early 40 python3 benchmarks/bench_decode_model.py --early --ways bf16 nothing "hyb, cuda"
step products 80 python3 benchmarks/bench_decode_kernels.py rank
step rotations 25 python3 benchmarks/bench_decode.py rotations
tail -n 60 "$out"/*.txt
