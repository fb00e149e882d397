"""The verb `curve`: several runs and published logs in one table and one picture."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal, DecimalException
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from jobs.certify import read_order, writing
from pipeline.curve import Curve, curve_of, plot
from pipeline.errors import UserError
from pipeline.logs import read_log
from pipeline.tables import ENVELOPE, render

_ENDINGS = (".png", ".pdf", ".svg")
_MOST_RADII = 10_000


class Source(NamedTuple):
    """One of the places that the command line names."""

    label: str
    place: str
    sigma: float | None  # given with a log


def compare(
    sources: Sequence[str],
    *,
    order_name: str | None,
    grid: str | None,
    float_grid: bool,
    form: str,
    output: str | None,
    picture: str | None,
    envelope: bool,
) -> None:
    """Print or write the table of [NAME=]RUN and [NAME=]LOG[@SIGMA], and the picture where it is asked for.

    Raises: UserError; what can be told from the command line alone is told before anything is read.
    """
    if picture and Path(picture).suffix.lower() not in _ENDINGS:
        raise UserError(f"--plot {picture}: the ending must be {', '.join(_ENDINGS[:-1])} or {_ENDINGS[-1]}")
    if float_grid and not grid:
        raise UserError("--float-grid says how --grid is meant: add --grid START:STOP:STEP")
    radii = _radii(grid, float_grid) if grid else None
    parsed = [parse_source(text) for text in sources]
    curves = [_curve(source, order_name) for source in parsed]
    curves = with_distinct_names(parsed, curves, taken=[ENVELOPE] if envelope else [])
    table = render(curves, form, radii=radii, envelope=envelope)
    if output:
        with writing("--output", output):
            Path(output).write_text(table, encoding="utf-8")
    else:
        click.echo(table, nl=False)
    if picture:
        with writing("--plot", picture):
            plot(curves, picture, envelope=envelope)
        click.echo(f"{picture}: the curves, with 95 % intervals", err=True)


def _radii(grid: str, float_grid: bool) -> NDArray[np.float64]:
    """START, START + STEP, ... up to STOP: exact decimals, or in floats as published tables do.

    70 steps of 0.005 are 0.35 in decimals and 0.35000000000000003 in floats, where a radius of 0.35 does not reach.
    """
    try:
        start, stop, step = map(Decimal, grid.split(":"))
        if not all(math.isfinite(float(value)) for value in (start, stop, step)):
            raise ValueError
    except (ValueError, DecimalException):
        raise UserError(f"--grid {grid}: must be START:STOP:STEP in decimal numbers, say 0:1.5:0.25") from None
    if float(step) <= 0:
        raise UserError(f"--grid {grid}: the step {step} must be above 0")
    if not 0 <= start <= stop:
        raise UserError(f"--grid {grid}: the radii must satisfy 0 <= START <= STOP")
    if (stop - start) / _MOST_RADII >= step:
        raise UserError(f"--grid {grid}: more than {_MOST_RADII:,} radii: take a larger step")
    if float_grid:
        return np.arange(float(start), float(stop) + float(step), float(step))
    return np.array([float(start + index * step) for index in range(int((stop - start) // step) + 1)])


def parse_source(text: str) -> Source:
    """Parse [NAME=]PLACE[@SIGMA]; what exists under the whole text is taken as it stands."""
    label, equals, place = text.partition("=")
    if _stands(text) or not equals or "/" in label:
        label, place = "", text
    elif not label:
        raise UserError(f"{text}: nothing stands before the '=': write NAME={place}")
    sigma = None
    log, _, value = place.rpartition("@")
    if _stands(log) and not _stands(place):
        place, sigma = log, _sigma(text, value)
    if not _stands(place):
        raise UserError(f"{place}: nothing stands there: give a run's folder, s3://BUCKET/PREFIX or a log")
    if sigma is not None and not is_log(place):
        raise UserError(f"{text}: a run knows its own sigma: leave @{value} out")
    return Source(label, place, sigma)


def _sigma(text: str, value: str) -> float:
    try:
        sigma = float(value)
    except ValueError:
        sigma = 0.0
    if not 0 < sigma < math.inf:
        raise UserError(f"{text}: sigma = {value!r} must be a number above 0")
    return sigma


def _stands(place: str) -> bool:
    return "://" in place or os.path.exists(place)


def is_log(place: str) -> bool:
    return "://" not in place and not os.path.isdir(place)


def _curve(source: Source, order_name: str | None) -> Curve:
    if not is_log(source.place):
        return read_order(source.place, order_name).curve
    certificates = read_log(source.place)
    # a number is part of a name (sigma_0.50), and no ending
    name = re.sub(r"\.[A-Za-z]\w*$", "", Path(source.place).name)
    curve = curve_of(name, certificates, source.sigma, certificates["radius"].max())
    if not curve.num_samples:
        raise UserError(f"{source.place}: the log holds no sample; leave it out")
    return curve


def with_distinct_names(
    sources: Sequence[Source], curves: Sequence[Curve], *, taken: Sequence[str] = ()
) -> list[Curve]:
    """The curves under their labels, or under as much of their paths as tells them apart.

    Raises: UserError where nothing does.
    """
    paths = [_name_parts(source, curve.name) for source, curve in zip(sources, curves, strict=True)]
    names = _distinct([*paths, *((name,) for name in taken)])
    return [replace(curve, name=name) for curve, name in zip(curves, names, strict=False)]


def _name_parts(source: Source, name: str) -> tuple[str, ...]:
    """A curve's name and what stands before it: a label alone, else the folders above."""
    if source.label:
        return (source.label,)
    above = source.place.rstrip("/") if "://" in source.place else os.path.abspath(source.place)
    parts = [part for part in above.split("/") if part]
    if is_log(source.place) or parts[-1:] == [name]:
        parts.pop()
    return (*parts, name)


def _distinct(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """The last part of each path, with as many of those before it as tell it from the others."""
    taken = [1] * len(paths)
    while True:
        names = ["/".join(path[-count:]) for path, count in zip(paths, taken, strict=True)]
        alike = [index for index, name in enumerate(names) if names.count(name) > 1]
        if not alike:
            return names
        if all(taken[index] >= len(paths[index]) for index in alike):
            name = paths[alike[0]][-1]
            raise UserError(f"two curves have the name {name!r}: give one another, NAME=PATH, or leave it out")
        taken = [count + (index in alike) for index, count in enumerate(taken)]
