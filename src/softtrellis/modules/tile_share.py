"""A rank's share of a layer's tiles, where several ranks train one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class TileShare:
    """The contiguous tiles of one layer that this rank owns: ``Shard(0)`` of a ``DTensor``.

    All ranks but the last ones own ``most`` tiles; with few tiles the last ones may own none. That
    is how ``torch.chunk`` and ``fully_shard`` cut them, too.

    Attributes:
        mesh: of one dimension, the ranks that share the layer.
        tiles: of the whole layer.
    """

    mesh: DeviceMesh
    tiles: int

    @property
    def most(self) -> int:
        """The tiles of the largest share."""
        return -(-self.tiles // self.mesh.size())

    @property
    def owned(self) -> slice:
        """Where this rank's tiles lie among all."""
        first = self.most * self.mesh.get_local_rank()
        return slice(min(first, self.tiles), min(first + self.most, self.tiles))

    def spread(self, own: Tensor) -> DTensor:
        """``DTensor`` [tiles, ...] of which every rank has its own [n, ...]."""
        from torch.distributed.tensor import DTensor, Shard  # takes a second

        whole = torch.Size((self.tiles, *own.shape[1:]))
        stride = torch.empty(whole, device="meta").stride()
        return DTensor.from_local(own, self.mesh, [Shard(0)], shape=whole, stride=stride)

    def gather(self, own: Tensor) -> Tensor:
        """[tiles, ...] of every rank's own [n, ...]; all ranks call it together.

        Differentiable: the gradients that all ranks have for the whole are added up, and every
        rank gets the sum for its own tiles (an all-gather, and backwards a reduce-scatter).
        """
        from torch.distributed.tensor import Partial

        gathered: Tensor = self.spread(own).full_tensor(grad_placements=[Partial()])
        return gathered

    @torch.no_grad()
    def local(self, spread: Tensor) -> Tensor:
        """[n, ...], this rank's tiles in the memory of a ``DTensor`` [tiles, ...].

        Raises:
            TypeError: a tensor that is not spread.
        """
        from torch.distributed.tensor import DTensor

        if not isinstance(spread, DTensor):
            raise TypeError(
                "the codewords lie whole on every rank; call fully_shard on a module around the "
                "layer first"
            )
        own: Tensor = spread.to_local()
        return own

    def gather_bytes(self, own: Tensor) -> Tensor:
        """``gather`` for any dtype, without gradients: NCCL has no int16."""
        return self.gather(own.contiguous().view(torch.uint8)).view(own.dtype)
