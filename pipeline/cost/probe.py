"""Probe: how fast this machine's CPU computes f, from a few batches of random images."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffsmooth.pipeline.data.entry import Facts
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.locations import EMBEDDED
from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.models.denoisers import resolve_denoiser
from diffsmooth.pipeline.models.device import cores
from diffsmooth.pipeline.models.weights import RANDOM
from diffsmooth.pipeline.smoothing import base_classifier
from diffsmooth.pipeline.spec import RunSpec
from diffsmooth.pipeline.storage.fetch import at_hand

_LARGEST_BATCH = 64  # what a worker uses on a CPU
_SECONDS = 2.0  # CPU time of the measured batches; a single draw may take longer


@dataclass(frozen=True, kw_only=True)
class CpuRate:
    """The speed of f on this machine's CPU, if each core runs a worker."""

    cores: int
    draws_per_second_and_core: float
    batch_size: int
    random_weights: list[str]  # networks that were measured with random weights

    def hours(self, draws: int) -> float:
        return draws / (self.draws_per_second_and_core * self.cores) / 3600


def with_weights_at_hand(spec: RunSpec) -> tuple[RunSpec, list[str]]:
    """Return the spec with random weights for networks whose weights are not on this machine, and their names."""
    changed: dict[str, Any] = {}
    for name, section in (("denoiser", spec.denoiser), ("classifier", spec.classifier)):
        if is_own(section.arch) or section.arch in ("diffusers", "transformers"):
            continue
        if name == "denoiser" and _denoises_without_weights(spec):
            continue
        location = (section.checkpoint or "").partition("#")[0]
        if not location.startswith(EMBEDDED) and ("${" in location or not at_hand(location)):
            changed[name] = section.model_copy(update={"checkpoint": f"{RANDOM}0"})
    adapter, classifier = spec.classifier.adapter, changed.get("classifier", spec.classifier)
    if adapter is not None and not at_hand(adapter.checkpoint or ""):
        changed["classifier"] = classifier.model_copy(
            update={"adapter": adapter.model_copy(update={"checkpoint": f"{RANDOM}0"})}
        )
    return spec.model_copy(update=changed), list(changed)


def _denoises_without_weights(spec: RunSpec) -> bool:
    """Whether the denoiser has no file: there is none, or it is a formula."""
    try:
        return spec.denoiser.checkpoint is None and not resolve_denoiser(spec).ids()
    except UserError:  # its checkpoint is missing
        return False


def probe_cpu(spec: RunSpec, facts: Facts) -> CpuRate:
    """Measure f of a spec on one core, in CPU time, so that other programs hardly disturb it; nothing is downloaded.

    Raises: UserError for networks that do not load or do not fit the images.
    """
    spec, random_weights = with_weights_at_hand(spec)
    f = base_classifier(spec, torch.device("cpu"), facts.shape_CHW, facts.num_classes)
    random = np.random.Generator(np.random.Philox(0))
    x_BCHW = torch.from_numpy(random.random((_LARGEST_BATCH, *facts.shape_CHW), dtype=np.float32))
    return measure_on_one_core(lambda size: f(x_BCHW[:size]), random_weights=random_weights)


def measure_on_one_core(
    compute: Callable[[int], object], *, random_weights: Sequence[str], smallest: int = 1
) -> CpuRate:
    """Return the rate of `compute(batch size)` at the largest size that is tried; sizes double while time is left."""

    def seconds(size: int) -> float:
        start = time.process_time()
        compute(size)
        return max(time.process_time() - start, 1e-9)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each worker does
    try:
        size, best = smallest, seconds(smallest)
        if best < _SECONDS:
            best = min(best, seconds(smallest))  # the first call is slower
        while size < _LARGEST_BATCH and 4 * best < _SECONDS:
            size *= 2
            best = min(seconds(size), seconds(size))
    finally:
        torch.set_num_threads(threads)
    return CpuRate(
        cores=cores(), draws_per_second_and_core=size / best, batch_size=size, random_weights=list(random_weights)
    )
