"""The paper's claims, each as an experiment (docs/results.md).

    python benchmarks/claims.py single MODEL --calibration C4 --train documents:TRAIN --test TEXT \
        --json FILE --layers 4 12 20 --starts viterbi ldlq --seeds 0 1 2 \
        --settings identity@1e-2,3e-2,6e-2 soft-1.0@1e-2,3e-2,1e-1 soft-0.1@3e-2,1e-1

The first word is one of

- single: decoder layers, each alone quantized: PTQ, and training from it;
- pairs: the layers together and two by two, trained jointly; one by one they are runs of single;
- drift: a grid of learning rates and steps, on each of the layers, with the share of tiles that
  changed and the radii from which one predicts it;
- overshoot: divergence of the hard code along the trajectory.

Starts are PTQ by plain Viterbi (the paper's) and by LDLQ. Settings are an estimator, for BCJR the
temperature that it starts from, and learning rates of the latents: runs are all of layers, starts,
settings, rates and seeds, and are called CLAIM/LAYERS/START/ESTIMATOR-T@LR. Temperatures end at
0.03. Every run's hard code is scored on the held-out windows ("heldout"), by which
``claims_tables.py`` chooses the rate; the test text is only reported. Of several rates, seeds after
the first run the one that was best with it.

Runs of one claim have the same steps and text. ``--trainable latents,scales,norms``, the default,
trains scales and norms, too: where no code changes, what is gained is theirs. With "latents", say,
names begin with CLAIM-latents. Several processes with the same ``--claims FOLDER`` share the runs;
each needs a FILE of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

from experiment import add_arguments
from layer_experiment import LayerExperiment
from layer_runs import heldout

from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.replace import quantized_layers
from softtrellis.recipes.drift import predicted_radius
from softtrellis.recipes.plan import PlanConfig, plan_layers

TRAINABLE = "latents,scales,norms"
STARTS = {"ldlq": "", "viterbi": " --no-hessian"}
GRID = "1e-5,1e-4,1e-3,3e-3,1e-2,3e-2,4.5e-2,5.5e-2,1e-1"
"""Between 3e-2 and 1e-1 identity's drift passes the radii along random directions."""
SETTINGS = {
    "single": ["identity@1e-2", "soft-1.0@1e-1", "soft-0.3@1e-1", "soft-0.1@1e-1"],
    "pairs": ["identity@1e-2", "soft-0.1@1e-1"],
    "drift": [f"identity@{GRID}", f"soft-0.1@{GRID}"],
    "overshoot": ["soft-1.0@1e-1", "soft-0.3@1e-1", "soft-0.1@1e-1"],
}
"""By default; the rates were chosen on held-out text, see docs/results.md."""


def settings(texts: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Of "soft-0.3@3e-2,1e-1" and the like: a name for each rate, and options of train."""
    for text in texts:
        kind, _, rates = text.partition("@")
        estimator, _, t_init = kind.partition("-")
        cooling = f" --t-init {t_init} --t-min 0.03" if t_init else ""
        for lr in map(float, rates.split(",")):
            yield f"{kind}@{lr:g}", f"--estimator {estimator}{cooling} --start 0 --lr {lr:g}"


def runs(experiment: LayerExperiment, name: str, quantize: str, common: str, seed: int) -> None:
    """All settings, trained from one PTQ of some layers."""
    first = experiment.options.seeds[0]
    for text in experiment.options.settings:
        names = [f"{name}/{setting}" for setting, _ in settings([text])]
        chosen = names if seed == first else [experiment.best(names, first, heldout)]
        for run, (_, train) in zip(names, settings([text]), strict=True):
            if run in chosen:
                experiment.run(run, f"{train} {common}", quantize=quantize, seed=seed)


def trained(
    experiment: LayerExperiment, name: str, start: str, common: str, seed: int, sizes: Iterable[int]
) -> None:
    """All sets of so many layers: PTQ, and all settings trained from it."""
    common += f" --steps {experiment.options.steps} --measure-every 0 --evaluate-every 0"
    for size in sizes:
        for chosen in itertools.combinations(experiment.options.layers, size):
            numbers = ",".join(map(str, chosen))
            ptq, quantize = f"{name}/{numbers}/{start}", f"--layers {numbers}{STARTS[start]}"
            experiment.run(ptq, None, quantize=quantize, seed=seed)
            runs(experiment, ptq, quantize, common, seed)


def single(experiment: LayerExperiment, name: str, start: str, common: str, seed: int) -> None:
    """Does BCJR beat PTQ on one layer, and what does a high temperature do to it?"""
    trained(experiment, name, start, common, seed, [1])


def pairs(experiment: LayerExperiment, name: str, start: str, common: str, seed: int) -> None:
    """Do gains add up over layers?"""
    trained(experiment, name, start, common, seed, range(2, len(experiment.options.layers) + 1))


def drift(experiment: LayerExperiment, name: str, start: str, common: str, seed: int) -> None:
    """Do the predicted and the measured radii say which runs change codes?

    Pins stay where they are, as they do for the radii.
    """
    for layer in experiment.options.layers:
        ptq, quantize = f"{name}/{layer}/{start}", f"--layers {layer}{STARTS[start]}"
        experiment.run(ptq, None, quantize=quantize, seed=seed)
        if experiment.claim(f"{ptq}/radii", seed):
            with experiment.turn():
                radii(experiment, f"{ptq}/radii", quantize, seed)
        for steps in experiment.options.grid_steps:
            ends = f"--steps {steps} --measure-every {steps} --evaluate-every 0 --reencode-every 0"
            for setting, train in settings(experiment.options.settings):
                words = f"{train} {ends} {common}"
                experiment.run(f"{ptq}/{setting}/{steps}", words, quantize=quantize, seed=seed)


def radii(experiment: LayerExperiment, name: str, quantize: str, seed: int) -> None:
    """Adds a record of the radii of sampled tiles, in sigma, by linear layer and direction."""
    model = experiment.quantized(quantize, seed=seed).to(experiment.device)
    modules = quantized_layers(model)
    latents = {key: LatentLinear.from_quantized(module) for key, module in modules.items()}
    plan = plan_layers(latents, PlanConfig(tiles=experiment.options.radii_tiles, seed=seed))
    record = {
        "name": name,
        "seed": seed,
        "quantize": quantize,
        "paper": predicted_radius(next(iter(latents.values())).layer.code.spec.num_states),
        "tiles": {key: layer.layer.tiles for key, layer in latents.items()},
        "radii": {
            key: {ray: [round(radius, 5) for radius in found[ray].tolist()] for ray in found}
            for key, found in plan.layers.items()
        },
    }
    with experiment.options.json.open("a") as file:
        file.write(json.dumps(record) + "\n")


def overshoot(experiment: LayerExperiment, name: str, start: str, common: str, seed: int) -> None:
    """What does the hard code do while the temperature falls?"""
    common += f" --steps {experiment.options.steps} --measure-every 0"
    common += f" --evaluate-every {experiment.options.trajectory_every}"
    for layer in experiment.options.layers:
        ptq, quantize = f"{name}/{layer}/{start}", f"--layers {layer}{STARTS[start]}"
        runs(experiment, ptq, quantize, common, seed)


CLAIMS = {"single": single, "pairs": pairs, "drift": drift, "overshoot": overshoot}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("claim", choices=CLAIMS)
    add_arguments(parser)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12, 20])
    parser.add_argument("--starts", choices=STARTS, nargs="+", default=["ldlq"])
    parser.add_argument("--settings", nargs="+", metavar="ESTIMATOR-T@LR,LR")
    parser.add_argument("--trainable", default=TRAINABLE, help="what training changes")
    parser.add_argument("--steps", type=int, default=60, help="of all claims but drift")
    parser.add_argument("--grid-steps", type=int, nargs="+", default=[10, 40], help="of drift")
    parser.add_argument("--radii-tiles", type=int, default=1792, help="measured, of drift")
    parser.add_argument(
        "--trajectory-windows",
        type=int,
        default=32,
        help="windows of the test text, evenly spaced, that overshoot scores along the way",
    )
    parser.add_argument("--trajectory-every", type=int, default=5, help="steps, of overshoot")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    options.settings = options.settings or SETTINGS[options.claim]
    list(settings(options.settings))  # says what is wrong with them before anything runs
    watched = options.trajectory_windows if options.claim == "overshoot" else 0
    experiment = LayerExperiment(options, watched)
    common = f"--batch {options.batch} --train {options.trainable} --scale-lr 5e-3"
    name = str(options.claim)
    if options.trainable != TRAINABLE:
        name += f"-{options.trainable.replace(',', '+')}"
    for seed, start in itertools.product(options.seeds, options.starts):
        CLAIMS[options.claim](experiment, name, start, common, seed)


if __name__ == "__main__":
    main()
