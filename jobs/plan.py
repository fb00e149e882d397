"""What a spec will cost, before anything is launched: draws, FLOPs, GPU-hours, dollars.

FLOPs are counted on the meta device (2 per multiply-add, one forward pass of f); peaks are the vendors' figures for
dense matrix products.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from pipeline.block import STAGES
from pipeline.certify import certified_radius, looks_at
from pipeline.data import known_facts, open_dataset, sample_indices
from pipeline.errors import UserError
from pipeline.smoothing import base_classifier, check_base_classifier
from pipeline.spec import RunSpec

logger = logging.getLogger(__name__)

# GPU -> peak TFLOP/s in fp32, tf32, bf16, fp16; None where it has no such matrix products
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


def parse_gpus(options: Sequence[str]) -> dict[str, float | None]:
    """GPU -> dollars an hour, or None, from "NAME" or "NAME=PRICE", names in any case; all GPUs where none is given.

    Raises: UserError for a GPU whose peak is not known and for a price that is none.
    """
    prices: dict[str, float | None] = {}
    for option in options:
        name, equals, text = option.partition("=")
        known = next((gpu for gpu in GPUS if gpu.lower() == name.strip().lower()), None)
        if known is None:
            raise UserError(f"--gpu {option}: the peak of {name} is not known; choose one of {', '.join(GPUS)}")
        try:
            prices[known] = float(text) if equals else None
        except ValueError:
            prices[known] = 0.0
        if prices[known] is not None and not 0 < (prices[known] or 0) < math.inf:
            raise UserError(f"--gpu {option}: the price must be dollars an hour above 0: write, say, {known}=2.50")
    return prices or dict.fromkeys(GPUS)


def plan(spec: RunSpec, *, prices: Mapping[str, float | None], utilization: float) -> dict[str, Any]:
    """The cost of a spec's order, were nothing of it cast yet; needs no weights and, for known data sets, no data.

    `prices` are the GPUs to say it for, with dollars an hour where known; `utilization` is the share of a GPU's peak
    that the networks reach. Raises: UserError for a spec that cannot be certified.
    """
    check_base_classifier(spec)
    facts = known_facts(spec.data)
    if facts is None:
        data = open_dataset(spec.data)
        first = data[sample_indices(spec.data.samples, len(data))[0]]
        size, shape, num_classes = len(data), first.image_CHW.shape, data.num_classes
    else:
        size, shape, num_classes = facts
    smoothing, samples = spec.smoothing, len(sample_indices(spec.data.samples, size))
    flops = flops_per_draw(spec, shape, num_classes)
    draws = samples * (smoothing.n0 + smoothing.n)
    total = None if flops is None else draws * sum(flops.values())
    column, costs = _PRECISIONS.index(smoothing.precision), []
    for gpu, price in prices.items():
        peak = GPUS[gpu][column]
        hours = None if peak is None or total is None else total / (peak * 1e12 * utilization) / 3600
        dollars = None if hours is None or price is None else hours * price
        costs.append({"gpu": gpu, "peak_tflops": peak, "gpu_hours": hours, "dollars": dollars})
    return {
        "name": spec.name,
        "samples": samples,
        "image_shape": list(shape),
        "draws_per_sample": smoothing.n0 + smoothing.n,
        "draws": draws,
        "at_most": spec.sampling.mode != "fixed" or spec.sampling.skip_wrong,
        "blocks": samples * sum(smoothing.draws(stage) // smoothing.block.of(stage) for stage in STAGES),
        "largest_radius": max(
            float(certified_radius(n, n, share, smoothing.sigma))
            for n, share in looks_at(smoothing.alpha, smoothing.n).items()
        ),
        "gflop_per_draw": None if flops is None else {name: value / 1e9 for name, value in flops.items()},
        "local_copies": smoothing.m,
        "total_flop": total,
        "precision": smoothing.precision,
        "utilization": utilization,
        "costs": costs,
    }


def gpu_hours(spec: RunSpec, draws: int | None = None) -> float | None:
    """Hours of an H100 at 40 % of its peak for so many draws, all that the spec asks for unless they are given.

    None where the networks cannot be counted.
    """
    planned = plan(spec, prices={"H100": None}, utilization=0.4)
    hours = planned["costs"][0]["gpu_hours"]
    return hours if hours is None or draws is None else hours * draws / planned["draws"]


def flops_per_draw(spec: RunSpec, shape: Sequence[int], num_classes: int) -> dict[str, int] | None:
    """FLOPs of one draw in the denoiser and, for all m copies, in the classifier.

    None where a network does not run on the meta device, as an own function may not."""
    meta = torch.device("meta")
    try:
        f = base_classifier(spec, meta, tuple(shape), num_classes)
        x_1CHW = torch.zeros(1, *shape, device=meta)
        counts = {}
        for name, part, times in (("denoiser", f.denoise, 1), ("classifier", f.classify, spec.smoothing.m)):
            counter = FlopCounterMode(display=False)
            with counter:
                part(x_1CHW)
            counts[name] = counter.get_total_flops() * times
        return counts
    except (RuntimeError, NotImplementedError) as error:
        logger.warning("FLOPs cannot be counted: %s", str(error).splitlines()[0])
        return None


def print_plans(plans: Sequence[dict[str, Any]], console: Console) -> None:
    """Each plan in words and as a table of GPUs; the sum of several."""
    console.width = max(console.width, 40 + sum(26 + len(one["name"]) for one in plans))  # wraps; nothing is cut short
    for one in plans:
        lines = [
            f"[bold]{one['name']}[/]: {one['samples']:,} samples x {one['draws_per_sample']:,} draws = "
            f"{'at most ' if one['at_most'] else ''}{one['draws']:,} draws, {one['blocks']:,} blocks; "
            f"radii up to {_floor(one['largest_radius'])}",
        ]
        if one["gflop_per_draw"] is None:
            lines.append("FLOPs unknown: f does not run on torch's meta device")
        else:
            denoiser, classifier = one["gflop_per_draw"]["denoiser"], one["gflop_per_draw"]["classifier"]
            copies = f" ({one['local_copies']} copies)" if one["local_copies"] > 1 else ""
            lines.append(
                f"GFLOP a draw: denoiser {denoiser:,.1f}, classifier {classifier:,.1f}{copies}; "
                f"in all {one['total_flop']:.3g} FLOP in {one['precision']}"
            )
        console.print("\n".join(lines), highlight=False, soft_wrap=True)
    if any(one["total_flop"] is not None for one in plans):
        console.print(_costs(plans))


def _costs(plans: Sequence[dict[str, Any]]) -> Table:
    share = 100 * plans[0]["utilization"]
    table = Table(box=box.SIMPLE_HEAD, title=f"GPU-hours at {share:g} % of the peak", title_justify="left")
    for heading in ("GPU", "peak TFLOP/s", *(one["name"] for one in plans), *(("all",) if len(plans) > 1 else ())):
        table.add_column(heading, justify="left" if heading == "GPU" else "right", no_wrap=True)
    for index, first in enumerate(plans[0]["costs"]):
        costs = [one["costs"][index] for one in plans]
        peaks = dict.fromkeys("-" if cost["peak_tflops"] is None else f"{cost['peak_tflops']:g}" for cost in costs)
        cells = [_cost(cost["gpu_hours"], cost["dollars"]) for cost in costs]
        if len(plans) > 1:
            cells.append(_cost(*(_sum([cost[key] for cost in costs]) for key in ("gpu_hours", "dollars"))))
        table.add_row(first["gpu"], "/".join(peaks), *cells)
    return table


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(value for value in values if value is not None)


def _cost(hours: float | None, dollars: float | None) -> str:
    if hours is None:
        return "-"
    time = f"{hours:,.1f} h" if hours >= 0.1 else f"{60 * hours:.1f} min"
    return time if dollars is None else f"{time} = ${dollars:,.2f}"


def _floor(radius: float) -> str:
    return f"{math.floor(radius * 1000) / 1000:g}"
