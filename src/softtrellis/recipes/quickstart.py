"""The main job on a default that always works: quantize, train, evaluate, report."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from softtrellis.codes.codebook import HYBRID_MIN_STATE_BITS
from softtrellis.evaluation.report import write_report
from softtrellis.evaluation.run_log import BASELINE, REFERENCE, TRAINED
from softtrellis.io.checkpoint import (
    base_of,
    load_full_precision,
    load_quantized,
    save_quantized,
)
from softtrellis.io.files import whole_directory, write_json
from softtrellis.io.sources import EMBEDDED
from softtrellis.io.text import load_documents, token_windows
from softtrellis.modules.replace import dequantize_, linear_names, select_layers
from softtrellis.recipes.drift import predicted_radius
from softtrellis.recipes.pipeline import checkpoint_size, dense_size, score_and_compare, summary
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIVIDED_SOURCES = ("pydoc", "wikitext2")
HELD_OUT_SHARE = 0.15


@dataclass(frozen=True)
class QuickstartConfig:
    """Sizes of the quickstart; the defaults fit two CPU cores and 12 minutes.

    Attributes:
        model: the teacher, see ``load_source``.
        layers: which linear layers are quantized and trained, see ``select_layers``.
        data: texts, see ``load_documents``; of those that do not come in two parts, the last
            fifteen per cent are held out.
        bits, L: bits per weight and bits of a state.
        steps, lr, batch: of training.
        ctx: tokens per window, everywhere.
        calibration_windows, eval_windows: how many windows are used.
    """

    model: str = EMBEDDED
    layers: tuple[str, ...] | None = ("29",)
    data: tuple[str, ...] = ("pydoc",)
    bits: int = 2
    L: int = 10
    steps: int = 24
    lr: float = 1.5e-2
    batch: int = 2
    ctx: int = 512
    calibration_windows: int = 24
    eval_windows: int = 24

    def __post_init__(self) -> None:
        if self.eval_windows < 2:
            raise ValueError(f"eval_windows must be at least 2, got {self.eval_windows}")
        if self.L < HYBRID_MIN_STATE_BITS:
            raise ValueError(f"L must be at least {HYBRID_MIN_STATE_BITS} (code HYB), got {self.L}")
        self.quantize_config()
        self.distill_config()

    def shortened(self) -> QuickstartConfig:
        """The smallest sizes that still go the whole way."""
        return replace(self, L=10, steps=4, batch=2, calibration_windows=8, eval_windows=4, ctx=256)

    def quantize_config(self) -> QuantizeConfig:
        """How it quantizes."""
        return QuantizeConfig(
            bits=self.bits,
            L=self.L,
            layers=self.layers,
            data=self.data,
            ctx=self.ctx,
            windows=self.calibration_windows,
            show_progress=True,
        )

    def distill_config(self) -> DistillConfig:
        """How it trains."""
        return DistillConfig(
            layers=self.layers,
            estimator="soft",
            start=0.0,
            train=("latents",),
            lr=self.lr,
            steps=self.steps,
            batch=self.batch,
            ctx=self.ctx,
            data=self.data,
            measure_every=max(1, self.steps // 20),
            held_out=0,
            save_minutes=0,
            show_progress=True,
        )


def quickstart(config: QuickstartConfig, output: Path, *, force: bool = False) -> None:
    """Writes ptq/, bcjr-qat/, log.jsonl, results.json, report.html and main.png."""
    began = time.perf_counter()
    with whole_directory(output, force=force) as directory:
        _run(config, directory)
    print(f"\nReport: {output / 'report.html'}\nCheckpoint: {output / 'bcjr-qat'}")
    print(f"It took {(time.perf_counter() - began) / 60:.1f} minutes.")


def _hold_out(
    config: QuickstartConfig, tokenizer: PreTrainedTokenizerBase, directory: Path
) -> tuple[QuickstartConfig, tuple[str, ...]]:
    """The configuration with texts to train on, and the texts that are held out.

    Sources that come in two parts stay as they are; others are cut in two, into ``text/``.
    """
    train, held_out = [], []
    for number, source in enumerate(config.data):
        if source in DIVIDED_SOURCES:
            train.append(source)
            held_out.append(source)
            continue
        text = "".join(load_documents([source], split="train", tokenizer=tokenizer))
        cut = text.find("\n", int(len(text) * (1 - HELD_OUT_SHARE))) + 1
        (directory / "text").mkdir(exist_ok=True)
        for part, parts, name in (
            (text[:cut], train, "train"),
            (text[cut:], held_out, "held-out"),
        ):
            path = directory / "text" / f"{number}-{name}.txt"
            path.write_text(part, encoding="utf-8")
            parts.append(str(path))
    return replace(config, data=tuple(train)), tuple(held_out)


def _run(config: QuickstartConfig, directory: Path) -> None:
    print(f"Teacher: {config.model}")
    source = load_full_precision(config.model)
    base, tokenizer = base_of(source), source.tokenizer
    names = select_layers(source.model, config.layers)
    text = ", ".join(config.data)
    config, held_out_data = _hold_out(config, tokenizer, directory)
    held_out = token_windows(
        tokenizer,
        load_documents(held_out_data, split="heldout"),
        config.ctx,
        limit=config.eval_windows,
    )
    print(
        f"Quantizing {len(names)} of {len(linear_names(source.model))} linear layers "
        f"({', '.join(config.layers or ('all',))}) to {config.bits} bits, code hyb, L={config.L}; "
        "--layers, --L and --steps change that."
    )
    quantized = quantize_model(
        copy.deepcopy(source.model), config.quantize_config(), tokenizer=tokenizer
    )
    ptq, trained = directory / "ptq", directory / "bcjr-qat"
    for path in (ptq, trained):
        path.mkdir()
    settings: dict[str, str | int | float] = {
        "layers": ", ".join(config.layers or ("all",)),
        "bits": config.bits,
        "L": config.L,
        "steps": config.steps,
        "lr": config.lr,
        "tokens per step": config.batch * config.ctx,
        "text": text,
        "held-out windows": held_out.shape[0],
        "ctx": config.ctx,
    }
    save = partial(
        save_quantized,
        tokenizer=tokenizer,
        base=base,
        source_directory=source.directory,
        provenance={"quickstart": settings},
    )
    save(quantized, directory=ptq)
    result = distill(
        quantized,
        config.distill_config(),
        teacher=source.model,
        tokenizer=tokenizer,
        run_directory=directory,
    )
    save(result.model, directory=trained)
    models = {
        REFERENCE: source.model,
        BASELINE: load_quantized(ptq),
        TRAINED: load_quantized(trained),
    }
    sizes = {REFERENCE: dense_size(source.model)}
    for name, path in ((BASELINE, ptq), (TRAINED, trained)):
        dequantize_(models[name])
        sizes[name] = checkpoint_size(path)
    results = score_and_compare(
        models, held_out, sizes, title="softtrellis quickstart", settings=settings
    )
    results["held_out"] = True
    results["predicted_radius"] = predicted_radius(2**config.L)
    write_json(directory / "results.json", results)
    write_report(directory)
    print("\n" + summary(results))
