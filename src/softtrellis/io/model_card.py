"""The model card that every checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softtrellis.io.manifest import TUNING, codes_of
from softtrellis.modules.quantized_linear import LayerFormat


def model_card(
    base: str,
    licence: str,
    layers: Mapping[str, LayerFormat],
    provenance: Mapping[str, Any],
) -> str:
    """README.md of a checkpoint: YAML front matter for hubs, then what it is and how to load it."""
    sizes = [layer.in_features * layer.out_features for layer in layers.values()]
    weights, code_bits = sum(sizes), [layer.code.spec.k for layer in layers.values()]
    bits = f"{sum(n * k for n, k in zip(sizes, code_bits, strict=True)) / weights:.3g}"
    codes = "; ".join(
        f"code {code.name}, L={code.spec.L}, k={code.spec.k}, V={code.spec.V}"
        for code in codes_of(layers)
    )
    steps = "".join(f"- {name}: {plain(value)}\n" for name, value in provenance.items())
    return f"""---
license: {licence}
base_model: {base}
library_name: softtrellis
tags:
- quantization
- trellis-coded-quantization
---

# {base}, {bits}-bit trellis-coded

{len(layers)} linear layers of {base} ({weights:,} weights) at {bits} bits per weight, as
tail-biting paths through a bitshift trellis: {codes}.
{_other_weights(provenance)} The licence of the base model ({licence}) applies.

```python
import softtrellis.integrations.transformers  # without it the layers are random
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

Methods: QTIP (arXiv 2406.11235) for the codes, BCJR-QAT (arXiv 2605.10655) for training.

## How it was made

{steps or "Not recorded."}"""


def _other_weights(provenance: Mapping[str, Any]) -> str:
    """What is known of the weights that are not packed."""
    tuned = any(step in provenance for step in TUNING)
    if tuned or _trained_norms(provenance.get("train")):
        return "Norms and biases were trained, too; all other weights are those of the base model."
    if "quantize" in provenance or "quickstart" in provenance:
        return "All other weights are those of the base model."
    return "Whether other weights were changed, too, is not recorded."


def _trained_norms(settings: Any) -> bool:
    """Of a ``DistillConfig``; older ones, and those of others, do not say what was trained."""
    if not isinstance(settings, Mapping):
        return settings is not None
    return "norms" in settings.get("train", ("norms",))


def plain(value: Any) -> str:
    """Settings as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items())
    return str(value)


def export_card(base: str, licence: str, form: str, provenance: Mapping[str, Any]) -> str:
    """README.md of a model that was exported to another format."""
    steps = "".join(f"- {name}: {plain(value)}\n" for name, value in provenance.items())
    return f"""---
license: {licence}
base_model: {base}
tags:
- quantization
- trellis-coded-quantization
---

# {base}, quantized

{base} quantized with softtrellis (trellis-coded quantization) and exported: {form}. The licence
of the base model ({licence}) applies.

## How it was made

{steps or "Not recorded."}"""
