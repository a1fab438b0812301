"""Loading checkpoints with transformers: importing this module registers the quantization method.

import softtrellis.integrations.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("smollm2-2bit")
"""

from __future__ import annotations

from transformers.quantizers.auto import register_quantization_config, register_quantizer

from softtrellis.io.hf_quantizer import SofttrellisConfig, SofttrellisQuantizer
from softtrellis.io.manifest import FORMAT
from softtrellis.modules.quantized_linear import QuantizedLinear

__all__ = ["SofttrellisConfig", "SofttrellisQuantizer"]

register_quantization_config(FORMAT)(SofttrellisConfig)
register_quantizer(FORMAT)(SofttrellisQuantizer)

# Some models initialise the weights of layers inside a module (GPT-2: c_proj.weight of attention),
# except where they have this mark. Ours are methods.
QuantizedLinear.weight._is_hf_initialized = True  # type: ignore[attr-defined]
