"""The loop on Ray: one actor per device, one task in flight per ready actor, failed tasks requeued.

Only lists of blocks and small receipts travel through Ray; votes go from the actor straight to storage, and weights
from a file to the actor. All actors are created at once: those that wait for a device make an autoscaling cluster add
nodes, and each is used as soon as it has loaded its models. An actor on a node that is being drained gets no new task,
and moves to another node after the task in flight.
"""

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from diffsmooth.cluster import compiled
from diffsmooth.cluster.actor import REMOTE, Actor, DeviceLost, Loaded
from diffsmooth.cluster.connect import Suitable, address_of, cause_of, connect, line_of, suitable_nodes
from diffsmooth.cluster.listener import Listener, Update
from diffsmooth.cluster.metrics import Metrics
from diffsmooth.cluster.ray_private import draining_nodes, only_for_this_process
from diffsmooth.cluster.scheduler import Scheduler, SetAside
from diffsmooth.cluster.worker import CleanAccuracy, Progress, Receipt, Setup
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.sampling import Sampler
from diffsmooth.pipeline.errors import RunError, Stopped, UserError, missing_import
from diffsmooth.pipeline.votes.blocks import Votes

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 5  # failed starts in a row, per actor, after which the run is given up
_TICK = 1.0  # seconds between checks of deadlines and stop requests
_NAP = 0.05  # seconds between checks for work if nothing is in flight
_DRAIN_CHECK = 3.0  # seconds between checks for nodes that are being drained
_PROGRESS_CHECK = 1.0  # seconds between questions for the progress of running tasks
_ASKED_AT_ONCE = 64  # actors asked for their progress each time; the others have their turn later


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
        address = address_of(address)
        self.actors: dict[str, Actor] = {}
        self._created = 0
        self.stop_signal: int | None = None
        with ExitStack() as started:
            if not ray.is_initialized():
                if address == "local":
                    started.enter_context(only_for_this_process())
                started.callback(ray.shutdown)
                connect(address, actors, verbose)
            self._choose_actors(address, device, actors, suitable_nodes(address, device, accelerators, memory_gb))
            self._own_ray = started.pop_all()  # ends what is started here

    def _choose_actors(self, address: str, device: str, actors: int | None, suitable: "Suitable") -> None:
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

    def add_actor(self) -> Actor:
        self._created += 1
        actor = Actor(f"actor-{self._created}", REMOTE.options(**self._options).remote())
        self.actors[actor.name] = actor
        return actor

    def release(self, actors: Iterable[Actor]) -> None:
        """Stop actors and free their devices."""
        for actor in actors:
            del self.actors[actor.name]
            ray.kill(actor.handle)

    def cast(
        self,
        work: Work,
        *,
        scheduler: Scheduler | None = None,
        listeners: Sequence[Listener] = (),
    ) -> Outcome:
        """Cast and store the votes of all blocks of `work`.

        Raises: Stopped after `stop`; UserError or RunError, the first cause, if the program or its input is wrong:
        nothing is retried then.
        """
        return _Cast(self, work, scheduler or Scheduler(), [Metrics(work.setup.spec.name), *listeners]).run()


class _InFlight:
    """What running tasks have committed, as their actors report about once per second.

    Only the first attempt at a task counts, not the copy of a straggler. A check asks a limited number of actors, so
    that a large cluster costs no more than a small one.
    """

    def __init__(self) -> None:
        self.draws = self.stored = 0  # sums over the running attempts
        self._running: dict[str, tuple[Actor, Progress]] = {}  # by the actor's name; who is asked next comes first
        self._asked: dict[str, Any] = {}  # the actor's name -> the future of its answer
        self._checked = 0.0

    def started(self, actor: Actor, attempt: str) -> None:
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


_Handler = Callable[[Actor, Any], list[Votes]]  # takes in the result of a future


class _Cast:
    """One call of `Cluster.cast`."""

    def __init__(self, cluster: Cluster, work: Work, scheduler: Scheduler, listeners: Sequence[Listener]) -> None:
        self._cluster, self._work, self._scheduler, self._listeners = cluster, work, scheduler, listeners
        self._setup = work.setup._replace(threads=cluster.threads)
        self._outcome = Outcome(set_aside=scheduler.set_aside)
        self._idle: deque[Actor] = deque()
        self._pending: dict[Any, tuple[Actor, _Handler]] = {}  # future -> its actor, and what handles its result
        self._checking = 0  # actors that measure the clean accuracy
        self._checked = False  # only the first actor is asked for the clean accuracy
        self._clean: CleanAccuracy | None = None
        self._draining: set[str] = set()
        self._drains_checked = 0.0
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

    def _restart(self, actor: Actor) -> None:
        """End the actor's process; Ray starts it again where it has a place."""
        actor.node = ""
        ray.kill(actor.handle, no_restart=False)
        self._await_ready(actor)

    def _await_ready(self, actor: Actor) -> None:
        """Wait until the actor's process runs on a device: at the start, and after each death."""
        self._pending[actor.handle.__ray_ready__.remote()] = (actor, self._started)

    def _started(self, actor: Actor, future: Any) -> list[Votes]:
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

    def _loaded(self, actor: Actor, future: Any) -> list[Votes]:
        try:
            loaded: Loaded = ray.get(future)
        except RayTaskError as error:
            if not isinstance(error.cause, DeviceLost):
                raise cause_of(error) from None
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

    def _keep_compiled(self, key: str, actor: Actor, future: Any) -> list[Votes]:
        """Keep what the first actor has compiled, for actors that start later and for the next call."""
        try:
            artefacts: bytes | None = ray.get(future)
        except RayError as error:  # if the actor died, its next task reports it
            logger.warning("the compiled f of %s is not kept (%s)", actor.name, line_of(error))
            artefacts = None
        if artefacts:
            self._compiled[key] = artefacts
            self._compiled_ref = ray.put(self._compiled)
            compiled.store(key, artefacts)
        else:
            del self._compiled[key]
        return []

    def _accuracy_measured(self, actor: Actor, future: Any) -> list[Votes]:
        self._checking -= 1
        try:
            self._clean = ray.get(future)
        except RayTaskError as error:
            if not isinstance(error.cause, DeviceLost):
                raise cause_of(error) from None
            logger.warning("the clean accuracy is unknown (%s)", line_of(error))
            self._restart(actor)
        except RayActorError as error:
            logger.warning("the clean accuracy is unknown; its actor died (%s)", line_of(error))
            self._await_ready(actor)
        else:
            self._idle.append(actor)
        return []

    def _task_done(self, actor: Actor, future: Any) -> list[Votes]:
        try:
            receipt: Receipt = ray.get(future)
        except RayTaskError as error:
            if isinstance(error.cause, UserError | RunError):
                raise cause_of(error) from None
            self._task_failed(actor, error)
            if isinstance(error.cause, DeviceLost):  # otherwise it would fail every task
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
        for listener in self._listeners:
            listener.finished(receipt)
        if not first:
            return []  # a copy of the task brings these votes
        self._draws += sum(votes.block.draws for votes in receipt.votes)
        return receipt.votes

    def _task_failed(self, actor: Actor, error: RayTaskError | RayActorError) -> None:
        self._in_flight.ended(actor.name)
        self._outcome.lost += 1
        for listener in self._listeners:
            listener.lost(error)
        logger.warning("task failed; requeued: %s", line_of(error))
        self._scheduler.lost(actor.name, line_of(error), attempted=not getattr(error, "preempted", False))

    def _count_failed_start(self, error: RayActorError | RayTaskError) -> None:
        """Give the run up if actors do nothing but die; waiting for a device is not dying."""
        if lacking := missing_import(error):
            raise RunError(
                f"an actor could not start: {lacking}; install the same diffsmooth, and the packages that the spec "
                "needs, on every node"
            )
        self._failed_starts += 1
        if self._failed_starts >= _START_ATTEMPTS * self._cluster.wanted:
            raise RunError(
                f"actors died {self._failed_starts} times in a row while they started or loaded the models "
                f"({line_of(error)}); check that their nodes have enough memory and working GPUs"
            )

    def _report(self, new: list[Votes]) -> None:
        update = Update(
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
        for listener in self._listeners:
            listener.updated(update)
