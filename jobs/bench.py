"""`diffsmooth bench`: its options, and the figures of `speed` as text."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from diffsmooth.jobs.console import conclude
from diffsmooth.jobs.later import Later
from diffsmooth.jobs.options import CPU, JSON, SET, on_device, together
from diffsmooth.jobs.specs import load_named

if TYPE_CHECKING:
    from diffsmooth.pipeline.cost import speed
    from diffsmooth.pipeline.cost.speed import Rate, SpeedFigures
else:
    speed = Later("diffsmooth.pipeline.cost.speed")

_POSITIVE = click.IntRange(min=1)
speed_options = together(
    click.argument("spec"),
    CPU,
    SET,
    click.option(
        "--batch-size", "sizes", multiple=True, type=_POSITIVE, help="Batch size to try. Can be repeated. "
        "[default: powers of two]",
    ),
    click.option(
        "--precision", "precisions", multiple=True, type=click.Choice(["fp32", "tf32", "bf16", "fp16"]),
        help="Further precision to measure. Can be repeated.",
    ),
    click.option("--threads", type=_POSITIVE, default=1, show_default=True, help="Threads of a CPU."),
    click.option(
        "--rounds", type=_POSITIVE, default=5, show_default=True, help="Rounds; each side is measured once per round."
    ),
    click.option("--draws", type=_POSITIVE, default=200, show_default=True, help="Draws on which votes are compared."),
    JSON,
)  # fmt: skip


@click.command("bench")
@speed_options
def bench_command(
    spec: str,
    cpu: bool,
    overrides: tuple[str, ...],
    sizes: tuple[int, ...],
    precisions: tuple[str, ...],
    threads: int,
    rounds: int,
    draws: int,
    as_json: bool,
) -> None:
    """Measure the speed of SPEC against its bare networks, and compare its votes in several precisions.

    Weights and images that are not on this machine are random; nothing is downloaded.

    \b
    diffsmooth bench cifar10-diffsmooth-0.50 --precision bf16 --precision tf32
    """
    loaded = load_named(spec, on_device(overrides, cpu))
    figures = speed.measure(
        speed.Pipeline(loaded, threads=threads),
        batch_sizes=sizes,
        precisions=precisions,
        effort=speed.Effort(rounds=rounds, agreement_draws=draws),
    )
    conclude(figures, as_json=as_json, show=lambda one: print_speed(one, Console()))


def print_speed(figures: "SpeedFigures", console: Console) -> None:
    """Print the figures in words and tables."""
    unit = "draws per CPU second" if figures.clock == "cpu" else "draws per second"
    console.width = max(console.width, 110)
    random = [*figures.random_weights, *(["images"] if figures.random_images else [])]
    console.print(
        f"{escape(figures.name)} on {escape(figures.device)}, {figures.precision}"
        + (f"; random: {', '.join(random)}" if random else ""),
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("side", "batch", unit, "memory"):
        table.add_column(heading, justify="left" if heading == "side" else "right", no_wrap=True)
    for name, rate in figures.draws_per_second.items():
        memory = f"{figures.peak_memory_bytes[name] / 1e9:.2f} GB"
        table.add_row(name, str(figures.batch_size[name]), f"{rate:,.4g}", memory)
    console.print(table)
    console.print("\n".join(_sentences(figures)), highlight=False)
    console.print(_sweep_table(figures.sweep, f"{unit} by batch size"))


def _sentences(figures: "SpeedFigures") -> list[str]:
    lines = [
        f"pipeline over {'bare networks' if name == 'bare' else name}: {ratio:.3f}"
        for name, ratio in figures.pipeline_over.items()
    ]
    lines.append(f"warm-up of the pipeline: {figures.warm_up_seconds['pipeline']:.1f} s of wall time")
    if figures.share_of_peak is not None:
        lines.append(
            f"{figures.gflop_per_second:,.1f} GFLOP/s, {figures.share_of_peak:.0%} of the "
            f"{figures.peak_gflop_per_second:,.1f} of a matrix product"
        )
    for name, one in figures.agreement.items():
        lines.append(
            f"votes equal to those of {name}: {one.equal:,} of {one.draws:,}; scores differ by at most "
            f"{one.largest_difference:.1e}"
        )
    return lines


def _sweep_table(sweep: "Sequence[Rate]", title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    sizes = sorted({one.batch_size for one in sweep})
    for heading in ("side", "precision", *map(str, sizes)):
        table.add_column(heading, justify="right" if heading.isdigit() else "left", no_wrap=True)
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for one in sweep:
        rows.setdefault((one.side, one.precision), {})[one.batch_size] = one.draws_per_second
    for (side, precision), rates in rows.items():
        table.add_row(side, precision, *(f"{rates[size]:,.4g}" if size in rates else "-" for size in sizes))
    return table
