"""What the experiments of docs/results.md share: one teacher, its texts, and runs that are scored.

Everything stays in one process: the model and its texts are loaded once, models are quantized and
trained as the commands do, with their options, and scored on all windows of the test text. Results
are added to a file of JSON lines, one object per run: name, seed, options, seconds, the scores of
every window, and the log of the training.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from turns import turn

from softtrellis.cli.main import build_parser
from softtrellis.cli.quantize import configs
from softtrellis.cli.train import config_of
from softtrellis.evaluation.perplexity import WindowScores, score_many
from softtrellis.io.checkpoint import base_of, save_quantized
from softtrellis.io.sources import load_source
from softtrellis.io.text import load_documents, token_windows
from softtrellis.modules.replace import dequantize_
from softtrellis.recipes.benchmark import default_device
from softtrellis.recipes.ptq import quantize_model
from softtrellis.recipes.qat import DistillConfig, distill
from softtrellis.recipes.training_text import training_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softtrellis.io.sources import Source
    from softtrellis.recipes.stages import DistillResult

PATIENCE = 3600
"""Seconds that a process waits for others' runs, which may wait for a GPU that one has alone."""
_SOURCES: dict[str, Source] = {}
_TEXTS: dict[tuple[str, DistillConfig], tuple[Tensor, Tensor]] = {}
_QUANTIZED: dict[tuple[str, str], PreTrainedModel] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every experiment needs."""
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="text for the Hessians")
    parser.add_argument(
        "--train",
        nargs="+",
        required=True,
        help="texts for training: documents:FILE, teacher or both",
    )
    parser.add_argument("--test", required=True, help="text that is reported")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--ctx", type=int, default=1024, help="tokens of a training window")
    parser.add_argument("--windows", type=int, default=4096, help="training windows")
    parser.add_argument("--teacher-share", type=float, help="of them, as in softtrellis train")
    parser.add_argument("--held-out", type=int, default=32, help="windows that choose settings")
    parser.add_argument("--calibration-windows", type=int, default=128)
    parser.add_argument("--test-windows", type=int, help="by default all")
    parser.add_argument("--test-ctx", type=int, default=2048)
    parser.add_argument("--quantize", default="", help="more options of softtrellis quantize")
    parser.add_argument("--json", type=Path, required=True, help="results are added to this file")
    parser.add_argument("--save", type=Path, help="models are saved here, in a folder per run")
    parser.add_argument(
        "--claims",
        type=Path,
        help="processes with one of these share the runs; those with --minutes have a GPU alone",
    )


class Experiment:
    """A teacher, its texts, and the models that are made of it; one process makes each once."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, options.device
        if options.model not in _SOURCES:
            _SOURCES[options.model] = load_source(options.model)
        source = _SOURCES[options.model]
        self.teacher, self.tokenizer = source.model, source.tokenizer
        self.base = base_of(source)
        text = DistillConfig(
            data=tuple(options.train),
            ctx=options.ctx,
            windows=options.windows,
            teacher_share=options.teacher_share,
            held_out=options.held_out,
            device=options.device,
            show_progress=True,
        )
        if (options.model, text) not in _TEXTS:
            with self.turn():
                windows = training_windows(text, self.teacher, self.tokenizer)
            _TEXTS[options.model, text] = windows
        self.text = _TEXTS[options.model, text]
        test = load_documents([options.test], split="heldout")
        self.test = token_windows(
            self.tokenizer, test, options.test_ctx, limit=options.test_windows
        )

    def quantized(self, more: str = "", *, seed: int = 0) -> PreTrainedModel:
        """A copy of the quantized model."""
        o = self.options
        words = f"{o.quantize} {more} --seed {seed}"
        line = f"quantize x -o x --data {shlex.quote(o.calibration)} --ctx {o.test_ctx} "
        line += f"--windows {o.calibration_windows} --device {o.device} {words}"
        if (o.model, line) not in _QUANTIZED:
            options = build_parser().parse_args(shlex.split(line))
            config, fine_tune, progressive, end_to_end = configs(options)
            config = replace(config, show_progress=False)
            model = copy.deepcopy(self.teacher)
            began = time.perf_counter()
            quantize_model(
                model,
                config,
                tokenizer=self.tokenizer,
                fine_tune=fine_tune,
                progressive=progressive,
                end_to_end=end_to_end,
            )
            print(f"quantized in {time.perf_counter() - began:.1f} s: {words}", flush=True)
            _QUANTIZED[o.model, line] = model.cpu()
        return copy.deepcopy(_QUANTIZED[o.model, line])

    def train(self, model: PreTrainedModel, config: DistillConfig) -> DistillResult:
        """Trains a model in place."""
        return distill(model, config, teacher=self.teacher, text=self.text)

    def score(self, model: nn.Module, windows: Tensor | None = None) -> WindowScores:
        """The hard model on windows of text, with the KL divergence from the teacher.

        Args:
            windows: int64 [n, ctx]; None is the test text.
        """
        dequantize_(model)
        models = {"teacher": self.teacher.to(self.device), "model": model.to(self.device)}
        windows = self.test if windows is None else windows
        scores = score_many(models, windows, "teacher", batch_size=4, chunk=2048)
        model.cpu()
        return scores["model"]

    def claim(self, name: str, seed: int) -> bool:
        """Whether a run is this process's: the first of those with these claims to ask for it."""
        claims = self.options.claims
        if claims is None:
            return True
        claims.mkdir(parents=True, exist_ok=True)
        try:
            path_of(claims, name, seed).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def turn(self, *, alone: bool = False) -> AbstractContextManager[None]:
        """Of the processes with these claims on one device, see ``turns``."""
        return turn(self.options.claims, self.device, alone=alone)

    def best(
        self, names: Sequence[str], seed: int, score: Callable[[dict[str, Any]], float]
    ) -> str:
        """Of runs with this seed that with the least score, once other processes have made them."""
        if len(names) == 1:
            return names[0]
        folder = self.options.json.parent
        for _ in range(PATIENCE):
            lines = [line for file in folder.glob("*.jsonl") for line in file.open()]
            whole = [json.loads(line) for line in lines if line.endswith("\n")]
            found = {r["name"]: score(r) for r in whole if r["seed"] == seed and r["name"] in names}
            if len(found) == len(names):
                return min(names, key=found.__getitem__)
            time.sleep(1)
        raise TimeoutError(f"{folder} has no records of {names} with seed {seed}")

    def run(
        self, name: str, train: str | None, *, quantize: str = "", seed: int = 0
    ) -> dict[str, Any] | None:
        """Quantizes, trains with options of ``softtrellis train`` if there are some, and scores.

        Returns:
            The run's record; None if it is another process's, see ``claim``.
        """
        if not self.claim(name, seed):
            return None
        with self.turn():
            model = self.quantized(quantize, seed=seed)
        o = self.options
        record: dict[str, Any] = {
            "name": name,
            "seed": seed,
            "seconds": 0.0,
            "train": train,
            "quantize": f"{o.quantize} {quantize}".strip(),
            "training_text": {
                "teacher": "teacher" in o.train,
                **{option: getattr(o, option) for option in ("ctx", "windows", "teacher_share")},
            },
        }
        if train is not None:
            line = f"train x --teacher x -o x --ctx {o.ctx} --device {o.device} --seed {seed} "
            line += f"--held-out {o.held_out} --save-minutes 0 {train}"
            config = replace(
                config_of(build_parser().parse_args(shlex.split(line))), show_progress=False
            )
            if o.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with self.turn(alone=config.minutes is not None):
                began = time.perf_counter()
                result = self.train(model, config)
                record["seconds"] = time.perf_counter() - began
            if o.device == "cuda":
                record["peak_bytes"] = torch.cuda.max_memory_allocated()
            log = [{k: v for k, v in r.items() if k != "layers"} for r in result.history]
            changed = list(result.changed_codes.values())
            record |= {"log": log, "kept": result.kept, "changed": sum(changed) / len(changed)}
        if self.options.save is not None:
            folder = path_of(self.options.save, name, seed)
            folder.mkdir(parents=True)
            save_quantized(model, self.tokenizer, folder, base=self.base)
        with self.turn():
            return self.record(record, model)

    def record(self, record: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        """Scores the hard model, adds that to the run's record, and the record to the file."""
        scores = self.score(model)
        assert scores.kl is not None
        assert scores.kl_mean is not None
        record |= {
            "perplexity": scores.perplexity,
            "kl": scores.kl_mean,
            "windows": {
                "nll": scores.nll.tolist(),
                "kl": scores.kl.tolist(),
                "tokens": scores.tokens.tolist(),
            },
        }
        with self.options.json.open("a") as file:
            file.write(json.dumps(record) + "\n")
        steps = len(record.get("log", ()))
        print(
            f"{record['name']:28} seed {record['seed']}  perplexity {scores.perplexity:8.2f}  "
            f"KL {scores.kl_mean:.4f}  "
            f"{steps} steps  {record['seconds']:.0f} s  kept {record.get('kept')}  "
            f"changed {record.get('changed', 0):.4f}",
            flush=True,
        )
        return record


def path_of(folder: Path, name: str, seed: int) -> Path:
    """A run's own file or folder there."""
    return folder / f"{name.replace('/', '_')}.{seed}"


def kept(record: dict[str, Any]) -> float:
    """KL on the held-out windows of the hard code that a run kept, in nats per token."""
    return float(record["kept"][0][1])


def main() -> None:
    """Runs by name; NAME alone is the quantized model."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="NAME[@RIVAL]=OPTIONS",
        help="options of softtrellis train; of those with rivals, runs with seed 0 in the folder "
        "of --json, only the ones whose rival kept the best hard code are made: other seeds, say",
    )
    options = parser.parse_args()
    experiment = Experiment(options)
    names = [text.partition("=")[0].partition("@") for text in options.runs]
    rivals = list(dict.fromkeys(rival for _, _, rival in names if rival))
    best = experiment.best(rivals, 0, kept) if rivals else ""
    for text, (name, _, rival) in zip(options.runs, names, strict=True):
        _, given, train = text.partition("=")
        for seed in options.seeds if rival in ("", best) else ():
            experiment.run(name, train if given else None, seed=seed)


if __name__ == "__main__":
    main()
