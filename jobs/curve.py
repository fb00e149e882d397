"""`diffsmooth curve`: several runs and published logs in one table and one picture."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from jobs.cascade import cascade
from jobs.places import is_log, parse_source, read_source, with_distinct_names, writing
from pipeline.cascade import CASCADE
from pipeline.curve import Curve, plot
from pipeline.errors import UserError
from pipeline.results import comparison_notes
from pipeline.tables import ENVELOPE, render

logger = logging.getLogger(__name__)

_ENDINGS = (".png", ".pdf", ".svg")
_MOST_RADII = 10_000


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What to print and draw; the fields are the options of the command."""

    order_name: str | None = None
    grid: str | None = None
    float_grid: bool = False
    form: str = "text"
    output: str | None = None
    picture: str | None = None
    envelope: bool = False
    cascade: bool = False  # also adds the envelope


def curve(sources: Sequence[str], layout: Layout) -> None:
    """Print or write the table of [NAME=]RUN and [NAME=]LOG[@SIGMA], and draw the picture if one is requested.

    Raises: UserError; mistakes on the command line are reported before anything is read.
    """
    picture = layout.picture
    if picture and Path(picture).suffix.lower() not in _ENDINGS:
        raise UserError(f"--plot {picture}: the file must end in {', '.join(_ENDINGS[:-1])} or {_ENDINGS[-1]}")
    if layout.float_grid and not layout.grid:
        raise UserError("--float-grid changes the meaning of --grid; add --grid START:STOP:STEP")
    radii = _radii(layout.grid, layout.float_grid) if layout.grid else None
    parsed = [parse_source(text) for text in sources]
    read = [read_source(source, layout.order_name) for source in parsed]
    curves = [one if isinstance(one, Curve) else one.curve for one in read]
    envelope = layout.envelope or layout.cascade
    taken = [ENVELOPE] * envelope + [CASCADE] * layout.cascade
    curves = with_distinct_names(parsed, curves, taken=taken)
    if layout.cascade:
        curves.append(cascade([source.place for source in parsed if not is_log(source.place)]).curve)
    table = render(curves, layout.form, radii=radii, envelope=envelope)
    for line in comparison_notes([one for one in read if not isinstance(one, Curve)]):
        logger.warning("NOTE: %s", line)
    if layout.output:
        with writing("--output", layout.output):
            Path(layout.output).write_text(table, encoding="utf-8")
    else:
        click.echo(table, nl=False)
    if picture:
        with writing("--plot", picture):
            plot(curves, picture, envelope=envelope)
        click.echo(f"{picture}: curves with 95 % intervals", err=True)


def _radii(grid: str, float_grid: bool) -> NDArray[np.float64]:
    """START, START + STEP, ... up to STOP: exact decimals, or floats as in published tables.

    70 steps of 0.005 are 0.35 in decimals but 0.35000000000000003 in floats, which a radius of 0.35 does not reach.
    """
    try:
        start, stop, step = map(Decimal, grid.split(":"))
        if not all(math.isfinite(float(value)) for value in (start, stop, step)):
            raise ValueError
    except (ValueError, DecimalException):
        raise UserError(f"--grid {grid} must be START:STOP:STEP in decimal numbers, for example 0:1.5:0.25") from None
    if float(step) <= 0:
        raise UserError(f"--grid {grid}: the step {step} must be above 0")
    if not 0 <= start <= stop:
        raise UserError(f"--grid {grid}: the radii must satisfy 0 <= START <= STOP")
    if (stop - start) / _MOST_RADII >= step:
        raise UserError(f"--grid {grid}: more than {_MOST_RADII:,} radii; use a larger step")
    if float_grid:
        return np.arange(float(start), float(stop) + float(step), float(step))
    return np.array([float(start + index * step) for index in range(int((stop - start) // step) + 1)])
