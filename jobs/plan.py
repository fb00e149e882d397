"""`diffsmooth plan`: how the GPUs are given, and the estimates as text."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.table import Table

from diffsmooth.jobs.console import conclude
from diffsmooth.jobs.later import Later
from diffsmooth.jobs.options import JSON, SET, SPEC_ARGUMENTS
from diffsmooth.jobs.specs import is_training, load_named, load_named_training
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import RunSpec

if TYPE_CHECKING:
    from diffsmooth.pipeline.cost import flops, training
    from diffsmooth.pipeline.cost.flops import Estimate
else:
    flops = Later("diffsmooth.pipeline.cost.flops")
    training = Later("diffsmooth.pipeline.cost.training")


@click.command("plan")
@SPEC_ARGUMENTS
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME[=PRICE]",
    help="GPU type and its price in dollars per hour. [default: all known types]",
)
@click.option(
    "--utilization",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.4,
    show_default=True,
    help="Fraction of the GPU's peak that the networks reach.",
)
@click.option(
    "--attack", "of_attack", is_flag=True, help="Estimate `diffsmooth attack` with its default settings instead; a "
    "gradient counts as three draws.",
)  # fmt: skip
@click.option(
    "--probe", is_flag=True, help="Measure f on this machine's CPU, with random weights if the weights are not here.",
)  # fmt: skip
@SET
@JSON
def plan_command(
    specs: tuple[str, ...],
    gpus: tuple[str, ...],
    utilization: float,
    of_attack: bool,
    probe: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Estimate draws, FLOPs, GPU-hours and dollars of SPEC before anything is started; needs no weights.

    SPEC may also be a training.

    \b
    diffsmooth plan imagenet-diffsmooth-0.50 --gpu H100=2.50 --gpu A100=1.60
    diffsmooth plan my-training.toml
    """
    trainings = [name for name in specs if is_training(name)]
    if trainings and of_attack:
        raise UserError(f"--attack does not apply to {trainings[0]}, which is a training; remove one of them")
    load = {name: load_named_training if name in trainings else load_named for name in specs}
    loaded = [load[name](name, overrides) for name in specs]
    prices = parse_gpus(gpus)
    passes = flops.attack_passes() if of_attack else None
    plans: list[Estimate] = [
        flops.plan(one, prices=prices, utilization=utilization, passes=passes, probe=probe)
        if isinstance(one, RunSpec)
        else training.plan_training(one, prices=prices, utilization=utilization, probe=probe)
        for one in loaded
    ]
    conclude(plans, as_json=as_json, show=lambda found: print_plans(found, Console()))


def parse_gpus(options: Sequence[str]) -> dict[str, float | None]:
    """Return GPU -> dollars per hour, or None, from "NAME" or "NAME=PRICE"; all GPUs if `options` is empty.

    Names are case-insensitive. Raises: UserError for an unknown GPU and for an invalid price.
    """
    prices: dict[str, float | None] = {}
    for option in options:
        name, equals, text = option.partition("=")
        known = next((gpu for gpu in flops.GPUS if gpu.lower() == name.strip().lower()), None)
        if known is None:
            raise UserError(f"--gpu {option}: the peak of {name} is unknown; choose one of {', '.join(flops.GPUS)}")
        prices[known] = _price(option, known, text) if equals else None
    return prices or dict.fromkeys(flops.GPUS)


def _price(option: str, gpu: str, text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = math.nan
    if not 0 < price < math.inf:
        raise UserError(f"--gpu {option}: the price must be a number of dollars per hour above 0; use e.g. {gpu}=2.50")
    return price


def print_plans(plans: "Sequence[Estimate]", console: Console) -> None:
    """Print each estimate in words, and all of them as a table with a row per GPU."""
    console.width = max(console.width, 40 + sum(26 + len(one.name) for one in plans))  # so that no cell is truncated
    for one in plans:
        console.print("\n".join(one.describe()), highlight=False, soft_wrap=True)
    if any(one.total_flop is not None or one.cpu is not None for one in plans):
        console.print(_table(plans))


def _table(plans: "Sequence[Estimate]") -> Table:
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
