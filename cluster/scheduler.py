"""Which worker computes which blocks next: a pure state machine without I/O, without Ray, and without a clock.

Blocks are queued in order. A worker that asks for work gets a task cut from the queue: long enough to keep it busy for
TARGET_SECONDS at its measured speed, short enough that the remaining work is shared evenly. A failed task is requeued
at the front; for its last two attempts it is split into single blocks, so that a block that kills its worker affects no
other block. A block that fails MAX_ATTEMPTS times is set aside with its last error. When the queue is empty, an idle
worker gets a copy of a task that takes much longer than expected; storage keeps the first result of each block.

Other drivers may work on the same run. Each starts at its own place in the list of blocks. If another driver has stored
blocks of a task, the two have met, and this one continues at a random place: otherwise both would compute the same
blocks from there on. The last blocks in the queue are then probably in progress elsewhere, so workers wait before they
take one.

No call loops over all workers or all blocks: a tick with nothing to do costs the same for eight workers and a thousand.
"""

import heapq
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from diffsmooth.pipeline.block import Block

TARGET_SECONDS = 60.0
MAX_ATTEMPTS = 4
SHARES = 4  # a task has at most 1 / (SHARES * workers) of the queued draws
STRAGGLER_FACTOR = 2.0
DEADLINE_FACTOR, DEADLINE_FLOOR = 10.0, 600.0  # a task times out after the larger of factor * expected and floor, s
FIRST_DRAWS = 2_000  # the size of a worker's first task, before its speed is known
STRANGERS = 4  # drivers that are assumed to be at work once one of them was met; only sizes depend on it
LAST_BLOCKS = 2  # per worker of all drivers: so few blocks in the queue are probably in progress elsewhere


@dataclass(eq=False)
class Task:
    blocks: list[Block]
    attempts: int = 0
    done: bool = False
    workers: list[str] = field(default_factory=list)  # that run it now; two if a straggler was copied

    @property
    def draws(self) -> int:
        return sum(block.draws for block in self.blocks)


class Running(NamedTuple):
    task: Task
    started: float
    expected: float  # seconds


class Part(NamedTuple):
    """The part of a run with which a driver starts."""

    place: float = 0.0  # where it starts in a list of blocks, as a fraction of its length
    drivers: int = 1  # that work on the run


ALL = Part()


class SetAside(NamedTuple):
    task: Task
    error: str


class _Timer:
    """Running tasks by the time at which something is due; tasks that have ended are skipped."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str, Running]] = []
        self._count = 0

    def set(self, when: float, worker: str, run: Running) -> None:
        self._count += 1
        heapq.heappush(self._heap, (when, self._count, worker, run))

    def passed(self, now: float, running: dict[str, Running]) -> list[str]:
        """Remove and return the workers whose time has passed."""
        workers = []
        while self._heap and (self._heap[0][0] < now or running.get(self._heap[0][2]) is not self._heap[0][3]):
            _, _, worker, run = heapq.heappop(self._heap)
            if running.get(worker) is run:
                workers.append(worker)
        return workers


@dataclass
class Scheduler:
    """Workers are named by strings; `now` is in seconds on any monotonic clock."""

    target_seconds: float = TARGET_SECONDS
    max_attempts: int = MAX_ATTEMPTS
    first_draws: int = FIRST_DRAWS
    part: Part = ALL
    random: Callable[[], float] = secrets.SystemRandom().random  # uniform in [0, 1)
    set_aside: list[SetAside] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    _queue: deque[Block] = field(default_factory=deque)
    _failed: deque[Task] = field(default_factory=deque)
    _queued_draws: int = 0
    _rates: dict[str, float] = field(default_factory=dict)  # draws per second
    _rates_sum: float = 0.0
    _lateness: _Timer = field(default_factory=_Timer)
    _late: dict[str, None] = field(
        default_factory=dict
    )  # workers far past the expected time whose task is not copied yet
    _deadlines: _Timer = field(default_factory=_Timer)
    _overdue: dict[str, None] = field(default_factory=dict)
    _met: bool = False  # another driver works on the same run
    _waits: dict[str, float] = field(default_factory=dict)  # until when a worker takes none of the last blocks

    def add(self, blocks: Sequence[Block]) -> None:
        start = int(self.part.place * len(blocks))
        self._queue.extend(blocks[start:])
        self._queue.extend(blocks[:start])
        self._queued_draws += sum(block.draws for block in blocks)

    @property
    def done(self) -> bool:
        return not (self._queue or self._failed or self.running)

    @property
    def rate(self) -> float:
        """Mean draws per second of a worker; 0 while unknown."""
        return self._rates_sum / len(self._rates) if self._rates else 0.0

    def next_task(self, worker: str, workers: int, now: float) -> Task | None:
        """The task that an idle worker, one of `workers`, starts now; None if there is nothing to do."""
        assert worker not in self.running
        if self._failed:
            task: Task | None = self._failed.popleft()
        elif self._in_progress_elsewhere(worker, workers, now):
            return None
        else:
            task = self._cut(worker, workers) or self._straggler(now)
        if task is None:
            return None
        task.attempts += 1
        task.workers.append(worker)
        rate = self._rates.get(worker) or self.rate
        expected = task.draws / rate if rate else self.target_seconds
        self.running[worker] = run = Running(task, now, expected)
        self._deadlines.set(now + max(DEADLINE_FLOOR, DEADLINE_FACTOR * expected), worker, run)
        if len(task.workers) == 1:
            self._lateness.set(now + STRAGGLER_FACTOR * expected, worker, run)
        return task

    def finished(
        self, worker: str, draws: int, seconds: float, *, met: bool = False, left: Sequence[Block] = ()
    ) -> bool:
        """All blocks of the worker's task are stored, except those `left` to others; it computed `draws` draws.

        `met` says that another attempt has stored some of them. Returns False if a copy of the task has finished
        earlier, or has to finish what is left.
        """
        task = self._take(worker)
        if left and task.workers:
            return False
        if not task.done:
            self._requeue(left, elsewhere=met and task.attempts == 1)  # later attempts and copies meet our own
        first, task.done = not task.done, True
        self._overdue.update(dict.fromkeys(task.workers))
        if draws and seconds > 0:
            rate = draws / seconds
            self._rates_sum += rate - self._rates.get(worker, 0.0)
            self._rates[worker] = rate
        return first

    def lost(self, worker: str, error: str, *, attempted: bool = True) -> None:
        """The worker's attempt failed, or the worker died; with `attempted` False the attempt does not count."""
        task = self._take(worker)
        if not attempted:
            task.attempts -= 1
        if task.done:
            return  # another copy has finished it
        if task.workers:  # another copy is still running, and may be copied again
            other = self.running[task.workers[0]]
            self._lateness.set(other.started + STRAGGLER_FACTOR * other.expected, task.workers[0], other)
        elif task.attempts >= self.max_attempts:
            self.set_aside.append(SetAside(task, error))
        elif task.attempts == self.max_attempts - 2:
            self._failed.extend(Task([block], task.attempts) for block in task.blocks)
        else:
            self._failed.append(task)

    def overdue(self, now: float) -> list[str]:
        """Workers whose task timed out, or was finished by another worker."""
        self._overdue.update(dict.fromkeys(self._deadlines.passed(now, self.running)))
        return list(self._overdue)

    def spare(self, idle: int) -> int:
        """How many idle workers can be released: the queue is empty, and one is kept for each running task."""
        return 0 if self._queue or self._failed else max(0, idle - len(self.running))

    def _take(self, worker: str) -> Task:
        """End the attempt of a worker."""
        task = self.running.pop(worker).task
        task.workers.remove(worker)
        self._late.pop(worker, None)
        self._overdue.pop(worker, None)
        return task

    def _cut(self, worker: str, workers: int) -> Task | None:
        if not self._queue:
            return None
        rate = self._rates.get(worker) or self.rate
        fair = self._queued_draws / (SHARES * workers * self._drivers)
        wanted = min(self.target_seconds * rate if rate else self.first_draws, fair)
        blocks: list[Block] = []
        draws = 0
        while self._queue and (not blocks or draws + self._queue[0].draws <= wanted):
            blocks.append(self._queue.popleft())
            draws += blocks[-1].draws
        self._queued_draws -= draws
        return Task(blocks)

    def _requeue(self, left: Sequence[Block], *, elsewhere: bool) -> None:
        """Put blocks back; with `elsewhere`, continue at a random place, because another driver works at this one."""
        self._queue.extend(left)
        self._queued_draws += sum(block.draws for block in left)
        if elsewhere:
            self._met = True
            self._queue.rotate(-int(self.random() * len(self._queue)))

    @property
    def _drivers(self) -> int:
        """How many drivers there probably are."""
        return max(self.part.drivers, STRANGERS) if self._met else self.part.drivers

    def _in_progress_elsewhere(self, worker: str, workers: int, now: float) -> bool:
        """Whether the last blocks in the queue are left to other drivers for now.

        Before each task, a worker waits about as long as the next block takes to compute.
        """
        if not self._met or not 0 < len(self._queue) <= LAST_BLOCKS * workers * self._drivers:
            return False
        if worker not in self._waits:
            rate = self._rates.get(worker) or self.rate
            seconds = self._queue[0].draws / rate if rate else 0.0
            self._waits[worker] = now + (0.5 + self.random()) * seconds
        if now < self._waits[worker]:
            return True
        del self._waits[worker]
        return False

    def _straggler(self, now: float) -> Task | None:
        """The task that is furthest past its expected time, if one is far past it and not copied yet."""
        self._late.update(dict.fromkeys(self._lateness.passed(now, self.running)))
        if not self._late:
            return None

        def lateness(worker: str) -> float:
            run = self.running[worker]
            return (now - run.started) / run.expected

        worker = max(self._late, key=lateness)
        del self._late[worker]
        return self.running[worker].task
