"""Products with packed weights: the readable reference, and who computes them on a GPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from softtrellis.backend import why_no_cuda
from softtrellis.codes.codebook import WHOLE_CODES, codebook
from softtrellis.codes.hybrid import TABLE_ROWS, Flip
from softtrellis.extras import install
from softtrellis.modules.rotated_product import partial_product, rotated_product, unrotated
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.quantizers.tiling import TileOrder
from softtrellis.spec import TrellisSpec
from softtrellis.transforms.incoherence import padded_size
from softtrellis.trellis.packing import unpack, words_per_tile

DecodeBackend = Literal["auto", "torch", "triton", "cuda"]
ResolvedDecodeBackend = Literal["torch", "triton", "cuda"]

_log = logging.getLogger(__name__)
_BACKENDS = get_args(DecodeBackend)
_ONE_MAD_STEP = 147.800537109375


def resolve_decode_backend(backend: DecodeBackend, x: Tensor) -> ResolvedDecodeBackend:
    """Who multiplies these activations, or why the one asked for cannot.

    For float16 and bfloat16 activations on a CUDA device ``"auto"`` is ``"cuda"`` where that can
    run and ``"triton"`` elsewhere; it is ``"torch"`` for all others, as the kernels multiply in
    float16 and add in float32; for float32 on a CUDA device a warning is logged, once.
    ``"cuda"`` is CUDA C++ at k = 2 for HYB at L = 12 and 16 and EXL3's mul1, and for rotations of
    up to some 200,000 channels, and Triton for what that leaves.

    Raises:
        ValueError: an unknown name, or activations that the backend does not take.
        RuntimeError: a backend whose package is not installed, or that this GPU cannot run.
    """
    if backend not in _BACKENDS:
        names = ", ".join(_BACKENDS)
        raise ValueError(f"unknown backend {backend!r}; use one of {names}")
    if backend == "auto":
        if not x.is_cuda or x.dtype not in (torch.float16, torch.bfloat16):
            if x.is_cuda and x.dtype == torch.float32:
                _say_float32_is_slow()
            return "torch"
        backend = "triton" if _why_no_cuda(x.device) else "cuda"
    if backend == "torch":
        return backend
    if x.dtype == torch.float64 or not x.is_floating_point():
        raise ValueError(
            f"backend {backend!r} takes float16, bfloat16 or float32 activations, got {x.dtype}; "
            "use backend='torch'"
        )
    if not _has_triton():
        raise RuntimeError(f"backend {backend!r} needs triton; {install(backend)}")
    if not x.is_cuda and not (backend == "triton" and _interpreted()):
        raise ValueError(
            f"backend {backend!r} needs a CUDA device, and the activations are on {x.device}; move "
            "them and the layer to one, or use backend='torch'"
        )
    if backend == "cuda" and (reason := _why_no_cuda(x.device)):
        raise RuntimeError(f"backend 'cuda' {reason}")
    return backend


@cache
def _warn_of_float32() -> None:
    _log.warning(
        "packed layers decode their weights at every call for float32 activations; load the model "
        "with dtype=torch.bfloat16 for the fused kernels of this GPU"
    )


_say_float32_is_slow: Callable[[], None] = torch.compiler.assume_constant_result(
    lambda: _warn_of_float32()
)
"""Once per process; ``torch.compile`` calls it while it traces and leaves it out of the graph."""


def _read_interpreted() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


_interpreted: Callable[[], bool] = torch.compiler.assume_constant_result(_read_interpreted)
"""Whether Triton runs its kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""

_kept_why_no_cuda = cache(why_no_cuda)
_kept_has_triton = cache(lambda: find_spec("triton") is not None)
_why_no_cuda: Callable[[torch.device], str | None] = torch.compiler.assume_constant_result(
    lambda device: _kept_why_no_cuda(device)
)
_has_triton: Callable[[], bool] = torch.compiler.assume_constant_result(lambda: _kept_has_triton())
"""Both once per process: asking again takes a large part of a product's time."""


@dataclass(frozen=True, eq=False)
class CodeValues:
    """A code's values in the forms that decoding reads.

    Attributes:
        codebook: float32 [S, V].
        table: int32, two float16 components in each (the first in the low bits): of "hyb" [1024],
            by bits 6 to 15 of the hash, signs included; of ``WHOLE_CODES`` [S]; of others [0].
        factor: the codebook is ``factor`` times what the table or the code's formula gives.
    """

    codebook: Tensor
    table: Tensor
    factor: float

    @classmethod
    def of(cls, code: TrellisCode, codebook: Tensor) -> CodeValues:
        """The values of a code whose codebook is ``codebook``, float32 [S, V]."""
        return cls(codebook, decode_table(code, codebook), code_factor(code))


def decode_table(code: TrellisCode, codebook: Tensor) -> Tensor:
    """int32 table of a code, see ``CodeValues``; values are rounded to float16."""
    if code.name not in ("hyb", *WHOLE_CODES):
        return torch.zeros(0, dtype=torch.int32, device=codebook.device)
    halves = codebook.detach().to(torch.float16)
    if code.spec.V == 1:
        halves = torch.cat([halves, torch.zeros_like(halves)], 1)
    packed = halves.contiguous().view(torch.int32).flatten()
    if code.name in WHOLE_CODES:
        return packed
    states = torch.arange(code.spec.num_states, device=codebook.device)
    table = torch.zeros(2 * TABLE_ROWS, dtype=torch.int32, device=codebook.device)
    table[((states * states + states) >> 6) & (2 * TABLE_ROWS - 1)] = packed
    return table


@cache
def code_factor(code: TrellisCode) -> float:
    """What the float16 values of a computed code are multiplied by; 1 for codes with a table."""
    if code.name in ("hyb", *WHOLE_CODES):
        return 1.0
    step = _ONE_MAD_STEP if code.name == "1mad" else 1.0
    if not code.normalize:
        return 1.0 / step
    with torch.device("cpu"):
        values = codebook(code.name, code.spec, normalize=False)
    return 1.0 / step / float(values.double().square().mean().sqrt())


def decode(codes: Tensor, codebook: Tensor, code: TrellisCode, out: int, inputs: int) -> Tensor:
    """float32 [out, in]: the latent matrix of packed codes int16 [tiles, words]."""
    states = unpack(codes, code.spec, steps=code.spec.steps())
    return code.decode(states, codebook, out, inputs)


def decode_matmul(
    x: Tensor,
    codes: Tensor,
    values: CodeValues,
    code: TrellisCode,
    out_features: int,
    *,
    backend: DecodeBackend = "auto",
) -> Tensor:
    """Multiplies with the latent matrix of packed codes: ``x @ decode(codes).T``.

    The reference decodes the matrix in float32. The kernels round x and the values to float16 and
    add in float32; up to 16 rows of x (48 in CUDA C++) they never write the matrix to memory. Runs
    under ``torch.compile``, and inside a CUDA graph once it has run before it. Not differentiable.

    Args:
        x: [..., in], in a multiple of 16.
        codes: int16 [out * in / 256, 16 k], see ``pack``.
        values: of the code.
        code: how the matrix was written.
        out_features: rows of the matrix, a multiple of 16.
        backend: "auto", "torch", "triton" or "cuda"; see ``resolve_decode_backend``.

    Returns:
        float32 [..., out].

    Raises:
        ValueError: shapes that do not fit, or a backend that does not take x.
        RuntimeError: a backend that is not installed.
    """
    inputs, words = x.shape[-1], words_per_tile(code.spec, code.spec.steps())
    if inputs % 16 or out_features % 16 or codes.shape != (inputs * out_features // 256, words):
        raise ValueError(
            f"{list(codes.shape)} codes do not hold a matrix {out_features}x{inputs} of "
            f"k={code.spec.k}; both dimensions must be multiples of 16"
        )
    resolved = resolve_decode_backend(backend, x)
    if resolved == "torch":
        matrix = decode(codes, values.codebook, code, out_features, inputs)
        return torch.nn.functional.linear(x.to(matrix.dtype), matrix)
    y: Tensor = torch.ops.softtrellis.decode_matmul(
        x.reshape(-1, inputs), codes, values.table, values.factor, out_features,
        *_fields(code), resolved,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], out_features)


def check_width(x: Tensor, in_features: int) -> None:
    """ValueError for other channels than the codes are for, beyond which kernels would read."""
    if x.shape[-1] != in_features:
        raise ValueError(f"x has {x.shape[-1]} channels and must have {in_features}")


def quantized_linear(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    code: TrellisCode,
    *,
    factor: float,
    scale: Tensor,
    in_signs: Tensor,
    out_signs: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    multiple: int,
    block: int | None,
    backend: ResolvedDecodeBackend,
) -> Tensor:
    """A whole quantized layer on a GPU: the activations are rotated, not the weight.

    ``y = out_scale R_out^T (scale M (R_in (in_scale x))) + bias`` with the latent matrix M of the
    codes, in two or three kernels for up to 16 rows. The rotated activations are rounded to
    float16 after a division by the row's largest, sums are float32.

    Args:
        x: [..., in] on a CUDA device, any floating dtype of at most 32 bits.
        codes, code: as in ``decode_matmul``.
        table, factor: see ``CodeValues``.
        scale, in_signs, out_signs, in_scale, out_scale, bias: buffers of ``QuantizedLinear``.
        out_features: outputs, before padding.
        multiple, block: of the rotation, see ``Incoherence``.
        backend: "triton" or "cuda", which rotates and multiplies.

    Returns:
        [..., out_features], x's dtype.
    """
    layer = scale, in_signs, out_signs, in_scale, out_scale, bias
    sizes = out_features, multiple, block
    if not torch.compiler.is_compiling() and type(x) is Tensor:  # an operator would only take time
        return _quantized_linear(x, codes, table, layer, factor, sizes, code, backend)
    y: Tensor = torch.ops.softtrellis.quantized_linear(
        x, codes, table, *layer, factor, *sizes, *_fields(code), backend
    )
    return y


def _quantized_linear(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    layer: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    factor: float,
    sizes: tuple[int, int, int | None],
    code: TrellisCode,
    backend: ResolvedDecodeBackend,
) -> Tensor:
    (scale, in_signs, out_signs, in_scale, out_scale, bias), (out, multiple, block) = layer, sizes
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], out)
    product = rotated_product(
        x.contiguous(), in_signs, in_scale, codes, table, code, [padded_size(out, multiple)],
        backend, multiple=multiple, block=block,
    )  # fmt: skip
    layers = [(out_signs, scale, out_scale, bias, out)]
    (y,) = unrotated(product, layers, factor=factor, dtype=x.dtype, backend=backend, block=block)
    return y


def _fields(code: TrellisCode) -> tuple[str, int, int, int, str]:
    return code.name, code.spec.L, code.spec.k, code.spec.V, code.order


@lru_cache(maxsize=256)
def _code(
    name: str, L: int, k: int, V: int, order: TileOrder, flip: Flip = "second"
) -> TrellisCode:
    """What the kernels need to know of a code: the table has the flips, the factor the norm."""
    return TrellisCode(TrellisSpec(L, k, V), name, flip, order=order)


_CODE = "str name, int L, int k, int V, str order, str backend"
_TAGS = (torch.Tag.pt2_compliant_tag,)
torch.library.define(
    "softtrellis::decode_matmul",
    f"(Tensor x, Tensor codes, Tensor table, float factor, int out, {_CODE}) -> Tensor",
    tags=_TAGS,
)
torch.library.define(
    "softtrellis::quantized_linear",
    "(Tensor x, Tensor codes, Tensor table, Tensor scale, Tensor in_signs, Tensor out_signs, "
    "Tensor? in_scale, Tensor? out_scale, Tensor? bias, float factor, int out, int multiple, "
    f"int? block, {_CODE}) -> Tensor",
    tags=_TAGS,
)


@torch.library.impl("softtrellis::decode_matmul", "default")
def _decode_matmul_op(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    factor: float,
    out: int,
    name: str,
    L: int,
    k: int,
    V: int,
    order: TileOrder,
    backend: ResolvedDecodeBackend,
) -> Tensor:
    code = _code(name, L, k, V, order)
    if x.shape[0] == 0:
        return x.new_empty(0, out, dtype=torch.float32)
    halves = x.to(torch.float16).contiguous()
    return partial_product(halves, codes.contiguous(), table, code, out, backend).sum(0) * factor


@torch.library.impl("softtrellis::quantized_linear", "default")
def _quantized_linear_op(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    scale: Tensor,
    in_signs: Tensor,
    out_signs: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    bias: Tensor | None,
    factor: float,
    out: int,
    multiple: int,
    block: int | None,
    name: str,
    L: int,
    k: int,
    V: int,
    order: TileOrder,
    backend: ResolvedDecodeBackend,
) -> Tensor:
    layer = scale, in_signs, out_signs, in_scale, out_scale, bias
    sizes, code = (out, multiple, block), _code(name, L, k, V, order)
    return _quantized_linear(x, codes, table, layer, factor, sizes, code, backend)


def _decode_matmul_shape(
    x: Tensor, codes: Tensor, table: Tensor, factor: float, out: int, *code: str | int
) -> Tensor:
    return x.new_empty(x.shape[0], out, dtype=torch.float32)


def _quantized_linear_shape(
    x: Tensor,
    codes: Tensor,
    table: Tensor,
    scale: Tensor,
    in_signs: Tensor,
    out_signs: Tensor,
    in_scale: Tensor | None,
    out_scale: Tensor | None,
    bias: Tensor | None,
    factor: float,
    out: int,
    *rest: str | int | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out)


torch.library.register_fake("softtrellis::decode_matmul", _decode_matmul_shape)
torch.library.register_fake("softtrellis::quantized_linear", _quantized_linear_shape)
