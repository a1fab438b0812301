"""The windows that a run trains on, and those that it is judged by."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from softtrellis.backend import compute_dtype
from softtrellis.io.sources import cache_directory
from softtrellis.io.text import (
    TEACHER,
    stream_documents,
    token_windows,
    train_and_held_out_windows,
)
from softtrellis.recipes.seeds import epoch_generator
from softtrellis.recipes.teacher_text import is_mixture, sample_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from softtrellis.recipes.qat import DistillConfig

_log = logging.getLogger(__name__)

SAMPLED_WINDOWS = 1024
"""Windows that the teacher writes, alone, where ``windows`` does not say."""

TEACHER_SHARE = 0.5
"""Of the windows of a mixture, where ``teacher_share`` does not say."""

DEFAULT_CTX = 1024
"""Tokens of a window, of models that have as many positions."""

_GOLDEN = (math.sqrt(5) - 1) / 2  # whose multiples, less whole numbers, are never near each other


def window_length(ctx: int | None, model: PreTrainedModel) -> int:
    """``ctx``, or for None ``DEFAULT_CTX`` or all positions of a model that has fewer.

    Raises:
        ValueError: the model has fewer positions than ``ctx``.
    """
    settings = model.config.get_text_config()
    positions: int | None = getattr(settings, "max_position_embeddings", None)
    if positions is None:
        return ctx or DEFAULT_CTX
    if ctx is not None and ctx > positions:
        raise ValueError(f"ctx must be at most the model's {positions} positions, got {ctx}")
    return ctx or min(DEFAULT_CTX, positions)


def training_windows(
    config: DistillConfig, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor]:
    """Windows int64 [n, ctx] to train on, and [held_out, ctx] at most that are never trained on.

    Of a mixture, see ``DistillConfig.teacher_share``, first those of the text, then the teacher's.

    Raises:
        ValueError: less than one window of text, and what ``window_length`` and
            ``stream_documents`` raise.
    """
    ctx = window_length(config.ctx, teacher)
    if is_mixture(config.data):
        windows, held_out = _mixed(config, teacher, tokenizer, ctx)
    elif TEACHER in config.data:
        count = config.windows or SAMPLED_WINDOWS
        both = _sampled(config, teacher, tokenizer, count + config.held_out, ctx)
        windows, held_out = both[:count], both[count:]
    else:
        windows, held_out = _loaded(config, tokenizer, config.data, ctx, config.windows)
    if config.batch > len(windows):
        _log.warning(f"a step of {config.batch} windows takes some twice: there are {len(windows)}")
    return windows, held_out


def _mixed(
    config: DistillConfig, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ctx: int
) -> tuple[Tensor, Tensor]:
    share = TEACHER_SHARE if config.teacher_share is None else config.teacher_share
    limit, count = None, 0
    if config.windows is not None:
        count = min(max(round(config.windows * share), 1), config.windows - 1)
        limit = config.windows - count
    sources = [source for source in config.data if source != TEACHER]
    text, held_out = _loaded(config, tokenizer, sources, ctx, limit)
    if limit is None or len(text) < limit:
        count = max(round(len(text) * share / (1 - share)), 1)
        few = "" if limit is None else f", fewer than {limit}"
        written = f"the teacher writes {count}, a share of {count / (len(text) + count):.3g}"
        _log.warning(f"the text has {len(text)} windows{few}: {written}, slowly the first time")
    return torch.cat((text, _sampled(config, teacher, tokenizer, count, ctx))), held_out


def _sampled(
    config: DistillConfig,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    ctx: int,
) -> Tensor:
    return sample_windows(
        teacher,
        tokenizer,
        count,
        ctx,
        seed=config.seed,
        device=config.device,
        dtype=compute_dtype(config.dtype, config.device),
        cache=cache_directory() / "teacher_text",
        show_progress=config.show_progress,
    )


def _loaded(
    config: DistillConfig,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    ctx: int,
    limit: int | None,
) -> tuple[Tensor, Tensor]:
    if config.held_out:
        return train_and_held_out_windows(
            tokenizer, sources, ctx, limit=limit, held_out_windows=config.held_out
        )
    documents = stream_documents(sources, split="train", tokenizer=tokenizer)
    windows = token_windows(tokenizer, documents, ctx, limit=limit)
    return windows, windows[:0]


class WindowOrder:
    """Which windows the steps of a run take: every epoch a new permutation, from the seed."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        """Of so many windows, ``batch`` a step."""
        self._count, self._batch, self._seed = count, batch, seed
        self._permutation: tuple[int, list[int]] = (-1, [])

    def rows(self, step: int) -> list[int]:
        """Indices of the windows of a step, which may be those of two epochs or more."""
        return [row for _, row in self.places(step)]

    def places(self, step: int) -> list[tuple[int, int]]:
        """Epoch and index of every window of a step."""
        first = step * self._batch
        positions = (divmod(i, self._count) for i in range(first, first + self._batch))
        return [(epoch, self._epoch(epoch)[place]) for epoch, place in positions]

    def _epoch(self, epoch: int) -> list[int]:
        if epoch != self._permutation[0]:
            generator = epoch_generator(self._seed, epoch)
            self._permutation = epoch, torch.randperm(self._count, generator=generator).tolist()
        return self._permutation[1]


class TrainingWindows:
    """The windows of every step of a run.

    Text that is seen again is learned by heart. So where ``shift`` is set only the first epoch has
    the windows as they are given: those of epoch e begin e golden sections of a window later in
    the text, full windows left out, and the last one ends with its beginning. Windows that the
    teacher wrote follow each other, and the text that they are mixed with, like documents; it was
    for the teacher's alone that it was measured.
    """

    def __init__(self, windows: Tensor, batch: int, seed: int, *, shift: bool) -> None:
        """Of windows int64 [n, ctx], which follow each other in the text, ``batch`` a step."""
        self.first, self.shift = windows, shift
        self._order = WindowOrder(len(windows), batch, seed)

    def rows(self, step: int) -> list[int]:
        """Numbers of the windows of a step: with ``shift`` each is used once."""
        if not self.shift:
            return self._order.rows(step)
        return [epoch * len(self.first) + index for epoch, index in self._order.places(step)]

    def tokens(self, rows: Sequence[int]) -> Tensor:
        """int64 [rows, ctx], the windows of these numbers."""
        count, ctx = self.first.shape
        later = [int(ctx * (row // count * _GOLDEN % 1)) for row in rows]
        starts = [row % count * ctx + shift for row, shift in zip(rows, later, strict=True)]
        places = torch.tensor(starts)[:, None] + torch.arange(ctx)
        return self.first.flatten()[places.to(self.first.device) % (count * ctx)]
