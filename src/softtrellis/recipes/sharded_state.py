"""What several ranks share of a saved state: every rank writes and reads its own part.

``torch.distributed.checkpoint`` stores the parts in safetensors files, with their places in the
headers. Any number of ranks reads them. It has no index, so that a file that is missing or too many
is found here.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softtrellis.io.errors import DAMAGED, first_line
from softtrellis.modules.latent_linear import LatentLinear
from softtrellis.quantizers.tiling import from_tiles
from softtrellis.recipes.ranks import Ranks

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.tensor import DTensor

_FILE_BYTES = 1 << 28
"""About the size of one file of a rank, which takes twice that memory while it is written."""


@dataclass(frozen=True)
class SharedTensors:
    """Tensors in the files of a directory, each rank's part in files of its own.

    Attributes:
        directory: with safetensors files, all of which belong to it.
        names: of all tensors.
    """

    directory: Path
    names: frozenset[str]


def spread(tensors: Mapping[str, Tensor], layers: Mapping[str, LatentLinear]) -> dict[str, Tensor]:
    """A state in which the tensors of tiles that ranks share are ``DTensor``s.

    Args:
        tensors: by name; those of ``layers`` are "LAYER.latent", "LAYER.latent.MOMENT" and
            "LAYER.pins", of this rank's tiles.
        layers: by name.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _layer_of(name, layers)
        if layer is not None and layer.share is not None and tensor.ndim:
            tensor = layer.share.spread(tensor.detach())
        found[name] = tensor
    return found


def own_part(
    tensors: Mapping[str, Tensor], layers: Mapping[str, LatentLinear]
) -> dict[str, Tensor]:
    """This rank's part of the state that one process saved."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer = _layer_of(name, layers)
        if layer is not None and layer.share is not None and tensor.ndim:
            tensor = layer.own(tensor) if tensor.ndim == 2 else tensor[layer.share.owned]
        found[name] = tensor
    return found


def shared_in(tensors: Mapping[str, Tensor]) -> dict[str, DTensor]:
    """Those that are ``DTensor``s."""
    from torch.distributed.tensor import DTensor

    return {name: tensor for name, tensor in tensors.items() if isinstance(tensor, DTensor)}


def save_shared(directory: Path, tensors: Mapping[str, DTensor], ranks: Ranks) -> None:
    """Every rank writes its part into files in ``directory``; all ranks call it together.

    Raises:
        OSError: on all ranks, if one of them could not write.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    numbers, size = dict[str, int](), 0
    for name, tensor in tensors.items():
        numbers[name] = 1 + size // _FILE_BYTES
        size += tensor.to_local().nbytes
    writer = HuggingFaceStorageWriter(str(directory), numbers, save_distributed=True)
    with _first_failure():
        save(dict(tensors), storage_writer=writer, **_group(ranks))


def load_shared(
    shared: SharedTensors, prefix: str, layers: Mapping[str, LatentLinear], ranks: Ranks
) -> dict[str, Tensor]:
    """This rank's part of the tensors of ``layers``, with these ranks or others.

    All ranks call it together.

    Args:
        shared: what ``save_shared`` wrote.
        prefix: of the names in the files.
        layers: by name.
        ranks: that share the layers now.

    Returns:
        By name without the prefix, on the CPU, in the shape of ``LatentLinear.latent`` and
        ``LatentLinear.pins``.

    Raises:
        ValueError: files are damaged, missing, too many or of another run.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    targets = _targets(shared, prefix, layers)
    reader = HuggingFaceStorageReader(str(shared.directory))
    try:
        with _first_failure(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(targets, storage_reader=reader, **_group(ranks))
    except (SafetensorError, OSError, AssertionError, *DAMAGED) as error:
        raise _damaged(shared, first_line(error)) from error
    found: dict[str, Tensor] = {}
    for full_name, target in targets.items():
        name = full_name.removeprefix(prefix)
        layer = _layer_of(name, layers)
        assert layer is not None
        if layer.share is not None:
            found[name] = target.to_local()
        elif target.ndim == 3:
            found[name] = from_tiles(target, *layer.layer.padded, layer.layer.code.order)
        else:
            found[name] = target
    return found


def _targets(
    shared: SharedTensors, prefix: str, layers: Mapping[str, LatentLinear]
) -> dict[str, Any]:
    """Tensors to read into by name, on the CPU, after a look at all headers."""
    targets: dict[str, Any] = {}
    for full_name, saved in _headers(shared).items():
        if not full_name.startswith(prefix):
            continue
        name = full_name.removeprefix(prefix)
        layer = _layer_of(name, layers)
        if layer is None:
            raise _damaged(shared, f"{name} is of another run")
        own = layer.pins if name.endswith(".pins") else layer.tiles().detach()
        shape = torch.Size((layer.layer.tiles, *own.shape[1:]))
        if saved.properties.dtype != own.dtype or not _is_whole(saved, shape):
            raise _damaged(shared, f"{name} is not {own.dtype} {list(shape)}, or lacks a part")
        target = torch.empty_like(own)
        targets[full_name] = (target if layer.share is None else layer.share.spread(target)).cpu()
    return targets


def _headers(shared: SharedTensors) -> dict[str, TensorStorageMetadata]:
    """The tensors in the files' headers by name.

    Raises:
        ValueError: files are damaged, or hold other tensors than they should.
    """
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    errors = (SafetensorError, OSError, RuntimeError, *DAMAGED)  # RecursionError is a RuntimeError
    try:
        reader = HuggingFaceStorageReader(str(shared.directory))
        found: dict[str, Any] = dict(reader.read_metadata().state_dict_metadata)
    except errors as error:
        raise _damaged(shared, first_line(error)) from error
    if others := found.keys() ^ shared.names:
        raise _damaged(shared, f"{min(others)} is missing, or does not belong there")
    return found


def _is_whole(saved: TensorStorageMetadata, shape: torch.Size) -> bool:
    """Whether the parts of a tensor, one after the other, are all of its tiles."""
    end = 0
    for part in sorted(saved.chunks, key=lambda part: (part.offsets, part.sizes)):
        place = (end, *[0] * (len(shape) - 1))
        if part.offsets != place or len(part.sizes) != len(shape) or part.sizes[1:] != shape[1:]:
            return False
        end += part.sizes[0]
    return end == shape[0] and saved.size == shape


def _damaged(shared: SharedTensors, reason: str) -> ValueError:
    return ValueError(f"{shared.directory} is damaged ({reason}); start over with --force")


def _group(ranks: Ranks) -> dict[str, Any]:
    if ranks.mesh is None:
        return {"no_dist": True}
    return {"process_group": ranks.mesh.get_group()}


@contextmanager
def _first_failure() -> Iterator[None]:
    """Raises what failed on some rank in the place of ``CheckpointException``, on all of them."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _layer_of(name: str, layers: Mapping[str, LatentLinear]) -> LatentLinear | None:
    """The layer whose latent weights, their moments or whose pins have this name."""
    latent, found, _ = name.partition(".latent")
    return layers.get(latent if found else name.removesuffix(".pins"))
