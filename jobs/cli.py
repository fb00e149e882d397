"""The command `diffsmooth`: a table of commands, and the exit status of each way in which a command ends.

The module of a command is imported when the command runs or its help is shown, so that `--help` and completion start
fast.

Exit status: 0 complete; 2 a mistake of the user; 1 our mistake, a failure of the environment, or incomplete; 130 and
143 stopped by Ctrl-C and SIGTERM, resumable.
"""

import importlib
import importlib.metadata
import logging
import platform
import sys
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from diffsmooth.pipeline.errors import RunError, Stopped, UserError, printable, redacted


class Entry(NamedTuple):
    """A command: the module of `diffsmooth.jobs` that declares NAME_command, and what it does in a sentence."""

    name: str
    module: str
    sentence: str


_TABLE = (
    Entry("certify", "certify", "Cast votes, compute certified radii, and draw the curve."),
    Entry("predict", "certify", "Cast votes and predict with abstention."),
    Entry("status", "status", "Show what a run has committed and what is missing."),
    Entry("analyze", "analyze", "Certify stored votes with other settings, without draws."),
    Entry("curve", "curve", "Compare runs and logs in one table and one picture."),
    Entry("compare", "compare", "Test which of several runs certifies more samples."),
    Entry("report", "report", "Write one HTML file about one or more runs."),
    Entry("attack", "attack", "Bound radii from above by searching for adversarial images."),
    Entry("audit", "audit", "Check a run's files, and cast some of its votes again."),
    Entry("seal", "seal", "Compute one hash over all that certificates depend on."),
    Entry("publish", "publish", "Publish a run so that anyone can audit it."),
    Entry("plan", "plan", "Estimate draws, FLOPs, GPU-hours and dollars of a spec."),
    Entry("bench", "bench", "Measure the speed of a spec against its bare networks."),
    Entry("submit", "submit", "Certify as a Ray job with its driver on the cluster."),
    Entry("train", "train", "Train a denoiser or a classifier, and write its spec."),
    Entry("completion", "completion", "Print a script that completes commands in a shell."),
)
COMMANDS = {entry.name: entry for entry in _TABLE}


class _Main(click.Group):
    """Imports a command when it is needed; reports how it ended in one line, with its exit status."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"diffsmooth.jobs.{COMMANDS[name].module}"), f"{name}_command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.sentence) for name, entry in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=entry.sentence) for name, entry in COMMANDS.items() if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _fail(error, 2)
        except RunError as error:
            _fail(error, 1)
        except Stopped as stopped:
            click.echo("diffsmooth: stopped; run the same command to resume", err=True)
            sys.exit(128 + stopped.signal)
        except KeyboardInterrupt:
            click.echo("diffsmooth: stopped", err=True)
            sys.exit(130)


class _Formatter(logging.Formatter):
    """One line without secrets, also for messages of other packages."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redacted(super().format(record)))


def _fail(error: Exception, status: int) -> None:
    click.echo(printable(f"diffsmooth: {redacted(' '.join(str(error).split()))}"), err=True)
    sys.exit(status)


def _show_versions(context: click.Context, option: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    from diffsmooth.pipeline.models.device import describe_torch

    click.echo(
        f"diffsmooth {importlib.metadata.version('diffsmooth')} (Python {platform.python_version()}, "
        f"{describe_torch()}, Ray {importlib.metadata.version('ray')})"
    )
    context.exit()


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_show_versions,
              help="Show the versions of diffsmooth, Python, torch, CUDA and Ray, and exit.")  # fmt: skip
def main() -> None:
    """Certify image classifiers against l2 attacks with DiffSmooth and its relatives, on Ray.

    \b
    diffsmooth certify fashion           run the demo: no GPU, no download
    diffsmooth report runs/fashion       write everything about a run into one HTML file
    """
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_Formatter("diffsmooth: %(message)s"))
    for module in (
        "diffsmooth.pipeline.storage.fetch",
        "diffsmooth.pipeline.data",
    ):  # downloads in progress, and the order of the classes
        logging.getLogger(module).setLevel(logging.INFO)


if __name__ == "__main__":
    main()
