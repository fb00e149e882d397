"""Drivers that share a run without a cluster: simulated on a clock, and with real workers and storage."""

import heapq
import random
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from itertools import count

import pytest

from diffsmooth.cluster.allocation import part_of
from diffsmooth.cluster.scheduler import Part, Scheduler, Task
from diffsmooth.cluster.worker import Setup, Worker, to_compute
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.orders import Order
from diffsmooth.pipeline.certify.planning import make_plan
from diffsmooth.pipeline.certify.sampling import Sampler
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.smoothing import weights_ids
from diffsmooth.pipeline.spec import BlockLengths, load_spec
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.blocks import Votes, list_blocks
from diffsmooth.pipeline.votes.run import claim_run, describe_run

LENGTHS = BlockLengths(selection=100, estimation=100)
ORDERS = {
    "fixed": Order(samples=list(range(40)), n0=100, n=400, alpha=0.001),
    "planned": Order(samples=list(range(60)), n0=100, n=1000, alpha=0.001, mode="planned", max_acr_loss=0.02),
    "grid": Order(samples=list(range(60)), n0=100, n=1000, alpha=0.001, mode="grid", radii=[0.1, 0.3, 0.5]),
}


def votes_of(block: Block) -> Votes:
    """Votes that do not depend on the driver; samples differ in how often f returns class 0."""
    for_top = block.draws * (60 + 7 * block.sample % 40) // 100
    return Votes(block, 0, {0: for_top, 1: block.draws - for_top})


class Driver:
    """A driver with one worker: its scheduler, and its sampler."""

    def __init__(self, order: Order, part: Part, uniform) -> None:
        def settle(pilots):
            return make_plan(order, LENGTHS, 0.5, pilots, {})

        self.scheduler = Scheduler(part=part, random=uniform)
        self.sampler = Sampler(order, LENGTHS, 0.5, committed=[], read=lambda blocks: [], settle_plan=settle)
        self.scheduler.add(self.sampler.start())

    def finished(self, work: "Work", seconds: float, stored: set[Block]) -> None:
        left = [block for block in work.task.blocks if block not in stored]
        draws = sum(block.draws for block in work.wanted[: work.computed])
        if self.scheduler.finished("worker", draws, seconds, met=work.met, left=left):
            new = [votes_of(block) for block in work.task.blocks if block in stored]
            self.scheduler.add(self.sampler.take(new))


@dataclass(eq=False)
class Work:
    """A task in progress."""

    task: Task
    started: float
    wanted: list[Block]
    met: bool
    computed: int = 0


@dataclass
class Simulation:
    """Drivers that compute an order together, a block in about six seconds each."""

    drivers: list[Driver]
    uniform: random.Random
    stored: set[Block] = field(default_factory=set)
    twice: int = 0

    def run(self, dies: dict[int, float]) -> None:
        number = count()
        events: list = [(self.uniform.random(), next(number), index, None) for index in range(len(self.drivers))]
        while events:
            now, _, index, work = heapq.heappop(events)
            driver = self.drivers[index]
            if now > dies.get(index, 1e9):
                continue
            if work is not None:
                work = self._store_next(work, now, driver)
            if work is None and not driver.scheduler.done:
                task = driver.scheduler.next_task("worker", 1, now)
                if task is None:
                    heapq.heappush(events, (now + 0.5, next(number), index, None))
                    continue
                found = self.stored.intersection(task.blocks)
                work = Work(task, now, to_compute(task.blocks, found, task.attempts == 1), bool(found))
            if work is not None:
                seconds = 5 + 2 * self.uniform.random() if work.wanted else 0.01
                heapq.heappush(events, (now + seconds, next(number), index, work))

    def _store_next(self, work: Work, now: float, driver: Driver) -> Work | None:
        """Store the block that is computed now; None if the task has ended."""
        lost = False
        if work.wanted:
            block = work.wanted[work.computed]
            work.computed += 1
            lost = block in self.stored
            self.twice += lost
            self.stored.add(block)
            work.met |= lost
        if work.computed < len(work.wanted) and not lost:
            return work
        driver.finished(work, now - work.started, self.stored)
        return None


def simulate(order: Order, drivers: int, *, known: bool, kill: bool, seed: int) -> Simulation:
    uniform = random.Random(seed)
    parts = [Part(index / drivers, drivers) if known else Part(uniform.random()) for index in range(drivers)]
    simulation = Simulation([Driver(order, part, uniform.random) for part in parts], uniform)
    whole = 6 * len(list(order.blocks(LENGTHS))) / drivers
    simulation.run({uniform.randrange(drivers): whole * uniform.random()} if kill else {})
    return simulation


@cache
def simulated_alone(mode: str) -> Simulation:
    return simulate(ORDERS[mode], 1, known=True, kill=False, seed=0)


@pytest.mark.parametrize("kill", [False, True], ids=["", "killed"])
@pytest.mark.parametrize("known", [True, False], ids=["part", "random"])
@pytest.mark.parametrize("drivers", [2, 4])
@pytest.mark.parametrize("mode", ORDERS)
def test_drivers_compute_few_blocks_twice(mode, drivers, known, kill):
    alone = simulated_alone(mode)
    assert alone.twice == 0
    shares = []
    for seed in range(3):
        shared = simulate(ORDERS[mode], drivers, known=known, kill=kill, seed=seed)
        assert shared.stored == alone.stored  # the same blocks become needed, whichever driver casts them
        shares.append(shared.twice / len(alone.stored))
    assert statistics.mean(shares) <= 0.1


def test_a_straggler_that_leaves_blocks_to_its_copy_loses_none():
    blocks = [Block(0, "estimation", start, start + 100) for start in (0, 100, 200)]
    for copy_dies in (False, True):
        scheduler = Scheduler(first_draws=300)
        scheduler.add(blocks[:1])
        scheduler.next_task("a", 1, 0.0)
        scheduler.finished("a", 100, 1.0)
        scheduler.add(blocks[1:])
        scheduler._queued_draws = 10_000  # so that both blocks are one task
        task = scheduler.next_task("a", 1, 1.0)
        assert task.blocks == blocks[1:]
        assert scheduler.next_task("b", 2, 100.0) is task
        if copy_dies:
            scheduler.lost("b", "died")
            assert scheduler.finished("a", 100, 1.0, met=True, left=[blocks[2]])
            assert scheduler.next_task("a", 1, 200.0).blocks == [blocks[2]]
            scheduler.finished("a", 100, 1.0)
        else:
            assert not scheduler.finished("a", 100, 1.0, met=True, left=[blocks[2]])
            assert scheduler.finished("b", 100, 1.0)
        assert scheduler.done


SLURM = {"SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "9", "SLURM_ARRAY_TASK_COUNT": "4"}


@pytest.mark.parametrize(
    ("option", "environment", "part"),
    [
        ("1/1", {}, Part(0.0, 1)),
        ("2/4", SLURM | {"SLURM_ARRAY_TASK_ID": "9"}, Part(0.25, 4)),
        (None, SLURM | {"SLURM_ARRAY_TASK_ID": "3"}, Part(0.0, 4)),  # --array=3-9:2
        (None, SLURM | {"SLURM_ARRAY_TASK_ID": "9"}, Part(6 / 7, 4)),
    ],
)
def test_part(option, environment, part):
    assert part_of(option, environment) == part


@pytest.mark.parametrize("environment", [{}, SLURM, SLURM | {"SLURM_ARRAY_TASK_ID": "10"}])
def test_without_a_part_a_driver_starts_anywhere(environment):
    parts = {part_of(None, environment) for _ in range(5)}
    assert len(parts) == 5
    assert all(0 <= part.place < 1 and part.drivers == 1 for part in parts)


@pytest.mark.parametrize("option", ["0/4", "5/4", "1/0", "1", "one/two", "1/4/2", "01/4"])
def test_a_part_that_does_not_exist_is_refused(option):
    with pytest.raises(UserError, match=re.escape(f"--part {option}: must be I/K")):
        part_of(option, {})


def test_two_workers_share_a_run_in_real_storage(raw_spec, tmp_path):
    """Two drivers with real workers and a folder; each of their loops is a thread of this process."""
    raw_spec["classifier"]["arch"] = "tests.models:slow_half_space"
    spec, store = load_spec(raw_spec), open_store(str(tmp_path / "run"))
    run = describe_run(spec, weights_ids(spec), 2)
    claim_run(store, run)
    blocks = [Block(sample, "estimation", start, start + 100) for sample in range(8) for start in range(0, 300, 100)]

    def drive(part: Part) -> tuple[list[Block], int]:
        worker = Worker.load(Setup(spec, store.uri, run.votes_id, 25))
        scheduler, brought, twice = Scheduler(part=part), [], 0
        scheduler.add(blocks)
        while not scheduler.done:
            task = scheduler.next_task("worker", 1, time.monotonic())
            if task is None:
                time.sleep(0.02)
                continue
            receipt = worker.run(task.blocks, "0", share=True)
            scheduler.finished("worker", receipt.draws, receipt.seconds, met=receipt.met, left=receipt.left)
            brought += [votes.block for votes in receipt.votes]
            twice += len(receipt.duplicates)
        return brought, twice

    with ThreadPoolExecutor() as pool:
        done = list(pool.map(drive, [Part(0.0, 2), Part(0.5, 2)]))
    for brought, _ in done:
        assert sorted(brought) == blocks  # each driver gets the votes of every block once, its own or not
    assert sum(twice for _, twice in done) <= 0.15 * len(blocks)  # two blocks each where they meet, of 24
    assert list_blocks(store, run.block) == set(blocks)
