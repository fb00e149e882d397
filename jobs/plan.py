"""`diffsmooth plan`: estimate what a spec costs before anything is launched: draws, FLOPs, GPU-hours and dollars.

FLOPs are counted on the meta device (2 per multiply-add, one forward pass of f). Peaks are the vendors' figures for
dense matrix products.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from diffsmooth.jobs.probe import CpuRate, probe_cpu
from diffsmooth.pipeline.attack.record import Attack
from diffsmooth.pipeline.block import STAGES
from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.data.entry import Facts
from diffsmooth.pipeline.data.sets import known_facts, open_dataset, sample_indices
from diffsmooth.pipeline.errors import RunError, UserError, first_line
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


MANY_HOURS = 100  # of a GPU: an order above it needs confirmation
_FEW_DRAWS = 100_000  # never need so many hours, whatever the networks; their FLOPs are not counted


def parse_gpus(options: Sequence[str]) -> dict[str, float | None]:
    """Return GPU -> dollars per hour, or None, from "NAME" or "NAME=PRICE"; all GPUs if `options` is empty.

    Names are case-insensitive. Raises: UserError for an unknown GPU and for an invalid price.
    """
    prices: dict[str, float | None] = {}
    for option in options:
        name, equals, text = option.partition("=")
        known = next((gpu for gpu in GPUS if gpu.lower() == name.strip().lower()), None)
        if known is None:
            raise UserError(f"--gpu {option}: the peak of {name} is unknown; choose one of {', '.join(GPUS)}")
        prices[known] = _price(option, known, text) if equals else None
    return prices or dict.fromkeys(GPUS)


def _price(option: str, gpu: str, text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise UserError(f"--gpu {option}: the price must be a number of dollars per hour above 0; use e.g. {gpu}=2.50")
    return price


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


def warn_of_cost(wanted: Sequence[tuple[RunSpec, int | None]], confirm: Callable[[str], None]) -> None:
    """Pass `confirm` a warning if specs, each with its draws (None: all), need many GPU-hours together."""
    total = 0.0
    for spec, draws in wanted:
        if spec.compute.device != "cpu" and (draws is None or draws > _FEW_DRAWS):
            with suppress(UserError):  # weights that only the cluster can load cannot be counted here
                total += gpu_hours(spec, draws) or 0.0
    if total > MANY_HOURS:
        confirm(
            f"this order needs at least {total:,.0f} GPU-hours on H100s at 40 % of their peak; use diffsmooth plan for "
            "other GPUs"
        )


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


def print_plans(plans: Sequence[Estimate], console: Console) -> None:
    """Print each estimate in words, and all of them as a table with a row per GPU."""
    console.width = max(console.width, 40 + sum(26 + len(one.name) for one in plans))  # so that no cell is truncated
    for one in plans:
        console.print("\n".join(one.describe()), highlight=False, soft_wrap=True)
    if any(one.total_flop is not None or one.cpu is not None for one in plans):
        console.print(_table(plans))


def _table(plans: Sequence[Estimate]) -> Table:
    percent = 100 * plans[0].utilization
    title = f"hours of one GPU at {percent:g} % of its peak, and of all cores of this machine"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("device", "peak TFLOP/s", *(one.name for one in plans), *(("total",) if len(plans) > 1 else ())):
        table.add_column(heading, justify="left" if heading == "device" else "right", no_wrap=True)
    for costs in zip(*(one.costs for one in plans), strict=True):
        peaks = dict.fromkeys("-" if cost.peak_tflops is None else f"{cost.peak_tflops:g}" for cost in costs)
        cells = [_cell(cost.gpu_hours, cost.dollars) for cost in costs]
        if len(plans) > 1:
            cells.append(_cell(_sum([cost.gpu_hours for cost in costs]), _sum([cost.dollars for cost in costs])))
        table.add_row(costs[0].gpu, "/".join(peaks), *cells)
    hours = [one.cpu_hours for one in plans]
    hours += [_sum(hours)] if len(plans) > 1 else []
    probed = plans[0].cpu
    name, unknown = ("CPU", "use --probe") if probed is None else (f"CPU, {_plural(probed.cores, 'core')}", "-")
    table.add_row(name, "-", *(unknown if one is None else _cell(one, None) for one in hours))
    return table


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


def _cell(hours: float | None, dollars: float | None) -> str:
    if hours is None:
        return "-"
    minutes = 60 * hours
    time = f"{hours:,.1f} h" if hours >= 0.1 else f"{minutes:.1f} min" if minutes >= 1 else "< 1 min"
    return time if dollars is None else f"{time} = ${dollars:,.2f}"


def _gflop(number: float) -> str:
    return f"{number:,.1f}" if number >= 1 else f"{number:.2g}"


def _floor(radius: float) -> str:
    return f"{math.floor(radius * 1000) / 1000:g}"
