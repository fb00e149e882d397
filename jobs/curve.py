"""`diffsmooth curve`: several runs and published logs in one table and one picture."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from diffsmooth.jobs.options import GRID, ORDER, PIXELS, SOURCE_ARGUMENTS
from diffsmooth.jobs.places import (
    images_of,
    is_log,
    parse_images,
    parse_source,
    read_source,
    with_distinct_names,
    writing,
)
from diffsmooth.pipeline.certify.curve import Curve, plot
from diffsmooth.pipeline.certify.kinds import CASCADE
from diffsmooth.pipeline.certify.units import UNITS, converted
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.cascades import cascade
from diffsmooth.pipeline.results.stored import comparison_notes
from diffsmooth.pipeline.show.grids import parse_grid
from diffsmooth.pipeline.show.tables import ENVELOPE, FORMATS, render

logger = logging.getLogger(__name__)

_ENDINGS = (".png", ".pdf", ".svg")


@click.command("curve")
@SOURCE_ARGUMENTS
@ORDER
@GRID
@click.option("--float-grid", is_flag=True, help="Use numpy.arange in floats for --grid, as published tables do.")
@click.option(
    "--format", "form", type=click.Choice(list(FORMATS)), default="text", show_default=True, help="Format of the table."
)
@click.option("--output", metavar="FILE", help="Write the table to this file. [default: stdout]")
@click.option("--plot", "picture", metavar="FILE", help="Draw the curves into a .png, .pdf or .svg file.")
@click.option("--envelope", is_flag=True, help="Add the best curve at each radius, and its name; not a classifier.")
@click.option("--cascade", is_flag=True, help="Add one certificate over the sigmas of the runs, and the envelope.")
@click.option(
    "--unit",
    type=click.Choice(list(UNITS)),
    default="l2",
    show_default=True,
    help="Convert the radii: other pixel scales, or the l-infinity norm.",
)
@PIXELS
@click.option("--std", metavar="S,S,S", help="With --unit l2-normalized: std per channel of the normalisation.")
def curve_command(sources: tuple[str, ...], **layout: Any) -> None:
    """Compare runs and published logs in one table and one picture.

    A folder, s3://BUCKET/PREFIX or hf://datasets/ORG/NAME is a run, a file is a log in Cohen's layout. NAME=PATH names
    a curve, LOG@SIGMA gives the sigma of a log.

    \b
    diffsmooth curve runs/mnist-cohen-0.50 runs/mnist-diffsmooth-0.50 --plot curves.png
    diffsmooth curve runs/my-0.50 Cohen=sigma_0.50@0.5 --grid 0:1.5:0.25 --format latex
    """
    curve(sources, Layout(**layout))


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
    unit: str = "l2"
    pixels: str | None = None
    std: str | None = None


def curve(sources: Sequence[str], layout: Layout) -> None:
    """Print or write the table of [NAME=]RUN and [NAME=]LOG[@SIGMA], and draw the picture if one is requested.

    Raises: UserError; mistakes on the command line are reported before anything is read.
    """
    picture = layout.picture
    if picture and Path(picture).suffix.lower() not in _ENDINGS:
        raise UserError(f"--plot {picture}: the file must end in {', '.join(_ENDINGS[:-1])} or {_ENDINGS[-1]}")
    if layout.float_grid and not layout.grid:
        raise UserError("--float-grid changes the meaning of --grid; add --grid START:STOP:STEP")
    radii = parse_grid(layout.grid, layout.float_grid) if layout.grid else None
    images = parse_images(layout.pixels, layout.std)
    parsed = [parse_source(text) for text in sources]
    read = [read_source(source, layout.order_name) for source in parsed]
    curves = [one if isinstance(one, Curve) else one.curve for one in read]
    envelope = layout.envelope or layout.cascade
    taken = [ENVELOPE] * envelope + [CASCADE] * layout.cascade
    curves = with_distinct_names(parsed, curves, taken=taken)
    runs = [None if isinstance(one, Curve) else one.run for one in read]
    if layout.cascade:
        curves.append(cascade([source.place for source in parsed if not is_log(source.place)]).curve)
        runs.append(next(run for run in runs if run is not None))
    if layout.unit != "l2":
        curves = [
            converted(curve, layout.unit, images_of(run, images)) for curve, run in zip(curves, runs, strict=True)
        ]
    table = render(curves, layout.form, radii=radii, envelope=envelope)
    for line in comparison_notes([one for one in read if not isinstance(one, Curve)]):
        logger.warning("NOTE: %s", line)
    if layout.output:
        with writing("--output", layout.output) as path:
            Path(path).write_text(table, encoding="utf-8")
    else:
        click.echo(table, nl=False)
    if picture:
        with writing("--plot", picture) as path:
            plot(curves, path, envelope=envelope)
        click.echo(f"{picture}: curves with 95 % intervals", err=True)
