"""`diffsmooth compare`: paired differences between runs and logs on the samples that they share."""

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from diffsmooth.jobs.places import (
    Source,
    is_log,
    parse_grid,
    parse_source,
    read_source,
    with_distinct_names,
    writing,
)
from diffsmooth.pipeline.certify.compare import MOST_RUNS, Comparison, PairDifference, compare, shared_rows
from diffsmooth.pipeline.certify.curve import GROWN, Curve, table_radii
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.stored import OrderResult, comparison_notes, read_result
from diffsmooth.pipeline.show.logs import read_log
from diffsmooth.pipeline.votes.blocks import StoredBlock


@dataclass(frozen=True, kw_only=True)
class _Side:
    """One of the compared runs or logs."""

    rows: pd.DataFrame  # as `shared_rows` requires
    curve: Curve
    result: OrderResult | None  # None for a log


def compare_sources(sources: Sequence[str], *, order_name: str | None = None, grid: str | None = None) -> Comparison:
    """Compare [NAME=]RUN and [NAME=]LOG[@SIGMA], by default at round radii.

    Raises: UserError, also for runs that cannot be compared.
    """
    if not 2 <= len(sources) <= MOST_RUNS:
        raise UserError(f"{len(sources)} runs were given; give between 2 and {MOST_RUNS} runs or logs")
    chosen = None if grid is None else parse_grid(grid)
    parsed = [parse_source(text) for text in sources]
    read = [_read(source, order_name) for source in parsed]
    curves = with_distinct_names(parsed, [side.curve for side in read])
    sides = dict(zip((curve.name for curve in curves), read, strict=True))
    _check_claims(sides)
    radii = _radii(curves, chosen)
    rows = shared_rows({name: side.rows for name, side in sides.items()})
    found = compare(rows, radii.tolist(), without_acr=any(curve.tested is not None for curve in curves))
    return found.model_copy(update={"notes": [*_notes(sides, rows, radii), *found.notes]})


def print_comparison(found: Comparison, *, as_json: bool, output: str | None) -> None:
    """Print a comparison, or write it to a file. Raises: UserError if the file cannot be written."""
    text = json.dumps(found.to_json(), indent=2) + "\n" if as_json else describe(found)
    if output is None:
        click.echo(text, nl=False)
        return
    with writing("--output", output) as path:
        Path(path).write_text(text, encoding="utf-8")


def _read(source: Source, order_name: str | None) -> _Side:
    if is_log(source.place):
        curve = read_source(source, None)
        assert isinstance(curve, Curve)
        rows = read_log(source.place)
        if (rows["status"] == "certified").any() and not rows["radius"].any():
            raise UserError(
                f"{source.place}: the log has no radius above 0, so it seems to be a log of PREDICT; compare logs of "
                "CERTIFY"
            )
        return _Side(rows=rows.assign(image=""), curve=curve, result=None)
    stored = read_result(source.place, order_name)
    rows = stored.result.certificates
    images = _images(stored.blocks)
    rows = rows.assign(image=[images.get(sample, "") for sample in rows["sample"]])
    return _Side(rows=rows, curve=stored.result.curve, result=stored.result)


def _images(blocks: Iterable[StoredBlock]) -> dict[int, str]:
    """The hash of each sample's image."""
    return {one.block.sample: one.metadata.sample_sha256 for one in blocks}


def _check_claims(sides: Mapping[str, _Side]) -> None:
    """Refuse to compare shares that claim different properties of g."""
    (first, one), *others = sides.items()
    for name, other in others:
        kinds, costs = (one.curve.kind, other.curve.kind), [_costly(side) for side in (one, other)]
        if not kinds[0].comparable_with(kinds[1]) or costs[0] != costs[1]:
            weaker = next((kind for kind in kinds if not kind.claims_label), kinds[0])
            raise UserError(
                f"{first}, {name}: the certificate {weaker.name!r} {weaker.caveat.partition(';')[0]}; compare it with "
                "orders that have the same certificate and the same costly classes"
            )


def _costly(side: _Side) -> Mapping[int, Sequence[int]] | None:
    return None if side.result is None else side.result.order.costly


def _radii(curves: Sequence[Curve], chosen: np.ndarray | None) -> np.ndarray:
    """The chosen radii, or round ones; with grid mode, radii that every such order tested. Raises: UserError."""
    grids = [set(curve.tested.tolist()) for curve in curves if curve.tested is not None]
    if not grids:
        return table_radii(curves) if chosen is None else chosen
    tested = sorted(set.intersection(*grids))
    wrong = [] if chosen is None else sorted(set(chosen.tolist()) - set(tested))
    shown = ", ".join(f"{radius:g}" for radius in tested[:20]) or "none"
    if wrong or not tested:
        problem = f"r = {wrong[0]:g} was not tested" if wrong else "no radius was tested"
        raise UserError(f"{problem} by every order in grid mode; use radii that were: {shown}")
    return np.array(tested) if chosen is None else chosen


def _notes(sides: Mapping[str, _Side], rows: Mapping[str, pd.DataFrame], radii: np.ndarray) -> list[str]:
    """What must be said with the figures: samples left out, settings that differ, second looks."""
    shared = len(next(iter(rows.values())))
    notes = []
    if any(len(side.rows) > shared for side in sides.values()):
        sizes = ", ".join(f"{shared:,} of {len(side.rows):,} in {name}" for name, side in sides.items())
        notes.append(f"only samples that are complete in all runs are compared: {sizes}")
    sigmas = [side.curve.sigma for side in sides.values()]
    if len(set(sigmas)) > 1:
        shown = ", ".join("unknown" if sigma is None else f"{sigma:g}" for sigma in sigmas)
        notes.append(f"the runs differ in sigma ({shown}), so a difference between them is not only one of f")
    notes += comparison_notes([side.result for side in sides.values() if side.result is not None])
    notes += _about_attacks([side.curve for side in sides.values()], list(sides), radii)
    if logs := [name for name, side in sides.items() if side.result is None]:
        notes.append(
            f"{', '.join(logs)}: a log does not state n, n0, alpha or its images; only the labels were compared"
        )
    if late := [name for name, table in rows.items() if table["post_hoc"].any()]:
        notes.append(f"post hoc: {', '.join(late)}; an earlier order covers these samples")
    if grown := [name for name, side in sides.items() if side.curve.grown]:
        notes.append(f"{', '.join(grown)}: {GROWN}")
    return notes


def _about_attacks(curves: Sequence[Curve], names: Sequence[str], radii: np.ndarray) -> list[str]:
    """The gap between certified and resisted accuracy of each run that was attacked."""
    notes = []
    for name, curve in zip(names, curves, strict=True):
        if curve.uppers is None:
            continue
        shown = "; ".join(
            f"r = {radius:.10g}: {100 * certified:.1f} certified, {100 * resisted:.1f} not proven wrong"
            for radius, certified, resisted in zip(radii, curve.at(radii), curve.resisted(radii), strict=True)
        )
        attacked = int(np.isfinite(curve.uppers).sum())
        notes.append(f"attacks on {name} (upper bounds for {attacked:,} of {curve.num_samples:,} samples), %: {shown}")
    return notes


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
