"""The steps that the commands are made of: from names on disk to names on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softtrellis.evaluation.divergence import paired_bootstrap
from softtrellis.evaluation.harness import TaskConfig, run_tasks
from softtrellis.evaluation.perplexity import WindowScores, score_many
from softtrellis.evaluation.report import format_table, format_tasks, verdict
from softtrellis.evaluation.run_log import Comparison
from softtrellis.io.checkpoint import (
    base_of,
    check_base,
    is_checkpoint,
    load_any,
    load_full_precision,
    load_quantized,
    read_manifest,
    save_quantized,
    size_report,
)
from softtrellis.io.text import stream_documents, token_windows
from softtrellis.modules.replace import dequantize_, head_name, prepare_for_layers_
from softtrellis.recipes.calibration import check_finite
from softtrellis.recipes.end_to_end import EndToEndConfig
from softtrellis.recipes.environment import environment
from softtrellis.recipes.estimate import Estimate, estimate
from softtrellis.recipes.finetune import FineTuneConfig
from softtrellis.recipes.group import LayerReport
from softtrellis.recipes.progressive import ProgressiveConfig
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill, with_start
from softtrellis.recipes.ranks import ONE, Ranks, output_directory
from softtrellis.recipes.stages import DistillResult
from softtrellis.recipes.training_text import window_length

DENSE_BITS = 32


def quantize_to(
    model: str,
    config: QuantizeConfig,
    output: Path,
    *,
    fine_tune: FineTuneConfig | None = None,
    progressive: ProgressiveConfig | None = None,
    end_to_end: EndToEndConfig | None = None,
    force: bool = False,
    resume: bool = False,
    ranks: Ranks = ONE,
) -> dict[str, LayerReport]:
    """Loads, quantizes and saves a model; a report per layer.

    With several ``ranks`` all of them call this; rank 0 writes.
    """
    with output_directory(output, ranks, force=force, resume=resume) as directory:
        source = load_full_precision(model)
        base = base_of(source)
        reports: dict[str, LayerReport] = {}
        quantized = quantize_model(
            source.model,
            config,
            tokenizer=source.tokenizer,
            reports=reports,
            fine_tune=fine_tune,
            progressive=progressive,
            end_to_end=end_to_end,
            run_directory=directory,
            resume=resume,
            ranks=ranks,
        )
        provenance = {"quantize": _settings(config)}
        if fine_tune is not None:
            provenance["fine_tune"] = asdict(fine_tune)
        if progressive is not None:
            provenance["progressive"] = asdict(progressive)
        if end_to_end is not None:
            provenance["end_to_end"] = asdict(end_to_end)
        if ranks.first:
            save_quantized(
                quantized,
                source.tokenizer,
                directory,
                base=base,
                source_directory=source.directory,
                provenance=provenance,
            )
    return reports


def plan_quantization(
    model: str,
    config: QuantizeConfig,
    fine_tune: FineTuneConfig | None,
    progressive: ProgressiveConfig | None,
    end_to_end: EndToEndConfig | None,
) -> tuple[list[str], Estimate]:
    """What ``quantize_to`` would quantize, and what that takes."""
    loaded = load_full_precision(model).model
    names = config.names_of(loaded)
    prepare_for_layers_(loaded, names)
    plan = estimate(loaded, config, fine_tune, progressive, end_to_end)
    return names if config.head_bits is None else [*names, head_name(loaded)], plan


def train_to(
    checkpoint: Path,
    teacher: str,
    config: DistillConfig,
    output: Path,
    *,
    force: bool = False,
    resume: bool = False,
    ranks: Ranks = ONE,
) -> DistillResult:
    """Trains a checkpoint and saves the result with its log.

    With several ``ranks`` all of them call this; rank 0 writes.
    """
    manifest = read_manifest(checkpoint)
    with output_directory(output, ranks, force=force, resume=resume) as directory:
        source = load_full_precision(teacher)
        check_base(manifest, source.model)
        config = replace(config, ctx=window_length(config.ctx, source.model))
        config = with_start(config, manifest.provenance)
        result = distill(
            load_quantized(checkpoint),
            config,
            teacher=source.model,
            tokenizer=source.tokenizer,
            run_directory=directory,
            resume=resume,
            ranks=ranks,
        )
        if ranks.first:
            save_quantized(
                result.model,
                source.tokenizer,
                directory,
                base=manifest.base,
                source_directory=checkpoint,
                provenance={**manifest.provenance, "train": _settings(config)},
            )
    return result


def _settings(config: QuantizeConfig | DistillConfig) -> dict[str, Any]:
    left_out = ("trellis_code", "show_progress", "backend")
    return {name: value for name, value in asdict(config).items() if name not in left_out}


def evaluate_models(
    names: Sequence[str],
    data: Sequence[str],
    *,
    ctx: int,
    windows: int | None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Scores models on text; the first is the reference of the KL divergence.

    Returns:
        What ``results.json`` holds: rows, scores per window and paired comparisons.
    """
    sources = {name: load_any(name, device=device) for name in names}
    first = next(iter(sources.values()))
    documents = stream_documents(data, split="heldout", tokenizer=first.tokenizer)
    ids = token_windows(first.tokenizer, documents, ctx, limit=windows)
    for source in sources.values():
        dequantize_(source.model)
    models: dict[str, nn.Module] = {name: source.model for name, source in sources.items()}
    sizes = {name: model_size(name, model) for name, model in models.items()}
    title = "Evaluation of " + ", ".join(names)
    settings: dict[str, str | int | float] = {
        "text": ", ".join(data),
        "ctx": ctx,
        "windows": ids.shape[0],
    }
    return score_and_compare(models, ids, sizes, title=title, settings=settings)


def evaluate_tasks(
    names: Sequence[str], tasks: Mapping[str, Any], config: TaskConfig, *, device: str = "cpu"
) -> dict[str, Any]:
    """Evaluates models on tasks that ``load_tasks`` gave, one model in memory at a time.

    Returns:
        What ``results.json`` holds: rows with the sizes, and the results by model and task.
    """
    rows: list[dict[str, Any]] = []
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        source = load_any(name, device=device)
        dequantize_(source.model)
        check_finite(source.model)
        bits, size = model_size(name, source.model)
        rows.append({"name": name, "bits_per_weight": bits, "bytes": size})
        found = run_tasks(source.model, source.tokenizer, tasks, config)
        results[name] = {task: asdict(result) for task, result in found.items()}
        del source  # before the next one is loaded
    return {
        "title": "Evaluation of " + ", ".join(names),
        "rows": rows,
        "tasks": results,
        "settings": {
            "task_dir": "none" if config.task_dir is None else str(config.task_dir),
            "limit": "none" if config.limit is None else config.limit,
            "batch_size": config.batch_size,
            "seed": config.seed,
        },
        "environment": environment(),
    }


def add_tasks(scores: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """One object of the results of ``evaluate_models`` and ``evaluate_tasks``."""
    settings = {**scores["settings"], **measured["settings"]}
    return {**scores, "tasks": measured["tasks"], "settings": settings}


def model_size(name: str, model: nn.Module) -> tuple[float, int]:
    """(bits per weight, bytes) of a checkpoint, or of a full-precision model."""
    path = Path(name)
    return checkpoint_size(path) if is_checkpoint(path) else dense_size(model)


def checkpoint_size(directory: Path) -> tuple[float, int]:
    """(bits per weight of the quantized layers, bytes of all files)."""
    size = size_report(directory)
    return size.stored_bits, size.file_bytes


def dense_size(model: nn.Module) -> tuple[float, int]:
    """(bits per weight, bytes of all parameters, tied ones once) of a model in float32."""
    return float(DENSE_BITS), sum(p.numel() for p in model.parameters()) * DENSE_BITS // 8


def score_and_compare(
    models: Mapping[str, nn.Module],
    windows: Tensor,
    sizes: Mapping[str, tuple[float, int]],
    *,
    title: str,
    settings: Mapping[str, str | int | float],
) -> dict[str, Any]:
    """Scores models, the first as reference, and compares each with the one before it."""
    names = list(models)
    scores = score_many(models, windows, names[0], progress=True)
    rows = [
        {
            "name": name,
            "perplexity": scores[name].perplexity,
            "kl": scores[name].kl_mean,
            "bits_per_weight": sizes[name][0],
            "bytes": sizes[name][1],
        }
        for name in names
    ]
    pairs = [(b, names[0], "nll") for b in names[1:]]
    pairs += [(b, a, metric) for a, b in pairwise(names[1:]) for metric in ("kl", "nll")]
    if windows.shape[0] < 2:
        pairs = []  # a bootstrap over windows needs two
    return {
        "title": title,
        "rows": rows,
        "windows": {name: _lists(scores[name]) for name in names},
        "comparisons": [_compare(scores, a, b, metric) for a, b, metric in pairs],
        "settings": dict(settings),
        "environment": environment(),
    }


def _lists(scores: WindowScores) -> dict[str, list[float]]:
    return {
        "nll": scores.nll.tolist(),
        "kl": [] if scores.kl is None else scores.kl.tolist(),
        "tokens": scores.tokens.tolist(),
    }


def _compare(scores: Mapping[str, WindowScores], a: str, b: str, metric: str) -> dict[str, Any]:
    tokens = scores[a].tokens.double()
    interval = paired_bootstrap(
        getattr(scores[a], metric) / tokens, getattr(scores[b], metric) / tokens, tokens
    )
    return {
        "a": a,
        "b": b,
        "metric": metric,
        "mean": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }


def summary(results: Mapping[str, Any]) -> str:
    """The tables, and what the paired comparisons show, as text."""
    measured = {row["name"]: row for row in results["rows"]}
    lines = [format_table(results["rows"]), ""]
    if "tasks" in results:
        lines += [format_tasks(results["tasks"]), ""]
    if "comparisons" not in results:
        return "\n".join(lines[:-1])
    held_out = results.get("held_out", False)
    for found in results["comparisons"]:
        baseline = measured[found["b"]]["kl"] if found["metric"] == "kl" else None
        lines.append(verdict(Comparison(**found), baseline, held_out=held_out)[1])
    if len(measured) > 1 and not results["comparisons"]:
        lines.append("One window of text is too few to compare models; use two or more.")
    return "\n".join(lines)
