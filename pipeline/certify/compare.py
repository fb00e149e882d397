"""Certificates of several runs on the same samples -> paired differences, with tests, intervals and power.

The samples are pairs: run A and run B certify the same images. Only discordant samples, which one run certifies
correctly at radius r and the other does not, say anything about a difference of certified accuracy:

    b samples by A only, c by B only, d = b + c of m; difference = (b - c) / m

Test: exact McNemar test. If the runs are equally good, b ~ Bin(d, 1/2) given d; the p-value is two-sided.

Interval at level delta: with psi = P(discordant) and theta = P(A only | discordant), the difference is
psi (2 theta - 1). Given d, b ~ Bin(d, theta), so the Clopper-Pearson interval of theta at level 0.8 delta holds for
each d, and therefore without the condition. The one of psi at level 0.2 delta holds too. Both hold together with
probability 1 - delta (Bonferroni), and the difference is between the smallest and the largest psi (2 theta - 1).
Simultaneous over J radii and P pairs of runs: delta = 0.05 / (J P) at each (Bonferroni).

Holm's correction (1979) of the p-values over all radii and pairs: rejecting those at most 0.05 makes any false
rejection with probability at most 0.05.

Difference of ACR: BCa bootstrap (Efron 1987) of the mean of the paired differences, at level 0.05 / P. Its random
numbers come from a generator with a fixed key, so that the same certificates give the same interval.

All intervals are statements about the population that the images were drawn from at random, and about the share that
the procedure certifies.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.special import ndtr, ndtri

from diffsmooth.pipeline.certify.bounds import prediction_p_value
from diffsmooth.pipeline.certify.curve import NO_INTERVAL, Bounds, Interval, clopper_pearson
from diffsmooth.pipeline.errors import UserError

DELTA = 0.05  # probability that any of the intervals, or any rejection, is wrong
POINT = 0.01  # the difference of certified accuracy that `samples_needed` resolves
POWER = 0.8  # and with what probability
MOST_RUNS = 10

_W = 0.8  # theta's share of delta
_RESAMPLES = 10_000
_KEY = 0x0D1FF  # of the bootstrap's own Philox generator
_LEAST_DIFFERENT = 10  # different samples, below which the bootstrap has too few values to resample


class RadiusDifference(BaseModel):
    """Certified accuracy of a pair of runs at one radius; differences are first minus second."""

    model_config = ConfigDict(frozen=True)

    radius: float
    first_accuracy: float
    second_accuracy: float
    difference: float
    lower: float  # simultaneous over all radii and pairs, 95 %
    upper: float
    first_only: int  # samples that only the first run certifies correctly
    second_only: int
    p_value: float  # exact McNemar test at this radius alone
    p_holm: float  # corrected over all radii and pairs
    samples_needed: int  # to resolve a difference of one point with probability 80 %


class PairDifference(BaseModel):
    """A pair of runs; differences are first minus second. The ACR is not set if a run in grid mode has none."""

    model_config = ConfigDict(frozen=True)

    first: str
    second: str
    first_acr: float | None = None
    second_acr: float | None = None
    acr_difference: float | None = None
    acr_lower: float | None = None  # simultaneous over all pairs, 95 %
    acr_upper: float | None = None
    radii: list[RadiusDifference]


class Comparison(BaseModel):
    """All pairs of several runs on the samples that they share."""

    model_config = ConfigDict(frozen=True)

    samples: int
    pairs: list[PairDifference]
    notes: list[str] = []  # what must be said with the figures

    @property
    def table(self) -> pd.DataFrame:
        """A row per pair and radius."""
        rows = [
            {"first": pair.first, "second": pair.second, **row.model_dump()}
            for pair in self.pairs
            for row in pair.radii
        ]
        return pd.DataFrame(rows)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump()


def shared_rows(tables: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The rows of each table whose samples are complete in all tables, in the same order.

    A table has the columns sample, label, status, radius, correct, and `image`, a hash or "" if it is not known.
    Raises: UserError if no sample is shared, or a shared sample has two labels or two images.
    """
    complete = {
        name: table[~table["status"].isin(["incomplete", "exempt"])].set_index("sample")
        for name, table in tables.items()
    }
    shared = sorted(set.intersection(*(set(table.index) for table in complete.values())))
    if not shared:
        raise UserError(f"{', '.join(tables)} have no complete sample in common; compare runs on the same samples")
    rows = {name: table.loc[shared] for name, table in complete.items()}
    for (one, left), (other, right) in itertools.combinations(rows.items(), 2):
        pairs = zip(shared, left["label"], right["label"], left["image"], right["image"], strict=True)
        for sample, label, other_label, image, other_image in pairs:
            if label != other_label:
                raise UserError(
                    f"sample {sample} has label {label} in {one} and {other_label} in {other}; compare runs on the "
                    "same data set"
                )
            if image and other_image and image != other_image:
                raise UserError(
                    f"sample {sample} is another image in {one} than in {other}; compare runs on the same data set"
                )
    return rows


def compare(rows: Mapping[str, pd.DataFrame], radii: Sequence[float], *, without_acr: bool = False) -> Comparison:
    """Compare all pairs of runs on rows that `shared_rows` returned, at some radii.

    Raises: UserError for fewer than two or too many runs.
    """
    if not 2 <= len(rows) <= MOST_RUNS:
        raise UserError(f"{len(rows)} runs were given; compare needs between 2 and {MOST_RUNS} runs or logs")
    # a correct sample reaches its radius, a wrong one not even 0
    reach = {
        name: np.where(table["correct"].to_numpy(bool), table["radius"].to_numpy(float), -1.0)
        for name, table in rows.items()
    }
    pairs = list(itertools.combinations(reach, 2))
    tests = len(pairs) * len(radii)
    blocks = [_at_radii(reach[one], reach[other], np.asarray(radii), DELTA / tests) for one, other in pairs]
    p_holm = holm(np.concatenate([block["p_value"] for block in blocks]))
    found = []
    for index, ((one, other), block) in enumerate(zip(pairs, blocks, strict=True)):
        block["p_holm"] = p_holm[index * len(radii) : (index + 1) * len(radii)]
        differences = [
            RadiusDifference(**dict(zip(block, row, strict=True))) for row in zip(*block.values(), strict=True)
        ]
        acr = {} if without_acr else _acr(reach[one], reach[other], DELTA / len(pairs))
        found.append(PairDifference(first=one, second=other, radii=differences, **acr))
    return Comparison(samples=len(next(iter(rows.values()))), pairs=found, notes=_few_different(found, reach))


def _at_radii(
    first_M: NDArray[np.float64], second_M: NDArray[np.float64], radii_J: NDArray[np.float64], delta: float
) -> dict[str, Any]:
    """The columns of RadiusDifference over J radii, without p_holm."""
    m = len(first_M)
    first_J, second_J, both_J = (
        np.array([(values_M >= radius).sum() for radius in radii_J])
        for values_M in (first_M, second_M, np.minimum(first_M, second_M))
    )
    b, c = first_J - both_J, second_J - both_J
    bounds = difference_bounds(b, c, m, delta)
    return {
        "radius": radii_J,
        "first_accuracy": first_J / m,
        "second_accuracy": second_J / m,
        "difference": (b - c) / m,
        "lower": bounds.lower,
        "upper": bounds.upper,
        "first_only": b,
        "second_only": c,
        "p_value": prediction_p_value(np.maximum(b, c), np.minimum(b, c)),
        "samples_needed": [samples_needed(float(share), delta) for share in (b + c) / m],
    }


def difference_bounds(b: NDArray[np.int64], c: NDArray[np.int64], m: int, delta: float) -> Bounds:
    """The interval of a difference at confidence 1 - delta, over arrays: b and c discordant samples of m."""
    theta = clopper_pearson(b, b + c, _W * delta)
    psi = clopper_pearson(b + c, np.full_like(b, m), (1 - _W) * delta)
    low, high = 2 * theta.lower - 1, 2 * theta.upper - 1
    return Bounds(
        np.where(low > 0, psi.lower, psi.upper) * low,
        np.where(high > 0, psi.upper, psi.lower) * high,
    )


def samples_needed(discordant: float, delta: float) -> int:
    """About how many samples the exact McNemar test at level delta needs to resolve a difference of one point.

    Normal approximation (Connor 1987) for a share of discordant samples, plus 1 / POINT for the discrete test. A
    difference of one point needs at least one point of discordant samples.
    """
    psi = max(discordant, POINT)
    z, z_power = -float(ndtri(delta / 2)), float(ndtri(POWER))
    root = z * math.sqrt(psi) + z_power * math.sqrt(psi - POINT**2)
    return math.ceil((root / POINT) ** 2 + 1 / POINT)


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Holm's step-down corrected p-values: the i-th smallest of T times T - i + 1, never below the one before."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(p_values[order] * factors), 1.0)
    return corrected


def _acr(first_M: NDArray[np.float64], second_M: NDArray[np.float64], delta: float) -> dict[str, float | None]:
    first, second = np.maximum(first_M, 0), np.maximum(second_M, 0)
    interval = [None if math.isnan(end) else end for end in bca_interval(first - second, 1 - delta)]
    return {
        "first_acr": float(first.mean()),
        "second_acr": float(second.mean()),
        "acr_difference": float((first - second).mean()),
        "acr_lower": interval[0],
        "acr_upper": interval[1],
    }


def bca_interval(values_M: NDArray[np.float64], confidence: float, resamples: int = _RESAMPLES) -> Interval:
    """The BCa bootstrap interval of a mean; NaN if fewer than 10 values differ from the most common one."""
    m = len(values_M)
    _, counts = np.unique(values_M, return_counts=True)
    if m - counts.max() < _LEAST_DIFFERENT:
        return NO_INTERVAL
    generator = np.random.Generator(np.random.Philox(key=_KEY))
    chunk = max(1, 4_000_000 // m)
    means = np.concatenate(
        [
            values_M[generator.integers(m, size=(min(chunk, resamples - start), m), dtype=np.int32)].mean(axis=1)
            for start in range(0, resamples, chunk)
        ]
    )
    mean = values_M.mean()
    below = (means < mean).sum() + 0.5 * (means == mean).sum()
    z0 = float(ndtri(np.clip(below / resamples, 1 / resamples, 1 - 1 / resamples)))  # bias
    d = values_M - mean
    a = (d**3).sum() / (6 * (d**2).sum() ** 1.5)  # acceleration, from the jackknife
    w = z0 + ndtri(np.array([(1 - confidence) / 2, (1 + confidence) / 2]))
    return Interval(*np.quantile(means, ndtr(z0 + w / (1 - a * w))).tolist())


def _few_different(pairs: Sequence[PairDifference], reach: Mapping[str, NDArray[np.float64]]) -> list[str]:
    """Pairs whose ACR has no interval because too few samples differ."""
    return [
        f"{pair.first} - {pair.second}: the radii of {int((reach[pair.first] != reach[pair.second]).sum())} samples "
        "differ, too few for an interval of the difference of ACR"
        for pair in pairs
        if pair.acr_difference is not None and pair.acr_lower is None
    ]
