"""The settings that a run was made with, read from what it left in its directory."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from softtrellis.io.files import STATE

_TRAIN = "train."
_DIGESTS = ("checkpoint", "text")
"""Settings of a saved state that are hashes of what the run works on."""


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
        saved = _settings_of_state(run_dir / STATE)
        return {_TRAIN + k: v for k, v in flat_settings(saved).items() if k not in _DIGESTS}
    return {}


def flat_settings(settings: Mapping[str, object]) -> dict[str, str]:
    """Nested settings as text, with dots between the names: {"train": {"lr": 0.1}} gives
    {"train.lr": "0.1"}.
    """
    return dict(_flat(settings, ""))


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the settings that not all runs have with one value, in order of appearance.

    What a run that is not finished does not say is not counted: it saves only its training's.
    """
    names = dict.fromkeys(name for each in settings for name in each)
    unfinished = [all(name.startswith(_TRAIN) for name in each) for each in settings]
    found = []
    for name in names:
        said = zip(settings, unfinished, strict=True)
        if len({each.get(name) for each, half in said if name in each or not half}) > 1:
            found.append(name)
    return found


def _settings_of_state(path: Path) -> Mapping[str, object]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "numpy") as file:
            settings: Mapping[str, object] = json.loads(file.metadata()["settings"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
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
