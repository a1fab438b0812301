"""Perplexity of language models, and their KL divergence from a reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softtrellis.io.progress import progress as progress_bar

_PROBE_TOKENS = 64


@dataclass(frozen=True)
class WindowScores:
    """Scores of one model, window by window.

    The first token of a window is given, the others are predicted.

    Attributes:
        nll: float64 [n], negative log likelihood in nats, summed over the predicted tokens.
        tokens: int64 [n], how many tokens were predicted.
        kl: float64 [n], KL(reference || model) in nats, summed over the same positions; None
            without a reference.
    """

    nll: Tensor
    tokens: Tensor
    kl: Tensor | None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood per token."""
        return math.exp(float(self.nll.sum() / self.tokens.sum()))

    @property
    def kl_mean(self) -> float | None:
        """Mean KL(reference || model) per token, in nats."""
        return None if self.kl is None else float(self.kl.sum() / self.tokens.sum())


def score_windows(
    model: nn.Module,
    windows: Tensor,
    *,
    reference: nn.Module | None = None,
    batch_size: int = 1,
    chunk: int = 512,
    progress: bool = False,
) -> WindowScores:
    """Score one model on windows of tokens; see :func:`score_many`."""
    models = {"model": model} if reference is None else {"model": model, "reference": reference}
    name = None if reference is None else "reference"
    scores = score_many(
        models, windows, name, batch_size=batch_size, chunk=chunk, progress=progress
    )
    return scores["model"]


@torch.no_grad()
def score_many(
    models: Mapping[str, nn.Module],
    windows: Tensor,
    reference: str | None = None,
    *,
    batch_size: int = 1,
    chunk: int = 512,
    progress: bool = False,
) -> dict[str, WindowScores]:
    """Score several models on the same windows, each model once per window.

    Memory beyond the models: the hidden states of a batch, and a few times ``chunk`` x vocabulary
    numbers; for a model whose logits are not its output layer of its hidden states (see
    :func:`split_head`), its logits of a batch.

    Args:
        models: causal language models by name, all of one vocabulary. A model takes int64 ids
            [b, ctx] and returns logits [b, ctx, vocabulary], alone or as attribute ``logits``.
        windows: int64 [n, ctx].
        reference: the name in ``models`` of the one that the KL divergence is taken from; its
            own is 0.
        batch_size: windows per forward pass.
        chunk: positions whose log-probabilities are held at once.
        progress: show a progress bar.

    Raises:
        ValueError: windows that are no int64 [n, ctx] with ctx of at least 2 or hold ids outside
            the vocabulary, an unknown reference, different vocabularies, logits with NaN or
            infinity (named by model).
    """
    _validate(models, windows, reference, batch_size, chunk)
    order = sorted(models, key=lambda name: name != reference)
    count, ctx = windows.shape
    nll = {name: torch.zeros(count, dtype=torch.float64) for name in models}
    kl = {name: torch.zeros(count, dtype=torch.float64) for name in models}
    with (
        _evaluating(list(models.values())),
        progress_bar(count, "evaluate", enabled=progress) as bar,
    ):
        split = {name: split_head(model, windows[0]) for name, model in models.items()}
        for start in range(0, count, batch_size):
            batch = windows[start : start + batch_size]
            targets = batch[:, 1:].reshape(-1)
            rows = torch.arange(start, start + len(batch)).repeat_interleave(ctx - 1)
            features = {name: split[name].features(batch) for name in order}
            for first in range(0, len(targets), chunk):
                part = slice(first, first + chunk)
                target, row = targets[part], rows[part]
                teacher: Tensor | None = None
                for name in order:
                    log_p = _log_softmax(split[name].head(features[name][part]))
                    picked = log_p.gather(1, target.to(log_p.device)[:, None])[:, 0]
                    nll[name].index_add_(0, row, -picked.to("cpu", torch.float64))
                    if name == reference:
                        teacher = log_p
                    elif teacher is not None:
                        divergence = _divergence(teacher, log_p, name)
                        kl[name].index_add_(0, row, divergence.to("cpu", torch.float64))
            for name in order:
                _require_finite(name, nll[name], kl[name])
            bar.update(len(batch))
    tokens = torch.full((count,), ctx - 1, dtype=torch.int64)
    return {
        name: WindowScores(nll[name], tokens, None if reference is None else kl[name])
        for name in models
    }


@dataclass(frozen=True)
class SplitHead:
    """A model in two parts, so that logits can be made for a few positions at a time.

    Attributes:
        features: ids [b, ctx] to the features [b * (ctx - 1), d] of all positions but the last.
        head: features [m, d] to logits [m, vocabulary].
    """

    features: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]


def split_head(model: nn.Module, window: Tensor) -> SplitHead:
    """Split a model into hidden states and output layer, if its logits are just that.

    Many models do more between the two (scale or cap the logits, say). So both ways are compared
    on the start of `window` [ctx]; if they do not agree to rounding, or if the model has no such
    parts, the features are the logits themselves.
    """
    device = next(model.parameters()).device

    def whole(ids: Tensor) -> Tensor:
        return _logits(model, ids.to(device))[:, :-1].flatten(0, 1)

    whole_head = SplitHead(whole, lambda features: features)
    base = getattr(model, "base_model", None)
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    if not isinstance(base, nn.Module) or base is model or not isinstance(head, nn.Module):
        return whole_head

    def hidden(ids: Tensor) -> Tensor:
        states: Tensor = base(input_ids=ids.to(device), use_cache=False).last_hidden_state
        return states[:, :-1].flatten(0, 1)

    probe = window[None, :_PROBE_TOKENS]
    expected, found = whole(probe), head(hidden(probe))
    if found.shape != expected.shape:
        return whole_head
    tolerance = max(1e-5, 2 * torch.finfo(expected.dtype).eps) * expected.abs().max()
    return SplitHead(hidden, head) if (found - expected).abs().max() <= tolerance else whole_head


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    # A cache would hold every layer's keys and values for nothing.
    options = {"use_cache": False} if hasattr(model, "generation_config") else {}
    output = model(ids, **options)
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _require_finite(name: str, nll: Tensor, kl: Tensor) -> None:
    if not (nll.isfinite().all() and kl.isfinite().all()):
        raise ValueError(f"The logits of '{name}' hold NaN or infinity: its weights are broken.")


def _divergence(teacher: Tensor, student: Tensor, name: str) -> Tensor:
    """KL(teacher || student) of log-probabilities [m, vocabulary], as [m]."""
    if teacher.shape != student.shape:
        raise ValueError(
            f"'{name}' has a vocabulary of {student.shape[1]}, the reference one of "
            f"{teacher.shape[1]}: compare models of one vocabulary."
        )
    teacher = teacher.to(student.device)
    return (teacher.exp() * (teacher - student)).sum(-1)


def _validate(
    models: Mapping[str, nn.Module],
    windows: Tensor,
    reference: str | None,
    batch_size: int,
    chunk: int,
) -> None:
    if not models:
        raise ValueError("There is no model to score.")
    if windows.ndim != 2 or windows.dtype != torch.int64 or not len(windows):
        raise ValueError(
            f"windows must be int64 [n, ctx] with n at least 1, got {windows.dtype} "
            f"{list(windows.shape)}."
        )
    if windows.shape[1] < 2:
        raise ValueError(f"ctx must be at least 2 tokens, got {windows.shape[1]}.")
    if reference is not None and reference not in models:
        raise ValueError(f"The reference '{reference}' is not among {', '.join(models)}.")
    if batch_size < 1 or chunk < 1:
        raise ValueError(f"batch_size and chunk must be at least 1, got {batch_size}, {chunk}.")
    low, high = int(windows.min()), int(windows.max())
    for name, model in models.items():
        get = getattr(model, "get_input_embeddings", None)
        embedding = get() if callable(get) else None
        if isinstance(embedding, nn.Embedding) and not 0 <= low <= high < embedding.num_embeddings:
            raise ValueError(
                f"The windows hold token ids from {low} to {high}, '{name}' knows 0 to "
                f"{embedding.num_embeddings - 1}: use its own tokenizer."
            )


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    """Put models in eval mode, and every module back as it was."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
