"""The scheduler without Ray: scripted failures on a clock that the tests advance."""

import pytest

from diffsmooth.cluster.scheduler import DEADLINE_FLOOR, MAX_ATTEMPTS, Scheduler
from diffsmooth.pipeline.block import Block

BLOCKS = [Block(sample, "estimation", start, start + 100) for sample in range(5) for start in range(0, 400, 100)]


def filled(blocks=BLOCKS, **settings) -> Scheduler:
    scheduler = Scheduler(**settings)
    scheduler.add(blocks)
    return scheduler


def test_every_block_is_handed_out_once():
    scheduler, handed, now = filled(), [], 0.0
    while not scheduler.done:
        for worker in ("a", "b"):
            task = scheduler.next_task(worker, 2, now)
            if task:
                handed += task.blocks
        now += 1
        for worker in list(scheduler.running):
            scheduler.finished(worker, scheduler.running[worker].task.draws, 1.0)
    assert handed == BLOCKS


def test_tasks_fit_the_speed_and_shrink_towards_the_end():
    blocks = [Block(sample, "estimation", 0, 100) for sample in range(1000)]
    scheduler = filled(blocks, target_seconds=60)
    scheduler.next_task("a", 2, 0)
    scheduler.finished("a", 1000, 10.0)  # 100 draws a second
    sizes = []
    while task := scheduler.next_task("a", 2, 0):
        sizes.append(task.draws)
        scheduler.finished("a", task.draws, task.draws / 100)
    assert max(sizes) == 6000
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == 100


def test_failed_tasks_come_first_and_only_the_failing_block_is_set_aside():
    scheduler = filled()
    poison = BLOCKS[2]
    now, attempts, finished, together = 0.0, 0, [], []
    while (task := scheduler.next_task("a", 1, now)) is not None:
        if poison in task.blocks:
            attempts += 1
            together = task.blocks if attempts == 1 else together
            assert attempts == task.attempts <= MAX_ATTEMPTS
            assert task.blocks == (together if attempts <= MAX_ATTEMPTS - 2 else [poison])
            scheduler.lost("a", f"error {attempts}")
            if attempts < MAX_ATTEMPTS:
                assert scheduler.next_task("a", 1, now).blocks[0] in together  # type: ignore[union-attr]
                scheduler.lost("a", "", attempted=False)
        else:
            finished += task.blocks
            scheduler.finished("a", task.draws, 1.0)
        now += 1
    assert scheduler.done
    assert [(aside.task.blocks, aside.error) for aside in scheduler.set_aside] == [([poison], f"error {MAX_ATTEMPTS}")]
    assert sorted(finished) == sorted(set(BLOCKS) - {poison})


def test_a_preempted_worker_costs_no_attempt():
    scheduler = filled(BLOCKS[:1])
    for _ in range(3 * MAX_ATTEMPTS):
        assert scheduler.next_task("a", 1, 0) is not None
        scheduler.lost("a", "preempted", attempted=False)
    assert scheduler.set_aside == []


def tail() -> Scheduler:
    """One block, running on "slow" since 0, expected to take 1 s."""
    scheduler = filled(BLOCKS[:2])
    scheduler.next_task("slow", 1, 0)
    scheduler.finished("slow", 100, 1.0)
    scheduler.next_task("slow", 1, 0)
    return scheduler


def test_stragglers_are_duplicated_once_and_the_first_result_counts():
    scheduler = tail()
    assert scheduler.next_task("idle", 2, 1.5) is None
    assert scheduler.next_task("idle", 2, 2.5) is scheduler.running["slow"].task
    assert scheduler.next_task("third", 3, 9.0) is None
    scheduler.finished("idle", 100, 1.0)
    assert not scheduler.done
    assert scheduler.overdue(9.0) == ["slow"]
    scheduler.lost("slow", "killed")
    assert scheduler.done
    assert scheduler.set_aside == []


def test_a_failed_copy_is_not_requeued_while_the_other_runs():
    scheduler = tail()
    scheduler.next_task("idle", 2, 9.0)
    scheduler.lost("slow", "killed")
    assert scheduler.next_task("slow", 2, 9.1) is None
    scheduler.lost("idle", "killed as well")
    assert scheduler.next_task("slow", 2, 9.2) is not None


def test_deadline():
    scheduler = tail()
    assert scheduler.overdue(DEADLINE_FLOOR) == []
    assert scheduler.overdue(DEADLINE_FLOOR + 1) == ["slow"]


@pytest.mark.parametrize(
    ("waiting", "running", "idle", "spare"), [(4, 0, 3, 0), (0, 1, 3, 2), (0, 2, 1, 0), (0, 0, 2, 2)]
)
def test_idle_workers_are_released_except_one_per_running_task(waiting, running, idle, spare):
    scheduler = Scheduler()
    for worker in range(running):
        scheduler.add(BLOCKS[:1])
        scheduler.next_task(str(worker), 1, 0)
    scheduler.add(BLOCKS[:waiting])
    assert scheduler.spare(idle) == spare
