"""`diffsmooth compare`: paired differences between runs and logs on the samples that they share."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
from rich import box
from rich.console import Console
from rich.table import Table

from diffsmooth.jobs.console import conclude, json_of
from diffsmooth.jobs.options import GRID, JSON, ORDER, SOURCE_ARGUMENTS
from diffsmooth.jobs.places import (
    Source,
    is_log,
    parse_source,
    read_source,
    with_distinct_names,
    writing,
)
from diffsmooth.pipeline.certify.compare import MOST_RUNS, Comparison, PairDifference
from diffsmooth.pipeline.certify.curve import Curve
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.compared import Side, compare_sides
from diffsmooth.pipeline.results.stored import read_result
from diffsmooth.pipeline.show.grids import parse_grid
from diffsmooth.pipeline.show.logs import read_log
from diffsmooth.pipeline.votes.blocks import StoredBlock


@click.command("compare")
@SOURCE_ARGUMENTS
@ORDER
@GRID
@click.option("--output", metavar="FILE", help="Write to this file. [default: stdout]")
@JSON
def compare_command(
    sources: tuple[str, ...], order_name: str | None, grid: str | None, output: str | None, as_json: bool
) -> None:
    """Test which of two or more runs certifies more of the samples that they share.

    Prints differences of certified accuracy (exact McNemar test) and of ACR (BCa bootstrap), with intervals that hold
    for all radii and pairs at once, and the number of samples that would show a difference of 1 point.

    \b
    diffsmooth compare runs/mnist-diffsmooth-0.50 runs/mnist-cohen-0.50 --grid 0:1.5:0.25
    """
    found = compare_sources(sources, order_name=order_name, grid=grid)
    if output is None:
        conclude(found, as_json=as_json, show=lambda one: click.echo(describe(one), nl=False))
    with writing("--output", output) as path:
        Path(path).write_text(json_of(found) + "\n" if as_json else describe(found), encoding="utf-8")


def compare_sources(sources: Sequence[str], *, order_name: str | None = None, grid: str | None = None) -> Comparison:
    """Compare [NAME=]RUN and [NAME=]LOG[@SIGMA], by default at round radii.

    Raises: UserError, also for runs that cannot be compared.
    """
    if not 2 <= len(sources) <= MOST_RUNS:
        raise UserError(f"{len(sources)} runs were given; compare needs between 2 and {MOST_RUNS} runs or logs")
    chosen = None if grid is None else parse_grid(grid)
    parsed = [parse_source(text) for text in sources]
    read = [_read(source, order_name) for source in parsed]
    curves = with_distinct_names(parsed, [side.curve for side in read])
    return compare_sides(dict(zip((curve.name for curve in curves), read, strict=True)), chosen)


def _read(source: Source, order_name: str | None) -> Side:
    if is_log(source.place):
        curve = read_source(source, None)
        assert isinstance(curve, Curve)
        rows = read_log(source.place)
        if (rows["status"] == "certified").any() and not rows["radius"].any():
            raise UserError(
                f"{source.place}: the log has no radius above 0, so it seems to be a log of PREDICT; compare logs of "
                "CERTIFY"
            )
        return Side(rows=rows.assign(image=""), curve=curve, result=None)
    stored = read_result(source.place, order_name)
    rows = stored.result.certificates
    images = _images(stored.blocks)
    rows = rows.assign(image=[images.get(sample, "") for sample in rows["sample"]])
    return Side(rows=rows, curve=stored.result.curve, result=stored.result)


def _images(blocks: Iterable[StoredBlock]) -> dict[int, str]:
    """The hash of each sample's image."""
    return {one.block.sample: one.metadata.sample_sha256 for one in blocks}


def describe(found: Comparison) -> str:
    """The comparison as text."""
    pairs = len(found.pairs)
    lines = [f"{found.samples:,} samples that all runs share; differences are first - second, in points\n"]
    for pair in found.pairs:
        lines += [_heading(pair), _table(pair)]
    lines += [
        f"intervals: 95 %, all {pairs * len(found.pairs[0].radii)} rows at once; of ACR: 95 %, BCa bootstrap"
        + (f", all {pairs} pairs at once" if pairs > 1 else ""),
        "p: exact McNemar test at this radius alone; p Holm: corrected for all rows",
        "needed: samples that would show a difference of 1 point in this table, with probability 80 %",
        *found.notes,
    ]
    return "\n".join(lines) + "\n"


def _heading(pair: PairDifference) -> str:
    if pair.first_acr is None or pair.second_acr is None or pair.acr_difference is None:
        return f"{pair.first} - {pair.second}"
    interval = "" if pair.acr_lower is None else f" [{pair.acr_lower:.3f}, {pair.acr_upper:.3f}]"
    return (
        f"{pair.first} - {pair.second}: ACR {pair.first_acr:.3f} - {pair.second_acr:.3f} = "
        f"{pair.acr_difference:.3f}{interval}"
    )


def _table(pair: PairDifference) -> str:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for heading in (
        "radius", "first, %", "second, %", "difference", "95 % interval", "only first", "only second", "p", "p Holm",
        "needed",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=True)
    for row in pair.radii:
        table.add_row(
            f"{row.radius:.10g}",
            f"{100 * row.first_accuracy:.1f}",
            f"{100 * row.second_accuracy:.1f}",
            f"{100 * row.difference:+.1f}",
            f"[{100 * row.lower:+.1f}, {100 * row.upper:+.1f}]",
            f"{row.first_only:,}",
            f"{row.second_only:,}",
            f"{row.p_value:.2g}",
            f"{row.p_holm:.2g}",
            f"{row.samples_needed:,}",
        )
    console = Console(file=io.StringIO(), width=100_000, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().strip("\n").split("\n")) + "\n"
