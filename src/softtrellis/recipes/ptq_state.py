"""What an interrupted quantization goes on from: one file per finished decoder layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softtrellis.io.files import write_json
from softtrellis.modules.quantized_linear import LayerFormat, QuantizedLinear
from softtrellis.modules.replace import quantized_layers, replace_modules
from softtrellis.quantizers.hard import TrellisCode
from softtrellis.recipes.group import LayerReport
from softtrellis.recipes.run_state import (
    check_settings,
    read_metadata,
    read_tensors,
    write_tensors,
)

SETTINGS, TUNING = "quantize_state.json", "quantize_state_tuning.safetensors"
REST = "quantize_state_rest.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class LayerStore:
    """Finished decoder layers in a directory; in none where there is no directory."""

    def __init__(
        self, directory: Path | None, settings: Mapping[str, Any], *, resume: bool
    ) -> None:
        """Starts anew, or goes on with what lies in the directory.

        Args:
            directory: of the run, or None to keep nothing.
            settings: all that decides what a layer becomes.
            resume: go on.

        Raises:
            ValueError: the run was started with other settings (named).
        """
        self.directory = directory
        self.settings = json.loads(json.dumps(settings, sort_keys=True))
        if directory is None:
            return
        path = directory / SETTINGS
        if not resume or not path.is_file():  # what has no settings beside it is not trusted
            for old in directory.glob("quantize_state*"):
                old.unlink()
            return
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged; start over with --force") from error
        check_settings(saved, self.settings)

    def _path(self, index: int) -> Path | None:
        if self.directory is None:
            return None
        return self.directory / f"quantize_state_{index:05d}.safetensors"

    def has(self, index: int) -> bool:
        """Whether a decoder layer is finished."""
        path = self._path(index)
        return path is not None and path.is_file()

    def save(self, index: int, layer: nn.Module, reports: Mapping[str, LayerReport]) -> None:
        """Writes a finished decoder layer, whole or not at all."""
        path = self._path(index)
        if self.directory is None or path is None:
            return
        formats = {name: asdict(module.layer) for name, module in quantized_layers(layer).items()}
        metadata = {
            "formats": json.dumps(formats),
            "reports": json.dumps({name: asdict(report) for name, report in reports.items()}),
        }
        write_tensors(path, layer.state_dict(), metadata)
        if not (self.directory / SETTINGS).is_file():
            write_json(self.directory / SETTINGS, self.settings)

    def load(
        self, index: int, layer: nn.Module, codebooks: Mapping[TrellisCode, Tensor]
    ) -> dict[str, LayerReport]:
        """Puts a finished decoder layer back; its reports.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(index)
        assert path is not None
        metadata, tensors = read_tensors(path, next(layer.parameters()).device)
        formats = {
            name: _layer_format(value, codebooks)
            for name, value in json.loads(metadata["formats"]).items()
        }
        replace_modules(
            layer,
            formats,
            lambda name, _: QuantizedLinear(formats[name], codebooks[formats[name].code]),
        )
        layer.load_state_dict(tensors, assign=True)
        layer.requires_grad_(False)
        reports = json.loads(metadata["reports"])
        return {name: LayerReport(**report) for name, report in reports.items()}

    def save_rest(self, index: int, parameters: Mapping[str, Tensor]) -> None:
        """Writes what was trained behind a finished decoder layer, in the place of the last."""
        if self.directory is not None:
            tensors = {name: parameter.detach() for name, parameter in parameters.items()}
            write_tensors(self.directory / REST, tensors, {"index": str(index)})

    def rest_index(self) -> int:
        """The decoder layer that ``save_rest`` was last called for, -1 if there is none."""
        if self.directory is None or not (self.directory / REST).is_file():
            return -1
        return int(read_metadata(self.directory / REST)["index"])

    @torch.no_grad()
    def load_rest(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes over what ``save_rest`` wrote.

        Raises:
            ValueError: the file is damaged.
        """
        assert self.directory is not None
        _, tensors = read_tensors(self.directory / REST, torch.device("cpu"))
        if tensors.keys() != parameters.keys():
            raise ValueError(f"{self.directory / REST} is damaged; start over with --force")
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])

    def save_tuning(
        self,
        epochs: int,
        before: float,
        best: float,
        tuned: Sequence[nn.Parameter],
        kept: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Writes the state of end-to-end tuning after some epochs, whole or not at all."""
        if self.directory is None:
            return
        tensors: dict[str, Tensor] = {}
        for i, (parameter, value) in enumerate(zip(tuned, kept, strict=True)):
            tensors |= {f"{i}.value": parameter, f"{i}.kept": value}
            moments = optimizer.state.get(parameter, {})  # empty where no gradient ever came
            tensors |= {f"{i}.{key}": moments[key] for key in _MOMENTS if key in moments}
        metadata = {"epochs": str(epochs), "before": repr(before), "best": repr(best)}
        write_tensors(self.directory / TUNING, tensors, metadata)

    @torch.no_grad()
    def load_tuning(
        self, tuned: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, float, float, list[Tensor] | None]:
        """Takes over what ``save_tuning`` wrote: epochs done, errors, the best values.

        (0, 0, 0, None) where there is nothing.
        """
        if self.directory is None or not (self.directory / TUNING).is_file():
            return 0, 0.0, 0.0, None
        metadata, tensors = read_tensors(self.directory / TUNING, tuned[0].device)
        for i, parameter in enumerate(tuned):
            parameter.copy_(tensors[f"{i}.value"])
            if f"{i}.step" in tensors:
                optimizer.state[parameter] = {key: tensors[f"{i}.{key}"] for key in _MOMENTS}
                optimizer.state[parameter]["step"] = tensors[f"{i}.step"].cpu()
        kept = [tensors[f"{i}.kept"] for i in range(len(tuned))]
        return int(metadata["epochs"]), float(metadata["before"]), float(metadata["best"]), kept


def _layer_format(value: dict[str, Any], codes: Mapping[TrellisCode, Tensor]) -> LayerFormat:
    code = next(code for code in codes if asdict(code) == value["code"])
    return LayerFormat(**{**value, "code": code})
