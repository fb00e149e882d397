"""Group-sequential boundaries: golden values, exact spending, claims that hold together."""

import itertools

import numpy as np
import pytest
from scipy.stats import binom, norm

from diffsmooth.pipeline.certify.sequential import Grid, boundaries, looks_of, spending

DOUBLING = (100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 51200, 100_000)
GOLDEN = [
    (0.0, [72, 128, 239, 454, 878, 1709, 3353, 6618, 13108, 26035, 50519]),
    (1.0, [98, 187, 364, 711, 1401, 2771, 5496, 10926, 21762, 43393, 84513]),
    (2.0, [101, 201, 400, 796, 1585, 3158, 6298, 12571, 25107, 50163, 97879]),  # 101 of 100: unreachable
]


@pytest.mark.parametrize(("radius", "expected"), GOLDEN)
def test_golden_boundaries(radius, expected):
    assert list(boundaries(float(norm.cdf(radius)), DOUBLING, 0.001)) == expected


def test_one_look_is_the_exact_binomial_test():
    for p0, n in ((0.5, 100), (0.9, 333), (norm.cdf(2), 2000)):
        (bound,) = boundaries(float(p0), (n,), 0.01)
        assert binom.sf(bound - 1, n, p0) <= 0.01 < binom.sf(bound - 2, n, p0)


@pytest.mark.parametrize("p0", [0.5, 0.84, 0.99])
def test_the_boundaries_spend_at_most_alpha(p0):
    """The chance of ever reaching a boundary, summed by an own recursion in plain Python, without the convolution."""
    looks, alpha = (20, 40, 80, 120), 0.05
    table, alive, spent, before = boundaries(p0, looks, alpha), {0: 1.0}, 0.0, 0
    for look, bound, allowed in zip(looks, table, spending(looks, alpha), strict=True):
        after: dict[int, float] = {}
        for count, chance in alive.items():
            for more in range(look - before + 1):
                after[count + more] = after.get(count + more, 0.0) + chance * binom.pmf(more, look - before, p0)
        spent += sum(chance for count, chance in after.items() if count >= bound)
        alive, before = {count: chance for count, chance in after.items() if count < bound}, look
        one_less = spent + alive.get(bound - 1, 0.0)
        assert spent <= allowed < one_less or bound > look
    assert spent <= alpha


@pytest.mark.parametrize(("n", "length"), [(100_000, 1000), (100_000, 100), (900, 300), (50, 50), (1100, 50)])
def test_looks_end_blocks_and_end_at_n(n, length):
    looks = looks_of(n, length)
    assert looks[-1] == n
    assert all(look % length == 0 for look in looks)
    assert all(a < b for a, b in itertools.pairwise(looks))


@pytest.mark.parametrize("true_radius", [0.0, 0.25, 0.3, 0.5])
def test_claims_beyond_the_true_radius_have_probability_at_most_alpha(true_radius):
    """All radii of a sample together, p_A at the very edge of one of them, or between two; 20,000 paths."""
    sigma, alpha, paths = 0.5, 0.05, 20_000
    grid = Grid((0.0, 0.25, 0.5, 0.75), sigma, alpha, looks_of(2000, 100))
    rng = np.random.default_rng(3)
    steps = np.diff((0, *grid.looks))
    counts = rng.binomial(steps, norm.cdf(true_radius / sigma), size=(paths, len(steps))).cumsum(axis=1)
    claimed = np.array(
        [grid.radius(decision.level) for decision in map(grid.decide, counts.tolist()) if decision.final]
    )
    assert len(claimed) == paths
    certified = np.array([decision.level > 0 for decision in map(grid.decide, counts.tolist())])
    # at p_A exactly on the edge of a tested radius, claiming that radius is an error
    edge = true_radius in grid.radii
    errors = (claimed > true_radius) | (edge & certified & (claimed == true_radius))
    assert errors.mean() <= alpha * 1.1
    if edge:
        assert errors.mean() > alpha / 3  # the simulation does reach the boundary


def test_a_decision_depends_only_on_the_first_draws():
    grid = Grid((0.0, 0.5), 0.5, 0.001, looks_of(10_000, 100))
    rng = np.random.default_rng(1)
    for p in (0.3, 0.55, 0.85, 0.999):
        counts = rng.binomial(np.diff((0, *grid.looks)), p).cumsum().tolist()
        final = grid.decide(counts)
        assert final.final
        seen = grid.looks.index(final.n) + 1
        assert grid.decide(counts[:seen]) == final
        for fewer in range(seen):
            assert not grid.decide(counts[:fewer]).final
            assert grid.decide(counts[:fewer]).n == grid.looks[fewer]


def test_hopeless_and_finished_samples_stop_early():
    grid = Grid((0.0, 0.5), 0.5, 0.001, looks_of(100_000, 100))
    hopeless, sure = grid.decide([10]), grid.decide([100, 200, 300])
    assert (hopeless.n, hopeless.level, hopeless.final) == (100, 0, True)
    assert (sure.level, sure.final) == (2, True)
    assert grid.decide([]).n == 100
