"""The paper's claims, each as an experiment (docs/results.md).

    python benchmarks/claims.py CLAIM MODEL --calibration C4 --train documents:TRAIN --test TEXT \
        --json FILE [--layers 4 12 20] [--steps 60] [--seeds 0] [--claims FOLDER]

CLAIM is one of

- single: decoder layers, each alone quantized: PTQ by plain Viterbi and by LDLQ, and training from
  both: identity STE, and BCJR with temperatures from 1.0, 0.3 and 0.1 down to 0.03;
- pairs: the layers together and two by two, by LDLQ, trained one by one and jointly;
- drift: a grid of learning rates and steps, on the first of the layers, with the share of tiles
  that the measured radii predict to change, and held-out divergences to choose rates by;
- overshoot: divergence of the hard code along the trajectory, from a high and a low temperature.

Rows of one claim have the same steps, text, seeds and learning rates. Scales and norms are trained
in all of them: where no code changes, what is gained is theirs.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence

from experiment import Experiment, add_arguments

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes.drift import drift_budget, learning_rates, predicted_radius
from softtrellis.recipes.escape import escape_share
from softtrellis.recipes.plan import PlanConfig, plan_layers

LR = {"identity": 1e-2, "soft": 1e-1}
"""Chosen on held-out text, see docs/results.md."""
STARTS = ("1.0", "0.3", "0.1")
GRID_LR = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
GRID_STEPS = (10, 40)
MEASURED_TILES = 512


def soft(t_init: str, *, lr: float = LR["soft"]) -> str:
    """Options of BCJR from a temperature."""
    return f"--estimator soft --t-init {t_init} --t-min 0.03 --start 0 --lr {lr}"


def identity(*, lr: float = LR["identity"]) -> str:
    """Options of plain STE."""
    return f"--estimator identity --start 0 --lr {lr}"


def single(experiment: Experiment, layers: Sequence[int], common: str, seed: int) -> None:
    """Does BCJR beat PTQ on one layer, and what does a high temperature do to it?"""
    for layer in layers:
        for start, options in (("ldlq", ""), ("viterbi", "--no-hessian")):
            quantize = f"--layers {layer} {options}"

            def run(name: str, train: str | None, q: str = quantize) -> None:
                experiment.run(name, train, quantize=q, seed=seed)

            run(f"single/{layer}/{start}", None)
            run(f"single/{layer}/{start}/identity", f"{identity()} {common}")
            for t_init in STARTS:
                run(f"single/{layer}/{start}/soft-{t_init}", f"{soft(t_init)} {common}")


def pairs(experiment: Experiment, layers: Sequence[int], common: str, seed: int) -> None:
    """Do gains add up over layers?"""
    for count in range(1, len(layers) + 1):
        for chosen in itertools.combinations(layers, count):
            numbers = ",".join(map(str, chosen))
            quantize, name = f"--layers {numbers}", f"pairs/{numbers}"
            experiment.run(name, None, quantize=quantize, seed=seed)
            for kind, options in (("soft", soft("0.1")), ("identity", identity())):
                train = f"{options} {common}"
                experiment.run(f"{name}/{kind}", train, quantize=quantize, seed=seed)


def drift(experiment: Experiment, layers: Sequence[int], common: str, seed: int) -> None:
    """Do the predicted and the measured radii say which runs change codes?"""
    quantize = f"--layers {layers[0]}"
    model = experiment.quantized(quantize, seed=seed).to(experiment.device)
    modules = quantized_layers(model)
    latents = {name: LatentLinear.from_quantized(module) for name, module in modules.items()}
    radii = plan_layers(latents, PlanConfig(tiles=MEASURED_TILES)).radii
    for lr, steps in itertools.product(GRID_LR, GRID_STEPS):
        budget = drift_budget(learning_rates(lr, steps))
        for estimator in ("soft", "identity"):
            options = soft("0.1", lr=lr) if estimator == "soft" else identity(lr=lr)
            name = f"drift/{estimator}/{lr:g}/{steps}"
            options += f" --steps {steps} --measure-every {steps} --evaluate-every {steps} {common}"
            record = experiment.run(name, options, quantize=quantize, seed=seed)
            if record is None:
                continue
            last = record["log"][-1]
            states = next(iter(latents.values())).layer.code.spec.num_states
            prediction = {
                "name": f"{name}/prediction",
                "seed": seed,
                "radius": predicted_radius(states),
                "random": budget.random,
                "consistent": budget.consistent,
                "changed_tiles": last["changed_tiles"],
                "drift": last["drift"],
                "shares": {
                    f"{ray}/{kind}": escape_share(radii[ray], distance)
                    for ray in ("random", "sign", "soft")
                    for kind, distance in (
                        ("random", budget.random),
                        ("consistent", budget.consistent),
                        ("drift", last["drift"]),
                    )
                },
            }
            print(json.dumps(prediction), flush=True)
            with experiment.options.json.open("a") as file:
                file.write(json.dumps(prediction) + "\n")


def overshoot(experiment: Experiment, layers: Sequence[int], common: str, seed: int) -> None:
    """What does the hard code do while the temperature falls?"""
    for layer in layers:
        for t_init in STARTS:
            options = f"{soft(t_init)} --evaluate-every 5 {common}"
            quantize = f"--layers {layer}"
            experiment.run(f"overshoot/{layer}/{t_init}", options, quantize=quantize, seed=seed)


CLAIMS = {"single": single, "pairs": pairs, "drift": drift, "overshoot": overshoot}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("claim", choices=CLAIMS)
    add_arguments(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 20])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    experiment = Experiment(options)
    common = f"--batch {options.batch} --train latents,scales,norms --scale-lr 5e-3"
    if options.claim != "drift":
        common += f" --steps {options.steps} --measure-every 0"
    if options.claim in ("single", "pairs"):
        common += " --evaluate-every 0"  # the last step's code, for all rows alike
    for seed in options.seeds:
        CLAIMS[options.claim](experiment, options.layers, common, seed)


if __name__ == "__main__":
    main()
