"""The tables of the very small model in docs/ptq.md and docs/results.md, on a CPU.

python benchmarks/smallest.py ptq|tokens|starts|long|searches|steps|epochs|again|mixed|hot|few \
    stories260k tinystories.txt [--seeds 0 1]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from softtrellis.evaluation.perplexity import score_many
from softtrellis.io.sources import Source, load_source
from softtrellis.io.text import token_windows
from softtrellis.modules.replace import dequantize_
from softtrellis.recipes.end_to_end import EndToEndConfig
from softtrellis.recipes.finetune import FineTuneConfig
from softtrellis.recipes.progressive import ProgressiveConfig
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill

CTX, SCORED = 128, 50_000  # tokens of a window; characters at the end that only score
FROZEN = 1e-9  # a learning rate that moves no latent
SMALL = {"batch": 1, "steps": 140, "scale_lr": 3e-3}
SOFT = {"estimator": "soft", "t_init": 0.1, "t_min": 0.03}
RUNS: list[dict[str, Any]] = [
    *({**SMALL, "estimator": "identity", "lr": lr} for lr in (FROZEN, 1e-2, 2e-2)),
    *({**SMALL, **SOFT, "lr": lr} for lr in (1e-2, 3e-2)),
    {"batch": 4, "steps": 35, "estimator": "identity", "lr": 2e-2},
    *({"steps": 60, "estimator": "identity", "lr": lr} for lr in (FROZEN, 1e-2, 2e-2)),
    *({"steps": 240, "estimator": "identity", "lr": lr} for lr in (FROZEN, 5e-3, 1e-2)),
    {"steps": 240, **SOFT, "lr": 1e-2},
]

IDENTITY = {"estimator": "identity", "viterbi_every": 4, "scale_lr": 5e-3}
LARGE = {**IDENTITY, "batch": 4, "steps": 120}
LITTLE = {"batch": 1, "steps": 480, "reencode_every": 20, "scale_lr": 5e-3}
STARTS: list[dict[str, Any]] = [
    *({**LARGE, "lr": lr} for lr in (FROZEN, 1e-2, 2e-2, 2.5e-2)),
    *({**LARGE, "lr": FROZEN, "start": start} for start in (0.5, 0.75, 1.0)),
    *(
        {**LARGE, "lr": lr, "start": start}
        for lr, start in ((2e-2, 0.25), (1e-2, 0.5), (5e-3, 0.75), (1e-2, 0.75))
    ),
    *(
        {**LARGE, "lr": 2e-2, **change}
        for change in ({"reencode_every": 5}, {"viterbi_every": 1}, {"scale_lr": 1e-2})
    ),
    *({**IDENTITY, **LITTLE, "lr": lr} for lr in (7e-3, 1e-2)),
    *({**IDENTITY, **LITTLE, "lr": 1e-2, "start": start} for start in (0.25, 0.35, 0.5)),
    *({**IDENTITY, **LITTLE, "lr": 5e-3, "start": start} for start in (0.5, 0.75)),
    *({**IDENTITY, **LITTLE, "lr": 3e-3, "start": start} for start in (0.75, 1.0)),
    {**IDENTITY, **LITTLE, "lr": 1.5e-2, "start": 0.5},
    {**IDENTITY, **LITTLE, "lr": 1e-2, "start": 0.5, "scale_lr": 1e-2},
    *(
        {**SOFT, **LITTLE, "lr": lr, "start": x}
        for lr, x in ((2e-2, 0.0), (2e-2, 0.25), (1e-2, 0.5))
    ),
]
AGAIN = {
    **{"estimator": "identity", "batch": 1, "steps": 1000, "reencode_every": 50},
    **{"lr": 7e-3, "lr_end": 0.0, "start": 0.5, "scale_lr": 5e-3},
}
AGAIN_BCJR: list[dict[str, Any]] = [
    {**AGAIN, "estimator": "mixed", "t_init": 0.1, "t_min": 0.03},
    {**AGAIN, "estimator": "soft", "t_init": 0.2, "t_min": 0.03},
]
HALF = {**IDENTITY, **LITTLE, "lr": 1e-2, "start": 0.5}
LONG: list[dict[str, Any]] = [
    *({**HALF, "viterbi_every": every, "reencode_every": 32} for every in (1, 2, 4, 8, 16, 32)),
    *(
        {**HALF, "viterbi_every": 1, "finish": finish, "t_init": 0.05, "t_min": 0.03}
        for finish in (None, "straight_through", "soft")
    ),
    {
        **HALF,
        "viterbi_every": 1,
        "finish": "soft",
        "finish_share": 0.4,
        "t_init": 0.05,
        "t_min": 0.03,
    },
    *(
        {**HALF, "viterbi_every": 1, "steps": 1200, "lr": lr, "start": start}
        for lr, start in ((4.5e-3, 0.5), (6.5e-3, 0.5), (9e-3, 0.5), (6.5e-3, 0.75))
    ),
    *(
        {**HALF, "viterbi_every": 8, "steps": 3200, "reencode_every": 100, "lr": lr, "start": start}
        for lr, start in ((4e-3, 0.5), (7e-3, 0.5), (5e-3, 0.75), (5e-3, 1.0))
    ),
]
SEARCHES: list[dict[str, Any]] = [
    {**HALF, "viterbi_every": n, "reencode_every": 64, "batch": batch, "steps": steps, "lr": lr}
    for batch, steps, lr in ((1, 1920, 5e-3), (4, 480, 1e-2), (16, 120, 2e-2))
    for n in (1, 4, 8)
]
MIXED: list[dict[str, Any]] = [
    {**SOFT, **LITTLE, "lr": 1e-2, "start": 0.5, **change}
    for change in (
        {"estimator": "identity"},
        {"estimator": "straight_through"},
        {"estimator": "mixed", "mix": 0.5},
        {"estimator": "mixed", "mix": 0.25},
        {"estimator": "mixed", "mix": 0.5, "t_init": 0.05, "t_min": 0.02},
    )
]
HOTTER: list[dict[str, Any]] = [
    {"t_init": 0.2},
    {},
    {"t_init": 0.8},
    {"lr": 2e-2},
    {"lr": 7e-3},
    {"start": 1.0},
    {"estimator": "mixed", "mix": 0.5, "t_init": 0.2},
    {"estimator": "mixed", "t_init": 0.2, "mix": 0.25},
    {"seed": 1},
    *({"bcjr_stride": stride, "seed": seed} for stride, seed in ((2, 0), (4, 0), (4, 1))),
    {"finish": "identity", "finish_share": 0.5},
    {"estimator": "identity", "finish": "soft", "finish_share": 0.4, "t_init": 19.5},
    *({"steps": 1200, "lr": 6.5e-3, "bcjr_stride": stride} for stride in (1, 4)),
    *({"estimator": "identity", "steps": n, "lr": lr} for n, lr in ((1200, 4.5e-3), (3600, 4e-3))),
    {"steps": 1200, "lr": 6.5e-3, "t_init": 0.2},
    {"steps": 1200, "lr": 5.5e-3, "t_init": 0.2, "estimator": "mixed", "mix": 0.25},
    {"steps": 2150, "lr": 5e-3, "bcjr_stride": 4},
]
HOT: list[dict[str, Any]] = [
    {**SOFT, **LITTLE, "lr": 1e-2, "start": 0.5, "t_init": 0.4, **change} for change in HOTTER
]
FEWER: list[dict[str, Any]] = [
    *({"estimator": "identity", "lr": lr} for lr in (7e-3, 1e-2, 1.5e-2)),
    *({"t_init": t} for t in (0.1, 0.2, 0.4)),
    *({"estimator": "mixed", "mix": 0.25, "t_init": t} for t in (0.1, 0.2)),
    {"estimator": "mixed", "mix": 0.25, "lr": 1.5e-2},
    *({"estimator": "identity", "seed": seed} for seed in (1, 2)),
    {"t_init": 0.4, "seed": 1},
    {"estimator": "mixed", "mix": 0.25, "t_init": 0.2, "seed": 1},
]
SHORT = {"batch": 4, "steps": 240, "reencode_every": 64, "lr": 1e-2, "start": 0.5}
FEW: list[dict[str, Any]] = [{**SOFT, **LITTLE, **SHORT, **change} for change in FEWER]
STRIDES: list[dict[str, Any]] = [
    {**SOFT, **LITTLE, "lr": 1e-2, "start": 0.5, "estimator": "mixed", "mix": 0.5, **change}
    for change in (
        {"bcjr_stride": 2},
        {"bcjr_stride": 4},
        {"bcjr_stride": 4, "mix": 1.0},
        {"bcjr_stride": 4, "mix": 0.25},
        {"bcjr_stride": 4, "t_init": 0.2},
        {"bcjr_stride": 4, "seed": 1},
    )
]
TUNED: list[dict[str, Any]] = [
    {**IDENTITY, **LITTLE, "lr": FROZEN},
    {**LARGE, "lr": 1e-2},
    *(
        {**IDENTITY, **LITTLE, "lr": lr, "start": start}
        for start in (0.0, 0.25, 0.5)
        for lr in (5e-3, 1e-2)
    ),
]
PROGRESSIVE = [
    *((40, 16, 6e-2), (80, 8, 6e-2), (160, 4, 6e-2), (320, 2, 6e-2)),
    *((160, 4, 3e-2), (320, 2, 3e-2), (640, 1, 3e-2), (640, 1, 2e-2), (160, 16, 3e-2)),
]
"""Steps behind a decoder layer, windows a step, learning rate."""


def report(name: str, source: Source, model: Any, test: Tensor) -> None:
    dequantize_(model)
    models = {"teacher": source.model, "model": model}
    scores = score_many(models, test, "teacher", batch_size=32, chunk=4096)["model"]
    print(f"{name}: perplexity {scores.perplexity:.2f}, KL {scores.kl_mean:.3f}", flush=True)


def quantized(source: Source, text: str, windows: int, seed: int = 0, **tuning: Any) -> Any:
    """``tuning``: of ``quantize_model``, and ``output_windows``."""
    output_windows = tuning.pop("output_windows", 0)
    config = QuantizeConfig(
        L=10, ctx=CTX, windows=windows, data=(text,), seed=seed, output_windows=output_windows
    )
    model = copy.deepcopy(source.model)
    return quantize_model(model, config, tokenizer=source.tokenizer, **tuning)


def ptq(source: Source, text: str, test: Tensor, seeds: list[int]) -> None:
    fine = {"fine_tune": FineTuneConfig(epochs=2)}
    whole = {"end_to_end": EndToEndConfig(epochs=4, lr=3e-3, batch=16)}
    behind = {
        "progressive": ProgressiveConfig(
            steps=40, lr=6e-2, scale_lr=3e-2, micro_batch=None, data=(text,), ctx=CTX
        )
    }
    rows: dict[str, dict[str, Any]] = {
        "LDLQ": {},
        "fine-tuned": fine,
        "fine-tuned, end to end": fine | whole,
        "fine-tuned, progressive": fine | behind,
        "fine-tuned, progressive, end to end": fine | behind | whole,
    }
    for name, options in rows.items():
        for windows in (0, 256):
            for seed in seeds:
                model = quantized(source, text, 256, seed, output_windows=windows, **options)
                report(f"{name}, {windows} output windows, seed {seed}", source, model, test)


@torch.no_grad()
def written(source: Source, count: int) -> Tensor:
    """Windows that the teacher writes, at temperature 1."""
    torch.manual_seed(0)
    first = torch.full((512, 1), source.tokenizer.bos_token_id)
    options = {"max_new_tokens": CTX - 1, "min_new_tokens": CTX - 1, "do_sample": True, "top_k": 0}
    generate: Any = source.model.generate
    parts = (generate(first, pad_token_id=0, **options) for _ in range(count // 512))
    return torch.cat(list(parts))


def trained(
    source: Source, start: Any, windows: Tensor, test: Tensor, runs: list[dict[str, Any]]
) -> None:
    """Each run from the same quantized model."""
    report("as quantized", source, copy.deepcopy(start), test[1::2])
    for run in runs:
        settings = {"batch": 16, "start": 0.0, "scale_lr": 1e-2} | run
        settings |= {"evaluate_every": 0, "measure_every": 0}
        config = DistillConfig(ctx=CTX, train=("latents", "scales", "norms"), **settings)
        teacher, student = copy.deepcopy(source.model), copy.deepcopy(start)
        result = distill(student, config, teacher=teacher, text=(windows, windows[:0]))
        changed = list(result.changed_codes.values())
        share = sum(changed) / len(changed)
        report(f"{run}, {share:.3f} of codes changed", source, student, test[1::2])


def tuned(
    source: Source, text: Path, windows: Tensor, steps: int = 40, batch: int = 16, lr: float = 6e-2
) -> Any:
    """Fine-tuned; later layers learn from what the teacher wrote."""
    own = text.with_name("written.txt")
    decoded = source.tokenizer.batch_decode(windows, skip_special_tokens=True)
    own.write_text("\n\n".join(decoded), "utf-8")
    behind = ProgressiveConfig(
        steps=steps, batch=batch, lr=lr, scale_lr=lr / 2,
        micro_batch=None, data=(str(own),), ctx=CTX,
    )  # fmt: skip
    return quantized(source, str(text), 64, fine_tune=FineTuneConfig(epochs=2), progressive=behind)


def starts(source: Source, text: Path, test: Tensor) -> None:
    """LDLQ, then a tuned start."""
    windows = written(source, 4096)
    trained(source, quantized(source, str(text), 64), windows, test, STARTS)
    runs = [run | {"scale_lr": 3e-3} for run in TUNED]
    trained(source, tuned(source, text, windows), windows, test, runs)


def long(source: Source, text: Path, test: Tensor) -> None:
    """Steps between searches, soft steps at the end, and more steps, from LDLQ."""
    trained(source, quantized(source, str(text), 64), written(source, 4096), test, LONG)


def searches(source: Source, text: Path, test: Tensor) -> None:
    """Steps of few tokens, in windows of 16, and steps between searches, from LDLQ."""
    windows = written(source, 4096).reshape(-1, 16)
    trained(source, quantized(source, str(text), 64), windows, test, SEARCHES)


def steps(source: Source, text: Path, test: Tensor) -> None:
    """As many tokens behind every decoder layer in more and smaller steps."""
    windows = written(source, 4096)
    for count, batch, lr in PROGRESSIVE:
        name = f"{count} steps of {batch} windows, lr {lr}"
        report(name, source, tuned(source, text, windows, count, batch, lr), test[1::2])


def epochs(source: Source, text: Path, test: Tensor) -> None:
    """Text that is seen five times, as it is and cut elsewhere, and as much that is seen once."""
    windows, start = written(source, 4096), quantized(source, str(text), 64)
    for seed in (0, 1):
        again = AGAIN | {"seed": seed}
        shifts = [again | {"shift_windows": shift} for shift in (False, True)]
        trained(source, start, windows[:200], test, shifts)
        trained(source, start, windows[1000:2000], test, [again])


def again(source: Source, text: Path, test: Tensor) -> None:
    """BCJR where text is seen five times, cut elsewhere each time."""
    windows, start = written(source, 4096), quantized(source, str(text), 64)
    trained(source, start, windows[:200], test, AGAIN_BCJR)


def mixed(source: Source, text: Path, test: Tensor) -> None:
    """BCJR's gradient, the identity's, and means of both, from LDLQ; two of them by three seeds."""
    windows, start = written(source, 4096), quantized(source, str(text), 64)
    trained(source, start, windows, test, MIXED)
    confirmed = MIXED[0], MIXED[2]
    for seed in (1, 2):
        trained(source, start, windows, test, [run | {"seed": seed} for run in confirmed])


def hot(source: Source, text: Path, test: Tensor) -> None:
    """BCJR from higher temperatures, and mixed gradients of some tiles a step, from LDLQ."""
    trained(source, quantized(source, str(text), 64), written(source, 4096), test, HOT + STRIDES)


def few(source: Source, text: Path, test: Tensor) -> None:
    """Estimators where tokens are few: 64 a step, in windows of 16, from LDLQ."""
    windows = written(source, 4096).reshape(-1, 16)
    trained(source, quantized(source, str(text), 64), windows, test, FEW)


OTHERS = {
    "starts": starts,
    "long": long,
    "searches": searches,
    "steps": steps,
    "epochs": epochs,
    "again": again,
    "mixed": mixed,
    "hot": hot,
    "few": few,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", choices=["ptq", "tokens", *OTHERS])
    parser.add_argument("model")
    parser.add_argument("stories", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    source, stories = load_source(options.model), options.stories.read_text(encoding="utf-8")
    test = token_windows(source.tokenizer, [stories[-SCORED:]], CTX)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.txt"
        text.write_text(stories[: -SCORED if options.table == "ptq" else 60_000], "utf-8")
        if options.table == "ptq":
            ptq(source, str(text), test, options.seeds)
        elif options.table == "tokens":
            start = quantized(source, str(text), 64)
            trained(source, start, written(source, 16384), test, RUNS)
        else:
            OTHERS[options.table](source, text, test)


if __name__ == "__main__":
    main()
