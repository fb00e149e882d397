"""The work of `train`: a network is trained in this process or on Ray."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeRemainingColumn

from diffsmooth.cluster.cast import Cluster
from diffsmooth.cluster.connect import check_device
from diffsmooth.cluster.trainer import Workers, train_on_ray
from diffsmooth.jobs.console import note
from diffsmooth.jobs.watch import stop_on_signals
from diffsmooth.pipeline.errors import Stopped
from diffsmooth.pipeline.models.device import available_device
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.training.checkpoint import Row
from diffsmooth.pipeline.training.loop import Report, check_training, run_training
from diffsmooth.pipeline.training.settings import TrainingSpec
from diffsmooth.pipeline.training.world import World


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a training wrote."""

    spec: TrainingSpec
    home: str
    row: Row  # the last metrics

    def to_json(self) -> dict[str, Any]:
        return {"out": self.home, **self.row}

    def __str__(self) -> str:
        wrote = f"{self.home}: weights.safetensors, provenance.json, metrics.csv, loss.png"
        if self.spec.classifier is None:
            return (
                f"{wrote}\ncertify.toml needs a classifier; add the table [classifier] and run the same command again\n"
            )
        return f"{wrote}, certify.toml\nnext: diffsmooth certify {self.home}/certify.toml\n"


def train_here(spec: TrainingSpec, home: str, *, quiet: bool) -> Row:
    """Train in this process. Raises: UserError, RunError; Stopped after SIGTERM or Ctrl-C, resumable."""
    stopped: list[int] = []
    device = available_device(spec.compute.device)
    with _progress(spec, quiet) as show, stop_on_signals(stopped.append):
        rows = run_training(
            spec, open_store(home), device=device, world=World(), on_step=show,
            stopped_by=lambda: stopped[0] if stopped else None,
        )  # fmt: skip
    return rows[-1]


@contextmanager
def _progress(spec: TrainingSpec, quiet: bool) -> Iterator[Callable[[Report], None]]:
    """Show a progress bar on stderr, and a line of metrics at each checkpoint."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(spec.name, total=spec.training.steps, loss=float("nan"))

        def show(report: Report) -> None:
            bar.update(task, completed=report.step, loss=report.loss)
            if report.row is not None and not quiet:
                note(describe(report.row))

        yield show


def describe(row: Row) -> str:
    """Return a row of metrics as one line."""
    rest = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items() if name not in ("step", "seconds"))
    return f"step {int(row['step'])}: {', '.join(rest)}, {row['seconds']:.0f} s"


def train(spec: TrainingSpec, home: str, *, address: str | None, workers: str | None, quiet: bool) -> Trained:
    """Train in this process, or on Ray if workers or a cluster are given.

    Raises: UserError, RunError; Stopped after SIGTERM or Ctrl-C, resumable.
    """
    if address is None and workers is None:
        return Trained(spec=spec, home=home, row=train_here(spec, home, quiet=quiet))
    count = Workers.parse(workers or "1")
    check_device(address, spec.compute.device)
    check_training(spec, open_store(home))

    def stop(signal: int) -> None:
        raise Stopped(signal)

    cluster = Cluster(address=address, device=spec.compute.device, actors=count.most, verbose=False)
    with cluster, stop_on_signals(stop):
        row = train_on_ray(spec, home, cluster, count)
    if not quiet:
        note(describe(row))
    return Trained(spec=spec, home=home, row=row)
