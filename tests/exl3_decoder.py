"""A decoder of EXL3 in NumPy, written from the format's description; it shares nothing with us.

It reads bytes of safetensors files and bits of a stream, one state after the other.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np

DTYPES = {"I16": "<i2", "I32": "<i4", "F16": "<f2", "F32": "<f4"}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        raw = np.frombuffer(data[8 + length + first : 8 + length + last], DTYPES[entry["dtype"]])
        tensors[name] = raw.reshape(entry["shape"])
    return tensors


def bits_of(tile: np.ndarray) -> list[int]:
    """The stream of a tile: 32-bit little-endian words, each from its most significant bit."""
    words = struct.unpack(f"<{len(tile) // 2}I", tile.astype("<i2").tobytes())
    return [(word >> (31 - i)) & 1 for word in words for i in range(32)]


def states_of(tile: np.ndarray) -> np.ndarray:
    """The 256 states: state t is the 16 bits that end with symbol t."""
    bits = bits_of(tile)
    K = len(bits) // 256
    register = 0
    for bit in bits[-16:]:  # what comes before the first symbol, as the stream is cyclic
        register = (register << 1) | bit
    states = []
    for t in range(256):
        for bit in bits[t * K : (t + 1) * K]:
            register = ((register << 1) | bit) & 0xFFFF
        states.append(register)
    assert states[0] >> K == states[-1] & ((1 << (16 - K)) - 1)
    return np.array(states, dtype=np.uint64)


def half(bits: np.ndarray) -> np.ndarray:
    return bits.astype(np.uint16).view(np.float16)


def values_of(states: np.ndarray, code: str) -> np.ndarray:
    """What states emit, as float64."""
    if code == "mul1":
        h = (states * np.uint64(0x83DCD12D)) & np.uint64(0xFFFFFFFF)
        total = sum((h >> np.uint64(8 * i)) & np.uint64(255) for i in range(4))
        a = half(np.uint64(0x6400) + total).astype(np.float64)
        m, c = half(np.array([0x1EEE, 0xC931])).astype(np.float64)
        return (a * m + c).astype(np.float16).astype(np.float64)
    factor, offset = {"mcg": (0xCBAC1FED, 0), "3inst": (89226354, 64248484)}[code]
    h = (states * np.uint64(factor) + np.uint64(offset)) & np.uint64(0xFFFFFFFF)
    m = (h & np.uint64(0x8FFF8FFF)) ^ np.uint64(0x3B603B60)
    return (half(m >> np.uint64(16)) + half(m & np.uint64(0xFFFF))).astype(np.float64)


def hadamard(n: int) -> np.ndarray:
    """[n, n]: Sylvester's matrix in blocks of 128, over sqrt(128)."""
    H = np.ones((1, 1))
    while len(H) < 128:
        H = np.block([[H, H], [H, -H]])
    assert n % 128 == 0
    return np.kron(np.eye(n // 128), H / np.sqrt(128))


def decode(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    """W [in, out] of a layer, with both dimensions padded."""
    marks = [code for code in ("mcg", "mul1") if f"{name}.{code}" in tensors]
    assert len(marks) <= 1
    code = marks[0] if marks else "3inst"
    if marks:
        multiplier = {"mcg": 0xCBAC1FED, "mul1": 0x83DCD12D}[code]
        assert tensors[f"{name}.{code}"].shape == ()
        assert int(tensors[f"{name}.{code}"]) % 2**32 == multiplier
    trellis = tensors[f"{name}.trellis"]
    rows, columns = 16 * trellis.shape[0], 16 * trellis.shape[1]
    inner = np.empty((rows, columns))
    for i in range(trellis.shape[0]):
        for o in range(trellis.shape[1]):
            values = values_of(states_of(trellis[i, o]), code)
            for p in range(256):
                t, j = p // 8, p % 8
                row = 2 * (t % 4) + (0, 1, 8, 9)[j % 4]
                inner[16 * i + row, 16 * o + t // 4 + 8 * (j // 4)] = values[p]
    suh, svh = (tensors[f"{name}.{key}"].astype(np.float64) for key in ("suh", "svh"))
    assert (suh.shape, svh.shape) == ((rows,), (columns,))
    return suh[:, None] * (hadamard(rows) @ inner @ hadamard(columns)) * svh
