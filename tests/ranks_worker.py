"""What every rank runs in tests/recipes/test_ranks.py, under torchrun."""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from softtrellis.cli.main import main as command
from softtrellis.io.checkpoint import load_full_precision, load_quantized
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes import trainer
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill
from softtrellis.recipes.ranks import ONE, Ranks, join
from softtrellis.recipes.run_state import write_tensors

STEPS = 20


def codes(model: Any) -> dict[str, Tensor]:
    return {name: layer.codes for name, layer in quantized_layers(model).items()}


def train(folder: Path, ranks: Ranks, job: dict[str, Any]) -> tuple[list[Any], dict[str, Tensor]]:
    """The history and the codes of a run, which may end after some steps or go on."""
    stop_after = job.pop("stop_after", None)
    directory, resume = job.pop("directory", None), job.pop("resume", False)
    job = {key: tuple(v) if isinstance(v, list) else v for key, v in job.items()}
    settings = {"steps": STEPS, "ctx": 32, "lr": 3e-2, "held_out": 2, "measure_every": 10}
    settings |= {
        "estimator": "soft",
        "start": 0.0,
        "evaluate_every": 10,
        "save_minutes": 0.0,
        "windows": 24,
        "reencode_every": 6,
    }
    settings |= job
    whole, calls = trainer.Trainer.step, count()

    def step(self: trainer.Trainer, number: int, share: float) -> dict[str, Any]:
        if next(calls) == stop_after:
            raise KeyboardInterrupt
        return whole(self, number, share)

    trainer.Trainer.step = step  # type: ignore[method-assign]
    try:
        result = distill(
            load_quantized(folder / "student"),
            DistillConfig(data=(str(folder / "text.txt"),), **settings),
            teacher=str(folder / "teacher"),
            run_directory=None if directory is None else folder / directory,
            resume=resume,
            ranks=ranks,
        )
    except KeyboardInterrupt:
        return [], {}
    finally:
        trainer.Trainer.step = whole  # type: ignore[method-assign]
    return result.history, codes(result.model) | {"changed": sum_of(result.changed_codes)}


def sum_of(changed: dict[str, float]) -> Tensor:
    return Tensor(list(changed.values()))


def quantize(folder: Path, ranks: Ranks, job: dict[str, Any]) -> tuple[list[Any], Any]:
    """The reports and the codes of a quantization."""
    source = load_full_precision(str(folder / "teacher"))
    text = str(folder / "text.txt")
    config = QuantizeConfig(
        code="gaussian", L=8, layers=("1",), ctx=32, windows=11, data=(text,), **job
    )
    reports: dict[str, Any] = {}
    model = quantize_model(
        source.model, config, tokenizer=source.tokenizer, reports=reports, ranks=ranks
    )
    return [report.proxy_loss for report in reports.values()], codes(model)


DO = {"train": train, "quantize": quantize}


def run_jobs(folder: Path, jobs: dict[str, Any], ranks: Ranks = ONE) -> None:
    """Every job's history as JSON, and its codes, both of rank 0; all ranks have the same codes."""
    for name, (kind, job) in jobs.items():
        history, found = DO[kind](folder, ranks, dict(job))
        parts = ranks.gather({key: tensor.tolist() for key, tensor in found.items()})
        assert all(part == parts[0] for part in parts)
        if ranks.first:
            write_tensors(folder / f"{name}.safetensors", found, {})
            (folder / f"{name}.json").write_text(json.dumps(history), encoding="utf-8")


def main() -> None:
    folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
    commands, device = jobs.pop("commands", []), jobs.pop("device", "cpu")
    with join(device) as ranks:
        run_jobs(folder, jobs, ranks)
        for options in commands:
            assert command(options) == 0


if __name__ == "__main__":
    main()
