"""The loop on Ray: one actor per device, one task in flight per ready actor, failed tasks requeued.

Only lists of blocks and small receipts travel through Ray; votes go from the actor straight to storage, and weights
from a file to the actor. All actors are created at once: those that wait for a device make an autoscaling cluster add
nodes, and each is used as soon as it has loaded its models. An actor on a node that is being drained gets no new task,
and moves to another node after the task in flight.
"""

import logging
import os
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import ActorDiedError, AuthenticationError, RayActorError, RayError, RayTaskError
from ray.util.metrics import Counter, Histogram

from diffsmooth.cluster import compiled
from diffsmooth.cluster.allocation import address_of_symmetric_run
from diffsmooth.cluster.attacker import load_worker
from diffsmooth.cluster.ray_private import draining_nodes, only_for_this_process, redirect_worker_output
from diffsmooth.cluster.scheduler import Scheduler, SetAside
from diffsmooth.cluster.worker import CleanAccuracy, Progress, Receipt, Setup, Worker
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.sampling import Sampler
from diffsmooth.pipeline.errors import RunError, Stopped, UserError, first_line
from diffsmooth.pipeline.models.device import available_device, computes, cores, device_of
from diffsmooth.pipeline.votes.blocks import Votes

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 5  # failed starts in a row, per actor, after which the run is given up
_KNOCK_SECONDS = 10.0
_TICK = 1.0  # seconds between checks of deadlines and stop requests
_NAP = 0.05  # seconds between checks for work if nothing is in flight
_DRAIN_CHECK = 3.0  # seconds between checks for nodes that are being drained
_PROGRESS_CHECK = 1.0  # seconds between questions for the progress of running tasks
_ACCELERATOR = "ray.io/accelerator-type"  # the label that Ray gives a node with GPUs
_ASKED_AT_ONCE = 64  # actors asked for their progress each time; the others have their turn later


class _DeviceLost(Exception):
    """An actor's device computes nothing any more; only a new process can use it, or another device."""


class _RemoteWorker:
    """What Ray runs in an actor's process: a Worker that can be replaced by that of the next run."""

    def __init__(self) -> None:
        self._worker: Worker | None = None
        self._device = torch.device("cpu")

    def load(self, setup: Setup, known: dict[str, bytes]) -> "_Loaded":
        """Load the models; `known` are artefacts of compilations."""
        self._worker = None  # free the models of an earlier run first
        self._device = device_of(setup.spec)
        with self._noticing_a_lost_device():
            self._worker = load_worker(setup, known)
        return _Loaded(ray.get_runtime_context().get_node_id(), self._worker.compiled_key)

    def compiled(self) -> bytes | None:
        return compiled.save()

    def check(self) -> CleanAccuracy:
        assert self._worker is not None
        with self._noticing_a_lost_device():
            return self._worker.clean_accuracy()

    def run(self, blocks: list[Block], attempt: str, share: bool) -> Receipt:
        assert self._worker is not None
        with self._noticing_a_lost_device():
            return self._worker.run(blocks, attempt, share)

    @contextmanager
    def _noticing_a_lost_device(self) -> Iterator[None]:
        """Raise _DeviceLost instead of an error after which the device computes nothing any more."""
        try:
            yield
        except Exception as error:
            if computes(self._device):
                raise
            raise _DeviceLost(f"{self._device} on {socket.gethostname()}: {first_line(error)}") from error

    @ray.method(concurrency_group="progress")
    def progress(self) -> Progress | None:
        """Returns at once, also while `run` is busy, because its concurrency group has a thread of its own."""
        return self._worker.progress if self._worker else None


_REMOTE: Any = ray.remote(  # Ray's annotations lack concurrency_groups
    max_restarts=-1, max_task_retries=0, concurrency_groups={"progress": 1}
)(_RemoteWorker)  # type: ignore[call-overload]


class _Loaded(NamedTuple):
    """What an actor reports when it has loaded its models."""

    node: str  # the id of the node that it is on
    compiled_key: str | None  # None if f is not compiled


@dataclass(eq=False)
class _Actor:
    """One actor of ours on the cluster."""

    name: str  # as the scheduler knows it
    handle: Any
    node: str = ""  # where it loaded its models


class Update(NamedTuple):
    """What the driver reports while it casts."""

    draws: int  # of the committed blocks, also of those that other drivers cast
    in_flight: int  # those of `draws` whose task has not finished yet
    draws_wanted: int  # of all blocks handed out so far
    cast: int  # draws cast and stored by this call
    seconds: float  # since the first task started
    actors: int  # that are ready or busy
    actors_wanted: int
    new: list[Votes]  # of the tasks that finished since the last update
    clean: CleanAccuracy | None  # of the first actor that loaded the models, once it is measured


@dataclass
class Outcome:
    """What a call of `cast` did."""

    draws: int = 0  # cast and stored
    duplicates: int = 0
    tasks: int = 0
    lost: int = 0
    seconds: float = 0.0
    driver_seconds: float = 0.0  # the driver's own work: all time not spent waiting for Ray
    set_aside: list[SetAside] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What to cast."""

    setup: Setup
    blocks: Iterable[Block]  # to begin with
    sampler: Sampler | None = None  # says which blocks their votes make needed
    last: bool = True  # release actors as soon as nothing is left for them
    grace_seconds: float = 20.0  # for the blocks in flight, once a stop is requested


class Cluster:
    """A Ray cluster and our actors on it; a context manager. Several runs, one after another, share the actors."""

    def __init__(
        self,
        *,
        address: str | None,
        device: str,
        actors: int | None,
        accelerators: Sequence[str] = (),
        memory_gb: float | None = None,
        verbose: bool = False,
    ) -> None:
        """Attach to `address`, else to RAY_ADDRESS, else to the Ray of `ray symmetric-run`, else start a local Ray.

        Each actor is placed on a node with one of the `accelerators` (GPU types in Ray's spelling) and reserves
        `memory_gb` GB of its main memory. With `verbose`, everything that Ray and its actors print is shown.

        Raises: UserError if the cluster cannot be reached or lacks what the actors need.
        """
        address = _address(address)
        self.actors: dict[str, _Actor] = {}
        self._created = 0
        self.stop_signal: int | None = None
        with ExitStack() as started:
            if not ray.is_initialized():
                if address == "local":
                    started.enter_context(only_for_this_process())
                started.callback(ray.shutdown)
                _connect(address, actors, verbose)
            self._choose_actors(address, device, actors, _suitable(address, device, accelerators, memory_gb))
            self._own_ray = started.pop_all()  # ends what is started here

    def _choose_actors(self, address: str, device: str, actors: int | None, suitable: "_Suitable") -> None:
        """Decide how many actors there are, and what each needs. Raises: UserError."""
        cpus, gpus = (int(sum(node["Resources"].get(kind, 0) for node in suitable.nodes)) for kind in ("CPU", "GPU"))
        if device == "cuda" and address == "local" and not gpus:
            raise UserError("compute.device = 'cuda', but Ray sees no GPU on this machine; use --cpu to run on the CPU")
        if device == "cuda" and not gpus:
            hint = "" if actors else "; use --actors K to request K GPUs instead of one"
            logger.warning("the cluster at %s has no GPU yet; waiting for nodes with GPUs%s", address, hint)
        some_gpu = "GPU" in ray.cluster_resources() or "label_selector" in suitable.options
        self.on_gpu = on_gpu = device == "cuda" or (device == "auto" and some_gpu)
        if address == "local" and on_gpu and actors and actors > gpus:
            raise UserError(
                f"--actors {actors}: each actor needs a GPU of its own, and this machine has {gpus}; use --actors "
                f"{gpus}, or a cluster with --address"
            )
        self.threads = max(1, min(8, cpus // gpus if gpus else 4)) if on_gpu else 1
        self.wanted = actors or max(1, gpus if on_gpu else cpus)
        self._options = {"num_gpus": 1 if on_gpu else 0, "num_cpus": self.threads, **suitable.options}

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.release(list(self.actors.values()))
        self._own_ray.close()

    def stop(self, signal: int) -> None:
        """Make `cast` start no more tasks, wait for those in flight within the grace period, and raise Stopped."""
        self.stop_signal = signal

    def add_actor(self) -> _Actor:
        self._created += 1
        actor = _Actor(f"actor-{self._created}", _REMOTE.options(**self._options).remote())
        self.actors[actor.name] = actor
        return actor

    def release(self, actors: Iterable[_Actor]) -> None:
        """Stop actors and free their devices."""
        for actor in actors:
            del self.actors[actor.name]
            ray.kill(actor.handle)

    def cast(
        self,
        work: Work,
        *,
        scheduler: Scheduler | None = None,
        on_update: Callable[[Update], None] = lambda update: None,
    ) -> Outcome:
        """Cast and store the votes of all blocks of `work`.

        Raises: Stopped after `stop`; UserError or RunError, the first cause, if the program or its input is wrong:
        nothing is retried then.
        """
        return _Cast(self, work, scheduler or Scheduler(), on_update).run()


class _InFlight:
    """What running tasks have committed, as their actors report about once per second.

    Only the first attempt at a task counts, not the copy of a straggler. A check asks a limited number of actors, so
    that a large cluster costs no more than a small one.
    """

    def __init__(self) -> None:
        self.draws = self.stored = 0  # sums over the running attempts
        self._running: dict[str, tuple[_Actor, Progress]] = {}  # by the actor's name; who is asked next comes first
        self._asked: dict[str, Any] = {}  # the actor's name -> the future of its answer
        self._checked = 0.0

    def started(self, actor: _Actor, attempt: str) -> None:
        self._running[actor.name] = (actor, Progress(attempt))

    def ended(self, name: str) -> None:
        if name in self._running:
            _, progress = self._running.pop(name)
            self._add(progress, -1)

    def check(self, now: float) -> None:
        """Take in the answers that have arrived, and ask again."""
        if now - self._checked < _PROGRESS_CHECK:
            return
        self._checked = now
        futures = list(self._asked.values())
        done = set(ray.wait(futures, num_returns=len(futures), timeout=0)[0]) if futures else set()
        for name in [name for name, future in self._asked.items() if future in done]:
            self._take(name, self._asked.pop(name))
        for name in list(islice(self._running, _ASKED_AT_ONCE)):
            actor, progress = self._running.pop(name)
            self._running[name] = (actor, progress)
            if name not in self._asked:
                self._asked[name] = actor.handle.progress.remote()

    def _take(self, name: str, future: Any) -> None:
        try:
            found: Progress | None = ray.get(future)
        except RayError:
            return  # the actor died, which its task reports
        if found is None or name not in self._running:
            return
        actor, before = self._running[name]
        if found.attempt == before.attempt:  # not an answer about an earlier task
            self._add(before, -1)
            self._add(found, 1)
            self._running[name] = (actor, found)

    def _add(self, progress: Progress, sign: int) -> None:
        self.draws += sign * progress.draws
        self.stored += sign * progress.stored


_Handler = Callable[[_Actor, Any], list[Votes]]  # takes in the result of a future


class _Cast:
    """One call of `Cluster.cast`."""

    def __init__(self, cluster: Cluster, work: Work, scheduler: Scheduler, on_update: Callable[[Update], None]) -> None:
        self._cluster, self._work, self._scheduler, self._on_update = cluster, work, scheduler, on_update
        self._setup = work.setup._replace(threads=cluster.threads)
        self._outcome = Outcome(set_aside=scheduler.set_aside)
        self._idle: deque[_Actor] = deque()
        self._pending: dict[Any, tuple[_Actor, _Handler]] = {}  # future -> its actor, and what handles its result
        self._checking = 0  # actors that measure the clean accuracy
        self._checked = False  # only the first actor is asked for the clean accuracy
        self._clean: CleanAccuracy | None = None
        self._draining: set[str] = set()
        self._drains_checked = 0.0
        self._metrics = _Metrics(work.setup.spec.name)
        self._failed_starts = 0
        self._first_task: float | None = None
        self._draws = self._draws_wanted = 0  # of finished tasks; of all tasks
        self._in_flight = _InFlight()
        self._compiled = compiled.read_known(work.setup.votes_id) if work.setup.spec.compute.compile else {}
        self._compiled_ref = ray.put(self._compiled)  # one copy for all actors
        self._add(work.blocks)

    def run(self) -> Outcome:
        start, waited = time.monotonic(), 0.0
        while len(self._cluster.actors) < self._cluster.wanted:
            self._cluster.add_actor()
        for actor in self._cluster.actors.values():
            self._await_ready(actor)
        self._report([])
        give_up = float("inf")
        while not self._scheduler.done:
            now = time.monotonic()
            if self._cluster.stop_signal is not None:
                give_up = min(give_up, now + self._work.grace_seconds)
                if not self._scheduler.running or now > give_up:
                    raise Stopped(self._cluster.stop_signal)
            else:
                self._leave_draining_nodes(now)
                self._dispatch(now)
            waiting = time.monotonic()
            if not self._pending:  # all actors leave the last blocks to other drivers
                time.sleep(_NAP)
            done, _ = ray.wait(list(self._pending), num_returns=1, timeout=_TICK)
            if done:
                done, _ = ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)
            waited += time.monotonic() - waiting
            new = [votes for future in done for votes in self._collect(future)]
            if self._work.sampler and new:
                self._add(self._work.sampler.take(new))
            self._restart_overdue()
            self._in_flight.check(now)
            self._report(new)
        self._outcome.seconds = time.monotonic() - start
        self._outcome.driver_seconds = self._outcome.seconds - waited
        return self._outcome

    def _add(self, blocks: Iterable[Block]) -> None:
        blocks = list(blocks)
        self._draws_wanted += sum(block.draws for block in blocks)
        self._scheduler.add(blocks)

    def _dispatch(self, now: float) -> None:
        ready = len(self._idle) + len(self._scheduler.running)
        while self._idle and (task := self._scheduler.next_task(self._idle[0].name, ready, now)):
            self._first_task = self._first_task or now
            actor, attempt = self._idle.popleft(), f"{os.urandom(8).hex()}-{task.attempts}"
            share = task.attempts == 1  # a later attempt finds blocks of our own
            self._pending[actor.handle.run.remote(task.blocks, attempt, share)] = (actor, self._task_done)
            if len(task.workers) == 1:
                self._in_flight.started(actor, attempt)
        more = self._work.sampler is not None and self._work.sampler.open
        if self._work.last and not more:
            self._cluster.release([self._idle.popleft() for _ in range(self._scheduler.spare(len(self._idle)))])

    def _leave_draining_nodes(self, now: float) -> None:
        """Restart idle actors whose node is being drained; Ray places them on another node, or they wait for one."""
        if now - self._drains_checked > _DRAIN_CHECK:
            self._drains_checked = now
            self._draining = draining_nodes()
        if not self._draining:
            return
        for actor in [actor for actor in self._idle if actor.node in self._draining]:
            logger.warning("node %s is being drained; moving its actor to another node", actor.node[:8])
            self._idle.remove(actor)
            self._restart(actor)

    def _restart_overdue(self) -> None:
        for name in self._scheduler.overdue(time.monotonic()):
            logger.warning("restarting %s: its task timed out or was finished elsewhere", name)
            ray.kill(self._cluster.actors[name].handle, no_restart=False)

    def _collect(self, future: Any) -> list[Votes]:
        """Handle a future that is done; returns the votes that it brought."""
        actor, handle = self._pending.pop(future)
        return handle(actor, future)

    def _restart(self, actor: _Actor) -> None:
        """End the actor's process; Ray starts it again where it has a place."""
        actor.node = ""
        ray.kill(actor.handle, no_restart=False)
        self._await_ready(actor)

    def _await_ready(self, actor: _Actor) -> None:
        """Wait until the actor's process runs on a device: at the start, and after each death."""
        self._pending[actor.handle.__ray_ready__.remote()] = (actor, self._started)

    def _started(self, actor: _Actor, future: Any) -> list[Votes]:
        try:
            ray.get(future)
        except ActorDiedError as error:  # for good: put a new actor in its place
            self._count_failed_start(error)
            del self._cluster.actors[actor.name]
            self._await_ready(self._cluster.add_actor())
        except RayActorError:
            self._await_ready(actor)  # it has no device yet, or its node is gone
        else:
            self._pending[actor.handle.load.remote(self._setup, self._compiled_ref)] = (actor, self._loaded)
        return []

    def _loaded(self, actor: _Actor, future: Any) -> list[Votes]:
        try:
            loaded: _Loaded = ray.get(future)
        except RayTaskError as error:
            if not isinstance(error.cause, _DeviceLost):
                raise _cause(error) from None
            self._count_failed_start(error)
            self._restart(actor)
            return []
        except RayActorError as error:
            self._count_failed_start(error)
            self._await_ready(actor)
            return []
        self._failed_starts, actor.node = 0, loaded.node
        if loaded.compiled_key and loaded.compiled_key not in self._compiled:
            self._compiled[loaded.compiled_key] = b""  # only the first actor on such a device is asked
            self._pending[actor.handle.compiled.remote()] = (actor, partial(self._keep_compiled, loaded.compiled_key))
        if self._checked:
            self._idle.append(actor)
        else:  # the other actors start their tasks meanwhile
            self._checked = True
            self._checking += 1
            self._pending[actor.handle.check.remote()] = (actor, self._accuracy_measured)
        return []

    def _keep_compiled(self, key: str, actor: _Actor, future: Any) -> list[Votes]:
        """Keep what the first actor has compiled, for actors that start later and for the next call."""
        try:
            artefacts: bytes | None = ray.get(future)
        except RayError as error:  # if the actor died, its next task reports it
            logger.warning("the compiled f of %s is not kept (%s)", actor.name, _line(error))
            artefacts = None
        if artefacts:
            self._compiled[key] = artefacts
            self._compiled_ref = ray.put(self._compiled)
            compiled.store(key, artefacts)
        else:
            del self._compiled[key]
        return []

    def _accuracy_measured(self, actor: _Actor, future: Any) -> list[Votes]:
        self._checking -= 1
        try:
            self._clean = ray.get(future)
        except RayTaskError as error:
            if not isinstance(error.cause, _DeviceLost):
                raise _cause(error) from None
            logger.warning("the clean accuracy is unknown (%s)", _line(error))
            self._restart(actor)
        except RayActorError as error:
            logger.warning("the clean accuracy is unknown; its actor died (%s)", _line(error))
            self._await_ready(actor)
        else:
            self._idle.append(actor)
        return []

    def _task_done(self, actor: _Actor, future: Any) -> list[Votes]:
        try:
            receipt: Receipt = ray.get(future)
        except RayTaskError as error:
            if isinstance(error.cause, UserError | RunError):
                raise _cause(error) from None
            self._task_failed(actor, error)
            if isinstance(error.cause, _DeviceLost):  # otherwise it would fail every task
                self._restart(actor)
            else:
                self._idle.append(actor)
            return []
        except RayActorError as error:
            self._task_failed(actor, error)
            self._await_ready(actor)
            return []
        for name in self._scheduler.running[actor.name].task.workers:  # the receipt counts from here on
            self._in_flight.ended(name)
        first = self._scheduler.finished(actor.name, receipt.draws, receipt.seconds, met=receipt.met, left=receipt.left)
        self._idle.append(actor)
        self._outcome.tasks += 1
        self._outcome.draws += receipt.stored
        self._outcome.duplicates += len(receipt.duplicates)
        self._metrics.finished(receipt)
        if not first:
            return []  # a copy of the task brings these votes
        self._draws += sum(votes.block.draws for votes in receipt.votes)
        return receipt.votes

    def _task_failed(self, actor: _Actor, error: RayTaskError | RayActorError) -> None:
        self._in_flight.ended(actor.name)
        self._outcome.lost += 1
        self._metrics.lost(error)
        logger.warning("task failed; requeued: %s", _line(error))
        self._scheduler.lost(actor.name, _line(error), attempted=not getattr(error, "preempted", False))

    def _count_failed_start(self, error: RayActorError | RayTaskError) -> None:
        """Give the run up if actors do nothing but die; waiting for a device is not dying."""
        self._failed_starts += 1
        if self._failed_starts >= _START_ATTEMPTS * self._cluster.wanted:
            raise RunError(
                f"actors died {self._failed_starts} times in a row while they started or loaded the models "
                f"({_line(error)}); check that their nodes have enough memory and working GPUs"
            )

    def _report(self, new: list[Votes]) -> None:
        self._on_update(
            Update(
                draws=self._draws + self._in_flight.draws,
                in_flight=self._in_flight.draws,
                draws_wanted=self._draws_wanted,
                cast=self._outcome.draws + self._in_flight.stored,
                seconds=time.monotonic() - self._first_task if self._first_task else 0.0,
                actors=len(self._idle) + self._checking + len(self._scheduler.running),
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
        self._duplicates = Counter("diffsmooth_duplicate_blocks", "Blocks computed although already stored.", tags)
        self._failures = Counter(
            "diffsmooth_store_failures", "Writes to the store that lost their answer or met another one.", tags
        )
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
            if value:  # a counter accepts only values above 0
                counter.inc(value, tags)

    def lost(self, error: Exception) -> None:
        self._lost.inc(1, {"run": self._run, "error": _line(error).partition(":")[0]})


def check_device(address: str | None, device: str) -> None:
    """Refuse a GPU that this machine lacks before anything is stored, if `Cluster` would use this machine.

    Raises: UserError.
    """
    if device == "cuda" and not ray.is_initialized() and _address(address) == "local":
        available_device(device)


def _address(given: str | None) -> str:
    return given or os.environ.get("RAY_ADDRESS") or address_of_symmetric_run() or "local"


def _connect(address: str, actors: int | None, verbose: bool) -> None:
    """Attach to a cluster, or start a local one."""
    local: dict[str, Any] = (
        {"num_cpus": max(actors or 0, cores()), "include_dashboard": False} if address == "local" else {}
    )
    if not verbose:
        redirect_worker_output(lambda line: logger.warning("Ray: %s", line))
    level = logging.INFO if verbose else logging.ERROR
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=verbose, logging_level=level, **local)
    except (AuthenticationError, OSError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--address {address}: no Ray cluster answers there ({first_line(error)}); start one, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it requires a token, or omit --address to start a local Ray"
        ) from error
    except Exception as error:  # Ray raises plain ones if a machine is too slow or too full
        raise RunError(
            f"--address {address}: Ray did not start ({first_line(error)}); free some memory and run the command again"
        ) from error


class _Suitable(NamedTuple):
    """The living nodes that may hold an actor, and what an actor asks for so that it is placed there."""

    nodes: list[Any]
    options: dict[str, Any]


def _suitable(address: str, device: str, accelerators: Sequence[str], memory_gb: float | None) -> _Suitable:
    """Raises: UserError for names that are no accelerators, and for a local Ray on which no actor has a place."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    options: dict[str, Any] = {}
    present = sorted({node["Labels"][_ACCELERATOR] for node in nodes if _ACCELERATOR in node["Labels"]})
    if accelerators and device == "cpu":
        raise UserError(f"--accelerator {accelerators[0]} needs a GPU, but compute.device = 'cpu'; omit one of them")
    for name in accelerators:
        if not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"--accelerator {name}: not the name of a GPU type; use names such as H100, A100 or L4")
    if accelerators:
        options["label_selector"] = {_ACCELERATOR: f"in({','.join(accelerators)})"}
        nodes = [node for node in nodes if node["Labels"].get(_ACCELERATOR) in accelerators]
    lacking = "" if nodes else f"--accelerator {' --accelerator '.join(accelerators)}: no node has such a GPU"
    if memory_gb is not None:
        options["memory"] = int(memory_gb * 1e9)
        most = max((node["Resources"].get("memory", 0) for node in nodes), default=0)
        nodes = [node for node in nodes if node["Resources"].get("memory", 0) >= options["memory"]]
        if not nodes and not lacking:
            lacking = f"--memory {memory_gb:g}: a node has at most {most / 1e9:.1f} GB for actors"
    if lacking and address == "local":
        have = f"this machine has {', '.join(present) or 'none that Ray knows'}"
        raise UserError(f"{lacking} ({have}); omit the option, or use a cluster with --address")
    if lacking:
        logger.warning("%s yet (accelerators at %s: %s); waiting", lacking, address, ", ".join(present) or "none")
    return _Suitable(nodes, options)


def _knock(address: str) -> None:
    """Raise OSError at once if nothing listens at HOST:PORT; Ray itself would retry for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _cause(error: RayTaskError) -> Exception:
    """The exception that the actor's own code raised."""
    return error.cause if isinstance(error.cause, Exception) else error


def _line(error: Exception) -> str:
    cause = error.cause if isinstance(error, RayTaskError) and error.cause else error
    return f"{type(cause).__name__}: {first_line(cause)}"
