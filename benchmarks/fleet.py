"""`python -m benchmarks fleet`: the cost of scheduling on spot GPUs, with the real Scheduler on a simulated clock.

There is no I/O, no Ray and no model. A GPU computes the blocks of its task one after another and commits each when it
is finished, so that a preempted GPU loses only its current block. The task is requeued, and the next GPU skips the
blocks that are committed. Each GPU is preempted by a Poisson process of its own, independent of the schedule, and
replaced after some time. Storage and messages take no time apart from `Fleet.task_pause`.

The ideal makespan is the time in which GPUs of these speeds, available at these times, would compute all draws if none
were ever idle, repeated work or finished later than the others:

    the least T with  sum over GPUs g of  speed_g * (seconds that g is up before T)  =  draws
"""

import heapq
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from diffsmooth.cluster.scheduler import Scheduler, Task
from diffsmooth.pipeline.block import Block

_TICK = 1.0  # seconds between the driver's checks for idle and overdue GPUs


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """A number of GPUs, all available at the start; times in seconds."""

    gpus: int
    draws_per_second: float  # of a GPU of mean speed
    speed_spread: float = 0.1  # relative speeds are uniform in [1 - this, 1 + this]
    preemptions_per_hour: float = 0.0  # per GPU
    replacement: float = 240.0  # from a preemption until a replacement has loaded the models
    detection: float = 30.0  # until the driver notices that a GPU is lost
    restart: float = 60.0  # of a GPU's process with its models, after the driver has stopped its task
    notice: float = 0.0  # before a preemption, during which the GPU gets no task; 0 without a watcher
    task_pause: float = 0.05  # between two tasks of a GPU


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a simulated run. Amounts of work are in draws."""

    makespan: float  # seconds
    ideal: float  # seconds; the module's docstring defines it
    draws: int
    computed: float
    lost: float  # computed but not committed, because the GPU was preempted or its task was stopped
    repeated: int  # computed again although another GPU had committed them
    blocks_done: int
    blocks_lost: int  # in progress when a GPU was preempted or its task was stopped
    set_aside: int
    tasks: int
    copies: int  # tasks duplicated on a second GPU at the end of the run
    preemptions: int  # of GPUs that had not been released before
    scheduler_seconds: float = field(compare=False)  # CPU time of this machine


class _Gpu(NamedTuple):
    """A GPU in one of the fleet's slots, until its preemption."""

    name: str
    speed: float  # draws per second
    end: float


class _Work(NamedTuple):
    """A task in progress: its blocks that were not committed before, and when each of them will be finished."""

    task: Task
    gpu: _Gpu
    started: float
    blocks: list[Block]
    ends: list[float]


class _Timed:
    """Calls the scheduler, and adds up the time of the calls."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.seconds = 0.0

    def __call__(self, name: str, *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return getattr(self.scheduler, name)(*arguments, **named)
        finally:
            self.seconds += time.perf_counter() - start


def simulate(blocks: Sequence[Block], fleet: Fleet, *, seed: int = 0) -> Result:
    """Run all blocks on the fleet; the same seed preempts the same GPUs at the same times."""
    return _Simulation(blocks, fleet, seed).run()


def gpus_of(fleet: Fleet, slot: int, seed: int) -> Iterator[tuple[float, _Gpu]]:
    """The successive GPUs of one of the fleet's slots, each with the time at which it is ready."""
    stream = np.random.default_rng([seed, slot])
    ready, generation = 0.0, 0
    while True:
        up = stream.exponential(3600 / fleet.preemptions_per_hour) if fleet.preemptions_per_hour else float("inf")
        speed = fleet.draws_per_second * stream.uniform(1 - fleet.speed_spread, 1 + fleet.speed_spread)
        yield ready, _Gpu(f"{slot}.{generation}", speed, ready + up)
        ready, generation = ready + up + fleet.replacement, generation + 1


def ideal_makespan(draws: int, fleet: Fleet, seed: int) -> float:
    """The ideal makespan in seconds; the module's docstring defines it."""
    lines = [gpus_of(fleet, slot, seed) for slot in range(fleet.gpus)]
    changes = [(ready, slot, gpu, True) for slot, line in enumerate(lines) for ready, gpu in [next(line)]]
    heapq.heapify(changes)
    now = rate = 0.0
    left = float(draws)
    while True:
        when, slot, gpu, starts = changes[0] if changes else (float("inf"), 0, None, False)
        if rate and left <= rate * (when - now):
            return now + left / rate
        assert gpu is not None
        heapq.heappop(changes)
        left, now = left - rate * (when - now), when
        rate = rate + gpu.speed if starts else rate - gpu.speed
        if starts:
            if gpu.end < float("inf"):
                heapq.heappush(changes, (gpu.end, slot, gpu, False))
        else:
            ready, successor = next(lines[slot])
            heapq.heappush(changes, (ready, slot, successor, True))


class _Simulation:
    def __init__(self, blocks: Sequence[Block], fleet: Fleet, seed: int) -> None:
        self._fleet, self._seed = fleet, seed
        self._draws = sum(block.draws for block in blocks)
        self._scheduler = Scheduler()
        self._call = _Timed(self._scheduler)
        self._slots = [gpus_of(fleet, slot, seed) for slot in range(fleet.gpus)]
        self._events: list[tuple[float, int, str, Any]] = []
        self._number = 0
        self._now = 0.0
        self._idle: deque[_Gpu] = deque()
        self._work: dict[str, _Work] = {}
        self._closed: set[str] = set()  # GPUs that get no more tasks: warned, preempted or released
        self._released: set[str] = set()
        self._done: set[Block] = set()
        self._lost = 0.0
        self._finished = 0  # draws of finished blocks, counted each time
        self._blocks_lost = self._tasks = self._copies = self._preemptions = 0
        self._ticking = False
        self._call("add", blocks)

    def run(self) -> Result:
        for slot in range(self._fleet.gpus):
            self._replace(slot)
        while not self._scheduler.done:
            self._now, _, event, subject = heapq.heappop(self._events)
            getattr(self, f"_{event}")(subject)
            for name in self._call("overdue", self._now):
                if self._work[name].gpu.end > self._now:
                    self._restart(self._work[name])
            self._dispatch()
        return Result(
            makespan=self._now,
            ideal=ideal_makespan(self._draws, self._fleet, self._seed),
            draws=self._draws,
            computed=self._finished + self._lost,
            lost=self._lost,
            repeated=self._finished - sum(block.draws for block in self._done),
            blocks_done=len(self._done),
            blocks_lost=self._blocks_lost,
            set_aside=sum(len(aside.task.blocks) for aside in self._scheduler.set_aside),
            tasks=self._tasks,
            copies=self._copies,
            preemptions=self._preemptions,
            scheduler_seconds=self._call.seconds,
        )

    def _at(self, when: float, event: str, subject: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, event, subject))

    def _replace(self, slot: int) -> None:
        ready, gpu = next(self._slots[slot])
        self._at(ready, "ready", gpu)

    def _ready(self, gpu: _Gpu) -> None:
        """Event: a GPU has loaded its models."""
        self._idle.append(gpu)
        if gpu.end < float("inf"):
            if self._fleet.notice:
                self._at(max(self._now, gpu.end - self._fleet.notice), "warned", gpu)
            self._at(gpu.end, "preempted", gpu)

    def _back(self, gpu: _Gpu) -> None:
        """Event: a GPU is idle again after a task or a restart."""
        if gpu.name not in self._closed:
            self._idle.append(gpu)

    def _warned(self, gpu: _Gpu) -> None:
        """Event: a GPU gets the notice of its preemption; its task continues."""
        self._closed.add(gpu.name)
        self._forget(gpu)

    def _preempted(self, gpu: _Gpu) -> None:
        """Event: a GPU is preempted."""
        self._closed.add(gpu.name)
        self._forget(gpu)
        if gpu.name not in self._released:
            self._preemptions += 1
            self._replace(int(gpu.name.split(".")[0]))
        if gpu.name in self._work:
            known = self._now if self._fleet.notice else self._now + self._fleet.detection
            self._at(known, "missed", self._work[gpu.name])
            self._close(self._work[gpu.name])

    def _missed(self, work: _Work) -> None:
        """Event: the driver notices a lost task; after a notice it does not count as a failed attempt."""
        if self._work.pop(work.gpu.name, None):
            self._call("lost", work.gpu.name, "preempted", attempted=not self._fleet.notice)

    def _ended(self, work: _Work) -> None:
        """Event: a task is finished, unless its GPU was preempted or its task was stopped before."""
        gpu = work.gpu
        if self._work.get(gpu.name) is not work or gpu.end < self._now:
            return
        self._close(work)
        del self._work[gpu.name]
        self._call("finished", gpu.name, sum(block.draws for block in work.blocks), self._now - work.started)
        self._at(self._now + self._fleet.task_pause, "back", gpu)

    def _tick(self, _: None) -> None:
        """Event: the driver checks for late tasks."""
        self._ticking = False

    def _dispatch(self) -> None:
        ready = len(self._idle) + len(self._work)
        for _ in range(len(self._idle)):
            task = self._call("next_task", self._idle[0].name, ready, self._now)
            gpu = self._idle.popleft()
            if task is None:
                self._idle.append(gpu)
            else:
                self._start(task, gpu)
        for _ in range(self._call("spare", len(self._idle))):
            gpu = self._idle.popleft()
            self._closed.add(gpu.name)
            self._released.add(gpu.name)
        if self._idle and not self._ticking:
            self._ticking = True
            self._at(self._now + _TICK, "tick", None)

    def _start(self, task: Task, gpu: _Gpu) -> None:
        for name in task.workers:
            if name != gpu.name:
                self._copies += 1
                self._commit(self._work[name])
        blocks = [block for block in task.blocks if block not in self._done]
        ends, end = [], self._now
        for block in blocks:
            end += block.draws / gpu.speed
            ends.append(end)
        self._tasks += 1
        self._work[gpu.name] = work = _Work(task, gpu, self._now, blocks, ends)
        self._at(end, "ended", work)

    def _commit(self, work: _Work) -> int:
        """Commit the blocks that a task has finished by now, and return their number."""
        finished = 0
        while finished < len(work.blocks) and work.ends[finished] <= min(self._now, work.gpu.end):
            finished += 1
        self._done.update(work.blocks[:finished])
        return finished

    def _close(self, work: _Work) -> None:
        """Count what an ending task has computed, and what it loses: the block in progress."""
        finished = self._commit(work)
        self._finished += sum(block.draws for block in work.blocks[:finished])
        if finished < len(work.blocks):
            block_start = work.ends[finished - 1] if finished else work.started
            self._lost += (self._now - block_start) * work.gpu.speed
            self._blocks_lost += 1

    def _restart(self, work: _Work) -> None:
        """Restart a GPU's process, because its task is overdue or was finished elsewhere."""
        gpu = work.gpu
        del self._work[gpu.name]
        self._close(work)
        self._call("lost", gpu.name, "overdue")
        self._at(self._now + self._fleet.restart, "back", gpu)

    def _forget(self, gpu: _Gpu) -> None:
        if gpu in self._idle:
            self._idle.remove(gpu)


def imagenet_blocks(samples: int = 50_000, n0: int = 100, n: int = 10_000) -> Iterable[Block]:
    """The blocks of ImageNet's validation images, with the default block lengths."""
    for sample in range(samples):
        yield Block(sample, "selection", 0, n0)
        for start in range(0, n, 1000):
            yield Block(sample, "estimation", start, start + 1000)


_IMAGENET_RATE = 170.0  # draws per second of an H100 at 40 % of its bf16 peak; a draw of DiffSmooth needs 2.33 TFLOP


@dataclass(frozen=True, kw_only=True)
class FleetCost:
    """The cost of scheduling on one fleet; fractions are of the computed draws."""

    gpus: int
    preemptions_per_gpu_hour: float
    notice_seconds: float
    hours: float
    makespan_over_ideal: float
    preemptions: int
    share_lost: float
    share_repeated: float
    copies: int
    blocks_done: int
    tasks: int
    scheduler_cpu_seconds: float

    def describe(self) -> str:
        return (
            f"{self.gpus:>4}  {self.preemptions_per_gpu_hour:>11.0%}  {self.notice_seconds:>4.0f} s  "
            f"{self.hours:>6.2f}  {self.makespan_over_ideal - 1:>10.3%}  {self.preemptions:>11}  "
            f"{self.share_lost:>9.4%}  {self.share_repeated:>9.4%}  {self.scheduler_cpu_seconds:>11.1f} s"
        )


def bench_simulation(seed: int = 0) -> list[FleetCost]:
    """Simulate ImageNet's 50,000 validation images (n0 = 100, n = 10,000) on fleets of several sizes."""
    blocks = list(imagenet_blocks())
    costs = []
    for gpus in (8, 64, 1024):
        for preemptions, notice in ((0.0, 0.0), (0.05, 0.0), (0.05, 120.0)):
            fleet = Fleet(gpus=gpus, draws_per_second=_IMAGENET_RATE, preemptions_per_hour=preemptions, notice=notice)
            costs.append(_cost(fleet, simulate(blocks, fleet, seed=seed)))
    return costs


def _cost(fleet: Fleet, result: Result) -> FleetCost:
    return FleetCost(
        gpus=fleet.gpus,
        preemptions_per_gpu_hour=fleet.preemptions_per_hour,
        notice_seconds=fleet.notice,
        hours=result.makespan / 3600,
        makespan_over_ideal=result.makespan / result.ideal,
        preemptions=result.preemptions,
        share_lost=result.lost / result.computed,
        share_repeated=result.repeated / result.computed,
        copies=result.copies,
        blocks_done=result.blocks_done,
        tasks=result.tasks,
        scheduler_cpu_seconds=result.scheduler_seconds,
    )


def describe_simulation(costs: Sequence[FleetCost]) -> str:
    heading = "GPUs  preempted/h  notice   hours  over ideal  preemptions  work lost   repeated  scheduler CPU"
    return "\n".join([heading, *(cost.describe() for cost in costs)])
