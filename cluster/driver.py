"""The loop on Ray: one actor per device, one task in flight per ready actor, lost tasks requeued.

Only block lists and small receipts travel through Ray; votes go from the actor straight to storage, weights from a
file to the actor. Actors that wait for a device are left waiting, so that an autoscaling cluster brings nodes up for
them; each is used as soon as it has loaded its models. An actor on a node that is being drained gets no new task, and
moves to another node once the one in flight has ended.
"""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError
from ray.util.metrics import Counter, Histogram

from cluster.scheduler import Scheduler, SetAside
from cluster.worker import CleanAccuracy, Receipt, Setup, Worker
from pipeline.block import Block
from pipeline.errors import RunError, UserError
from pipeline.sampling import Sampler
from pipeline.votes import Votes

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 5  # starts in a row, per actor, that may die before the run is given up
_KNOCK_SECONDS = 10.0
_TICK = 1.0  # seconds between looks at deadlines and stop requests
_DRAIN_LOOK = 3.0  # seconds between looks for nodes that are being drained


class _Shell:
    """The shell round Worker that Ray sees."""

    def __init__(self) -> None:
        self._worker: Worker | None = None

    def load(self, setup: Setup) -> str:
        """Returns the id of the node that the actor is on."""
        self._worker = None  # frees the models of an earlier run first
        self._worker = Worker(setup)
        return ray.get_runtime_context().get_node_id()

    def check(self) -> CleanAccuracy:
        assert self._worker is not None
        return self._worker.clean_accuracy()

    def run(self, blocks: list[Block], attempt: str) -> Receipt:
        assert self._worker is not None
        return self._worker.run(blocks, attempt)


_Actor = ray.remote(max_restarts=-1, max_task_retries=0)(_Shell)


class Progress(NamedTuple):
    """What the driver tells of a run under way."""

    draws: int  # of the blocks below, whoever cast them
    draws_wanted: int  # of all blocks given out so far
    cast: int  # draws cast and stored by this call
    seconds: float  # since the first task began
    actors: int  # that wait for tasks or run one
    actors_wanted: int
    new: list[Votes]  # of the tasks that ended since the last word
    clean: CleanAccuracy | None  # of the first actor that loaded the models, once it has looked


@dataclass
class Outcome:
    """How a call of `cast` ended."""

    draws: int = 0  # cast and stored
    duplicates: int = 0
    tasks: int = 0
    lost: int = 0
    seconds: float = 0.0
    driver_seconds: float = 0.0  # the driver's own work: all time not spent waiting for Ray
    stopped: bool = False
    set_aside: list[SetAside] = field(default_factory=list)


class Cluster:
    """A Ray cluster and our actors on it; a context manager. Several runs, one after another, share the actors."""

    def __init__(self, *, address: str | None, device: str, actors: int | None, verbose: bool = False) -> None:
        """Attach to `address`, or start a local Ray where none is given and RAY_ADDRESS is not set.

        With `verbose` all that Ray and its actors print is let through.

        Raises: UserError where the cluster cannot be reached or has too little for the actors wanted.
        """
        address = address or os.environ.get("RAY_ADDRESS") or "local"
        local: dict[str, Any] = (
            {"num_cpus": max(actors or 0, _cores()), "include_dashboard": False} if address == "local" else {}
        )
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            if not verbose:
                _hush_ray()
            level = logging.INFO if verbose else logging.ERROR
            try:
                _knock(address)
                ray.init(address=address, log_to_driver=verbose, logging_level=level, **local)
            except (OSError, RuntimeError, ValueError) as error:
                reason = str(error).strip().split("\n")[0]
                raise UserError(
                    f"--address {address}: no Ray cluster answers there ({reason}); start one, or leave --address away "
                    "for a local Ray"
                ) from error
        resources = ray.cluster_resources()
        cpus, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0))
        if device == "cuda" and address == "local" and not gpus:
            raise UserError(
                "compute.device = 'cuda', but this machine has no GPU that Ray can see: pass --cpu for the CPU"
            )
        if device == "cuda" and not gpus:
            asked = "" if actors else "; pass --actors K to ask for K GPUs, not one"
            logger.warning("the cluster at %s has no GPU now: waiting for nodes that have one%s", address, asked)
        on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
        self.threads = max(1, min(8, cpus // gpus if gpus else 4)) if on_gpu else 1
        self.wanted = actors or max(1, gpus if on_gpu else cpus)
        self.options = {"num_gpus": 1 if on_gpu else 0, "num_cpus": self.threads}
        self.actors: list[Any] = []
        self.stopping = False

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.release(list(self.actors))
        if self._owns_ray:
            ray.shutdown()

    def stop(self) -> None:
        """Ask `cast` to begin no more tasks and to return when those in flight have ended or the grace is over."""
        self.stopping = True

    def release(self, actors: Iterable[Any]) -> None:
        """Let actors and their devices go."""
        for actor in actors:
            self.actors.remove(actor)
            ray.kill(actor)

    def cast(
        self,
        setup: Setup,
        blocks: Iterable[Block],
        *,
        scheduler: Scheduler | None = None,
        sampler: Sampler | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        grace_seconds: float = 20.0,
        last: bool = True,
    ) -> Outcome:
        """Cast and store the votes of `blocks` and of those that a sampler makes of their votes.

        With `last`, actors are let go as soon as nothing is left for them.

        Raises: UserError or RunError, the first cause, where the program or its input is wrong: nothing is retried.
        """
        return _Cast(self, setup, blocks, scheduler or Scheduler(), sampler, on_progress, last).run(grace_seconds)


class _Cast:
    """One call of `Cluster.cast`: which future belongs to which actor, and what has come of it."""

    def __init__(
        self,
        cluster: Cluster,
        setup: Setup,
        blocks: Iterable[Block],
        scheduler: Scheduler,
        sampler: Sampler | None,
        on_progress: Callable[[Progress], None],
        last: bool,
    ) -> None:
        self._cluster, self._scheduler, self._sampler, self._last = cluster, scheduler, sampler, last
        self._setup = setup._replace(threads=cluster.threads)
        self._on_progress = on_progress
        self._outcome = Outcome(set_aside=scheduler.set_aside)
        self._idle: deque[Any] = deque()
        self._waking: dict[Any, Any] = {}  # future -> actor
        self._loading: dict[Any, Any] = {}
        self._checking: dict[Any, Any] = {}
        self._running: dict[Any, Any] = {}
        self._looked = False  # an actor has been asked for the clean accuracy; nobody is asked twice
        self._clean: CleanAccuracy | None = None
        self._nodes: dict[Any, str] = {}  # actor -> the node that it loaded its models on
        self._draining: set[str] = set()
        self._looked_for_drains = 0.0
        self._metrics = _Metrics(setup.spec.name)
        self._failed_starts = 0
        self._first_task: float | None = None
        self._draws = self._draws_wanted = 0
        self._add(blocks)

    def run(self, grace_seconds: float) -> Outcome:
        start = time.monotonic()
        waited, give_up = 0.0, float("inf")
        while len(self._cluster.actors) < self._cluster.wanted:
            self._cluster.actors.append(_Actor.options(**self._cluster.options).remote())
        for actor in self._cluster.actors:
            self._wake(actor)
        self._tell([])
        while not self._scheduler.done:
            now = time.monotonic()
            if self._cluster.stopping:
                give_up = min(give_up, now + grace_seconds)
                if not self._running or now > give_up:
                    self._outcome.stopped = True
                    break
            else:
                self._leave_draining_nodes(now)
                self._dispatch(now)
            pending = [*self._running, *self._checking, *self._loading, *self._waking]
            waiting = time.monotonic()
            done, _ = ray.wait(pending, num_returns=1, timeout=_TICK)
            if done:
                done, _ = ray.wait(pending, num_returns=len(pending), timeout=0)
            waited += time.monotonic() - waiting
            new = [stored for future in done for stored in self._collect(future)]
            if self._sampler and new:
                self._add(self._sampler.take(new))
            if overdue := self._scheduler.overdue(time.monotonic()):
                busy = {_name(actor): actor for actor in self._running.values()}
                for name in overdue:
                    logger.warning("a task is past its deadline, or done elsewhere: its actor is restarted")
                    ray.kill(busy[name], no_restart=False)
            self._tell(new)
        self._outcome.seconds = time.monotonic() - start
        self._outcome.driver_seconds = self._outcome.seconds - waited
        return self._outcome

    def _add(self, blocks: Iterable[Block]) -> None:
        blocks = list(blocks)
        self._draws_wanted += sum(block.draws for block in blocks)
        self._scheduler.add(blocks)

    def _dispatch(self, now: float) -> None:
        ready = len(self._idle) + len(self._running)
        while self._idle and (task := self._scheduler.next_task(_name(self._idle[0]), ready, now)):
            self._first_task = self._first_task or now
            actor, attempt = self._idle.popleft(), f"{os.urandom(8).hex()}-{task.attempts}"
            self._running[actor.run.remote(task.blocks, attempt)] = actor
        more = self._sampler is not None and self._sampler.open
        if self._last and not more:
            self._cluster.release([self._idle.popleft() for _ in range(self._scheduler.spare(len(self._idle)))])

    def _leave_draining_nodes(self, now: float) -> None:
        """Restart idle actors whose node is to go; Ray places them on another, or they wait for one."""
        if now - self._looked_for_drains > _DRAIN_LOOK:
            self._looked_for_drains = now
            self._draining = set(ray._private.state.state.get_draining_nodes())
        if not self._draining:
            return
        for actor in [actor for actor in self._idle if self._nodes.get(actor) in self._draining]:
            logger.warning("node %s is being drained: its actor moves on", self._nodes.pop(actor)[:8])
            self._idle.remove(actor)
            ray.kill(actor, no_restart=False)
            self._wake(actor)

    def _collect(self, future: Any) -> list[Votes]:
        """Take in what became of a future: an actor that lives, has loaded or has checked, a receipt; or a failure."""
        if future in self._waking:
            self._collect_awake(future, self._waking.pop(future))
            return []
        if future in self._loading:
            self._collect_loaded(future, self._loading.pop(future))
            return []
        if future in self._checking:
            self._collect_checked(future, self._checking.pop(future))
            return []
        return self._collect_receipt(future, self._running.pop(future))

    def _collect_awake(self, future: Any, actor: Any) -> None:
        try:
            ray.get(future)
        except ActorDiedError as error:
            self._count_failed_start(error)
            self._replace(actor)
        except RayActorError:
            self._wake(actor)  # no device for it yet, or its node is gone: it goes on waiting
        else:
            self._loading[actor.load.remote(self._setup)] = actor

    def _collect_loaded(self, future: Any, actor: Any) -> None:
        try:
            self._nodes[actor] = ray.get(future)
        except RayTaskError as error:
            raise _cause(error) from None
        except RayActorError as error:
            self._count_failed_start(error)
            self._wake(actor)
        else:
            self._failed_starts = 0
            if not self._looked:  # the others begin their tasks meanwhile
                self._looked = True
                self._checking[actor.check.remote()] = actor
            else:
                self._idle.append(actor)

    def _collect_checked(self, future: Any, actor: Any) -> None:
        try:
            self._clean = ray.get(future)
        except RayTaskError as error:
            raise _cause(error) from None
        except RayActorError as error:
            logger.warning("the clean accuracy is not known: its actor died (%s)", _line(error))
            self._wake(actor)
        else:
            self._idle.append(actor)

    def _collect_receipt(self, future: Any, actor: Any) -> list[Votes]:
        try:
            receipt: Receipt = ray.get(future)
        except RayTaskError as error:
            if isinstance(error.cause, UserError | RunError):
                raise _cause(error) from None
            self._lose(actor, error)
            self._idle.append(actor)
            return []
        except RayActorError as error:
            self._lose(actor, error)
            self._wake(actor)
            return []
        first = self._scheduler.finished(_name(actor), receipt.draws, receipt.seconds)
        self._idle.append(actor)
        self._outcome.tasks += 1
        self._outcome.draws += receipt.stored
        self._outcome.duplicates += len(receipt.duplicates)
        self._metrics.finished(receipt)
        if not first:
            return []  # a copy of the task ended before, and told of these blocks
        self._draws += sum(block.draws for block, _, _ in receipt.votes)
        return receipt.votes

    def _lose(self, actor: Any, error: RayTaskError | RayActorError) -> None:
        self._outcome.lost += 1
        self._metrics.lost(error)
        logger.warning("a task was lost and goes back in line: %s", _line(error))
        self._scheduler.lost(_name(actor), _line(error), attempted=not getattr(error, "preempted", False))

    def _wake(self, actor: Any) -> None:
        """Wait until the actor's process lives, on a device: at the start, and after each death."""
        self._waking[actor.__ray_ready__.remote()] = actor

    def _replace(self, actor: Any) -> None:
        """Put a new actor in the place of one that is dead for good."""
        self._cluster.actors.remove(actor)
        self._cluster.actors.append(_Actor.options(**self._cluster.options).remote())
        self._wake(self._cluster.actors[-1])

    def _count_failed_start(self, error: RayActorError) -> None:
        """Give the run up where actors do nothing but die; waiting for a device is not dying."""
        self._failed_starts += 1
        if self._failed_starts >= _START_ATTEMPTS * self._cluster.wanted:
            raise RunError(
                f"actors died {self._failed_starts} times in a row while they started or loaded the models "
                f"({_line(error)}): look for missing memory on their nodes"
            )

    def _tell(self, new: list[Votes]) -> None:
        self._on_progress(
            Progress(
                draws=self._draws,
                draws_wanted=self._draws_wanted,
                cast=self._outcome.draws,
                seconds=time.monotonic() - self._first_task if self._first_task else 0.0,
                actors=len(self._idle) + len(self._checking) + len(self._running),
                actors_wanted=len(self._cluster.actors),
                new=new,
                clean=self._clean,
            )
        )


class _Metrics:
    """What Prometheus sees of a run: ray_diffsmooth_* on each node's metrics port."""

    def __init__(self, run: str) -> None:
        tags = ("run", "device")
        self._run = run
        self._draws = Counter("diffsmooth_draws", "Draws whose votes are stored.", tags)
        self._duplicates = Counter("diffsmooth_duplicate_blocks", "Blocks computed though they stood already.", tags)
        self._failures = Counter("diffsmooth_store_failures", "Calls to the store that were tried again.", tags)
        bounds = [0.1, 1, 10, 30, 60, 120, 300, 600, 1800]
        self._seconds = Histogram("diffsmooth_task_seconds", "Seconds per task.", bounds, tags)
        self._lost = Counter("diffsmooth_lost_tasks", "Attempts that ended in an error.", ("run", "error"))

    def finished(self, receipt: Receipt) -> None:
        tags = {"run": self._run, "device": receipt.device}
        self._seconds.observe(receipt.seconds, tags)
        for counter, value in (
            (self._draws, receipt.stored),
            (self._duplicates, len(receipt.duplicates)),
            (self._failures, receipt.store_failures),
        ):
            if value:  # a counter takes nothing else
                counter.inc(value, tags)

    def lost(self, error: Exception) -> None:
        self._lost.inc(1, {"run": self._run, "error": _line(error).partition(":")[0]})


def _hush_ray() -> None:
    """Make a line on stderr of what Ray prints to a driver's stdout: a raylet's death comes with its last 20 lines."""

    def say(data: dict[str, Any], ignore_prefix: bool = False) -> None:
        for text in data["lines"]:
            logger.warning("Ray says: %s", next(iter(text.strip().splitlines()), "")[:300])

    ray._private.worker.print_to_stdstream = say


def _knock(address: str) -> None:
    """Raise OSError at once where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _name(actor: Any) -> str:
    return actor._actor_id.hex()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cause(error: RayTaskError) -> Exception:
    """The exception that the actor's own code raised."""
    return error.cause if isinstance(error.cause, Exception) else error


def _line(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) and error.cause else error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else 'no message'}"
