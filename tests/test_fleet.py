"""The scheduler on a simulated fleet: invariants that hold for all preemptions."""

import dataclasses

import pytest

from benchmarks.fleet import Fleet, ideal_makespan, imagenet_blocks, simulate

BLOCKS = list(imagenet_blocks(samples=60, n=10_000))
LONGEST = 1000  # draws of a block
CALM = Fleet(gpus=7, draws_per_second=170.0)
STORMY = dataclasses.replace(CALM, preemptions_per_hour=20.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("notice", [0.0, 120.0])
@pytest.mark.parametrize("gpus", [1, 7, 40])
def test_every_block_is_done_and_a_preemption_costs_at_most_one_block(gpus, notice, seed):
    result = simulate(BLOCKS, dataclasses.replace(STORMY, gpus=gpus, notice=notice), seed=seed)
    assert (result.blocks_done, result.set_aside) == (len(BLOCKS), 0)
    assert result.preemptions > 0
    assert (
        result.blocks_lost <= result.preemptions + result.copies
    )  # a copy that is slower than the original is stopped
    assert result.lost <= LONGEST * result.blocks_lost
    done = result.computed - result.lost - result.repeated
    assert done == pytest.approx(sum(block.draws for block in BLOCKS))
    assert result.makespan >= result.ideal


def test_without_preemptions_no_work_and_little_time_is_lost():
    result = simulate(BLOCKS, CALM)
    assert (result.lost, result.repeated, result.set_aside, result.preemptions) == (0, 0, 0, 0)
    assert result.blocks_done == len(BLOCKS)
    assert 1 <= result.makespan / result.ideal < 1.02


def test_ideal_makespan_of_equal_gpus_is_a_quotient():
    fleet = dataclasses.replace(CALM, speed_spread=0.0)
    assert ideal_makespan(7 * 170 * 1000, fleet, seed=0) == pytest.approx(1000)


def test_same_seed_gives_the_same_result():
    assert simulate(BLOCKS, STORMY, seed=3) == simulate(BLOCKS, STORMY, seed=3)
    assert simulate(BLOCKS, STORMY, seed=3) != simulate(BLOCKS, STORMY, seed=4)


def test_last_tasks_of_slow_gpus_are_copied():
    """Relative speeds are 0.01 to 1.99; without copies, the slowest GPU would finish long after the others."""
    result = simulate(BLOCKS[:200], dataclasses.replace(CALM, gpus=20, speed_spread=0.99))
    assert result.copies > 0
    assert result.blocks_done == 200
