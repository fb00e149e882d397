"""Base classifiers whose smoothed probabilities are known exactly, and others that misbehave."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipeline.sampling import blocks_of, order_of, place_order
from pipeline.spec import RunSpec
from pipeline.storage.store import Store, open_store
from pipeline.votes import claim_run, run_of

Model = Callable[[Tensor], Tensor]

THRESHOLD = 0.5


def png(pixels_HW: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, format="PNG")
    return buffer.getvalue()


def half_space(spec: RunSpec, device: torch.device) -> Model:
    """Class 1 where the mean pixel is above THRESHOLD; an image of d pixels and mean v lies sqrt(d) |v - THRESHOLD|
    from the boundary, which is its exact certified radius at any sigma."""

    def logits(x_BCHW: Tensor) -> Tensor:
        margin_B = 1e3 * (x_BCHW.mean(dim=(1, 2, 3)) - THRESHOLD)
        return torch.stack([-margin_B, margin_B], dim=1)

    return logits


def upside_down(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` with its classes swapped: always wrong on clean images."""
    inner = half_space(spec, device)
    return lambda x_BCHW: inner(x_BCHW).flip(1)


def not_a_number(spec: RunSpec, device: torch.device) -> Model:
    """NaN for bright inputs only, so that it shows while drawing and not on the grey image of the first check."""

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


def three_classes(spec: RunSpec, device: torch.device) -> Model:
    return lambda x_BCHW: torch.zeros(len(x_BCHW), 3)


def slow_half_space(spec: RunSpec, device: torch.device) -> Model:
    """`half_space` at some 500 draws a second, so that there is time to kill it."""
    import time

    inner = half_space(spec, device)

    def logits(x_BCHW: Tensor) -> Tensor:
        time.sleep(0.002 * len(x_BCHW))
        return inner(x_BCHW)

    return logits


def make_run(spec: RunSpec, home: Path) -> Store:
    """A complete run on the eight samples, made by one worker without Ray."""
    from cluster.worker import Setup, Worker
    from jobs.certify import analyze
    from pipeline.smoothing import weights_ids

    store, run = open_store(str(home)), run_of(spec, weights_ids(spec), 2)
    store.prepare()
    claim_run(store, run)
    order = order_of(spec, range(8))
    place_order(store, order)
    worker = Worker(Setup(spec, store.uri, run["votes_id"], 16))
    worker.run(list(blocks_of(order, spec.smoothing.block)), "0")
    analyze(store.uri, alpha=None, n0=None, n=None, quiet=True)
    return store


def to_toml(spec: RunSpec) -> str:
    """A spec as the text of a TOML file, each table inline."""

    def value(one: Any) -> str:
        if isinstance(one, dict):
            return "{" + ", ".join(f"{key} = {value(inner)}" for key, inner in one.items()) + "}"
        return json.dumps(one)

    tables = spec.model_dump(exclude_none=True)
    return "\n".join(f"{name} = {value(table)}" for name, table in tables.items())
