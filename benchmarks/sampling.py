"""`python -m benchmarks sampling`: the draws that each sampling mode saves and what it loses, on simulated samples.

A population says how p_A is distributed over samples: by three invented laws, or by published logs. Votes are binomial
counts from one random stream, so that all modes see the same samples. The cost is counted in draws, not in seconds.

Shapes: N samples, L looks, U numbers of votes.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.certify.orders import Order
from diffsmooth.pipeline.certify.planning import plan_draws
from diffsmooth.pipeline.certify.sequential import Grid, looks_of
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.show.logs import read_log

ALPHA, N0, PILOT, LENGTH = 0.001, 100, 1000, 100
LEAST_SAMPLES = 1000
RADII = tuple(0.25 * step for step in range(13))  # of the published tables

_CONCENTRATION = 1e9  # of a Beta law that is narrow enough to be one number
_ROUNDING = 5e-3  # relative; logs print three digits of a radius
_MOST_DRAWS = 10_000_000


class Population(NamedTuple):
    """Samples, each with a Beta law of the probability of its top class."""

    name: str
    sigma: float
    wrong_N: NDArray[np.bool_]  # whether the top class is not the label
    beta_N2: NDArray[np.float64]  # the two parameters


def invented(name: str, wrong: float, saturated: float, beta: tuple[float, float]) -> Population:
    """A population with given shares of wrong samples and of right samples whose votes all agree.

    A saturated sample's p_A follows the posterior after 100,000 equal votes; all others' follows one Beta law: the top
    class of a wrong sample is as hard to bound as any other's.
    """
    kind_N = (np.arange(LEAST_SAMPLES) + 0.5) / LEAST_SAMPLES
    saturated_N = (kind_N >= wrong) & (kind_N < wrong + saturated)
    return Population(name, 0.5, kind_N < wrong, np.where(saturated_N[:, None], (100_000.5, 0.5), beta))


INVENTED = (
    invented("weak", 0.5, 0.02, (2.0, 1.0)),
    invented("middling", 0.35, 0.15, (4.0, 1.0)),
    invented("strong", 0.15, 0.5, (8.0, 1.0)),
)


def population_of_log(path: str | os.PathLike[str], sigma: float, n: int, alpha: float) -> Population:
    """The population of a log in Cohen's layout whose radii are Clopper-Pearson bounds of n draws at level alpha.

    The number of votes follows from the radius, and p_A from Jeffreys' posterior. A log does not say how an abstaining
    sample voted: these samples lie below 1/2, as dense as the certified ones just above, and count as right.

    Raises: UserError for a log that cannot be read, or that has a radius which n draws at level alpha do not reach.
    """
    if not (0 < sigma <= 100 and 0 < n <= _MOST_DRAWS and 0 < alpha < 1):
        raise UserError(
            f"--log {path} {sigma:g} {n} {alpha:g}: sigma must be above 0 and at most 100, n a number up to "
            f"{_MOST_DRAWS:,}, alpha between 0 and 1"
        )
    log = read_log(path)
    log = log[log["status"] != "incomplete"]
    votes_U = np.arange(n // 2, n + 1)
    radii_U = certified_radius(votes_U, n, alpha, sigma)
    radius_N, certified_N = log["radius"].to_numpy(), (log["status"] == "certified").to_numpy()
    if not certified_N.any() or radius_N.max() > radii_U[-1] * (1 + _ROUNDING):
        largest = radius_N.max(initial=0)
        raise UserError(
            f"--log {path}: its largest radius is {largest:g}; it must be above 0 and at most {radii_U[-1]:.3g}, which "
            f"{n} equal votes give at sigma = {sigma:g} and alpha = {alpha:g}"
        )
    k_N = votes_U[np.searchsorted((radii_U[1:] + radii_U[:-1]) / 2, radius_N[certified_N])]  # of the nearest radius
    near = (k_N < 0.55 * n).sum() / 0.05  # samples per unit of p_A above 1/2
    abstained = int((~certified_N).sum())
    p_N = 0.5 - (np.arange(abstained) + 0.5) / max(near, 2 * abstained)
    beta_N2 = np.empty((len(log), 2))
    beta_N2[certified_N] = np.stack([k_N + 0.5, n - k_N + 0.5], axis=1)
    beta_N2[~certified_N] = _CONCENTRATION * np.stack([p_N, 1 - p_N], axis=1)
    wrong_N = certified_N & ~log["correct"].to_numpy()
    copies = math.ceil(LEAST_SAMPLES / len(log))
    return Population(str(path), sigma, np.tile(wrong_N, copies), np.tile(beta_N2, (copies, 1)))


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

    def describe(self, width: int) -> str:
        lost = "       -" if self.acr_lost is None else f"{self.acr_lost:>8.2%}"
        return (
            f"{self.population:<{width}}  {self.mode:<17}  {self.n:>7,}  {self.saving:>6.2f}  {lost}  "
            f"{self.worst_points_lost:>5.2f}"
        )


def simulate_modes(n: int, populations: Sequence[Population] = INVENTED, seed: int = 0) -> list[ModeCost]:
    """Each sampling mode on each population, with at most `n` draws per sample."""
    return [
        cost
        for population in populations
        for cost in _Simulation(population, n, np.random.default_rng(seed)).costs()
    ]  # fmt: skip


class _Simulation:
    """The samples of one population, and what each mode certifies of them."""

    def __init__(self, population: Population, n: int, rng: np.random.Generator) -> None:
        self._population, self._n, self._rng = population, n, rng
        self._sigma, self._wrong_N = population.sigma, population.wrong_N
        a_N, b_N = population.beta_N2.T
        self._p_N: NDArray[np.float64] = rng.beta(a_N, b_N)
        self._samples, self._right_N = len(a_N), ~self._wrong_N & (self._p_N > 0.5)
        self._looks = looks_of(n, LENGTH)
        per_look = rng.binomial(np.diff((0, *self._looks)), self._p_N[:, None], size=(len(a_N), len(self._looks)))
        self._counts_NL = per_look.cumsum(axis=1)

    def costs(self) -> Iterator[ModeCost]:
        most = float(certified_radius(self._n, self._n, ALPHA, self._sigma))
        radii = tuple(radius for radius in RADII if radius <= most)
        radii_at_n = certified_radius(self._counts_NL[:, -1], self._n, ALPHA, self._sigma)
        fixed_N = self._counted(radii_at_n, radii_at_n > 0)
        pilot_N, everything_N = self._rng.binomial(PILOT, self._p_N), np.ones(self._samples, dtype=np.bool_)
        grid = Grid(radii, self._sigma, ALPHA, self._looks)
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
            lost = [float((fixed_N >= radius).mean() - (reached_N >= radius).mean()) for radius in radii]
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
        draws_N[active_N] = plan_draws(pilot_N[active_N].tolist(), order, sigma=self._sigma, length=LENGTH)
        some = draws_N > 0
        drawn = draws_N[some]
        reached_N[some] = certified_radius(self._rng.binomial(drawn, self._p_N[some]), drawn, ALPHA, self._sigma)
        return draws_N + PILOT, self._counted(reached_N, reached_N > 0)


def describe_modes(costs: Sequence[ModeCost]) -> str:
    width = max(len("population"), *(len(cost.population) for cost in costs))
    heading = f"{'population':<{width}}  mode                     n  saving  ACR lost  worst points lost at a radius"
    return "\n".join([heading, *(cost.describe(width) for cost in costs)])
