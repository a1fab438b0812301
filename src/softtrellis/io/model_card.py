"""The model card that every checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softtrellis.modules.quantized_linear import LayerFormat
from softtrellis.quantizers.hard import TrellisCode


def model_card(
    base: str,
    licence: str,
    code: TrellisCode,
    layers: Mapping[str, LayerFormat],
    provenance: Mapping[str, Any],
) -> str:
    """README.md of a checkpoint: YAML front matter for hubs, then what it is and how to load it."""
    spec = code.spec
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    steps = "".join(f"- {name}: {plain(value)}\n" for name, value in provenance.items())
    return f"""---
license: {licence}
base_model: {base}
library_name: softtrellis
tags:
- quantization
- trellis-coded-quantization
---

# {base}, {spec.k}-bit trellis-coded

{len(layers)} linear layers of {base} ({weights:,} weights) at {spec.k} bits per weight, as
tail-biting paths through a bitshift trellis: code {code.name}, L={spec.L}, k={spec.k},
V={spec.V}. All other weights are those of the base model, and its licence ({licence}) applies.

```python
from softtrellis import load_quantized
from transformers import AutoTokenizer

model = load_quantized("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Methods: QTIP (arXiv 2406.11235) for the codes, BCJR-QAT (arXiv 2605.10655) for training.

## How it was made

{steps or "Not recorded."}"""


def plain(value: Any) -> str:
    """Settings as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return str(value)
