"""The cost of a spec before anything is started: draws, FLOPs, GPU-hours and dollars.

FLOPs are counted on the meta device (2 per multiply-add, one forward pass of f). Peaks are the vendors' figures for
dense matrix products.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich.markup import escape
from torch.utils.flop_counter import FlopCounterMode

from diffsmooth.pipeline.attack.record import Attack
from diffsmooth.pipeline.block import STAGES
from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.cost.probe import CpuRate, probe_cpu
from diffsmooth.pipeline.data.entry import Facts
from diffsmooth.pipeline.data.sets import known_facts, open_dataset, sample_indices
from diffsmooth.pipeline.errors import RunError, first_line
from diffsmooth.pipeline.models.own import OwnFunctionError
from diffsmooth.pipeline.smoothing import base_classifier, resolve_networks
from diffsmooth.pipeline.spec import Data, RunSpec, looks_at

logger = logging.getLogger(__name__)

T = TypeVar("T")

# GPU -> peak TFLOP/s in fp32, tf32, bf16, fp16; None if the GPU does not support the precision
GPUS: dict[str, tuple[float, float | None, float | None, float]] = {
    "T4": (8.1, None, None, 65),
    "V100": (15.7, None, None, 125),
    "A10G": (31.5, 35, 70, 70),
    "L4": (30.3, 60, 121, 121),
    "L40S": (91.6, 183, 362, 362),
    "A100": (19.5, 156, 312, 312),
    "H100": (67, 495, 989, 989),
    "H200": (67, 495, 989, 989),
    "B200": (80, 1100, 2250, 2250),
}
_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class GpuCost:
    """The cost of a spec on one type of GPU; None for what is unknown."""

    gpu: str
    peak_tflops: float | None
    gpu_hours: float | None
    dollars: float | None


@dataclass(frozen=True, kw_only=True)
class FlopsPerDraw:
    """FLOPs of one draw in the denoiser and, for all m local copies, in the classifier."""

    denoiser: float
    classifier: float

    @property
    def total(self) -> float:
        return self.denoiser + self.classifier


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of a spec or of a training."""

    name: str
    total_flop: float | None  # None if a network does not run on the meta device
    precision: str
    utilization: float
    costs: list[GpuCost]
    cpu: CpuRate | None  # None if it was not measured

    @property
    def measured(self) -> int:
        """The number of what `cpu` measures: draws, or images that are trained on."""
        raise NotImplementedError

    @property
    def cpu_hours(self) -> float | None:
        """Hours of all cores of this machine."""
        return None if self.cpu is None else self.cpu.hours(self.measured)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"cpu_hours": self.cpu_hours}

    def describe(self) -> list[str]:
        """Return what the estimate counts, as lines with rich's markup."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CostEstimate(Estimate):
    """The cost of a spec if none of its votes exist yet."""

    samples: int
    image_shape: list[int]
    draws_per_sample: int
    draws: int
    at_most: bool  # whether the sampling mode may need fewer draws
    blocks: int
    largest_radius: float
    gflop_per_draw: FlopsPerDraw | None  # in 10^9; None if f does not run on the meta device
    local_copies: int

    @property
    def measured(self) -> int:
        return self.draws

    def describe(self) -> list[str]:
        lines = [
            f"[bold]{escape(self.name)}[/]: {self.samples:,} samples x {self.draws_per_sample:,} draws = "
            f"{'at most ' if self.at_most else ''}{self.draws:,} draws, {self.blocks:,} blocks; "
            f"radii up to {_floor(self.largest_radius)}",
        ]
        if self.gflop_per_draw is None:
            lines.append("FLOPs unknown: f does not run on torch's meta device")
        else:
            copies, gflop = f" ({self.local_copies} copies)" if self.local_copies > 1 else "", self.gflop_per_draw
            lines.append(
                f"GFLOP per draw: denoiser {_gflop(gflop.denoiser)}, classifier {_gflop(gflop.classifier)}{copies}; "
                f"{self.total_flop:.3g} FLOP in total, in {self.precision}"
            )
        if self.cpu is not None:
            random = f"; random weights: {', '.join(self.cpu.random_weights)}" if self.cpu.random_weights else ""
            lines.append(
                f"measured on this CPU: {self.cpu.draws_per_second_and_core:,.3g} draws/s per core, batches of "
                f"{self.cpu.batch_size}{random}"
            )
        return lines


def attack_passes() -> int:
    """Forward passes of f per sample that an attack with its default settings takes at most."""
    return Attack(attack="pgd", eps=[1.0, 0.5, 0.25, 0.125, 0.0625], votes_id="0" * 32).passes


def plan(
    spec: RunSpec,
    *,
    prices: Mapping[str, float | None],
    utilization: float,
    passes: int | None = None,
    probe: bool = False,
) -> CostEstimate:
    """Estimate the cost of a spec. It needs no weights and, for well-known data sets, no data.

    `prices` are the GPUs to include, with dollars per hour if known; `utilization` is the fraction of a GPU's peak that
    the networks reach. With `passes`, the estimate is that of an attack which takes so many forward passes per sample.
    With `probe`, f is measured on this machine's CPU.

    Raises: UserError for a spec that cannot be certified.
    """
    resolve_networks(spec)
    smoothing, facts = spec.smoothing, facts_of(spec.data)
    samples = len(sample_indices(spec.data.samples, facts.size))
    flops = flops_per_draw(spec, facts.shape_CHW, facts.num_classes)
    each = smoothing.n0 + smoothing.n if passes is None else passes
    draws = samples * each
    total = None if flops is None else draws * flops.total
    return CostEstimate(
        name=spec.name if passes is None else f"attack on {spec.name}",
        samples=samples,
        image_shape=list(facts.shape_CHW),
        draws_per_sample=each,
        draws=draws,
        at_most=passes is not None or spec.sampling.mode != "fixed" or spec.sampling.skip_wrong,
        blocks=samples * sum(smoothing.draws(stage) // smoothing.block.of(stage) for stage in STAGES)
        if passes is None
        else samples,
        largest_radius=max(
            float(certified_radius(n, n, share, smoothing.sigma))
            for n, share in looks_at(smoothing.alpha, smoothing.n).items()
        ),
        gflop_per_draw=None if flops is None else in_gflop(flops),
        local_copies=smoothing.m,
        total_flop=total,
        precision=smoothing.precision,
        utilization=utilization,
        costs=[gpu_cost(gpu, price, smoothing.precision, total, utilization) for gpu, price in prices.items()],
        cpu=probe_cpu(spec, facts) if probe else None,
    )


def facts_of(data: Data) -> Facts:
    """Return the size, shape and classes of a data set, which is opened only if they are not well known."""
    facts = known_facts(data)
    if facts is not None:
        return facts
    found = open_dataset(data)
    first = found[sample_indices(data.samples, len(found))[0]]
    channels, height, width = first.image_CHW.shape
    return Facts(len(found), (channels, height, width), found.num_classes)


def gpu_cost(gpu: str, price: float | None, precision: str, total: float | None, utilization: float) -> GpuCost:
    peak = GPUS[gpu][_PRECISIONS.index(precision)]
    hours = None if peak is None or total is None else total / (peak * 1e12 * utilization) / 3600
    dollars = None if hours is None or price is None else hours * price
    return GpuCost(gpu=gpu, peak_tflops=peak, gpu_hours=hours, dollars=dollars)


def gpu_hours(spec: RunSpec, draws: int | None = None) -> float | None:
    """Return the hours of an H100 at 40 % of its peak for a number of draws, by default all draws of the spec.

    None if the FLOPs cannot be counted.
    """
    estimate = plan(spec, prices={"H100": None}, utilization=0.4)
    hours = estimate.costs[0].gpu_hours
    return hours if hours is None or draws is None else hours * draws / estimate.draws


def flops_per_draw(spec: RunSpec, shape: Sequence[int], num_classes: int) -> FlopsPerDraw | None:
    """Count the FLOPs of one draw; None if a network, such as an own function's, does not run on the meta device."""

    def count() -> FlopsPerDraw:
        meta = torch.device("meta")
        f = base_classifier(spec, meta, tuple(shape), num_classes)
        x_1CHW = torch.zeros(1, *shape, device=meta)
        counts = {}
        for name, part, times in (("denoiser", f.denoise, 1), ("classifier", f.classify, spec.smoothing.m)):
            counter = FlopCounterMode(display=False)
            with counter:
                part(x_1CHW)
            counts[name] = counter.get_total_flops() * times
        return FlopsPerDraw(denoiser=counts["denoiser"], classifier=counts["classifier"])

    return on_meta_or_none(count)


def on_meta_or_none(count: Callable[[], T]) -> T | None:
    """Return what `count` counts on the meta device; None if a network does not run there. Raises: RunError."""
    try:
        return count()
    except RunError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, AttributeError, OwnFunctionError) as error:
        logger.warning("cannot count FLOPs: %s", first_line(error))
        return None


def in_gflop(flops: FlopsPerDraw) -> FlopsPerDraw:
    return FlopsPerDraw(denoiser=flops.denoiser / 1e9, classifier=flops.classifier / 1e9)


def _gflop(number: float) -> str:
    return f"{number:,.1f}" if number >= 1 else f"{number:.2g}"


def _floor(radius: float) -> str:
    return f"{math.floor(radius * 1000) / 1000:g}"
