"""The settings that a run was made with, read from what it left in its directory."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from softtrellis.io.files import STATE


def read_settings(run_dir: Path) -> dict[str, str]:
    """A run's settings by name, "train.lr" for instance, as text.

    They come from the provenance in the checkpoint's softtrellis.json; of a run that is not
    finished, from its saved state. Empty where there is neither.

    Raises:
        ValueError: the file is damaged.
    """
    from softtrellis.io.manifest import is_checkpoint, read_manifest

    if is_checkpoint(run_dir):
        return flat_settings(read_manifest(run_dir).provenance)
    if (run_dir / STATE).is_file():
        return flat_settings({"train": _settings_of_state(run_dir / STATE)})
    return {}


def flat_settings(settings: Mapping[str, object]) -> dict[str, str]:
    """Nested settings as text, with dots between the names: {"train": {"lr": 0.1}} gives
    {"train.lr": "0.1"}.
    """
    return dict(_flat(settings, ""))


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the settings that not all runs have with one value, in order of appearance."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({each.get(name) for each in settings}) > 1]


def _settings_of_state(path: Path) -> Mapping[str, object]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "numpy") as file:
            settings: Mapping[str, object] = json.loads(file.metadata()["settings"])
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); start the run again") from error
    return settings


def _flat(settings: Mapping[str, object], above: str) -> Iterator[tuple[str, str]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", _in_words(value)


def _in_words(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_in_words, value)) or "none"
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
