"""`diffsmooth report`."""

import sys
from typing import TYPE_CHECKING, Any

import click

from diffsmooth.jobs.later import Later
from diffsmooth.jobs.options import ORDER, PIXELS, SET
from diffsmooth.jobs.specs import load_named, load_shipped
from diffsmooth.pipeline.errors import printable

if TYPE_CHECKING:
    from diffsmooth.jobs import reporting
else:
    reporting = Later("diffsmooth.jobs.reporting")


@click.command("report")
@click.argument("sources", nargs=-1, required=True, metavar="RUN...")
@ORDER
@click.option(
    "--spec", "specs", multiple=True, metavar="SPEC", help="Spec of a run, for pictures. [default: a shipped one]"
)
@SET
@click.option(
    "--samples", "each", type=click.IntRange(min=0), default=3, show_default=True, help="Samples to show of each kind."
)
@PIXELS
@click.option(
    "--output", default="report.html", show_default=True, metavar="FILE", help="Write the report to this file."
)
def report_command(
    sources: tuple[str, ...], specs: tuple[str, ...], overrides: tuple[str, ...], output: str, **options: Any
) -> None:
    """Write one HTML file with curves, radii, classes, pictures, guarantees, and how the run was made.

    NAME=RUN names a run. Exit status 1 if samples are incomplete.

    \b
    diffsmooth report runs/mnist
    diffsmooth report runs/mnist-*-0.50 --output mnist.html
    """
    loaded = [load_named(name, overrides) for name in specs]
    complete = reporting.report(sources, specs=loaded, shipped=load_shipped, output=output, **options)
    click.echo(printable(f"{output}: report"))
    sys.exit(0 if complete else 1)
