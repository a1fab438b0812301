"""softtrellis bench"""

from __future__ import annotations

import argparse
from pathlib import Path

from softtrellis.cli.common import Commands, check_json, command, usage_errors


def integers(value: str) -> tuple[int, ...]:
    """ "64,128" as numbers."""
    return tuple(int(part) for part in value.split(","))


def numbers(value: str) -> tuple[float, ...]:
    """ "0.3,0.05" as numbers."""
    return tuple(float(part) for part in value.split(","))


def add_parser(commands: Commands) -> None:
    """Adds the command."""
    parser = command(
        commands,
        "bench",
        "check the trellis kernels against the reference and time them",
        "softtrellis bench --L 12 --operation forward --operation viterbi --json bench.json",
        "A kernel that is wrong is not timed, and the exit code is 1. Times are microseconds per "
        "tile of 256 weights: the median, the 20th and the 80th percentile. The floor is one "
        "exponential per state and sweep (viterbi: one addition and one minimum), at the rate "
        "measured on the device; kernels that share exponentials between states can exceed 100% "
        "of it.",
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], help="by default cuda where there is one"
    )
    parser.add_argument(
        "--backend",
        metavar="NAME",
        default="auto",
        help="what runs the trellis: torch, cpu, triton or another backend that bcjr takes; auto "
        "takes the fastest that fits the device",
    )
    parser.add_argument(
        "--code",
        help="hyb, 1mad, 3inst, mul1, mcg, gaussian or scalar; with --L, --k or --V it selects one "
        "case instead of the default ones",
    )
    parser.add_argument("--L", type=int, help="bits of a trellis state; 16 for one case")
    parser.add_argument("--k", type=int, help="bits per weight; 2 for one case")
    parser.add_argument("--V", type=int, help="weights per step; 2 for one case if its code can")
    parser.add_argument(
        "--tiles",
        type=integers,
        metavar="N,...",
        help="tiles at once; by default enough to keep the device busy",
    )
    parser.add_argument(
        "--temperature",
        type=numbers,
        metavar="T,...",
        default="0.3,0.05,0.03",
        help="temperatures of the soft operations",
    )
    parser.add_argument(
        "--operation",
        action="append",
        choices=["forward", "forward-backward", "viterbi"],
        help="may be given several times; all by default",
    )
    parser.add_argument(
        "--ends",
        choices=["auto", "free", "pinned", "tail_biting"],
        default="auto",
        help="ends of the paths that are timed; auto is free for soft operations and tail_biting "
        "for viterbi",
    )
    parser.add_argument("--repeats", type=int, default=20, help="time at most so many calls")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="time no longer for a row, but 3 calls at least"
    )
    parser.add_argument(
        "--parity-tiles",
        type=int,
        metavar="N",
        help="tiles compared with the float64 reference; by default 2 on the CPU and 4 on a GPU",
    )
    parser.add_argument(
        "--seed", type=int, help="of the random inputs; by default another one every time"
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="also write the results there; - prints them instead of the table",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures and prints a table; 1 if a kernel is wrong."""
    import json
    from dataclasses import asdict

    from softtrellis.io.files import write_json
    from softtrellis.recipes.benchmark import (
        BenchmarkConfig,
        benchmark,
        choose_cases,
        default_device,
    )
    from softtrellis.recipes.benchmark_results import OPERATIONS, table

    if options.json != "-":
        check_json(options.json)
    with usage_errors(options):
        config = BenchmarkConfig(
            cases=choose_cases(options.code, options.L, options.k, options.V),
            device=options.device or default_device(),
            backend=options.backend,
            operations=tuple(options.operation or OPERATIONS),
            ends=options.ends,
            temperatures=options.temperature,
            tiles=options.tiles or (),
            repeats=options.repeats,
            seconds=options.seconds,
            parity_tiles=options.parity_tiles,
            seed=options.seed,
            show_progress=True,
        )
    results = benchmark(config)
    if options.json == "-":
        print(json.dumps(asdict(results), indent=2, allow_nan=False))
    else:
        print(table(results))
    if options.json not in (None, "-"):
        write_json(Path(options.json), asdict(results))
    return 0 if results.right else 1
