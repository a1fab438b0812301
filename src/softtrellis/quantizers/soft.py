"""Four ways to train through the trellis."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from softtrellis.backend import Backend
from softtrellis.spec import TrellisSpec
from softtrellis.trellis.bcjr import bcjr, pass_back
from softtrellis.trellis.viterbi import best_states

Estimator = Literal["soft", "straight_through", "mixed", "identity"]
_ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
MIX = 0.25
"""The share of the Boltzmann average's gradient in that of "mixed"."""


def check_estimator(estimator: str) -> None:
    """ValueError if the estimator is unknown."""
    if estimator not in _ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}; use one of {', '.join(_ESTIMATORS)}")


def identity(tiles: Tensor, codebook: Tensor, states: Tensor) -> Tensor:
    """The codewords of states, with the gradient of the identity for tiles, and their own.

    Args:
        tiles: float [B, N, V], latent weights.
        codebook: float [S, V].
        states: int [B, N], the hard code.

    Returns:
        [B, N, V], in the dtype of the tiles.
    """
    hard = codebook.index_select(0, states.flatten()).view_as(tiles).to(tiles.dtype)
    return hard + (tiles - tiles.detach())


def estimate(
    tiles: Tensor,
    codebook: Tensor,
    spec: TrellisSpec,
    *,
    estimator: Estimator,
    temperature: float | Tensor,
    pins: Tensor,
    mix: float = MIX,
    bcjr_stride: int = 1,
    turn: int = 0,
    backend: Backend = "auto",
) -> Tensor:
    """Codewords of latent tiles, differentiable by the chosen estimator.

    - "soft": the Boltzmann average, with its exact gradient (BCJR-QAT).
    - "straight_through": the hard codeword, with the gradient of the Boltzmann average.
    - "mixed": the hard codeword, with ``mix`` of the gradient of "straight_through" and the rest of
      that of "identity".
    - "identity": the hard codeword, with the gradient of the identity (plain STE), and for the
      codebook that of its own codewords.

    Args:
        tiles: float [B, N, V], latent weights.
        codebook: float [S, V].
        spec: the trellis.
        estimator: see above.
        temperature: T, in the tiles' squared units, a number or a tensor [] or [B]; unused by
            "identity".
        pins: int [B], the overlap at both ends.
        mix: 0 to 1, for "mixed".
        bcjr_stride: 1 or more: one tile in so many has the estimator, the others have "identity".
        turn: which of them, counted on from pass to pass so that all tiles have their turn.
        backend: as in ``bcjr``.

    Returns:
        [B, N, V].
    """
    check_estimator(estimator)
    if estimator == "soft" and bcjr_stride == 1:
        return bcjr(
            tiles, codebook, spec, temperature=temperature, ends=pins, backend=backend
        ).values
    states = best_states(tiles, codebook, spec, ends=pins, backend=backend)
    hard = identity(tiles, codebook, states)
    turn = turn % bcjr_stride
    if estimator == "identity" or turn >= len(tiles):
        return hard
    part = slice(turn, None, bcjr_stride)
    if isinstance(temperature, Tensor) and temperature.ndim:
        temperature = temperature[part]
    w, own, T, ends = tiles[part], hard[part], temperature, pins[part]
    if estimator == "soft":
        chosen = bcjr(w, codebook, spec, temperature=T, ends=ends, backend=backend).values
    else:
        chosen = pass_back(own, w, codebook, spec, temperature=T, ends=ends, backend=backend)
    found = hard.clone()
    found[part] += (chosen - own) * (mix if estimator == "mixed" else 1.0)
    return found
