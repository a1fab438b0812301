"""Trellis-coded quantization that can be trained through, for language models at 2 bits.

The public names below are loaded on first use, so importing the package is cheap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"

if TYPE_CHECKING:
    from softtrellis.codes.codebook import codebook
    from softtrellis.io.checkpoint import load_quantized
    from softtrellis.recipes.ptq import QuantizeConfig, quantize_model
    from softtrellis.recipes.qat import DistillConfig, distill
    from softtrellis.spec import TrellisSpec
    from softtrellis.trellis.bcjr import bcjr
    from softtrellis.trellis.packing import pack, unpack
    from softtrellis.trellis.viterbi import viterbi

__all__ = [
    "DistillConfig",
    "QuantizeConfig",
    "TrellisSpec",
    "__version__",
    "bcjr",
    "codebook",
    "distill",
    "load_quantized",
    "pack",
    "quantize_model",
    "unpack",
    "viterbi",
]

_HOMES = {
    "DistillConfig": "softtrellis.recipes.qat",
    "QuantizeConfig": "softtrellis.recipes.ptq",
    "TrellisSpec": "softtrellis.spec",
    "bcjr": "softtrellis.trellis.bcjr",
    "codebook": "softtrellis.codes.codebook",
    "distill": "softtrellis.recipes.qat",
    "load_quantized": "softtrellis.io.checkpoint",
    "pack": "softtrellis.trellis.packing",
    "quantize_model": "softtrellis.recipes.ptq",
    "unpack": "softtrellis.trellis.packing",
    "viterbi": "softtrellis.trellis.viterbi",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'softtrellis' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
