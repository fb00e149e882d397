"""The workers of a training: one process alone, or a group that adds up its gradients with torch.distributed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class World:
    """This worker's number, and how many there are."""

    rank: int = 0
    size: int = 1

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace float tensors, in place, by their sums over all workers, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([one.flatten() for one in tensors])
        distributed.all_reduce(flat)
        for one, total in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
            one.copy_(total.view_as(one))

    def from_first(self, value: T) -> T:
        """Return the value of the first worker."""
        if self.size == 1:
            return value
        shared = [value]
        distributed.broadcast_object_list(shared, src=0)
        return shared[0]
