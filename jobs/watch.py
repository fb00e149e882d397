"""Watch: shows a run in progress on a terminal, in a notebook, as plain lines, and in progress.json; handles
signals."""

import logging
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diffsmooth.cluster.cast import Cluster
from diffsmooth.cluster.listener import Listener, Update
from diffsmooth.cluster.worker import CleanAccuracy
from diffsmooth.jobs.console import note
from diffsmooth.jobs.hooks import tell_progress
from diffsmooth.pipeline.block import STAGES
from diffsmooth.pipeline.certify.advice import better_than_chance
from diffsmooth.pipeline.certify.bounds import certified_radius, lower_confidence_bound
from diffsmooth.pipeline.certify.certificates import top_class
from diffsmooth.pipeline.certify.orders import Order
from diffsmooth.pipeline.results import stored as results
from diffsmooth.pipeline.storage.store import Store
from diffsmooth.pipeline.votes.blocks import Votes

logger = logging.getLogger(__name__)

_LOG_SECONDS = 10.0  # between plain progress lines, and between writes of progress.json


def progress_bar(console: Console) -> Progress:
    """A bar of draws with rate and ETA; its task needs the fields `rate` and `note`."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("draws  {task.fields[rate]:,.0f}/s  ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
    )


@contextmanager
def bar_in_process(name: str, *, show: bool) -> Iterator[Callable[[int, int, float], None]]:
    """Give a function that shows the draws cast, the draws wanted and draws per second as a bar on stderr."""
    bar = progress_bar(Console(stderr=True, quiet=not show))
    task = bar.add_task(name, total=None, rate=0.0, note="")

    def update(done: int, total: int, rate: float) -> None:
        bar.start()
        bar.update(task, completed=done, total=total, rate=rate)

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """How a command computes on the cluster, and how much it prints."""

    address: str | None = None
    actors: int | None = None
    accelerators: tuple[str, ...] = ()
    memory_gb: float | None = None
    batch_size: int | None = None
    quiet: bool = False
    verbose: bool = False

    def connect(self, device: str) -> Cluster:
        """Attach to the cluster or start one; `device` is compute.device. Raises: UserError as Cluster."""
        return Cluster(
            address=self.address,
            device=device,
            actors=self.actors,
            accelerators=self.accelerators,
            memory_gb=self.memory_gb,
            verbose=self.verbose,
        )


class Tally(Protocol):
    """What a watch says about the work so far."""

    def add(self, new: Votes) -> None: ...

    def describe(self) -> str: ...


class Watch(Listener):
    """A context manager that takes the driver's updates: a bar on a terminal or in a notebook, else plain lines."""

    def __init__(self, name: str, tally: Tally, store: Store, quiet: bool, *, key: str = results.PROGRESS_KEY) -> None:
        """`key` is where the status is written."""
        self._name, self._store, self._quiet, self._key = name, store, quiet, key
        self._tally = tally
        self._accuracy_reported = False
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._written = time.monotonic()
        if (self._console.is_terminal or self._console.is_jupyter) and not quiet:
            self._bar = progress_bar(self._console)
            self._task = self._bar.add_task(name, total=None, rate=0.0, note="")

    def __enter__(self) -> "Watch":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def updated(self, update: Update) -> None:
        """Show an update of the driver."""
        if update.clean is not None and not self._accuracy_reported:
            self._accuracy_reported = True
            self._report_accuracy(update.clean)
        for votes in update.new:
            self._tally.add(votes)
        rate = update.cast / update.seconds if update.seconds else 0.0
        text = self._note(update)
        if self._bar:
            self._bar.update(self._task, completed=update.draws, total=update.draws_wanted, rate=rate, note=text)
        finished = update.draws == update.draws_wanted and not update.in_flight
        if finished or time.monotonic() - self._written >= _LOG_SECONDS:
            self._written = time.monotonic()
            self._write(update, rate, text)

    def _write(self, update: Update, rate: float, text: str) -> None:
        """Write progress.json, and a plain line if there is no bar."""
        eta = (update.draws_wanted - update.draws) / rate if rate else None
        progress = results.Progress(
            draws_cast=update.draws,
            draws_wanted=update.draws_wanted,
            draws_per_second=round(rate, 1),
            eta_seconds=None if eta is None else round(eta),
            actors_ready=update.actors,
            updated=time.time(),
            note=text,
        )
        self._store.replace(self._key, progress.model_dump_json(indent=2).encode())
        tell_progress(self._store.uri, progress)
        if not self._bar and not self._quiet:
            left = "" if eta is None else f", ETA {eta:.0f} s"
            note(f"{self._name}: {update.draws:,} of {update.draws_wanted:,} draws, {rate:,.0f}/s{left}; {text}")

    def _report_accuracy(self, clean: CleanAccuracy) -> None:
        """Report the bare classifier's accuracy; warn if it may be chance and the samples can show that."""
        better = better_than_chance(clean.right, clean.samples, clean.num_classes)
        if better is None:
            return
        correct = f"{clean.right} of {clean.samples} clean samples"
        if not better:
            logger.warning(
                "WARNING: the classifier alone gets %s right, not clearly better than chance (%g of %d); check "
                "classifier.normalize and the order of the classes, since a certificate of this f is of little use",
                correct, round(clean.samples / clean.num_classes, 1), clean.samples,
            )  # fmt: skip
        elif not self._quiet:
            note(f"the classifier alone gets {correct} right")

    def _note(self, update: Update) -> str:
        if not update.actors:
            return f"waiting for devices: 0 of {update.actors_wanted} ready"
        return self._tally.describe() or f"{update.actors} actor{'s' if update.actors > 1 else ''}"


class OrderTally:
    """Certifies samples while a run is in progress, as soon as this call has cast all their draws (fixed mode only)."""

    def __init__(self, order: Order, sigma: float) -> None:
        self._order, self._sigma = order, sigma
        self._counts: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)
        self._certified = {0.0: 0, sigma: 0}  # radius -> samples certified there
        self._samples = 0

    def describe(self) -> str:
        if not self._samples or not self._order.kind.has_radius:
            return ""
        at = [f"{100 * count / self._samples:.0f}% at r={radius:g}" for radius, count in self._certified.items()]
        return f"certified {', '.join(at)} ({self._samples} samples)"

    def add(self, new: Votes) -> None:
        order, sample = self._order, new.block.sample
        if order.mode != "fixed" or not order.kind.claims_label:
            return
        self._counts[sample, new.block.stage].update(new.counts)
        selection, estimation = (self._counts[sample, stage] for stage in STAGES)
        if selection.total() < order.n0:
            return
        top = top_class(selection)  # PREDICT selects nothing
        if estimation.total() == order.n:
            self._samples += 1
            self._count(estimation[top], right=top == new.label)
        elif order.skip_wrong and top != new.label:
            self._samples += 1
        else:
            return
        del self._counts[sample, "selection"], self._counts[sample, "estimation"]

    def _count(self, n_A: int, *, right: bool) -> None:
        n, share = self._order.n, self._order.looks[self._order.n]
        if right and lower_confidence_bound(n_A, n, share) >= 0.5:
            reached = certified_radius(n_A, n, share, self._sigma)
            for radius in self._certified:
                self._certified[radius] += bool(reached >= radius)


@contextmanager
def stop_on_signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` at the first SIGTERM or Ctrl-C; a second one ends the process at once.

    Outside the main thread, where Python allows no handlers, signals are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        note("diffsmooth: stopping; finishing the work in progress (repeat to stop at once)")
        stop(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
