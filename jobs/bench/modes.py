"""`diffsmooth bench --sampling`: the draws that each sampling mode saves and what it loses, on simulated samples.

A population is a distribution of p_A over samples. Votes are binomial counts from one random stream, so that all modes
see the same samples. The cost is counted in draws, not in seconds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.certify import certified_radius
from pipeline.orders import Order
from pipeline.planning import plan_draws
from pipeline.sequential import Grid, looks_of

SIGMA, ALPHA, N0, PILOT, LENGTH = 0.5, 0.001, 100, 1000, 100
RADII = tuple(0.25 * step for step in range(8))


class Population(NamedTuple):
    """The shares of samples that are classified wrongly and of samples with saturated votes, and a Beta law of p_A.

    A saturated sample's p_A follows the posterior after 100,000 equal votes; all others' follows the Beta law.
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


@dataclass(frozen=True, kw_only=True)
class ModeCost:
    """One sampling mode on one population, compared with fixed mode."""

    population: str
    mode: str
    n: int
    draws: int
    saving: float  # draws of fixed mode over draws of this mode
    acr_lost: float | None  # fraction of the ACR; None in grid mode, whose mean radius is not comparable with an ACR
    worst_points_lost: float  # largest loss of certified accuracy at a radius, in percentage points

    def describe(self) -> str:
        lost = "       -" if self.acr_lost is None else f"{self.acr_lost:>8.2%}"
        return (
            f"{self.population:<10}  {self.mode:<17}  {self.n:>7,}  {self.saving:>6.2f}  {lost}  "
            f"{self.worst_points_lost:>5.2f}"
        )


def simulate_modes(n: int, samples: int = 1000, seed: int = 0) -> list[ModeCost]:
    """Each sampling mode on each population, with at most `n` draws per sample."""
    return [
        cost
        for population in POPULATIONS
        for cost in _Simulation(population, n, samples, np.random.default_rng(seed)).costs()
    ]


class _Simulation:
    """The samples of one population, N of them, and what each mode certifies of them."""

    def __init__(self, population: Population, n: int, samples: int, rng: np.random.Generator) -> None:
        self._population, self._n, self._samples, self._rng = population, n, samples, rng
        kind_N, p_N = rng.random(samples), rng.beta(*population.beta, samples)
        saturated_N = kind_N < population.wrong + population.saturated
        p_N[saturated_N] = rng.beta(100_000.5, 0.5, int(saturated_N.sum()))
        self._wrong_N = wrong_N = kind_N < population.wrong
        # the top class of a wrong sample is as hard to bound as any other's, but certifies nothing
        p_N[wrong_N] = rng.beta(*population.beta, int(wrong_N.sum()))
        self._p_N, self._right_N = p_N, ~wrong_N & (p_N > 0.5)
        self._looks = looks_of(n, LENGTH)
        per_look = rng.binomial(np.diff((0, *self._looks)), p_N[:, None], size=(samples, len(self._looks)))
        self._counts_NL = per_look.cumsum(axis=1)

    def costs(self) -> Iterator[ModeCost]:
        radii_at_n = certified_radius(self._counts_NL[:, -1], self._n, ALPHA, SIGMA)
        fixed_N = self._counted(radii_at_n, radii_at_n > 0)
        pilot_N, everything_N = self._rng.binomial(PILOT, self._p_N), np.ones(self._samples, dtype=np.bool_)
        grid = Grid(RADII, SIGMA, ALPHA, self._looks)
        decisions = [grid.decide(row) for row in self._counts_NL.tolist()]
        looked_N, levels_N = np.array([(decision.n, decision.level) for decision in decisions]).T
        at_looks_N = self._counted(np.array([grid.radius(level) for level in levels_N]), levels_N > 0)
        skipped = self._skipped
        for mode, (draws_N, reached_N), comparable in (
            ("fixed", (np.full(self._samples, N0 + self._n), fixed_N), True),
            ("fixed, skip", (skipped(np.full(self._samples, self._n)), fixed_N), True),
            ("planned 1 %", self._planned(pilot_N, 0.01, everything_N), True),
            ("planned 1 %, skip", self._planned(pilot_N, 0.01, ~self._wrong_N), True),
            ("planned 2 %, skip", self._planned(pilot_N, 0.02, ~self._wrong_N), True),
            ("grid", (N0 + looked_N, at_looks_N), False),
            ("grid, skip", (skipped(looked_N), at_looks_N), False),
        ):
            lost = [float((fixed_N >= radius).mean() - (reached_N >= radius).mean()) for radius in RADII]
            acr_lost = float(1 - np.maximum(reached_N, 0).sum() / np.maximum(fixed_N, 0).sum())
            yield ModeCost(
                population=self._population.name,
                mode=mode,
                n=self._n,
                draws=int(draws_N.sum()),
                saving=float((N0 + self._n) * self._samples / draws_N.sum()),
                acr_lost=acr_lost if comparable else None,
                worst_points_lost=100 * max(lost),
            )

    def _counted(self, radii_N: NDArray[np.float64], certified_N: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Radii of samples that are right and certified; -1 for all others, since 0 is a radius."""
        return np.where(self._right_N & certified_N, radii_N, -1.0)

    def _skipped(self, draws_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Draws of selection and estimation if wrong samples are skipped after selection."""
        return np.where(self._wrong_N, N0, N0 + draws_N)

    def _planned(
        self, pilot_N: NDArray[np.int64], loss: float, active_N: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Draws and radii of planned mode on the active samples, allowed to lose a fraction `loss` of the ACR."""
        draws_N, reached_N = np.zeros(self._samples, dtype=np.int64), np.zeros(self._samples)
        order = Order(samples=[0], n0=PILOT, n=self._n, alpha=ALPHA, mode="planned", max_acr_loss=loss)
        draws_N[active_N] = plan_draws(pilot_N[active_N].tolist(), order, sigma=SIGMA, length=LENGTH)
        some = draws_N > 0
        drawn = draws_N[some]
        reached_N[some] = certified_radius(self._rng.binomial(drawn, self._p_N[some]), drawn, ALPHA, SIGMA)
        return draws_N + PILOT, self._counted(reached_N, reached_N > 0)


def describe_modes(costs: Sequence[ModeCost]) -> str:
    heading = "population  mode                     n  saving  ACR lost  worst points lost at a radius"
    return "\n".join([heading, *(cost.describe() for cost in costs)])
