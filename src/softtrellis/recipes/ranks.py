"""Several processes that work on one model, one per device, as torchrun starts them."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from softtrellis.io.files import whole_directory
from softtrellis.modules.replace import decoder_layers

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


class FirstRankFailed(RuntimeError):
    """Rank 0 failed at what only it does, and says why; this rank need not."""


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work, and what they tell each other.

    All methods but ``most`` and ``part`` are called by all ranks together. With one process they
    do nothing.

    Attributes:
        mesh: of one dimension, all ranks; None with one process.
    """

    mesh: DeviceMesh | None = None

    @property
    def size(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else self.mesh.size()

    @property
    def rank(self) -> int:
        """The number of this one, from 0."""
        return 0 if self.mesh is None else self.mesh.get_local_rank()

    @property
    def first(self) -> bool:
        """Whether this is rank 0: the one that writes, prints and locks."""
        return self.rank == 0

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self.mesh is not None
        return self.mesh.get_group()

    def most(self, count: int) -> int:
        """How many of ``count`` things the rank with the most of them has, see ``part``."""
        return -(-count // self.size)

    def part(self, count: int) -> slice:
        """Which of ``count`` things this rank has; the numbers on two ranks differ by one at most.

        With fewer things than ranks some have none.
        """
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replaces every tensor by its sum over the ranks."""
        if self.mesh is not None:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self._group)

    def sum(self, *numbers: float) -> list[float]:
        """The sums of numbers over the ranks, in float64."""
        if self.mesh is None:
            return list(numbers)
        device = self.mesh.device_type
        totals = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(totals, group=self._group)
        return cast(list[float], totals.tolist())

    def any(self, *flags: bool) -> list[bool]:
        """Of every flag, whether it is set on any rank."""
        return [total > 0 for total in self.sum(*map(float, flags))]

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order; it is pickled."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def agree(self, value: T) -> T:
        """Rank 0's value; it is pickled."""
        if self.mesh is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._group, group_src=0)
        return values[0]

    def once(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0, which alone calls it.

        Raises:
            FirstRankFailed: on the other ranks, if it raises on rank 0.
        """
        value, failure = None, None
        if self.first:
            try:
                value = make()
            except BaseException as error:
                failure = error
        failed, found = self.agree((failure is not None, value))
        if failure is not None:
            raise failure
        if failed:
            raise FirstRankFailed("rank 0 failed")
        return cast(T, found)


ONE = Ranks()
"""One process, which does everything."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def join(device: str) -> Iterator[Ranks]:
    """The ranks that torchrun started together with this one; ``ONE`` if there are no others.

    They talk by NCCL between GPUs, of which each takes the one with its local number, and by gloo
    between CPUs; or by the process group that the program has set up already.
    """
    if not launched() or int(os.environ["WORLD_SIZE"]) == 1:
        yield ONE
        return
    from torch.distributed.device_mesh import init_device_mesh

    if dist.is_initialized():
        yield Ranks(init_device_mesh(device, (dist.get_world_size(),)))
        return
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local)
        dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    else:
        dist.init_process_group("gloo")
    try:
        yield Ranks(init_device_mesh(device, (dist.get_world_size(),)))
    finally:
        gc.collect()  # what still held the group in a cycle could abort the process as it exits
        dist.destroy_process_group()


@contextmanager
def output_directory(
    directory: Path, ranks: Ranks, *, force: bool = False, resume: bool = False
) -> Iterator[Path]:
    """``whole_directory`` of rank 0, whose path all ranks get; its errors are raised there."""
    with ExitStack() as stack:

        def enter() -> Path:
            return stack.enter_context(whole_directory(directory, force=force, resume=resume))

        yield ranks.once(enter)
        ranks.agree(None)  # rank 0 renames it only when no other reads it any more
    ranks.agree(None)


def shard_frozen_(model: nn.Module, ranks: Ranks) -> None:
    """Lets every rank store its part only of each decoder layer of a frozen model (FSDP2).

    A decoder layer's parameters are gathered when it runs, so that all ranks have to run it
    together. They stay sharded afterwards.
    """
    if ranks.mesh is None:
        return
    from torch.distributed.fsdp import FSDPModule, fully_shard

    model.requires_grad_(False)
    for layer in decoder_layers(model)[1]:
        if not isinstance(layer, FSDPModule):
            fully_shard(layer, mesh=ranks.mesh, reshard_after_forward=True)


def whole_weight(linear: nn.Linear) -> Tensor:
    """The weight [out, in] of a linear layer, gathered if ``shard_frozen_`` spread it."""
    weight: Any = linear.weight.detach()
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole
