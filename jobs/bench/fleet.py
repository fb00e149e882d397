"""What scheduling costs on a fleet of spot GPUs: the real Scheduler on a simulated clock. No I/O, no Ray, no models.

A GPU computes its task's blocks one after another and commits each as it finishes, so that one taken away loses the
block in hand alone; the task goes back in line, and whoever gets it skips the blocks that stand. GPUs are taken away by
a Poisson process each, independent of what is scheduled; another one comes in a GPU's place after a while. Reading and
writing storage and passing messages take no time but `Fleet.task_pause`.

The ideal makespan is the time at which GPUs of these speeds, up and down at these times, would have computed all draws
had none ever been idle, begun anew or ended later than the others:

    the least T with  sum over GPUs g of  speed_g * (seconds that g is up before T)  =  draws
"""

import heapq
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from cluster.scheduler import Scheduler, Task
from pipeline.block import Block

_TICK = 1.0  # seconds between the driver's looks at idle and overdue GPUs


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """GPUs, all of them up at the start; times in seconds."""

    gpus: int
    draws_per_second: float  # of a GPU of mean speed
    speed_spread: float = 0.1  # speeds are uniform in 1 -+ this
    preemptions_per_hour: float = 0.0  # of each GPU
    replacement: float = 240.0  # from a GPU's end until another has loaded the models in its place
    detection: float = 30.0  # until the driver knows that a GPU is gone
    restart: float = 60.0  # of a GPU's process, models loaded, after the driver has stopped its task
    notice: float = 0.0  # how long before its end a GPU takes no new task; 0 where nobody listens
    task_pause: float = 0.05  # from a task's end to the beginning of the GPU's next


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a simulated run went; draws where nothing else is said."""

    makespan: float  # seconds
    ideal: float  # seconds, see the module
    draws: int
    computed: float
    lost: float  # computed and not committed, because the GPU was taken away
    repeated: int  # computed and not committed, because they stood already
    blocks_done: int
    blocks_lost: int  # in hand when a GPU was taken away
    set_aside: int
    tasks: int
    copies: int  # tasks given to a second GPU at the tail
    preemptions: int  # of GPUs that had not been let go
    scheduler_seconds: float = field(compare=False)  # of this machine's CPU


class _Gpu(NamedTuple):
    """One GPU's life in one of the fleet's places."""

    name: str
    speed: float  # draws per second
    end: float


class _Work(NamedTuple):
    """A task in hand: the blocks that did not stand when it began, and when each of them is done."""

    task: Task
    gpu: _Gpu
    started: float
    blocks: list[Block]
    ends: list[float]


class _Timed:
    """The scheduler, with the CPU time that goes into its calls."""

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
    """Run all blocks on the fleet; the same seed takes the same GPUs away at the same times."""
    return _Simulation(blocks, fleet, seed).run()


def lives(fleet: Fleet, place: int, seed: int) -> Iterator[tuple[float, _Gpu]]:
    """The GPUs that follow one another in one of the fleet's places, each with the time at which it is ready."""
    stream = np.random.default_rng([seed, place])
    ready, generation = 0.0, 0
    while True:
        up = stream.exponential(3600 / fleet.preemptions_per_hour) if fleet.preemptions_per_hour else float("inf")
        speed = fleet.draws_per_second * stream.uniform(1 - fleet.speed_spread, 1 + fleet.speed_spread)
        yield ready, _Gpu(f"{place}.{generation}", speed, ready + up)
        ready, generation = ready + up + fleet.replacement, generation + 1


def ideal_makespan(draws: int, fleet: Fleet, seed: int) -> float:
    """See the module."""
    lines = [lives(fleet, place, seed) for place in range(fleet.gpus)]
    changes = [(ready, place, gpu, True) for place, line in enumerate(lines) for ready, gpu in [next(line)]]
    heapq.heapify(changes)
    now = rate = 0.0
    left = float(draws)
    while True:
        when, place, gpu, begins = changes[0] if changes else (float("inf"), 0, None, False)
        if rate and left <= rate * (when - now):
            return now + left / rate
        assert gpu is not None
        heapq.heappop(changes)
        left, now = left - rate * (when - now), when
        rate = rate + gpu.speed if begins else rate - gpu.speed
        if begins:
            if gpu.end < float("inf"):
                heapq.heappush(changes, (gpu.end, place, gpu, False))
        else:
            ready, follower = next(lines[place])
            heapq.heappush(changes, (ready, place, follower, True))


class _Simulation:
    def __init__(self, blocks: Sequence[Block], fleet: Fleet, seed: int) -> None:
        self._fleet, self._seed = fleet, seed
        self._draws = sum(block.draws for block in blocks)
        self._scheduler = Scheduler()
        self._call = _Timed(self._scheduler)
        self._lives = [lives(fleet, place, seed) for place in range(fleet.gpus)]
        self._events: list[tuple[float, int, str, Any]] = []
        self._number = 0
        self._now = 0.0
        self._idle: deque[_Gpu] = deque()
        self._work: dict[str, _Work] = {}
        self._closed: set[str] = set()  # GPUs that take no more tasks: warned, taken away or let go
        self._let_go: set[str] = set()
        self._done: set[Block] = set()
        self._lost = 0.0
        self._finished = 0  # draws of blocks that were finished, however often
        self._blocks_lost = self._tasks = self._copies = self._preemptions = 0
        self._ticking = False
        self._call("add", blocks)

    def run(self) -> Result:
        for place in range(self._fleet.gpus):
            self._follow(place)
        while not self._scheduler.done:
            self._now, _, what, which = heapq.heappop(self._events)
            getattr(self, f"_{what}")(which)
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

    def _at(self, when: float, what: str, which: Any) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, what, which))

    def _follow(self, place: int) -> None:
        ready, gpu = next(self._lives[place])
        self._at(ready, "ready", gpu)

    def _ready(self, gpu: _Gpu) -> None:
        """Event: a GPU has its models loaded."""
        self._idle.append(gpu)
        if gpu.end < float("inf"):
            if self._fleet.notice:
                self._at(max(self._now, gpu.end - self._fleet.notice), "warned", gpu)
            self._at(gpu.end, "taken", gpu)

    def _back(self, gpu: _Gpu) -> None:
        """Event: a GPU whose task has ended, or whose process was restarted, is idle again."""
        if gpu.name not in self._closed:
            self._idle.append(gpu)

    def _warned(self, gpu: _Gpu) -> None:
        """Event: the notice that a GPU will be taken away; its task goes on."""
        self._closed.add(gpu.name)
        self._forget(gpu)

    def _taken(self, gpu: _Gpu) -> None:
        """Event: a GPU is taken away."""
        self._closed.add(gpu.name)
        self._forget(gpu)
        if gpu.name not in self._let_go:
            self._preemptions += 1
            self._follow(int(gpu.name.split(".")[0]))
        if gpu.name in self._work:
            known = self._now if self._fleet.notice else self._now + self._fleet.detection
            self._at(known, "missed", self._work[gpu.name])
            self._close(self._work[gpu.name])

    def _missed(self, work: _Work) -> None:
        """Event: the driver knows that a task is lost; it is not to blame where there was a notice."""
        if self._work.pop(work.gpu.name, None):
            self._call("lost", work.gpu.name, "taken away", attempted=not self._fleet.notice)

    def _ended(self, work: _Work) -> None:
        """Event: a task is finished, unless its GPU was taken away or stopped before."""
        gpu = work.gpu
        if self._work.get(gpu.name) is not work or gpu.end < self._now:
            return
        self._close(work)
        del self._work[gpu.name]
        self._call("finished", gpu.name, sum(block.draws for block in work.blocks), self._now - work.started)
        self._at(self._now + self._fleet.task_pause, "back", gpu)

    def _tick(self, _: None) -> None:
        """Event: the driver looks whether a task is late."""
        self._ticking = False

    def _dispatch(self) -> None:
        ready = len(self._idle) + len(self._work)
        for _ in range(len(self._idle)):
            task = self._call("next_task", self._idle[0].name, ready, self._now)
            gpu = self._idle.popleft()
            if task is None:
                self._idle.append(gpu)
            else:
                self._begin(task, gpu)
        for _ in range(self._call("spare", len(self._idle))):
            gpu = self._idle.popleft()
            self._closed.add(gpu.name)
            self._let_go.add(gpu.name)
        if self._idle and not self._ticking:
            self._ticking = True
            self._at(self._now + _TICK, "tick", None)

    def _begin(self, task: Task, gpu: _Gpu) -> None:
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
        """Store what a task has finished by now, and return how many blocks that is."""
        finished = 0
        while finished < len(work.blocks) and work.ends[finished] <= min(self._now, work.gpu.end):
            finished += 1
        self._done.update(work.blocks[:finished])
        return finished

    def _close(self, work: _Work) -> None:
        """Count what was computed of a task that ends here, and what is lost of it: the block in hand."""
        finished = self._commit(work)
        self._finished += sum(block.draws for block in work.blocks[:finished])
        if finished < len(work.blocks):
            begun = work.ends[finished - 1] if finished else work.started
            self._lost += (self._now - begun) * work.gpu.speed
            self._blocks_lost += 1

    def _restart(self, work: _Work) -> None:
        """The driver stops a GPU's task, which is overdue or done elsewhere, by restarting its process."""
        gpu = work.gpu
        del self._work[gpu.name]
        self._close(work)
        self._call("lost", gpu.name, "overdue")
        self._at(self._now + self._fleet.restart, "back", gpu)

    def _forget(self, gpu: _Gpu) -> None:
        if gpu in self._idle:
            self._idle.remove(gpu)


def imagenet_blocks(samples: int = 50_000, n0: int = 100, n: int = 10_000) -> Iterable[Block]:
    """The blocks of ImageNet's validation images at the lengths that specs have by default."""
    for sample in range(samples):
        yield Block(sample, "selection", 0, n0)
        for start in range(0, n, 1000):
            yield Block(sample, "estimation", start, start + 1000)


_IMAGENET_RATE = 170.0  # draws per second of an H100 at 40 % of its bf16 peak: DiffSmooth takes 2.33 TFLOP a draw


def bench_simulation(seed: int = 0) -> list[dict[str, Any]]:
    """ImageNet's 50,000 images (n0 = 100, n = 10,000) on simulated fleets: see `simulate`."""
    blocks = list(imagenet_blocks())
    rows = []
    for gpus in (8, 64, 1024):
        for preemptions, notice in ((0.0, 0.0), (0.05, 0.0), (0.05, 120.0)):
            fleet = Fleet(gpus=gpus, draws_per_second=_IMAGENET_RATE, preemptions_per_hour=preemptions, notice=notice)
            result = simulate(blocks, fleet, seed=seed)
            rows.append(
                {
                    "gpus": gpus,
                    "preemptions_per_gpu_hour": preemptions,
                    "notice_seconds": notice,
                    "hours": result.makespan / 3600,
                    "makespan_over_ideal": result.makespan / result.ideal,
                    "preemptions": result.preemptions,
                    "share_lost": result.lost / result.computed,
                    "share_repeated": result.repeated / result.computed,
                    "copies": result.copies,
                    "blocks_done": result.blocks_done,
                    "tasks": result.tasks,
                    "scheduler_cpu_seconds": result.scheduler_seconds,
                }
            )
    return rows


def describe_simulation(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["GPUs  preempted/h  notice   hours  over ideal  preemptions  work lost   repeated  scheduler CPU"]
    lines += [
        f"{row['gpus']:>4}  {row['preemptions_per_gpu_hour']:>11.0%}  {row['notice_seconds']:>4.0f} s  "
        f"{row['hours']:>6.2f}  {row['makespan_over_ideal'] - 1:>10.3%}  {row['preemptions']:>11}  "
        f"{row['share_lost']:>9.4%}  {row['share_repeated']:>9.4%}  {row['scheduler_cpu_seconds']:>11.1f} s"
        for row in rows
    ]
    return "\n".join(lines)
