"""Passes as CUDA graphs; on a CPU what would be repeated runs again, on the memory of a capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipes.support import EVERYTHING, Setting, losses, same
from torch import Tensor
from transformers import masking_utils
from transformers.utils import import_utils

from softtrellis.recipes import objective, replay
from softtrellis.recipes.qat import DistillConfig
from softtrellis.recipes.replay import WARM_UP, Replayed


def run_again(function: Callable[[], Tensor], _: torch.device) -> tuple[Callable[[], None], Tensor]:
    """In the place of ``cuda_graph``: the result stays where the first one was."""
    result = function().clone()

    def again() -> None:
        result.copy_(function())

    return again, result


@pytest.fixture
def without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replayed, "_warm_up", lambda self, *inputs: self._function(*inputs))


@pytest.mark.usefixtures("without_streams")
def test_inputs_are_copied_and_results_are_the_callers() -> None:
    function = Replayed(lambda x, y: x * 2 + y, capture=run_again)
    found = [function(torch.full((2,), float(i)), torch.ones(2)) for i in range(WARM_UP + 3)]
    assert [float(x[0]) for x in found] == [2.0 * i + 1 for i in range(WARM_UP + 3)]
    assert float(function(torch.ones(3), torch.ones(3))[2]) == 3.0  # another shape


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch, without_streams: None) -> list[int]:
    """Graphs on a CPU; counts them.

    A capture runs the function, so it takes gradients back. Transformers believes that it is one,
    and writes causal masks out as 5.17 does. What is repeated has to find weights and gradients
    where they were.
    """
    monkeypatch.setattr(replay, "WARM_UP", 1)
    count, leaves = [0], list[Tensor]()
    original = replay.FixedPlaces.reset
    ignored = masking_utils._ignore_causal_mask_sdpa

    def ignore(padding_mask: Any, *args: Any, **kwargs: Any) -> bool:
        tracing = vars(masking_utils)["is_tracing"](padding_mask)
        return not tracing and ignored(padding_mask, *args, **kwargs)

    def reset(self: Any) -> None:
        original(self)
        leaves[:] = self._leaves

    def places() -> list[int]:
        gradients = [leaf.grad for leaf in leaves]
        return [t.data_ptr() for t in (*leaves, *gradients) if t is not None]

    def capture(
        function: Callable[[], Tensor], device: torch.device
    ) -> tuple[Callable[[], None], Tensor]:
        count[0] += 1
        before = [None if leaf.grad is None else leaf.grad.clone() for leaf in leaves]
        with monkeypatch.context() as patch:
            patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)
            patch.setattr(masking_utils, "_ignore_causal_mask_sdpa", ignore)
            again, result = run_again(function, device)
        for leaf, old in zip(leaves, before, strict=True):
            if leaf.grad is not None and old is not None:
                leaf.grad.copy_(old)
        where = places()

        def repeat() -> None:
            assert places() == where
            again()

        return repeat, result

    monkeypatch.setattr(replay.FixedPlaces, "reset", reset)
    monkeypatch.setattr(objective, "Replayed", lambda f: Replayed(f, capture=capture))
    monkeypatch.setattr(DistillConfig, "__post_init__", lambda _: None)
    return count


@pytest.mark.parametrize(
    ("estimator", "code", "parts"),
    [
        ("soft", ("gaussian", 6), ("latents", "scales", "norms")),
        ("identity", ("hyb", 10), EVERYTHING),
    ],
)
def test_graphs_change_nothing(
    setting: Setting,
    captures: list[int],
    estimator: str,
    code: tuple[str, int],
    parts: tuple[str, ...],
) -> None:
    student = setting.student(*code)
    change: dict[str, Any] = {"estimator": estimator, "train": parts, "micro_batch": 3}
    change |= {"steps": 6, "evaluate_every": 2, "held_out": 4}
    plain = setting.train(student, **change)
    assert captures == [0]
    masks = set[bool]()
    attention = setting.teacher.model.layers[0].self_attn

    def look(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.add(kwargs["attention_mask"] is None)

    hook = attention.register_forward_pre_hook(look, with_kwargs=True)
    found = setting.train(student, cuda_graphs=True, **change)
    hook.remove()
    assert masks == {True}, "captured with another mask than warmed up with"
    assert captures == [4]  # passes of 3 windows and of 1, and the teacher on as many
    assert losses(found) == losses(plain)
    assert found.kept == plain.kept
    assert same(found.model, plain.model)


def test_graphs_without_a_gpu() -> None:
    for change in ({"device": "cpu"}, {"checkpoint_layers": True}):
        with pytest.raises(ValueError, match="cuda_graphs must be left out"):
            DistillConfig(cuda_graphs=True, **change)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("estimator", "dtype"), [("soft", "float32"), ("identity", "bfloat16")])
def test_graphs_on_a_gpu(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, estimator: str, dtype: str, compiled: bool
) -> None:
    monkeypatch.setattr(objective, "_CACHE_BYTES", 0)  # so that the teacher's passes are repeated
    student = setting.student("hyb", 10)
    change: dict[str, Any] = {"estimator": estimator, "train": ("latents", "scales", "norms")}
    change |= {"steps": 12, "micro_batch": 3, "evaluate_every": 4, "held_out": 4}
    change |= {"device": "cuda", "dtype": dtype, "compile": compiled}
    plain = setting.train(student, **change)
    found = setting.train(student, cuda_graphs=True, **change)
    rel = 1e-4 if dtype == "float32" else 1e-2
    assert losses(found) == pytest.approx(losses(plain), rel=rel)
