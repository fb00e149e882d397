"""`diffsmooth bench --sampling`: what each sampling mode saves and gives up, simulated on populations of samples.

A population is a law of p_A over samples; every figure comes from binomial counts of one stream, so that the modes
see the same samples. Votes are counted, not seconds.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.certify import certified_radius
from pipeline.orders import Order
from pipeline.planning import plan_draws
from pipeline.sequential import Grid, looks_of

SIGMA, ALPHA, N0, PILOT, LENGTH = 0.5, 0.001, 100, 1000, 100
RADII = tuple(0.25 * step for step in range(8))


class Population(NamedTuple):
    """Shares of samples whose class is wrong and of those whose votes hardly ever differ; the rest's Beta law of p_A.

    The p_A of the second are those that 100,000 votes which all agree leave possible.
    """

    name: str
    wrong: float
    saturated: float
    beta: tuple[float, float]


POPULATIONS = (
    Population("weak", 0.5, 0.02, (2.0, 1.0)),
    Population("middling", 0.35, 0.15, (4.0, 1.0)),
    Population("strong", 0.15, 0.5, (8.0, 1.0)),
)


def simulate_modes(n: int, samples: int = 1000, seed: int = 0) -> list[dict[str, Any]]:
    """A row a population and mode: draws over those of fixed mode, ACR lost, and the worst loss at a radius."""
    return [row for population in POPULATIONS for row in _rows(population, n, samples, np.random.default_rng(seed))]


def _rows(population: Population, n: int, samples: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    kind = rng.random(samples)
    p = rng.beta(*population.beta, samples)
    saturated = kind < population.wrong + population.saturated
    p[saturated] = rng.beta(100_000.5, 0.5, int(saturated.sum()))
    wrong = kind < population.wrong
    # a wrong sample's top class is as hard to bound as a right one's; it counts nothing
    p[wrong] = rng.beta(*population.beta, int(wrong.sum()))
    right = ~wrong & (p > 0.5)
    looks = looks_of(n, LENGTH)
    counts = rng.binomial(np.diff((0, *looks)), p[:, None], size=(samples, len(looks))).cumsum(axis=1)
    radii_at_n = certified_radius(counts[:, -1], n, ALPHA, SIGMA)

    def counted(radii: NDArray[np.float64], certified: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Radii where right and certified, -1 elsewhere: 0 is a radius."""
        return np.where(right & certified, radii, -1.0)

    fixed = counted(radii_at_n, radii_at_n > 0)
    pilot = rng.binomial(PILOT, p)

    def planned(loss: float, active: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        draws = np.zeros(samples, dtype=np.int64)
        order = Order(samples=[0], n0=PILOT, n=n, alpha=ALPHA, mode="planned", max_acr_loss=loss)
        draws[active] = plan_draws(pilot[active].tolist(), order, sigma=SIGMA, length=LENGTH)
        some = draws > 0
        reached = np.zeros(samples)
        reached[some] = certified_radius(rng.binomial(draws[some], p[some]), draws[some], ALPHA, SIGMA)
        return draws + PILOT, counted(reached, reached > 0)

    grid = Grid(RADII, SIGMA, ALPHA, looks)
    decisions = [grid.decide(row) for row in counts.tolist()]
    looked, levels = np.array([(decision.n, decision.level) for decision in decisions]).T
    at_looks = counted(np.array([grid.radius(level) for level in levels]), levels > 0)
    everything = np.ones(samples, dtype=bool)
    modes = {
        "fixed": (np.full(samples, N0 + n), fixed, True),
        "fixed, skip": (np.where(wrong, N0, N0 + n), fixed, True),
        "planned 1 %": (*planned(0.01, everything), True),
        "planned 1 %, skip": (*planned(0.01, ~wrong), True),
        "planned 2 %, skip": (*planned(0.02, ~wrong), True),
        "grid": (N0 + looked, at_looks, False),
        "grid, skip": (np.where(wrong, N0, N0 + looked), at_looks, False),
    }
    acr = np.maximum(fixed, 0).sum()
    rows = []
    for mode, (draws, reached, comparable) in modes.items():
        lost = [float((fixed >= radius).mean() - (reached >= radius).mean()) for radius in RADII]
        rows.append(
            {
                "population": population.name,
                "mode": mode,
                "n": n,
                "draws": int(draws.sum()),
                "saving": float((N0 + n) * samples / draws.sum()),
                "acr_lost": float(1 - np.maximum(reached, 0).sum() / acr) if comparable else None,
                "worst_points_lost": 100 * max(lost),
            }
        )
    return rows


def describe_modes(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = ["population  mode                     n  saving  ACR lost  worst points lost at a radius"]
    for row in rows:
        lost = "       -" if row["acr_lost"] is None else f"{row['acr_lost']:>8.2%}"
        lines.append(
            f"{row['population']:<10}  {row['mode']:<17}  {row['n']:>7,}  {row['saving']:>6.2f}  {lost}  "
            f"{row['worst_points_lost']:>5.2f}"
        )
    return "\n".join(lines)
