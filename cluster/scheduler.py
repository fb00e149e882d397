"""Which worker computes which blocks next: a pure state machine. No I/O, no clock of its own, no Ray.

Blocks wait in order; a task is cut for a worker when it asks, long enough to keep it busy for TARGET_SECONDS at the
speed it has shown, short enough that the work left is shared out evenly. A lost task goes back to the front of the
line, for its last two attempts cut into single blocks: a block that kills its worker takes no other with it, and a
neighbour that merely shared its first attempts survives one more mishap. A block that is lost MAX_ATTEMPTS times is set
aside with its last error. When nothing waits, an idle worker gets a
second copy of a task that takes much longer than expected: storage keeps the first result of each block.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from pipeline.spec import Block

TARGET_SECONDS = 60.0
MAX_ATTEMPTS = 4
SHARES = 4  # a task takes at most 1 / (SHARES * workers) of the draws that wait
STRAGGLER_FACTOR = 2.0
DEADLINE_FACTOR, DEADLINE_FLOOR = 10.0, 600.0  # a task is given up after this many times its expected seconds
FIRST_DRAWS = 2_000  # the size of a worker's first task, before it has shown a speed


@dataclass(eq=False)
class Task:
    blocks: list[Block]
    attempts: int = 0
    done: bool = False

    @property
    def draws(self) -> int:
        return sum(block.draws for block in self.blocks)


class Running(NamedTuple):
    task: Task
    started: float
    expected: float  # seconds


class SetAside(NamedTuple):
    task: Task
    error: str


@dataclass
class Scheduler:
    """Workers are named by strings; `now` is in seconds on any clock that does not run backwards."""

    target_seconds: float = TARGET_SECONDS
    max_attempts: int = MAX_ATTEMPTS
    first_draws: int = FIRST_DRAWS
    set_aside: list[SetAside] = field(default_factory=list)
    running: dict[str, Running] = field(default_factory=dict)
    _waiting: deque[Block] = field(default_factory=deque)
    _lost: deque[Task] = field(default_factory=deque)
    _waiting_draws: int = 0
    _rates: dict[str, float] = field(default_factory=dict)  # draws per second

    def add(self, blocks: Iterable[Block]) -> None:
        for block in blocks:
            self._waiting.append(block)
            self._waiting_draws += block.draws

    @property
    def done(self) -> bool:
        return not (self._waiting or self._lost or self.running)

    @property
    def rate(self) -> float:
        """Draws per second of a typical worker, 0 while unknown."""
        return sum(self._rates.values()) / len(self._rates) if self._rates else 0.0

    def next_task(self, worker: str, workers: int, now: float) -> Task | None:
        """The task that an idle worker begins now, one of `workers`; None where there is nothing for it to do."""
        assert worker not in self.running
        task = self._lost.popleft() if self._lost else self._cut(worker, workers) or self._straggler(now)
        if task is None:
            return None
        task.attempts += 1
        rate = self._rates.get(worker) or self.rate
        expected = task.draws / rate if rate else self.target_seconds
        self.running[worker] = Running(task, now, expected)
        return task

    def finished(self, worker: str, draws: int, seconds: float) -> None:
        """The worker has stored all blocks of its task, of which it computed `draws` draws."""
        task = self.running.pop(worker).task
        task.done = True
        if draws and seconds > 0:
            self._rates[worker] = draws / seconds

    def lost(self, worker: str, error: str, *, attempted: bool = True) -> None:
        """The worker's attempt failed, or the worker went away; with `attempted` False the task is not to blame."""
        task = self.running.pop(worker).task
        if not attempted:
            task.attempts -= 1
        if task.done or any(other.task is task for other in self.running.values()):
            return  # another copy has done it, or still may
        if task.attempts >= self.max_attempts:
            self.set_aside.append(SetAside(task, error))
        elif task.attempts == self.max_attempts - 2:
            self._lost.extend(Task([block], task.attempts) for block in task.blocks)
        else:
            self._lost.append(task)

    def overdue(self, now: float) -> list[str]:
        """Workers whose task is past its deadline, or has been done by another."""
        return [
            worker
            for worker, (task, started, expected) in self.running.items()
            if task.done or now - started > max(DEADLINE_FLOOR, DEADLINE_FACTOR * expected)
        ]

    def spare(self, idle: int) -> int:
        """How many of the idle workers can go: nothing waits, and one is kept for each task under way."""
        return 0 if self._waiting or self._lost else max(0, idle - len(self.running))

    def _cut(self, worker: str, workers: int) -> Task | None:
        if not self._waiting:
            return None
        rate = self._rates.get(worker) or self.rate
        fair = self._waiting_draws / (SHARES * workers)
        wanted = min(self.target_seconds * rate if rate else self.first_draws, fair)
        blocks: list[Block] = []
        draws = 0
        while self._waiting and (not blocks or draws + self._waiting[0].draws <= wanted):
            blocks.append(self._waiting.popleft())
            draws += blocks[-1].draws
        self._waiting_draws -= draws
        return Task(blocks)

    def _straggler(self, now: float) -> Task | None:
        """The task that is furthest past its expected time, if any is far past it and not duplicated yet."""
        tasks = [run.task for run in self.running.values()]
        late = [
            ((now - run.started) / run.expected, index)
            for index, run in enumerate(self.running.values())
            if now - run.started > STRAGGLER_FACTOR * run.expected and tasks.count(run.task) == 1 and not run.task.done
        ]
        return tasks[max(late)[1]] if late else None
