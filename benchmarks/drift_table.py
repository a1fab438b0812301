"""The table of docs/drift.md, section 7, on a CPU: changed tiles beside what radii predict.

python benchmarks/drift_table.py stories260k tinystories.txt
"""

from __future__ import annotations

import argparse
import copy

from softtrellis.io.sources import load_source
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.modules.replace import quantized_layers
from softtrellis.quantizers.soft import Estimator
from softtrellis.recipes.drift import drift_budget, learning_rates
from softtrellis.recipes.escape import escape_share
from softtrellis.recipes.plan import PlanConfig, plan_layers
from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
from softtrellis.recipes.qat import DistillConfig, distill
from softtrellis.recipes.random_code import expected_escape

CTX, STEPS, ALL_TILES = 128, 40, 100_000
RUNS: dict[int, list[tuple[Estimator, float, tuple[int, ...]]]] = {
    8: [("identity", 1e-2, (12, 21, 39)), ("soft", 3e-2, (6,))],
    10: [
        ("identity", 1e-2, (21, 39)),
        ("identity", 3e-3, (39,)),
        ("soft", 1e-2, (21, 30)),
        ("soft", 3e-2, (6, 39)),
    ],
}
"""By L: estimator, learning rate, and the steps, from 0, that are shown."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("text")
    options = parser.parse_args()
    source, data = load_source(options.model), (options.text,)
    print("| L, estimator, lr | step | drift | largest | changed | random | signs | expected |")
    for L, runs in RUNS.items():
        quantize = QuantizeConfig(
            code="gaussian", L=L, inputs="quantized", data=data, ctx=CTX, windows=64
        )
        start = quantize_model(copy.deepcopy(source.model), quantize, tokenizer=source.tokenizer)
        layers = quantized_layers(start)
        latents = {name: LatentLinear.from_quantized(layer) for name, layer in layers.items()}
        radii = plan_layers(latents, PlanConfig(tiles=ALL_TILES)).radii
        spec = next(iter(layers.values())).layer.code.spec
        print(f"radii of {len(radii['random'])} tiles")
        for estimator, lr, shown in runs:
            config = DistillConfig(
                estimator=estimator,
                start=0.0,
                t_init=0.1,
                train=("latents",),
                lr=lr,
                steps=STEPS,
                batch=4,
                ctx=CTX,
                data=data,
                held_out=0,
                reencode_every=0,
                measure_every=3,
            )
            result = distill(
                copy.deepcopy(start),
                config,
                teacher=copy.deepcopy(source.model),
                tokenizer=source.tokenizer,
            )
            budget = drift_budget(learning_rates(lr, STEPS))
            print(f"budget {budget.random:.3f} random, {budget.consistent:.3f} agreeing")
            for step in shown:
                record = result.history[step]
                found = [record[key] for key in ("drift", "drift_max", "changed_tiles")]
                drift = found[0]
                found += [escape_share(radii[ray], drift) for ray in ("random", "sign")]
                found.append(expected_escape(spec, drift))
                numbers = " | ".join(f"{value:.3f}" for value in found)
                print(f"| {L}, {estimator}, {lr:g} | {step} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
