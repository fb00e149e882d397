"""The options that several commands have, each declared once."""

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from diffsmooth.jobs.specs import SPECS
from diffsmooth.pipeline.errors import UserError

# The certificates that certify offers; those of the other commands include predict and the cascade.
CERTIFICATES = ("top", "multiclass", "cost")  # equals the table of pipeline/certify, whose import takes a second

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Command], Command]


def together(*options: Option[Any]) -> Option[Any]:
    """Several options as one decorator, in the order in which the help shows them."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _complete_spec(context: click.Context, option: click.Parameter, typed: str) -> list[CompletionItem]:
    """The names of the shipped specs, then files."""
    names = [name for name in SPECS.names() if name.startswith(typed)]
    return [*map(CompletionItem, names), *([] if names else [CompletionItem(typed, type="file")])]


def _log_more(context: click.Context, option: click.Parameter, wanted: bool) -> bool:
    if wanted:
        logging.getLogger().setLevel(logging.INFO)
    return wanted


SPEC_ARGUMENTS = click.argument("specs", nargs=-1, required=True, metavar="SPEC...", shell_complete=_complete_spec)
RUN_ARGUMENT = click.argument("run")
SOURCE_ARGUMENTS = click.argument("sources", nargs=-1, required=True, metavar="RUN_OR_LOG...")
SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the spec. Can be repeated."
)
YES = click.option("--yes", is_flag=True, help="Do not ask for confirmation before an expensive order.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON only on stdout.")
CPU = click.option("--cpu", is_flag=True, help="Run on the CPU; same as --set compute.device=cpu.")
QUIET = click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
VERBOSE = click.option(
    "-v",
    "--verbose",
    is_flag=True,
    callback=_log_more,
    help="Print more, including everything from Ray and its actors.",
)
COSTLY = click.option(
    "--costly",
    metavar="FILE",
    help="With --certificate cost: a cost matrix (.csv, a row per label) or lines such as 3 = [5, 7] (.toml).",
)
ORDER = click.option("--order", "order_name", help="Name of the order in each run. [default: the first]")
GRID = click.option(
    "--grid", metavar="START:STOP:STEP", help="Radii, as exact decimals up to STOP. [default: round radii]"
)
PIXELS = click.option(
    "--pixels", metavar="C,H,W", help="Shape of the images, for l-infinity radii. [default: that of CIFAR-10, ImageNet]"
)
ADDRESS = click.option("--address", help="Address of the Ray cluster. [default: RAY_ADDRESS, else start a local Ray]")
ACTORS = click.option(
    "--actors", type=click.IntRange(min=1), help="Number of actors, one per device. [default: every GPU, else core]"
)
ACCELERATOR = click.option(
    "--accelerator",
    "accelerators",
    multiple=True,
    metavar="NAME",
    help="Use GPUs of this type only, such as H100. Can be repeated. [default: any]",
)
MEMORY = click.option(
    "--memory",
    "memory_gb",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB",
    help="Main memory to reserve for each actor. [default: none]",
)


def batch_size(on_gpu: str) -> Option[Any]:
    """--batch-size with its default on a GPU in words."""
    return click.option(
        "--batch-size", type=click.IntRange(min=1), help=f"Draws per batch. [default: 64 on a CPU, {on_gpu} on a GPU]"
    )


def on_device(overrides: tuple[str, ...], cpu: bool) -> tuple[str, ...]:
    """The overrides of --set, and that of --cpu after them."""
    return (*overrides, "compute.device=cpu") if cpu else overrides


def ask_unless(yes: bool) -> Callable[[str], None]:
    """What to do with a warning about an expensive order: ask for confirmation on a terminal, print it elsewhere."""

    def confirm(warning: str) -> None:
        if yes:
            return
        if sys.stdin.isatty() and sys.stderr.isatty():
            if not click.confirm(f"diffsmooth: {warning}. Continue?", err=True):
                raise UserError("aborted; nothing was started; use --yes to skip this prompt")
        else:
            click.echo(f"diffsmooth: {warning} (use --yes to suppress this warning)", err=True)

    return confirm
