"""`diffsmooth train`."""

from typing import TYPE_CHECKING

import click

from diffsmooth.jobs.console import conclude, print_text
from diffsmooth.jobs.later import Later
from diffsmooth.jobs.options import JSON, QUIET, SET
from diffsmooth.jobs.specs import load_named_training

if TYPE_CHECKING:
    from diffsmooth.jobs import training as work
else:
    work = Later("diffsmooth.jobs.training")


@click.command("train")
@click.argument("training", metavar="TRAINING")
@click.option("--out", help="Folder or s3://BUCKET/PREFIX of the training. [default: trainings/NAME]")
@click.option("--address", help="Address of the Ray cluster; trains on it. [default: train in this process]")
@click.option(
    "--workers",
    metavar="K[:L]",
    help="Train on Ray with K workers, or K to L as nodes come and go. [default: this process]",
)
@SET
@QUIET
@JSON
def train_command(
    training: str,
    out: str | None,
    address: str | None,
    workers: str | None,
    overrides: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Train a denoiser or a classifier, and write a spec that certifies it. Run it again to resume.

    \b
    diffsmooth train my-training.toml --out trainings/mine
    diffsmooth certify trainings/mine/certify.toml
    """
    spec = load_named_training(training, overrides)
    home = out or f"trainings/{spec.name}"
    done = work.train(spec, home, address=address, workers=workers, quiet=quiet or as_json)
    conclude(done, as_json=as_json, show=None if quiet else print_text)
