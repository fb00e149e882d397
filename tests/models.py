"""Base classifiers whose smoothed probabilities are known exactly, and others that fail in a chosen way."""

import io
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tomli_w
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffsmooth.pipeline.certify.orders import order_of, place_order
from diffsmooth.pipeline.noise import Draws
from diffsmooth.pipeline.results.stored import StoredRun
from diffsmooth.pipeline.spec import RunSpec
from diffsmooth.pipeline.storage.store import Store, open_store
from diffsmooth.pipeline.votes.blocks import BlockMetadata
from diffsmooth.pipeline.votes.run import claim_run, describe_run

Model = Callable[[Tensor], Tensor]

THRESHOLD = 0.5

METADATA = BlockMetadata(
    votes_id="a" * 32,
    sample_sha256="s" * 64,
    attempt="0",
    device="cpu x",
    versions={"numpy": "2"},
    batch_size=16,
    threads=1,
    precision="fp32",
    seconds=1.0,
)


def png(pixels_HW: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, format="PNG")
    return buffer.getvalue()


def half_space(spec: RunSpec, device: torch.device) -> Model:
    """Class 1 if the mean pixel is above THRESHOLD.

    An image of d pixels and mean v has the distance sqrt(d) |v - THRESHOLD| from the boundary, which is its exact
    certified radius at every sigma.
    """

    def logits(x_BCHW: Tensor) -> Tensor:
        margin_B = 1e3 * (x_BCHW.mean(dim=(1, 2, 3)) - THRESHOLD)
        return torch.stack([-margin_B, margin_B], dim=1)

    return logits


def upside_down(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` with its classes swapped: always wrong on clean images."""
    inner = half_space(spec, device)
    return lambda x_BCHW: inner(x_BCHW).flip(1)


def not_a_number(spec: RunSpec, device: torch.device) -> Model:
    """NaN for bright inputs only: it appears while votes are cast, not on the grey image of the first check."""

    def logits(x_BCHW: Tensor) -> Tensor:
        mean_B = x_BCHW.mean(dim=(1, 2, 3))
        return torch.stack([mean_B, torch.where(mean_B > 0.55, torch.nan, 1.0)], dim=1)

    return logits


def deadly(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` that kills its process at an input whose mean is above 0.9."""
    inner = half_space(spec, device)

    def logits(x_BCHW: Tensor) -> Tensor:
        if (x_BCHW.mean(dim=(1, 2, 3)) > 0.9).any():
            os._exit(1)
        return inner(x_BCHW)

    return logits


def dead_on_arrival(spec: RunSpec, device: torch.device) -> Model:
    os._exit(1)


def loses_its_device(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` on a device that fails three times: when it is built, for its clean accuracy, and in a task.

    As after an error of CUDA, the rest of the process cannot use the device; another process can.
    """
    inner = half_space(spec, device)

    driver = sys.modules["diffsmooth.cluster.actor"]

    def use_device(occasion: str) -> None:
        path = Path(spec.data.path or "").with_name(f"failed-{occasion}")
        if not path.exists():
            path.touch()
            driver.computes = lambda device: False  # type: ignore[attr-defined]
        if not driver.computes(device):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def logits(x_BCHW: Tensor) -> Tensor:
        use_device("check" if len(x_BCHW) == 8 else "task" if len(x_BCHW) > 8 else "build")  # there are 8 images
        return inner(x_BCHW)

    use_device("build")
    return logits


def asserts_on_the_gpu(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` that reads outside of a tensor once, in a task; CUDA reports it later, and at every call from then
    on."""
    inner, path = half_space(spec, device), Path(spec.data.path or "").with_name("asserted")

    def logits(x_BCHW: Tensor) -> Tensor:
        if len(x_BCHW) > 8 and not path.exists():
            path.touch()
            x_BCHW = x_BCHW[torch.full((len(x_BCHW),), len(x_BCHW), device=device)]
        return inner(x_BCHW)

    return logits


def three_classes(spec: RunSpec, device: torch.device) -> Model:
    return lambda x_BCHW: torch.zeros(len(x_BCHW), 3)


def slow_half_space(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` at about 500 draws per second, so that there is time to kill it."""
    import time

    inner = half_space(spec, device)

    def logits(x_BCHW: Tensor) -> Tensor:
        time.sleep(0.002 * len(x_BCHW))
        return inner(x_BCHW)

    return logits


def make_run(spec: RunSpec, home: Path, samples: int = 8) -> Store:
    """A complete run on the first samples, made by one worker without Ray."""
    from diffsmooth.cluster.worker import Setup, Worker
    from diffsmooth.pipeline.data.sets import open_dataset
    from diffsmooth.pipeline.smoothing import weights_ids

    store = open_store(str(home))
    run = describe_run(spec, weights_ids(spec), open_dataset(spec.data).num_classes)
    claim_run(store, run)
    order = order_of(spec, range(samples))
    name = place_order(store, order)
    worker = Worker.load(Setup(spec, store.uri, run.votes_id, 16))
    sampler = StoredRun(store).sampler(order, set(), name=name, plans=True)
    wanted = sampler.start()
    while wanted:
        wanted = sampler.take(worker.run(wanted, "0").votes)
    StoredRun(store).finish(name)
    return store


def to_toml(spec: RunSpec) -> str:
    """A spec as the text of a TOML file."""
    return tomli_w.dumps(spec.model_dump(mode="json", exclude_none=True))


def in_training_mode(spec: RunSpec, device: torch.device) -> Model:
    """A batch norm that was left in training mode: an image's logits depend on the other images of its batch."""
    norm = torch.nn.BatchNorm2d(1)
    inner = half_space(spec, device)
    return lambda x_BCHW: inner(norm(x_BCHW) / 10 + 0.5)


def with_memory(spec: RunSpec, device: torch.device) -> Model:
    """Every call gives other logits, as with dropout that was left in training mode."""
    calls = itertools.count()
    return lambda x_BCHW: torch.tensor([0.0, float(next(calls) % 2)]).expand(len(x_BCHW), 2)


def nan_gradient(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` whose values are finite but whose gradient is NaN: the derivative of a root at 0, times 0."""
    inner = half_space(spec, device)
    return lambda x_BCHW: inner(x_BCHW) + 0 * (x_BCHW * 0).sqrt().sum(dim=(1, 2, 3))[:, None]


def rounded_half_space(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` of rounded pixels, whose gradient is 0."""
    inner = half_space(spec, device)
    return lambda x_BCHW: inner((64 * x_BCHW).round() / 64)


def detached_half_space(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` that hides its gradient."""
    inner = half_space(spec, device)
    return lambda x_BCHW: inner(x_BCHW.detach())


INNER_STD = 0.75  # of the inner noise of `random_half_space`, per pixel


def random_half_space(spec: RunSpec, device: torch.device) -> Callable[..., Tensor]:
    """The half-space with inner noise, which depends on the identity of each draw alone."""
    model = half_space(spec, device)

    def logits(x_BCHW: Tensor, draws: Draws) -> Tensor:
        return model(x_BCHW + INNER_STD * torch.from_numpy(draws.noise(tuple(x_BCHW.shape[1:]))))

    return logits
