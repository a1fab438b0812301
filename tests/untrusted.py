"""What the tests of hostile files share: ways to damage them, and bounds on what reading takes."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from softtrellis.io.checkpoint import WEIGHTS

MOST_SECONDS = 30
FIXED_BYTES, MULTIPLE = 128 << 20, 64
"""Memory that a reader may take: this much, and so many times the bytes of the files."""

ODD: list[Any] = [None, True, -1, 0, 1, 7, 255, 10**6, 10**12, 10**30, 2.5, float("nan"), "", "x"]
ODD += [
    "../x",
    "/etc/passwd",
    "\0",
    [],
    {},
    [1],
    {"a": 1},
    "mul1",
    [None] * 3,
    float("inf"),
    -(2**63),
]
HUGE = [0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut short, overwritten (with numbers that claim much, too), added or left out."""
    # The start of a file is where its structure is.
    where = draw(st.integers(0, len(content) - 1) | st.integers(0, 2000)) % len(content)
    how = draw(st.sampled_from(["cut", "overwrite", "huge", "insert", "remove"]))
    new = draw(st.binary(min_size=1, max_size=16))
    if how == "cut":
        return content[:where]
    if how == "insert":
        return content[:where] + new + content[where:]
    if how == "remove":
        return content[:where] + content[where + len(new) :]
    if how == "huge":
        new = draw(st.sampled_from(HUGE)).to_bytes(8, "little")[: draw(st.sampled_from([4, 8]))]
    return content[:where] + new + content[where + len(new) :]


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """JSON with one of its values, however deep, exchanged, removed or renamed."""
    if isinstance(value, dict) and value and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(value)))
        rest = {k: v for k, v in value.items() if k != key}
        how = draw(st.sampled_from(["deeper", "deeper", "deeper", "remove", "rename"]))
        if how == "remove":
            return rest
        if how == "rename":
            return rest | {draw(st.sampled_from(["x", "../x", "/x", *value])): value[key]}
        return value | {key: draw(altered(value[key]))}
    if isinstance(value, list) and value and draw(st.integers(0, 4)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], draw(altered(value[index])), *value[index + 1 :]]
    return draw(st.sampled_from(ODD))


@st.composite
def damaged_tensors(draw: st.DrawFn, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of which one is removed, renamed, or of another shape, type or content."""
    tensors = dict(whole)
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    dtypes = [torch.float16, torch.float64, torch.int16, torch.int32, torch.bool, torch.float8_e5m2]
    change = draw(
        st.sampled_from(["remove", "rename", "shape", "dtype", "flat", "nan", "empty", "bits"])
    )
    if change == "rename":
        other = draw(st.sampled_from([*tensors, "", "x", ".trellis", "lm_head.trellis"]))
        tensors[other] = tensor
    elif change == "shape":
        shape = draw(st.lists(st.integers(0, 40), max_size=4))
        tensors[name] = torch.zeros(shape, dtype=tensor.dtype)
    elif change == "dtype":
        tensors[name] = tensor.float().to(draw(st.sampled_from(dtypes)))
    elif change == "flat":
        tensors[name] = tensor.flatten()
    elif change == "nan" and tensor.is_floating_point():
        tensors[name] = torch.full_like(tensor, float(draw(st.sampled_from(["nan", "inf"]))))
    elif change == "empty":
        tensors[name] = tensor.new_zeros(0)
    elif change == "bits" and tensor.ndim:
        last = draw(st.integers(0, 200))
        tensors[name] = torch.zeros(*tensor.shape[:-1], last, dtype=tensor.dtype)
    return tensors


def _status(name: str) -> int:
    """Bytes that /proc/self/status gives for a name."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)


@contextmanager
def bounded(place: Path) -> Iterator[None]:
    """Reading files below ``place`` takes bounded time and memory and changes nothing there."""
    before = sorted(place.rglob("*"))
    size = sum(path.stat().st_size for path in before if path.is_file())
    allowed = FIXED_BYTES + MULTIPLE * size
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    resident, start = _status("VmRSS"), time.monotonic()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + 4 * allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    taken, seconds = _status("VmHWM") - resident, time.monotonic() - start
    assert taken <= allowed, f"{taken:,} bytes for files of {size:,}"
    assert seconds < MOST_SECONDS
    assert sorted(place.rglob("*")) == before, "a reader wrote something"


@contextmanager
def with_damaged_bytes(whole: Path, file: str, data: st.DataObject) -> Iterator[Path]:
    """A copy in which one file's bytes are damaged."""
    with copy_of(whole) as directory:
        path = directory / file
        path.write_bytes(data.draw(damaged(path.read_bytes())))
        yield directory


@contextmanager
def with_damaged_tensors(whole: Path, data: st.DataObject) -> Iterator[Path]:
    """A copy whose weights are other tensors, in a file that is well-formed."""
    tensors = data.draw(damaged_tensors(load_file(whole / WEIGHTS)))
    with copy_of(whole) as directory:
        save_file(tensors, directory / WEIGHTS)
        yield directory


@contextmanager
def copy_of(whole: Path) -> Iterator[Path]:
    """A copy to damage, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        yield shutil.copytree(whole, Path(folder) / "model")
