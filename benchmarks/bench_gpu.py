"""Correctness first, then times of several launches of the Triton kernels, on one GPU.

    python benchmarks/bench_gpu.py check            parity with the fp64 reference, many shapes
    python benchmarks/bench_gpu.py time [NAME ...]  times of the launches below

Compiles all variants in parallel processes first. Prints one line per measurement.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from softtrellis.codes.codebook import codebook
from softtrellis.spec import TrellisSpec
from softtrellis.trellis import bcjr_torch, bcjr_triton, viterbi_torch, viterbi_triton
from softtrellis.trellis.launch_triton import Launch

V2, V1 = TrellisSpec(16, 2, 2), TrellisSpec(16, 2, 1)
CODES = {V2: "hyb", V1: "mul1"}

L12 = TrellisSpec(12, 2, 2)
FORWARD = {
    "f4": (V2, Launch(4, 1024, 16, 1, registers=128, choices=8)),
    "f3": (V2, Launch(3, 1024, 16, 1, registers=128, choices=8)),
    "f2x3": (V2, Launch(2, 512, 8, 3, registers=80, choices=8, beta_block=512)),
    "f12": (L12, Launch(4, 256, 4, 4, registers=128, choices=8, beta_block=256)),
    "fv1x2": (V1, Launch(1, 2048, 16, 2, registers=64, choices=4, beta_block=2048)),
}
BACKWARD = {
    "b1": (V2, Launch(1, 1024, 16, 1, registers=128, choices=16)),
    "b2": (V2, Launch(2, 1024, 16, 1, registers=128, choices=8)),
    "b3": (V2, Launch(3, 1024, 16, 1, registers=128, choices=8)),
    "b12": (L12, Launch(2, 256, 4, 4, registers=128, choices=8, beta_block=256)),
    "bv1": (V1, Launch(1, 2048, 16, 1, registers=128, choices=4, beta_block=2048)),
}
VITERBI = {
    "m4": (V2, Launch(4, 2048, 16, 1, registers=128, touch=True)),
    "m4x2": (V2, Launch(4, 2048, 16, 2, registers=64)),
    "m2x2": (V2, Launch(2, 2048, 16, 2, registers=64)),
    "m8w32": (V2, Launch(8, 4096, 32, 1, registers=64)),
    "v1": (V1, Launch(1, 4096, 16, 1, registers=128)),
    "v1x2": (V1, Launch(1, 4096, 16, 2, registers=64)),
    "v1x2b": (V1, Launch(1, 2048, 16, 2, registers=64)),
}
CHECKS = [
    (16, 2, 2),
    (16, 2, 1),
    (12, 2, 2),
    (14, 2, 2),
    (8, 1, 1),
    (9, 4, 2),
    (11, 3, 2),
    (12, 4, 1),
]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    error = float((a.double() - b.double()).norm() / b.double().norm())
    return error if error == error else float("inf")


def problem(
    spec: TrellisSpec, batch: int, seed: int, steps: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    name = CODES.get(spec, "gaussian")
    table = codebook(name, spec).cuda()
    return torch.randn(batch, steps or spec.steps(), spec.V, device="cuda"), table


def with_outliers(w: torch.Tensor) -> torch.Tensor:
    hit = torch.rand_like(w) < 0.01
    return torch.where(hit, w * 4.0, w)


def check_viterbi(
    spec: TrellisSpec, steps: int, launch: Launch | None, pinned: bool, batch: int = 5
) -> str:
    w, table = problem(spec, batch, 1, steps)
    w = with_outliers(w)
    pins = torch.randint(spec.num_overlaps, (batch,), device="cuda") if pinned else None
    ours = viterbi_triton.best_path(w, table, spec, pins, launch)
    best = viterbi_torch.best_path(w.double(), table.double(), spec, pins)
    cost = [(table.double()[s.long()] - w.double()).square().sum((1, 2)) for s in (ours, best)]
    worst = float((cost[0] / cost[1] - 1).abs().max())
    follows = torch.equal(ours[:, :-1] % spec.num_overlaps, ours[:, 1:] >> spec.shift)
    return f"same {float((ours == best).float().mean()):.4f} cost {worst:.1e} path {follows}"


def check_bcjr(
    spec: TrellisSpec, steps: int, T: float, launch: Launch | None, pinned: bool, batch: int = 3
) -> str:
    w, table = problem(spec, batch, 2, steps)
    w = with_outliers(w)
    pins = torch.randint(spec.num_overlaps, (batch,), device="cuda") if pinned else None
    g, gz = torch.randn_like(w), torch.randn(batch, device="cuda") * 0.1
    t = torch.full((batch,), T, device="cuda")
    exact = [x.double() for x in (w, table, t, g, gz)]
    v, z, e = bcjr_triton.soft_forward(w, table, spec, t, pins, True, launch)
    v_, z_, e_ = bcjr_torch.soft_forward(exact[0], exact[1], spec, exact[2], pins, True)
    gw, _ = bcjr_triton.soft_backward(w, table, spec, t, pins, v, g, 0 * gz, False, launch)
    gw_, _ = bcjr_torch.soft_backward(
        exact[0], exact[1], spec, exact[2], pins, v_, exact[3], 0 * exact[4], False
    )
    gy, gc = bcjr_triton.soft_backward(w, table, spec, t, pins, v, g, gz, True, launch)
    gy_, gc_ = bcjr_torch.soft_backward(
        exact[0], exact[1], spec, exact[2], pins, v_, exact[3], exact[4], True
    )
    assert e is not None
    assert e_ is not None
    assert gc is not None
    assert gc_ is not None
    pairs = {
        "values": (v, v_),
        "logz": (z, z_),
        "entropy": (e, e_),
        "grad": (gw, gw_),
        "grad+z": (gy, gy_),
        "code": (gc, gc_),
    }
    return " ".join(f"{k} {relative(*p):.1e}" for k, p in pairs.items())


def check_one(job: tuple[str, int, int, int]) -> list[str]:
    kind, L, k, V = job
    spec, lines = TrellisSpec(L, k, V), []
    temperatures = (100.0, 0.3, 0.05, 0.03, 0.02, 0.005) if L == 16 and V == 2 else (0.3, 0.03)
    cases = [37, spec.steps()] if kind == "viterbi" else list(temperatures)
    for case in cases:
        for pinned in (False, True):
            try:
                if kind == "viterbi":
                    said = check_viterbi(spec, int(case), None, pinned)
                else:
                    said = check_bcjr(spec, spec.steps(), case, None, pinned)
            except Exception as error:
                said = f"FAILED {type(error).__name__}: {str(error)[:300]}"
            lines.append(f"{kind} {(L, k, V)} {case} {'pinned' if pinned else 'free'}: {said}")
    return lines


def check() -> None:
    jobs = [(kind, *shape) for shape in CHECKS for kind in ("bcjr", "viterbi")]
    jobs = [job for job in jobs if not sys.argv[2:] or f"{job[0]}{job[1]}v{job[3]}" in sys.argv[2:]]
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        for lines in pool.imap_unordered(check_one, jobs):
            print("\n".join(lines), flush=True)


def measure(run: object, tiles: int, repeats: int = 5) -> str:
    run()  # type: ignore[operator]
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()  # type: ignore[operator]
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / tiles)
    times.sort()
    return f"{times[len(times) // 2]:.3f} us/tile ({times[0]:.3f}-{times[-1]:.3f})"


def bcjr_problem(spec: TrellisSpec, tiles: int, T: float) -> tuple[torch.Tensor, ...]:
    w, table = problem(spec, tiles, 3)
    t = torch.full((tiles,), T, device="cuda")
    return w, table, t, torch.randn_like(w), torch.zeros(tiles, device="cuda")


def default_tiles(spec: TrellisSpec) -> int:
    return 3168 if spec.V == 2 else 792


def time_forward(name: str, T: float = 0.05, tiny: bool = False) -> None:
    spec, launch = FORWARD[name]
    tiles = 1 if tiny else default_tiles(spec)
    w, table, t, _, _ = bcjr_problem(spec, tiles, T)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    v, _, _ = bcjr_triton.soft_forward(w, table, spec, t, None, False, launch)
    if tiny:
        return
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    e = [x[-4:].double() for x in (w, t)]
    v_, _, _ = bcjr_torch.soft_forward(e[0], table.double(), spec, e[1], None, False)
    taken = measure(lambda: bcjr_triton.soft_forward(w, table, spec, t, None, False, launch), tiles)
    print(
        f"forward {name} T={T} tiles={tiles} {taken} error {relative(v[-4:], v_):.1e}"
        f" peak {peak:.2f} GiB {launch}",
        flush=True,
    )


def time_backward(name: str, T: float = 0.05, tiny: bool = False) -> None:
    spec, launch = BACKWARD[name]
    tiles = 1 if tiny else default_tiles(spec)
    w, table, t, g, gz = bcjr_problem(spec, tiles, T)
    v = w
    if not tiny:
        v, _, _ = bcjr_triton.soft_forward(w, table, spec, t, None, False)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gw, _ = bcjr_triton.soft_backward(w, table, spec, t, None, v, g, gz, False, launch)
    if tiny:
        return
    peak = (torch.cuda.max_memory_allocated() - before) / 2**30
    e = [x[-4:].double() for x in (w, t, g, gz)]
    v_, _, _ = bcjr_torch.soft_forward(e[0], table.double(), spec, e[1], None, False)
    gw_, _ = bcjr_torch.soft_backward(e[0], table.double(), spec, e[1], None, v_, e[2], e[3], False)
    taken = measure(
        lambda: bcjr_triton.soft_backward(w, table, spec, t, None, v, g, gz, False, launch), tiles
    )
    print(
        f"backward {name} T={T} tiles={tiles} {taken} error {relative(gw[-4:], gw_):.1e}"
        f" peak {peak:.2f} GiB {launch}",
        flush=True,
    )


def time_viterbi(name: str, tiles: int = 4224, tiny: bool = False, default: bool = False) -> None:
    spec, launch = VITERBI[name]
    tiles = 1 if tiny else tiles
    w, table = problem(spec, tiles, 4)
    pins = torch.zeros(tiles, dtype=torch.int64, device="cuda")
    how = None if default else launch
    states = viterbi_triton.best_path(w, table, spec, pins, how)
    if tiny:
        return
    n = min(4, tiles)
    best = viterbi_torch.best_path(w[-n:].double(), table.double(), spec, pins[-n:])
    same = float((states[-n:] == best).float().mean())
    taken = measure(lambda: viterbi_triton.best_path(w, table, spec, pins, how), tiles)
    print(f"viterbi {name} tiles={tiles} one pass {taken} same {same:.4f} {how}", flush=True)


TIMERS: dict[str, Callable[..., None]] = {
    "forward": time_forward,
    "backward": time_backward,
    "viterbi": time_viterbi,
}


def compile_one(job: tuple[str, str]) -> str:
    kind, name = job
    start = time.time()
    try:
        TIMERS[kind](name, tiny=True)
    except Exception as error:
        return f"{kind} {name} FAILED {type(error).__name__}: {str(error)[:200]}"
    return f"{kind} {name} {time.time() - start:.0f}s"


def profile(name: str) -> None:
    """One launch over one group of tiles per multiprocessor, for a profiler."""
    for kind, table_of in (("forward", FORWARD), ("backward", BACKWARD), ("viterbi", VITERBI)):
        if name not in table_of:
            continue
        spec, launch = table_of[name]
        w, table, t, g, gz = bcjr_problem(spec, 132 * launch.tiles, 0.05)
        if kind == "forward":
            bcjr_triton.soft_forward(w, table, spec, t, None, False, launch)
        elif kind == "backward":
            bcjr_triton.soft_backward(w, table, spec, t, None, w, g, gz, False, launch)
        else:
            viterbi_triton.best_path(w, table, spec, None, launch)
    torch.cuda.synchronize()


def defaults() -> None:
    """What a caller gets: the default launches."""
    for spec, tiles in ((V2, 3168), (V1, 528), (L12, 8448), (TrellisSpec(14, 2, 2), 8448)):
        for T in (0.3, 0.05, 0.03):
            w, table, t, g, gz = bcjr_problem(spec, tiles, T)
            v, _, _ = bcjr_triton.soft_forward(w, table, spec, t, None, False)
            forward = measure(
                lambda w=w, C=table, s=spec, t=t: bcjr_triton.soft_forward(w, C, s, t, None, False),
                tiles,
            )
            backward = measure(
                lambda w=w, C=table, s=spec, t=t, v=v, g=g, z=gz: bcjr_triton.soft_backward(
                    w, C, s, t, None, v, g, z, False
                ),
                tiles,
            )
            print(f"default {spec} T={T} tiles={tiles} fwd {forward} bwd {backward}", flush=True)
    w, table, t, g, gz = bcjr_problem(V2, 37, 0.03)
    runs = [bcjr_triton.soft_backward(w, table, V2, t, None, w, g, gz, False)[0] for _ in range(20)]
    print("race check: twenty backward runs equal:", all(torch.equal(r, runs[0]) for r in runs))
    for spec in (V2, V1):
        for tiles in (36, 108, 512, 10000 if spec.V == 2 else 2000):
            w, table = problem(spec, tiles, 5)

            def encode(
                w: torch.Tensor = w, table: torch.Tensor = table, spec: TrellisSpec = spec
            ) -> None:
                half = w.shape[1] // 2
                rolled = viterbi_triton.best_path(w.roll(-half, 1), table, spec, None)
                pins = (rolled[:, -half] >> spec.shift).long()
                viterbi_triton.best_path(w, table, spec, pins)

            print(f"tail-biting {spec} tiles={tiles} {measure(encode, tiles)}", flush=True)


def main() -> None:
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": __import__("triton").__version__,
            }
        )
    )
    if sys.argv[1] == "check":
        check()
        return
    if sys.argv[1] == "defaults":
        defaults()
        return
    if sys.argv[1] == "profile":
        profile(sys.argv[2])
        return
    chosen = sys.argv[2:]
    known = {"forward": FORWARD, "backward": BACKWARD, "viterbi": VITERBI}
    jobs = [(k, n) for k, table in known.items() for n in table if not chosen or n in chosen]
    with multiprocessing.get_context("spawn").Pool(16) as pool:
        for line in pool.imap_unordered(compile_one, jobs):
            print("compiled", line, flush=True)
    for kind, name in jobs:
        try:
            TIMERS[kind](name)
        except Exception as error:
            print(kind, name, "FAILED", type(error).__name__, str(error)[:300], flush=True)


if __name__ == "__main__":
    main()
