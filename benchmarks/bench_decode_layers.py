"""How packed layers are best launched at batch 1, on one GPU.

    python benchmarks/bench_decode_layers.py

Times layers as ``bench_decode.py`` does, alone or of the same inputs as models have them, in
several ways; each is checked first, and a wrong one is named and not timed. At the end it prints
what each choice changes in ways that are else alike. (bench_decode_timeline.py shows when kernels
do what.)
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from bench_decode import (
    HYB,
    MUL1,
    layer_time,
    many_codes,
    random_layer,
    relative,
)  # fmt: skip

from softtrellis.modules import decode_cuda, rotated_product
from softtrellis.modules.decode_cuda import ROTATING, VARIANTS, Variant
from softtrellis.modules.joint_linear import JointLinear
from softtrellis.modules.quantized_linear import QuantizedLinear
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.transforms import rotation_cuda
from softtrellis.transforms.rotation_cuda import Transform, by_strips, transforms
from softtrellis.trellis import launch_cuda
from softtrellis.trellis.launch_cuda import CARVEOUT, Kernel

SHAPES = (
    ((4096,), 11008), ((2048,), 8192), ((28672,), 4096), ((11008,), 4096), ((4096,), 14336),
    ((4096,), 4096), ((576,), 1536), ((4096, 1024, 1024), 4096), ((14336, 14336), 4096),
)  # fmt: skip
"""Outputs of layers of the same inputs, and those."""

KERNELS = Path(launch_cuda.__file__).parent / "cuda"
REGISTERS = {8: 128, 12: 104}
"""Of a thread, by warps of a product's block."""

Edit = tuple[str, str]

BEGINS = (
    "    const int lane = threadIdx.x % LANES, g = lane / 4, q = lane % 4;\n    const int warp = "
)
LET_NEXT = "    let_the_next_kernel_begin();\n"
EARLY: list[Edit] = [
    (LET_NEXT, LET_NEXT.replace("    ", "    if (!INPUT) ", 1)),
    (BEGINS, LET_NEXT.replace("    ", "    if (INPUT) ", 1) + BEGINS),
]


@dataclass(frozen=True)
class Sources:
    """Of the kernels, in place of those in the package."""

    decode: str = "decode.cu"
    rotation: str = "rotation.cu"
    columns: str = "rotation_columns.cu"
    blocks: str = "rotation_blocks.cu"


@dataclass(frozen=True)
class Way:
    """Of launching a layer.

    Attributes:
        rotating: whether the product rotates its row itself.
        columns: whether products begin the outputs' rotation, which ends column by column.
        warps: of a product's block.
        early: whether the product may begin with the rotation before it, not after its wait.
        runs: of 16 rows of A that a cluster computes.
        carveout: see ``launch_cuda``; -1 is the driver's choice.
    """

    rotating: bool
    columns: bool
    warps: int
    early: bool = False
    runs: int = 8
    carveout: int = CARVEOUT

    @property
    def name(self) -> str:
        return ", ".join(f"{field.name} {getattr(self, field.name)}" for field in fields(self))

    def moved(self, usual: Variant, sources: Sources) -> Variant:
        name, threads = usual.kernel.name, usual.kernel.threads
        if usual.rows == 1 and usual.warps != self.warps:
            name, threads = f"{name}_{self.warps}", 32 * self.warps
        return replace(usual, kernel=Kernel(sources.decode, name, threads))

    @contextmanager
    def used(self, sources: Sources) -> Iterator[None]:
        usual = Transform.launch
        variants = {key: [self.moved(v, sources) for v in vs] for key, vs in VARIANTS.items()}
        rotating = {key: self.moved(v, sources) for key, v in ROTATING.items()}
        with ExitStack() as stack:
            stack.callback(forget)
            for change in (
                patch.dict(decode_cuda.VARIANTS, variants),
                patch.dict(decode_cuda.ROTATING, rotating),
                patch.object(decode_cuda, "rotates_fast", lambda *_: self.rotating),
                patch.object(rotation_cuda, "SOURCE", sources.rotation),
                patch.object(rotation_cuda, "COLUMNS_SOURCE", sources.columns),
                patch.object(rotation_cuda, "BLOCKS_SOURCE", sources.blocks),
                patch.object(
                    Transform, "launch", lambda t: replace(usual(t), part_tiles=self.runs)
                ),
                patch.object(launch_cuda, "CARVEOUT", self.carveout),
            ):
                stack.enter_context(change)
            if not self.columns:
                stack.enter_context(patch.object(rotation_cuda, "by_strips", lambda *_: False))
            forget()
            yield


def forget() -> None:
    """Launches that are kept prepared know their kernels, and functions their carve-out."""
    for kept in (
        launch_cuda._function,
        decode_cuda._variant,
        decode_cuda._prepared,
        rotation_cuda._prepared,
        rotated_product._way,
    ):
        kept.cache_clear()


def layers_of(joint: JointLinear) -> list[QuantizedLinear]:
    return list(joint.layers)  # type: ignore[arg-type]


def padded(joint: JointLinear) -> tuple[list[int], int]:
    """Padded outputs of each layer, and inputs."""
    sizes = [layer.layer.padded for layer in layers_of(joint)]
    return [out for out, _ in sizes], sizes[0][1]


def usual_way(joint: JointLinear, rotating: bool | None = None) -> Way:
    """That of the package, or what it would do if the product rotated its row itself, or not."""
    first, (outs, _) = layers_of(joint)[0], padded(joint)
    key = decode_cuda.kind_of(first.layer.code)
    if rotating is None:
        rotating = rotates(joint) and decode_cuda.rotates_fast(first.in_features, sum(outs))
    variant = ROTATING[key] if rotating else VARIANTS[key][0]
    return Way(rotating, all(by_strips(out, first.layer.block) for out in outs), variant.warps)


def rotates(joint: JointLinear) -> bool:
    """Whether a product can rotate its row itself."""
    first = layers_of(joint)[0]
    x = torch.zeros(1, first.in_features, dtype=torch.bfloat16, device="cuda")
    layer = first.layer
    return decode_cuda.rotates(layer.code, x, first.in_scale, layer.multiple, layer.block)


def ways(joint: JointLinear) -> list[Way]:
    """Those that differ for this layer."""
    main = [usual_way(joint, rotating) for rotating in {rotates(joint), False}]
    found = [
        replace(way, columns=columns, warps=warps)
        for way in main
        for columns, warps in product({way.columns, False}, REGISTERS)
    ]
    apart = usual_way(joint, False)
    found += [replace(way, carveout=-1) for way in main]
    found += [replace(apart, early=True), replace(apart, early=True, carveout=-1)]
    transform = transforms(padded(joint)[1], layers_of(joint)[0].layer.block)[0]
    if not transform.blocks and transform.tiles > apart.runs:
        few = replace(apart, runs=4)
        found += [few, replace(few, early=True)]
    return found


def edited(folder: Path, source: str, name: str, edits: list[Edit], more: str = "") -> str:
    """The path of a kernels' source in which each of these texts, found once, is replaced.

    Raises:
        ValueError: a text that is not there once.
    """
    text = (KERNELS / source).read_text()
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(f"{source} has {text.count(old)} of {old!r}")
        text = text.replace(old, new)
    path = folder / f"{name}.cu"
    path.write_text(text + more)
    return str(path)


def written(folder: Path) -> dict[bool, Sources]:
    """Sources with products of all numbers of warps, by whether the next kernel begins early."""
    more = "".join(
        f"KERNEL({code}_{name}_{warps}, {code.upper()}, 16, 1, {warps}, {inputs}, {registers})\n"
        for code, (name, inputs), (warps, registers) in product(
            ("hyb", "mul1"), (("rotating", "ROTATED"), ("one_row", "SHARED")), REGISTERS.items()
        )
    )
    late = Sources(decode=edited(folder, "decode.cu", "more", [], more))
    return {
        False: late,
        True: replace(late, rotation=edited(folder, "rotation.cu", "early", EARLY)),
    }


def label_of(outs: tuple[int, ...], inputs: int, code: TrellisCode) -> str:
    return f"{'+'.join(map(str, outs))}x{inputs} {code.name}"


def random_joint(
    outs: tuple[int, ...], inputs: int, code: TrellisCode, backend: str
) -> JointLinear:
    layers = [random_layer(out, inputs, code, backend) for out in outs]
    for layer in layers:
        layer.in_signs = layers[0].in_signs
    return JointLinear(layers)


def is_right(joint: JointLinear, x: Tensor, exact: Tensor) -> bool:
    ours = [torch.cat(joint(x), -1) for _ in range(5)]
    return relative(ours[0], exact) < 5e-3 and all(torch.equal(y, ours[0]) for y in ours)


Found = dict[str, dict[Way, float]]
"""Times by layer and way."""


@torch.no_grad()
def rank() -> None:
    found: Found = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = written(Path(folder))
        for (outs, inputs), code in product(SHAPES, (HYB, MUL1)):
            label = label_of(outs, inputs, code)
            joint = random_joint(outs, inputs, code, "torch")
            found[label] = rank_layer(joint, label, sources)
    for code in (HYB, MUL1):
        show_effects({k: times for k, times in found.items() if k.endswith(code.name)}, code.name)


def rank_layer(joint: JointLinear, label: str, sources: dict[bool, Sources]) -> dict[Way, float]:
    x = torch.randn(1, layers_of(joint)[0].in_features, device="cuda").bfloat16()
    exact = torch.cat(joint(x.float()), -1)
    for layer in layers_of(joint):
        layer.backend = "cuda"
    (outs, inputs), one = padded(joint), joint.codes
    codes = many_codes(sum(outs), inputs, 2)
    usual, found = usual_way(joint), {}
    for way in ways(joint):
        with way.used(sources[way.early]):
            joint.codes = one
            if is_right(joint, x, exact):
                found[way] = layer_time(joint, codes, x)
            else:
                print(f"WRONG: {label} {way.name}", flush=True)
    for way, time in sorted(found.items(), key=lambda item: item[1]):
        mark = "   as it is" if way == usual else ""
        print(f"{label} layer {time:7.2f} {way.name}{mark}", flush=True)
    return found


def show_effects(found: Found, code: str) -> None:
    """Of each choice: how much longer other values take, layer by layer."""
    for field in fields(Way):
        effects: dict[tuple[object, object], list[str]] = defaultdict(list)
        for label, times in found.items():
            for way, other in product(times, times):
                a, b = (getattr(w, field.name) for w in (way, other))
                alike = replace(way, **{field.name: b}) == other
                if alike and str(a) < str(b):
                    effects[a, b].append(f"{label.split()[0]} {times[other] - times[way]:+.2f}")
        for (a, b), cells in effects.items():
            print(f"{code} {field.name} {b} instead of {a}: {', '.join(cells)}", flush=True)


def main() -> None:
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), torch.__version__)
    rank()


if __name__ == "__main__":
    main()
