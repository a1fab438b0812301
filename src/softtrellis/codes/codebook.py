"""From a code's name to its table of values, one row per state."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from softtrellis.codes.computed import mcg, mul1, one_mad, three_inst
from softtrellis.codes.hybrid import TABLE_ROWS, Flip, default_table, hybrid
from softtrellis.codes.scalar import scalar
from softtrellis.spec import TrellisSpec

CodeName = Literal["1mad", "3inst", "mul1", "mcg", "hyb", "gaussian", "scalar"]
CODE_NAMES: tuple[str, ...] = get_args(CodeName)
HYBRID_MIN_STATE_BITS = 10
WHOLE_CODES = ("gaussian", "scalar")
"""Codes whose codebook is stored as it is, state by state."""

_COMPUTED = {"1mad": one_mad, "3inst": three_inst, "mul1": mul1, "mcg": mcg}


def check_code(name: str, spec: TrellisSpec) -> None:
    """ValueError if the code is unknown or does not exist for this trellis."""
    if name not in CODE_NAMES:
        raise ValueError(f"unknown code {name!r}; use one of {', '.join(CODE_NAMES)}")
    if (name in _COMPUTED or name == "scalar") and spec.V != 1:
        raise ValueError(f"code {name!r} emits one weight per step (V=1); for V=2 use 'hyb'")
    if name == "hyb" and spec.V != 2:
        raise ValueError("code 'hyb' emits two weights per step (V=2); for V=1 use 'mul1'")
    if name == "hyb" and spec.L < HYBRID_MIN_STATE_BITS:
        raise ValueError(
            f"code 'hyb' needs L of at least {HYBRID_MIN_STATE_BITS}, got {spec.L}; "
            "use 'gaussian' for smaller trellises"
        )


def codebook(
    name: str,
    spec: TrellisSpec,
    *,
    seed: int = 0,
    table: Tensor | None = None,
    flip: Flip = "second",
    normalize: bool = True,
) -> Tensor:
    """The values that every state emits, about N(0, 1) over uniform states.

    Args:
        name: "1mad", "3inst" (QTIP, section 3.1.1), "mul1", "mcg" (EXL3), "hyb" (QTIP, algorithm
            3), "gaussian" (independent normal values, for tests and comparison) or "scalar"
            (Lloyd-Max levels, the baseline without a trellis).
        spec: the trellis.
        seed: of "gaussian", and of the k-means that makes the default table of "hyb".
        table: float [512, 2], the table of "hyb"; gradients flow into it.
        flip: the component that "hyb" flips, "first" or "second".
        normalize: divide by the root mean square over all states, except of "scalar", whose levels
            are those for N(0, 1). Without it the values are bit-exact to the codes' definitions.

    Returns:
        float32 [2**L, V].

    Raises:
        ValueError: an unknown name, or a code that does not exist for this trellis.
    """
    check_code(name, spec)
    if flip not in get_args(Flip):
        raise ValueError(f"flip must be 'first' or 'second', got {flip!r}")
    if table is not None and name != "hyb":
        raise ValueError(f"code {name!r} has no table; only 'hyb' takes one")
    if name == "gaussian":
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(spec.num_states, spec.V, generator=generator)
    elif name == "hyb":
        if table is None:
            table = default_table(seed, flip)
        elif tuple(table.shape) != (TABLE_ROWS, 2):
            raise ValueError(f"table must be [{TABLE_ROWS}, 2], got {list(table.shape)}")
        states = torch.arange(spec.num_states, device=table.device)
        values = hybrid(states, table.to(torch.float32), flip)
    elif name == "scalar":
        return scalar(torch.arange(spec.num_states), spec.k).unsqueeze(1)
    else:
        values = _COMPUTED[name](torch.arange(spec.num_states)).unsqueeze(1)
    if not normalize:
        return values
    return values / values.double().square().mean().sqrt().to(torch.float32)
