"""A decoder of QTIP in NumPy, written from the format's description; it shares nothing with us.

W [out, in] = diag(SV) H What H diag(SU), H Sylvester's matrix of the whole side over its root.
"""

from __future__ import annotations

import numpy as np


def half(bits: int) -> float:
    return float(np.array([bits], np.uint16).view(np.float16)[0])


def states_of(tile: np.ndarray, L: int, K: int, V: int) -> list[int]:
    """State i is bits i K V to i K V + L of the cyclic stream, most significant bits first."""
    text = "".join(f"{word:016b}" for word in tile.astype(np.uint16).tolist())
    assert len(text) == 256 * K
    return [int((text + text)[i * K * V : i * K * V + L], 2) for i in range(256 // V)]


def values_of(state: int, mode: str, tlut: np.ndarray | None) -> list[float]:
    if mode == "1mad":
        h = (34038481 * state + 76625530) % 2**32
        return [(sum(h.to_bytes(4, "little")) - 510) / 147.800537109375]
    if mode == "3inst":
        h = (89226354 * state + 64248484) % 2**32
        m = (h & 0x8FFF8FFF) ^ 0x3B603B60
        return [float(np.float16(half(m >> 16)) + np.float16(half(m & 0xFFFF)))]
    assert mode == "quantlut_sym"
    assert tlut is not None
    h = state * state + state
    first, second = tlut[(h >> 6) & 511].astype(float)
    return [-first if (h >> 15) & 1 else first, second]


def sylvester(n: int) -> np.ndarray:
    rows = np.arange(n)
    parity = np.array([[bin(i & j).count("1") % 2 for j in rows] for i in rows])
    matrix: np.ndarray = (1 - 2 * parity) / np.sqrt(n)
    return matrix


def decode(layer: dict[str, np.ndarray], mode: str, L: int, K: int, V: int) -> np.ndarray:
    """W [out, in] of the tensors trellis, SU, SV and, with a table, tlut."""
    SU, SV = layer["SU"].astype(float), layer["SV"].astype(float)
    inner = np.empty((len(SV), len(SU)))
    across = len(SU) // 16
    for number, tile in enumerate(layer["trellis"]):
        values = [
            v for s in states_of(tile, L, K, V) for v in values_of(s, mode, layer.get("tlut"))
        ]
        down, right = 16 * (number // across), 16 * (number % across)
        inner[down : down + 16, right : right + 16] = np.array(values).reshape(16, 16)
    weight: np.ndarray = SV[:, None] * (sylvester(len(SV)) @ inner @ sylvester(len(SU))) * SU
    return weight
