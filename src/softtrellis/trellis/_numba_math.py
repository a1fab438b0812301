# mypy: allow-untyped-calls, allow-untyped-decorators
"""Vectors of 16 floats for Numba kernels: what an auto-vectoriser would guess, written out.

``load`` and ``store`` move 16 neighbouring elements of a contiguous float32 array; ``+ - * /`` work
on whole vectors, and products that are added are fused where the machine can. LLVM splits the
vectors into whatever registers there are (two of AVX2, four of NEON, one of AVX-512).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import ConcreteTemplate, infer_global, signature
from numba.extending import intrinsic, models, register_model

LANES = 16

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_FUSE = ("contract",)

# 2**f on [-1/2, 1/2], relative error 9.1e-8, and log2(1 + z) on [sqrt(1/2) - 1, sqrt(2) - 1],
# absolute error 4.8e-8: minimax polynomials, lowest power first.
_EXP2 = (
    1.0,
    0.693147003651,
    0.240222424269,
    0.055507343262,
    0.009671507403,
    0.001326472615,
)
_LOG2 = (
    1.4426947832107544,
    -0.7213571667671204,
    0.48093944787979126,
    -0.36008721590042114,
    0.28670746088027954,
    -0.2500690221786499,
    0.23689039051532745,
    -0.14574450254440308,
)


class FloatsType(types.Type):
    """The Numba type of a vector of ``LANES`` float32."""

    def __init__(self) -> None:
        super().__init__(name=f"floats{LANES}")


floats = FloatsType()


@register_model(FloatsType)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: FloatsType) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


def _operator(function: Any, emit: Callable[..., Any]) -> None:
    @infer_global(function)
    class _Typing(ConcreteTemplate):
        cases = (signature(floats, floats, floats),)

    @lower_builtin(function, floats, floats)
    def _lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return emit(builder, *args)


_operator(operator.add, lambda b, x, y: b.fadd(x, y, flags=_FUSE))
_operator(operator.sub, lambda b, x, y: b.fsub(x, y, flags=_FUSE))
_operator(operator.mul, lambda b, x, y: b.fmul(x, y, flags=_FUSE))
_operator(operator.truediv, lambda b, x, y: b.fdiv(x, y))


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [ir.Constant(_FLOAT, value)] * LANES)


def _integer(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [ir.Constant(_INT, value)] * LANES)


def _lanes(indices: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_INT, len(indices)), [ir.Constant(_INT, i) for i in indices])


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any, target: Any) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), target.as_pointer())


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    fma = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(_FLOATS, [_FLOATS] * 3),
        f"llvm.fmuladd.v{LANES}f32",
    )
    value = _constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = builder.call(fma, (value, x, _constant(coefficient)))
    return value


def _select_larger(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", x, y), x, y)


def _select_smaller(builder: Any, x: Any, y: Any) -> Any:
    return builder.select(builder.fcmp_ordered("<", x, y), x, y)


def _exp2_above(builder: Any, x: Any, base: Any) -> Any:
    # Adding 1.5 * 2**23 rounds to an integer n in the low bits; 127 more makes them 2**n's
    # exponent field once shifted into place.
    magic = builder.fsub(_constant(12582912.0 + 127.0), base)
    rounded = builder.fadd(x, magic)
    fraction = builder.fadd(x, builder.fsub(magic, rounded))
    power = builder.bitcast(builder.shl(builder.bitcast(rounded, _INTS), _integer(23)), _FLOATS)
    return builder.fmul(_polynomial(builder, fraction, _EXP2), power, flags=_FUSE)


def _exp2(builder: Any, x: Any) -> Any:
    return _exp2_above(builder, x, _constant(0.0))


def _nearest(builder: Any, x: Any) -> Any:
    magic = _constant(12582912.0)
    return builder.fsub(builder.fadd(x, magic), magic)


def _log2(builder: Any, x: Any) -> Any:
    bits = builder.bitcast(x, _INTS)
    root_half = _integer(0x3F3504F3)
    exponent = builder.ashr(builder.sub(bits, root_half), _integer(23))
    mantissa = builder.bitcast(builder.sub(bits, builder.shl(exponent, _integer(23))), _FLOATS)
    z = builder.fsub(mantissa, _constant(1.0))
    series = builder.fmul(_polynomial(builder, z, _LOG2), z, flags=_FUSE)
    return builder.fadd(series, builder.sitofp(exponent, _FLOATS), flags=_FUSE)


def _shuffle(indices: list[int]) -> Callable[..., Any]:
    return lambda builder, x, y: builder.shuffle_vector(x, y, _lanes(indices))


def _reduce(combine: Callable[..., Any]) -> Callable[..., Any]:
    def emit(builder: Any, x: Any) -> Any:
        width = LANES
        while width > 1:
            width //= 2
            low = builder.shuffle_vector(x, x, _lanes(list(range(width))))
            high = builder.shuffle_vector(x, x, _lanes(list(range(width, 2 * width))))
            x = combine(builder, low, high)
        return builder.extract_element(x, ir.Constant(_INT, 0))

    return emit


def _unary(emit: Callable[..., Any], result: Any = floats) -> Any:
    def function(typing: Any, x: Any) -> Any:
        return result(floats), lambda context, builder, sig, args: emit(builder, *args)

    return intrinsic(function)


def _binary(emit: Callable[..., Any]) -> Any:
    def function(typing: Any, x: Any, y: Any) -> Any:
        return floats(floats, floats), lambda context, builder, sig, args: emit(builder, *args)

    return intrinsic(function)


exp2 = _unary(_exp2)  # of -126 <= x <= 127
exp2_above = _binary(_exp2_above)  # 2**(x - base), base an integer, both of at most 2**22
nearest = _unary(_nearest)  # integer, of |x| <= 2**22
log2 = _unary(_log2)  # of positive normal numbers
largest = _unary(_reduce(_select_larger), types.float32)
total = _unary(_reduce(lambda builder, x, y: builder.fadd(x, y)), types.float32)
larger = _binary(_select_larger)
smaller = _binary(_select_smaller)
zip_low = _binary(_shuffle([i // 2 + LANES * (i % 2) for i in range(LANES)]))
zip_high = _binary(_shuffle([(i + LANES) // 2 + LANES * (i % 2) for i in range(LANES)]))
evens = _binary(_shuffle([2 * i for i in range(LANES)]))
odds = _binary(_shuffle([2 * i + 1 for i in range(LANES)]))


@intrinsic
def splat(typing: Any, x: Any) -> Any:
    """A vector of one float32, repeated."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        one = builder.insert_element(
            ir.Constant(_FLOATS, ir.Undefined), args[0], ir.Constant(_INT, 0)
        )
        return builder.shuffle_vector(one, one, _lanes([0] * LANES))

    return floats(types.float32), emit


@intrinsic
def load(typing: Any, array: Any, index: Any) -> Any:
    """``array[index : index + LANES]`` of a float32 array."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _FLOATS)
        return builder.load(pointer, align=4)

    return floats(array, types.intp), emit


@intrinsic
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index : index + LANES] = value`` of a float32 array."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _FLOATS)
        builder.store(args[2], pointer, align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, floats), emit


@intrinsic
def store_bytes(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index : index + LANES] = value`` of a uint8 array, value holding 0 to 255."""
    octets = ir.VectorType(ir.IntType(8), LANES)

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], octets)
        whole = builder.trunc(builder.fptosi(args[2], _INTS), octets)
        builder.store(whole, pointer, align=1)
        return context.get_dummy_value()

    return types.none(array, types.intp, floats), emit


@intrinsic
def where_larger(typing: Any, x: Any, y: Any, a: Any, b: Any) -> Any:
    """``a`` in the lanes where x > y, else ``b``."""

    def emit(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x, y, a, b = args
        return builder.select(builder.fcmp_ordered(">", x, y), a, b)

    return floats(floats, floats, floats, floats), emit
