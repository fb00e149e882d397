"""Group-sequential certification at chosen radii: looks at growing n, with boundaries that spend alpha exactly.

A sample is certified at radius r at the first look n_j at which its top class has at least K_rj of n_j votes. Dynamic
programming over the integer counts under p_A = Phi(r / sigma) computes the K_rj, so that the probability of ever
reaching one of them is at most alpha (Lan and DeMets, Biometrika 1983, with Bin(n_j, p) instead of its normal limit).
This probability grows with p_A, so it is at most alpha for every smaller p_A too. Radii are tested in increasing order,
each only after the one before is certified (fixed sequence), so all claims about a sample hold together with
probability 1 - alpha.

Stopping for futility makes no claim and spends no alpha.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from scipy.special import betainc, ndtr

GROWTH = 1.5  # from one look to the next
FUTILITY = 0.05  # stop if the probability of certifying one more radius is at most this
_INTERIM = 0.5  # share of alpha that is spent before the last look
_ROUNDING = 1e-12  # subtracted from alpha, for rounding errors in the sums below


def looks_of(n: int, length: int, growth: float = GROWTH) -> tuple[int, ...]:
    """The draws of each look: multiples of the block length, each `growth` times the one before, the last one n.

    The first look is the smallest multiple that is at least 100.
    """
    looks = [min(n, math.ceil(100 / length) * length)]
    while looks[-1] < n:
        looks.append(min(n, math.ceil(growth * looks[-1] / length) * length))
    return tuple(looks)


def spending(looks: Sequence[int], alpha: float) -> list[float]:
    """The part of alpha that may be spent up to each look: half of it before the last look, growing with log n."""
    if len(looks) == 1:
        return [alpha]
    x = [math.log(look / looks[0]) / math.log(looks[-1] / looks[0]) for look in looks]
    return [alpha * _INTERIM * (one + 0.02) / (x[-2] + 0.02) for one in x[:-1]] + [alpha]


@cache
def boundaries(p0: float, looks: tuple[int, ...], alpha: float) -> tuple[int, ...]:
    """The smallest count at each look that certifies p_A > p0; look + 1 if no count does."""
    from scipy.signal import fftconvolve  # imported here because it takes a second, which every command would pay
    from scipy.stats import binom

    found: list[int] = []
    spent, before = 0.0, 0
    law, first = np.ones(1), 0  # P(count = first + index and no boundary was reached)
    for look, allowed in zip(looks, spending(looks, alpha), strict=True):
        more = look - before
        low, high = (int(binom.ppf(q, more, p0)) for q in (1e-18, 1 - 1e-16))
        low, high = max(low - 2, 0), min(high + 2, more)
        law = np.maximum(fftconvolve(law, binom.pmf(np.arange(low, high + 1), more, p0)), 0.0)
        first, before = first + low, look
        reaching = law[::-1].cumsum()[::-1]  # P(count >= first + index and no boundary was reached)
        index = int(np.searchsorted(-reaching, -(allowed - spent - _ROUNDING), side="left"))
        found.append(min(first + index, look + 1))
        spent += float(reaching[index]) if index < len(reaching) else 0.0
        law = law[:index]
        if not len(law):
            law, first = np.zeros(1), 0
    return tuple(found)


@dataclass(frozen=True)
class Decision:
    """What follows from the draws of a sample up to a look."""

    n: int  # draws used; if not final, draws needed next
    level: int  # number of radii that are certified
    final: bool
    n_A: int = 0  # the top class's votes among the n draws, once final


@dataclass(frozen=True)
class Grid:
    """The looks of one order: `radii` increase, in [0, 1] pixel units; `looks` increase, in multiples of a block."""

    radii: tuple[float, ...]
    sigma: float
    alpha: float
    looks: tuple[int, ...]

    def decide(self, counts: Sequence[int]) -> Decision:
        """Decide from the top class's counts among the first n_1, n_2, ... draws, as far as these are committed."""
        level, table = 0, self._boundaries
        for index, (look, count) in enumerate(zip(self.looks, counts, strict=False)):
            while level < len(self.radii) and count >= table[level][index]:
                level += 1
            if look == self.looks[-1] or level == len(self.radii) or self._futile(count, look, table[level][-1]):
                return Decision(look, level, True, count)
        return Decision(self.looks[len(counts)], level, False)

    def radius(self, level: int) -> float:
        """The largest certified radius; 0 if there is none."""
        return self.radii[level - 1] if level else 0.0

    @cached_property
    def _boundaries(self) -> list[tuple[int, ...]]:
        return [boundaries(float(ndtr(radius / self.sigma)), self.looks, self.alpha) for radius in self.radii]

    def _futile(self, count: int, look: int, wanted: int) -> bool:
        """Whether the posterior of p_A makes the last boundary of the next radius improbable to reach."""
        rest = self.looks[-1] - look
        share = (wanted - count) / rest
        if share >= 1:
            return True
        if share <= 0:
            return False
        p, weight = (count + 0.5) / (look + 1), look * rest / self.looks[-1]
        return float(1 - betainc(p * weight, (1 - p) * weight, share)) <= FUTILITY
