"""What runs in an actor's process, and how the driver knows an actor."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
import torch

from diffsmooth.cluster import compiled
from diffsmooth.cluster.attacker import load_worker
from diffsmooth.cluster.worker import CleanAccuracy, Progress, Receipt, Setup, Worker
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.errors import first_line
from diffsmooth.pipeline.models.device import computes, device_of


class DeviceLost(Exception):
    """An actor's device computes nothing any more; only a new process can use it, or another device."""


class RemoteWorker:
    """What Ray runs in an actor's process: a Worker that can be replaced by that of the next run."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._device = torch.device("cpu")

    def load(self, setup: Setup, known: dict[str, bytes]) -> "Loaded":
        """Load the models; `known` are artefacts of compilations."""
        self._worker = None  # free the models of an earlier run first
        self._device = device_of(setup.spec)
        with self._noticing_a_lost_device():
            self._worker = load_worker(setup, known)
        return Loaded(ray.get_runtime_context().get_node_id(), self._worker.compiled_key)

    def compiled(self) -> bytes | None:
        return compiled.save()

    def check(self) -> CleanAccuracy:
        assert self._worker is not None
        with self._noticing_a_lost_device():
            return self._worker.clean_accuracy()

    def run(self, blocks: list[Block], attempt: str, share: bool) -> Receipt:
        assert self._worker is not None
        with self._noticing_a_lost_device():
            return self._worker.run(blocks, attempt, share)

    @contextmanager
    def _noticing_a_lost_device(self) -> Iterator[None]:
        """Raise DeviceLost instead of an error after which the device computes nothing any more."""
        try:
            yield
        except Exception as error:
            if computes(self._device):
                raise
            raise DeviceLost(f"{self._device} on {socket.gethostname()}: {first_line(error)}") from error

    @ray.method(concurrency_group="progress")
    def progress(self) -> Progress | None:
        """Returns at once, also while `run` is busy, because its concurrency group has a thread of its own."""
        return self._worker.progress if self._worker else None


REMOTE: Any = ray.remote(  # Ray's annotations lack concurrency_groups
    max_restarts=-1, max_task_retries=0, concurrency_groups={"progress": 1}
)(RemoteWorker)  # type: ignore[call-overload]


class Loaded(NamedTuple):
    """What an actor reports when it has loaded its models."""

    node: str  # the id of the node that it is on
    compiled_key: str | None  # None if f is not compiled


@dataclass(eq=False)
class Actor:
    """One actor of ours on the cluster."""

    name: str  # as the scheduler knows it
    handle: Any
    node: str = ""  # where it loaded its models
