"""A plan in words, as a table, and for a JSON file."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torch import Tensor

from softtrellis.recipes.drift import LOUD, WALK
from softtrellis.recipes.escape import escape_share, median

if TYPE_CHECKING:
    from softtrellis.recipes.plan import Plan

QUANTILES = (0.05, 0.5, 0.95)
HARDLY_ANY = 0.01
"""Share of tiles below which a run is warned of."""

FROM_CODEWORDS = (
    "Predicted for train --start 0, from the codewords; another start, as train has by default, "
    "changes codes itself."
)
"""Above the verdict: what was measured of other starts is in docs/drift.md."""


def warning_for(plan: Plan) -> str | None:
    """A sentence if the run cannot change codes, or hardly any; None if it can.

    From a start that is not at the codewords it is about the codes that this start has.
    """
    budget, radii = plan.prediction.budget, plan.radii
    count, bound = radii["sign"].numel(), float(radii["per_weight"].min())
    half = median(radii["soft"]) / budget.consistent
    advice = (
        ""
        if math.isinf(half)
        else (
            f"; gradients that agree reach half of them with {half:.2g} times the lr, "
            f"{plan.config.lr * half:.2g}, or as many times the steps"
        )
    )
    already = f" beyond those that change at its start, in {plan.moved:.0%} of the tiles"
    beyond = already if plan.moved else ""
    if budget.most < bound:
        return (
            f"this run cannot change a code{beyond}: AdamW moves no weight by more than "
            f"{budget.most:.3g} sigma, and none of {count} sampled tiles changes before a weight "
            f"has moved by {bound:.3g} sigma{advice}"
        )
    share = escape_share(radii["soft"], budget.consistent)
    if share < HARDLY_ANY:
        return (
            f"this run will hardly change a code{beyond}: gradients that agree at every step move "
            f"weights by {budget.consistent:.3g} sigma, which along a random gradient of the "
            f"soft code takes {share:.1%} of {count} sampled tiles out of their cells{advice}"
        )
    return None


def noise_warning(plan: Plan) -> str | None:
    """A sentence if gradients of random sign alone carry latents further than most good runs did.

    That is how latents move under ``--estimator identity`` where a step has too few tokens for
    gradients to agree, and codes that noise changes are worse ones (docs/results.md).
    """
    budget, radii = plan.prediction.budget, plan.radii["random"]
    if budget.random <= LOUD:
        return None
    share = escape_share(radii, budget.random)
    safe = plan.config.lr * WALK / budget.random
    return (
        f"gradients of random sign alone move weights by {budget.random:.3g} sigma, and that takes "
        f"{share:.0%} of {radii.numel()} sampled tiles out of their cells: most runs with more "
        f"than {LOUD} got worse; with lr {safe:.2g} it is {WALK}"
    )


def verdict_in_words(plan: Plan) -> str:
    """What the run is predicted to do, in a sentence or two."""
    warning = warning_for(plan)
    if warning is not None:
        return f"{warning[0].upper()}{warning[1:]}."
    budget, radii = plan.prediction.budget, plan.radii
    agreeing = escape_share(radii["soft"], budget.consistent)
    random = escape_share(radii["random"], budget.random)
    if random < HARDLY_ANY:
        found = (
            f"Codes change only where gradients agree over the run: in {agreeing:.0%} of the tiles "
            f"if all of them do, in {random:.1%} with gradients of random sign."
        )
    else:
        found = (
            f"Codes will change: in {random:.0%} of the tiles with gradients of random sign, in "
            f"{agreeing:.0%} with gradients that agree at every step."
        )
    noise = noise_warning(plan)
    return f"{found} With --estimator identity, {noise}." if noise else found


_ROWS = {
    "nearest": "nearest boundary",
    "per_weight": "nearest boundary, per weight",
    "random": "random direction",
    "sign": "random signs",
    "soft": "random gradient of soft code",
    "teacher": "towards the teacher",
}
_RAYS = ("random", "sign", "soft", "teacher")


def describe(plan: Plan) -> str:
    """The plan as a small table with its verdict."""
    config, budget, radii = plan.config, plan.prediction.budget, plan.radii
    count = radii["sign"].numel()
    lines = [
        f"lr {config.lr:g}, {config.steps} steps, warm-up {config.warmup}, {config.schedule}: "
        f"weights travel {budget.random:.3g} sigma (RMS) if gradients",
        f"have random signs, {budget.consistent:.3g} if they agree at every step, and never more "
        f"than {budget.most:.3g}",
        "",
        f"{'radius in sigma':30}"
        + "".join(f"{level:>9.0%}" for level in QUANTILES)
        + f"{'random':>12}{'agreeing':>10}",
        f"{'predicted, 1 / sqrt(2 pi S)':30}{plan.prediction.radius:>18.5f}",
    ]
    for kind, name in _ROWS.items():
        if kind in radii:
            numbers = "".join(f"{value:>9.4f}" for value in quantiles(radii[kind]))
            shares = [budget.random, budget.consistent] if kind in _RAYS else []
            after = "".join(
                f"{escape_share(radii[kind], drift):>{width}.0%}"
                for drift, width in zip(shares, (12, 10), strict=False)
            )
            lines.append(f"{name:30}{numbers}{after}")
    lines += [
        f"quantiles over {count} tiles of {len(plan.layers)} layers; the last columns are the "
        "tiles that such a",
        "run carries out of their cells, along that direction; none is the loss's own gradient",
        "",
        FROM_CODEWORDS,
        verdict_in_words(plan),
    ]
    return "\n".join(lines)


def quantiles(radii: Tensor) -> list[float]:
    """The radii at ``QUANTILES``, each one of the tiles'."""
    ordered = radii.sort().values
    return [float(ordered[round(level * (radii.numel() - 1))]) for level in QUANTILES]


def plan_record(plan: Plan) -> dict[str, Any]:
    """The plan for a JSON file; radii that are infinite are null."""
    return {
        "settings": asdict(plan.config),
        "prediction": asdict(plan.prediction),
        "verdict": verdict_in_words(plan),
        "layers": {
            name: {
                kind: [r if r < math.inf else None for r in t.tolist()] for kind, t in radii.items()
            }
            for name, radii in plan.layers.items()
        },
    }
