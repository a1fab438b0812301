"""Incoherence processing: random rotations of a layer's input and output channels.

A randomised Hadamard transform on both sides makes the entries of a weight matrix look like
independent Gaussians, whatever outliers it had, and leaves what the layer computes unchanged.
Sources: QTIP (arXiv 2406.11235), the section on incoherence processing; the randomised Hadamard
transform is QuIP#'s (arXiv 2402.04396).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from softtrellis.transforms.hadamard import hadamard_blocks, hadamard_transform


def padded_size(n: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least n.

    Raises:
        ValueError: n or multiple is smaller than 1.
    """
    if n < 1 or multiple < 1:
        raise ValueError(f"n and multiple must be at least 1, not {n} and {multiple}")
    return -(-n // multiple) * multiple


def pack_signs(signs: Tensor) -> Tensor:
    """Store signs as bits, most significant bit first.

    Args:
        signs: [n] of +-1, any integer or floating dtype.

    Returns:
        uint8 [ceil(n / 8)]: sign i is bit 7 - i % 8 of byte i // 8, 1 for -1; unused bits are 0.

    Raises:
        ValueError: not one dimension, or a value other than +-1.
    """
    _check_signs(signs, signs.numel(), "signs")
    bits = functional.pad((signs < 0).to(torch.uint8), (0, -signs.numel() % 8))
    return (bits.reshape(-1, 8) << _shifts(signs.device)).sum(dim=1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, n: int) -> Tensor:
    """Read back what `pack_signs` wrote.

    Args:
        packed: uint8 [ceil(n / 8)].
        n: number of signs.

    Returns:
        int8 [n] of +-1.

    Raises:
        ValueError: wrong dtype or size, or unused bits that are not 0 (which ``torch.compile``
            does not look at).
    """
    size = -(-n // 8)
    if n < 1 or packed.dtype != torch.uint8 or packed.shape != (size,):
        raise ValueError(
            f"{n} signs need uint8 [{size}], not {packed.dtype} {list(packed.shape)}; "
            "check the number of channels"
        )
    bits = ((packed[:, None] >> _shifts(packed.device)) & 1).reshape(-1).to(torch.int8)
    if not torch.compiler.is_compiling() and bool(bits[n:].any()):
        raise ValueError(f"the unused bits after {n} signs are not 0: the data is damaged")
    return 1 - 2 * bits[:n]


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def _check_signs(signs: Tensor, size: int, name: str) -> None:
    if signs.shape != (size,) or size < 1:
        raise ValueError(f"{name} must have shape [{size}], not {list(signs.shape)}")
    if signs.is_complex() or signs.dtype == torch.bool:
        raise ValueError(f"{name} must be integers or floats, not {signs.dtype}")
    if torch.compiler.is_compiling() or signs.is_meta:
        return
    if not bool((signs.abs() == 1).all()):
        raise ValueError(f"{name} must be +1 or -1 everywhere")


@dataclass(frozen=True, eq=False)
class Incoherence:
    """The rotation of one linear layer, W [out, in] to W~ [out_pad, in_pad].

    Both dimensions are first padded with zeros to multiples of `multiple`, then

        W~ = H_out diag(out_signs) W diag(in_signs) H_in^T

    with the orthonormal Hadamard matrices of `hadamard_transform`. Activations follow suit:
    `unrotate_output(W~ @ rotate_input(x)) == unrotate_weight(W~) @ x`.
    (QTIP, arXiv 2406.11235; QuIP#, arXiv 2402.04396.)

    Attributes:
        in_features: channels that go in, before padding.
        out_features: channels that come out, before padding.
        multiple: what both dimensions are padded to multiples of (16, the side of a tile).
        block: None for full-width transforms, or the order of the blocks (128 in EXL3).
        in_signs: [in_pad] of +-1.
        out_signs: [out_pad] of +-1, on the same device.

    Raises:
        ValueError: a size below 1, signs of another shape or value than said, or a block that
            does not divide the padded sizes or has no Hadamard matrix.
    """

    in_features: int
    out_features: int
    multiple: int = 16
    block: int | None = None
    in_signs: Tensor = field(kw_only=True)
    out_signs: Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be at least 1 or None, not {self.block}")
        for name, size in (("in", self.in_pad), ("out", self.out_pad)):
            if self.block is not None and size % self.block:
                raise ValueError(
                    f"block={self.block} does not divide the {size} padded {name}put channels; "
                    f"use multiple={self.block}"
                )
            _check_signs(getattr(self, f"{name}_signs"), size, f"{name}_signs")
        if self.block is not None and len(hadamard_blocks(self.block)) > 1:
            raise ValueError(f"block={self.block} has no Hadamard matrix; use a power of two")
        if self.in_signs.device != self.out_signs.device:
            raise ValueError("in_signs and out_signs must be on one device")

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        *,
        seed: int,
        multiple: int = 16,
        block: int | None = None,
    ) -> "Incoherence":
        """Draw the signs (int8, on the CPU) from a seed; the same seed gives the same signs.

        Args:
            in_features: channels that go in, at least 1.
            out_features: channels that come out, at least 1.
            seed: seed of the random generator; the input's signs are drawn first.
            multiple: see the class.
            block: see the class.

        Raises:
            ValueError: as for the class.
        """
        generator = torch.Generator(device="cpu").manual_seed(seed)

        def draw(features: int) -> Tensor:
            shape = (padded_size(features, multiple),)
            bits = torch.randint(2, shape, generator=generator, device="cpu", dtype=torch.int8)
            return 1 - 2 * bits

        in_signs = draw(in_features)
        out_signs = draw(out_features)
        return cls(
            in_features, out_features, multiple, block, in_signs=in_signs, out_signs=out_signs
        )

    @property
    def in_pad(self) -> int:
        """Input channels after padding."""
        return padded_size(self.in_features, self.multiple)

    @property
    def out_pad(self) -> int:
        """Output channels after padding."""
        return padded_size(self.out_features, self.multiple)

    @property
    def bits_overhead(self) -> float:
        """Stored weights per weight of the layer: 1.0 without padding, otherwise more."""
        return self.out_pad * self.in_pad / (self.out_features * self.in_features)

    def to(self, device: torch.device | str) -> "Incoherence":
        """The same rotation with its signs on another device."""
        return replace(self, in_signs=self.in_signs.to(device), out_signs=self.out_signs.to(device))

    def rotate_weight(self, weight: Tensor) -> Tensor:
        """W~ = H_out diag(out_signs) W_padded diag(in_signs) H_in^T.

        Args:
            weight: W [out, in], any floating dtype; half types are rotated in float32.

        Returns:
            W~ [out_pad, in_pad], W's dtype.

        Raises:
            ValueError: another shape, or another device than the signs'.
        """
        self._check(weight, (self.out_features, self.in_features), "weight")
        w = _pad_last(_working(weight), self.in_pad) * self.in_signs
        w = _pad_last(hadamard_transform(w, block=self.block).mT, self.out_pad) * self.out_signs
        return hadamard_transform(w, block=self.block).mT.contiguous().to(weight.dtype)

    def unrotate_weight(self, weight: Tensor) -> Tensor:
        """Undo `rotate_weight` and drop the padding.

        Args:
            weight: W~ [out_pad, in_pad], any floating dtype.

        Returns:
            W [out, in], W~'s dtype.

        Raises:
            ValueError: another shape, or another device than the signs'.
        """
        self._check(weight, (self.out_pad, self.in_pad), "rotated weight")
        return self._unrotate(weight, self.in_signs, self.out_signs)

    def _unrotate(self, weight: Tensor, in_signs: Tensor, out_signs: Tensor) -> Tensor:
        """[..., out, in] of W~ [..., out_pad, in_pad], with signs that its rows broadcast with."""
        w = hadamard_transform(_working(weight), block=self.block, inverse=True) * in_signs
        w = w[..., : self.in_features].mT
        w = hadamard_transform(w, block=self.block, inverse=True) * out_signs
        return w[..., : self.out_features].mT.contiguous().to(weight.dtype)

    def rotate_input(self, x: Tensor) -> Tensor:
        """Activations for W~: H_in diag(in_signs) x_padded.

        Args:
            x: [..., in], any floating dtype.

        Returns:
            [..., in_pad], x's dtype.

        Raises:
            ValueError: another number of channels, or another device than the signs'.
        """
        self._check(x, (self.in_features,), "input")
        return hadamard_transform(_pad_last(x, self.in_pad) * self.in_signs, block=self.block)

    def unrotate_output(self, y: Tensor) -> Tensor:
        """The layer's output from W~'s: diag(out_signs) H_out^T y, without the padding.

        Args:
            y: [..., out_pad], any floating dtype.

        Returns:
            [..., out], y's dtype.

        Raises:
            ValueError: another number of channels, or another device than the signs'.
        """
        self._check(y, (self.out_pad,), "rotated output")
        y = hadamard_transform(y, block=self.block, inverse=True) * self.out_signs
        return y[..., : self.out_features]

    def rotate_hessian(self, hessian: Tensor) -> Tensor:
        """E[x~ x~^T] of the rotated inputs from H = E[x x^T]; padded channels count as zero.

        Args:
            hessian: H [in, in], symmetric, any floating dtype.

        Returns:
            [in_pad, in_pad], exactly symmetric, H's dtype.

        Raises:
            ValueError: another shape, or another device than the signs'.
        """
        self._check(hessian, (self.in_features, self.in_features), "Hessian")
        half = self.rotate_input(_working(hessian))
        rotated = self.rotate_input(half.mT)
        return ((rotated + rotated.mT) / 2).to(hessian.dtype)

    def rotate_output_hessian(self, hessian: Tensor) -> Tensor:
        """E[d~ d~^T] of the gradients at the rotated outputs from G = E[d d^T] at the outputs.

        Args:
            hessian: G [out, out], symmetric, any floating dtype.

        Returns:
            [out_pad, out_pad], exactly symmetric, G's dtype.

        Raises:
            ValueError: another shape, or another device than the signs'.
        """
        return self._turned().rotate_hessian(hessian)

    def _turned(self) -> "Incoherence":
        """The transform of the transposed weight."""
        return Incoherence(
            self.out_features,
            self.in_features,
            self.multiple,
            self.block,
            in_signs=self.out_signs,
            out_signs=self.in_signs,
        )

    def _check(self, tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
        """Hold the last dimensions (all of them for a matrix) to `shape`, and the device."""
        matches = tensor.shape[-len(shape) :] == shape
        if not matches or (len(shape) == 2 and tensor.ndim != 2):
            dots = "..., " if len(shape) == 1 else ""
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"{name} must be [{dots}{wanted}], not {list(tensor.shape)}")
        if tensor.device != self.in_signs.device:
            raise ValueError(
                f"{name} is on {tensor.device} and the signs on {self.in_signs.device}; "
                f'move them with .to("{tensor.device}")'
            )


def unrotate_weights(rotations: Sequence[Incoherence], weights: Tensor) -> Tensor:
    """`unrotate_weight` of a stack, every matrix by its own rotation.

    Args:
        rotations: n, which differ in their signs only; one or more.
        weights: W~ [n, out_pad, in_pad], any floating dtype.

    Returns:
        W [n, out, in], W~'s dtype.

    Raises:
        ValueError: rotations of several sizes, another shape, or another device than the signs'.
    """
    first = rotations[0]
    if len({(r.in_features, r.out_features, r.multiple, r.block) for r in rotations}) > 1:
        raise ValueError("rotations of one stack must have the same sizes, multiple and block")
    if weights.ndim != 3 or len(weights) != len(rotations):
        raise ValueError(
            f"{len(rotations)} rotated weights must be a stack of as many matrices, "
            f"not {list(weights.shape)}"
        )
    first._check(weights[0], (first.out_pad, first.in_pad), "rotated weight")
    in_signs = torch.stack([rotation.in_signs for rotation in rotations]).unsqueeze(1)
    out_signs = torch.stack([rotation.out_signs for rotation in rotations]).unsqueeze(1)
    return first._unrotate(weights, in_signs, out_signs)


def _working(x: Tensor) -> Tensor:
    """x in the dtype that two transforms in a row are computed in."""
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _pad_last(x: Tensor, size: int) -> Tensor:
    """Zeros after the last dimension, up to `size`; x itself where it has that size."""
    return x if x.shape[-1] == size else functional.pad(x, (0, size - x.shape[-1]))
