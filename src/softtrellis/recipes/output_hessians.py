"""Second moments of the gradients at the outputs of linear layers: what each output is worth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from softtrellis.io.progress import progress
from softtrellis.modules.replace import get_linear, on_device

_CHUNK = 2048


def output_hessians(
    model: nn.Module,
    names: Sequence[str],
    windows: Tensor,
    *,
    device: torch.device,
    batch: int = 1,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """G = E[d d^T] of every named layer, d the gradient of a token's loss at its outputs.

    The losses are those of tokens drawn from the model's own predictions, so that G is the factor
    of the outputs in the Kronecker-factored Hessian of the KL divergence from the model (Martens
    and Grosse, 2015; YAQA, arXiv 2505.22988, section 3, with one step of its power iteration).

    Args:
        model: a causal language model, which moves to ``device`` for the time being, whole.
        names: of its linear layers.
        windows: int64 [n, ctx].
        device: where it runs; on a GPU in bfloat16, with float32 sums.
        batch: windows at once.
        seed: of the tokens that are drawn.
        show_progress: show a progress bar.

    Returns:
        float32 [out, out] on the CPU by name; without layers that no token reached.
    """
    totals: dict[str, Tensor] = {}

    def add(name: str, gradient: Tensor) -> None:
        d = gradient.detach().flatten(0, -2).float()
        found = d.T @ d
        totals[name] = found if name not in totals else totals[name].add_(found)

    def watch(name: str, _: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(add, name))

    entered: list[Tensor] = []

    def enter(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        entered.append(output.detach().requires_grad_())
        return entered[-1]

    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    handles = [embedding.register_forward_hook(enter)]
    handles += [get_linear(model, n).register_forward_hook(partial(watch, n)) for n in names]
    generator = torch.Generator(device).manual_seed(seed)
    try:
        with on_device(model, device), torch.enable_grad():
            for ids in progress(windows.split(batch), "outputs", enabled=show_progress):
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    logits = model(input_ids=ids.to(device), use_cache=False).logits
                torch.autograd.grad(_drawn_loss(logits.flatten(0, -2), generator), entered.pop())
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / windows.numel()).cpu() for name, total in totals.items()}


def _drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sum over positions of -log p(y), y drawn from p."""
    total = logits.new_zeros((), dtype=torch.float32)
    for part in logits.split(_CHUNK):
        p = part.detach().float().softmax(-1)
        drawn = torch.multinomial(p, 1, generator=generator).squeeze(1)
        total = total + functional.cross_entropy(part.float(), drawn, reduction="sum")
    return total
