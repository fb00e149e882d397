"""Votes -> p_A lower bound, abstention, certified radius (Cohen et al. 2019, arXiv 1902.02918, Algorithm 2: CERTIFY).

The selection votes choose the top class c_A and never enter the bound; the estimation votes give its count n_A among n:

    p_A lower bound  = inf{p : P(Bin(n, p) >= n_A) > alpha}    one-sided Clopper-Pearson
    abstain          iff p_A lower bound < 1/2
    certified radius = sigma * Phi^-1(p_A lower bound)         (equation 3 with p_B = 1 - p_A)

Both are computed from the upper tail q = 1 - p_A, which keeps its digits when p_A is close to 1.

The multi-class certificate bounds the runner-up from the same votes instead of setting p_B = 1 - p_A:

    certified radius = sigma / 2 (Phi^-1(p_A lower bound) - Phi^-1(p_B upper bound))    (equation 3)

with the bound of p_A at level w alpha and an upper bound for each of the other C - 1 classes at level
(1 - w) alpha / (C - 1); all hold together with probability 1 - alpha (Bonferroni). p_B is the largest of them, and at
most 1 - p_A lower bound. The class comes from the selection, never from the votes that bound it.

The cost-sensitive certificate (Xin et al., arXiv 2310.08732) makes a weaker claim with a larger radius: g(x + d) is
none of the classes Omega that are costly for the label, for |d| < radius. Its class is the top one of the selection
outside Omega; only the classes in Omega are bounded from above, with w = 0.8.

In the mode `planned` each sample has its own n, chosen before its first estimation draw, and its bound holds at the
full alpha. In the mode `grid` the draws are those of group-sequential looks (pipeline/sequential.py). If alpha is split
in advance over several n, each look has a bound at its share, and the sample gets the larger radius.

PREDICT (Algorithm 1 of the same paper) needs no selection: it returns the class with the most votes, and abstains
unless a two-sided binomial test separates its count from the runner-up's. It claims no radius.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtrc, betainccinv, ndtr, ndtri

from diffsmooth.pipeline.certify.orders import Certificate, Order
from diffsmooth.pipeline.certify.sequential import Grid
from diffsmooth.pipeline.spec import BlockLengths

ABSTAINED, NO_PREDICTION = -1, -2

_ROUNDING = 1e-15  # relative, times n: above SciPy's error, so that rounding never raises a bound or a radius
_W, _W_COST = 0.9, 0.8  # p_A's share of alpha in the multi-class and in the cost-sensitive certificate

COLUMNS = (
    "sample", "label", "status", "prediction", "top_class", "n0", "n", "n_A", "p_A_lower", "p_B_upper", "radius",
    "correct", "sigma", "alpha", "certificate", "mode", "order", "post_hoc",
)  # fmt: skip


def _upper_tail(n_A: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """q = 1 - p_A lower bound: the 1 - alpha quantile of Beta(n - n_A + 1, n_A), and 1 for n_A = 0."""
    count, total = np.broadcast_arrays(np.asarray(n_A), np.asarray(n))
    for name, values in (("n_A", count), ("n", total)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must be whole numbers, got {values.dtype}")
    if (total < 1).any() or (count < 0).any() or (count > total).any():
        raise ValueError("n_A and n must satisfy 0 <= n_A <= n and n >= 1")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha} must be between 0 and 1")
    q = betainccinv(total - count + 1.0, np.maximum(count, 1).astype(float), alpha) * (1 + _ROUNDING * total)
    q = np.where(count == total, -np.expm1(np.log(alpha) / total), q)
    return np.where(count == 0, 1.0, np.minimum(q, 1.0))


def lower_confidence_bound(n_A: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """One-sided Clopper-Pearson lower bound at confidence 1 - alpha, over arrays of whole numbers.

    It is 0 for n_A = 0, and alpha^(1/n) for n_A = n.
    Raises: ValueError unless 0 <= n_A <= n, n >= 1 and 0 < alpha < 1.
    """
    return 1 - _upper_tail(n_A, n, alpha)


def certified_radius(n_A: ArrayLike, n: ArrayLike, alpha: float, sigma: float) -> NDArray[np.float64]:
    """l2 radius in [0, 1] pixel units, over arrays; 0 if the bound is below 1/2 (abstain).

    Raises: ValueError as `lower_confidence_bound`, and unless sigma > 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma = {sigma} must be above 0")
    q = _upper_tail(n_A, n, alpha)
    return np.where(q <= 0.5, -sigma * ndtri(np.minimum(q, 0.5)), 0.0) + 0.0


def prediction_p_value(n_A: ArrayLike, n_B: ArrayLike) -> NDArray[np.float64]:
    """Two-sided p-value of n_A against n_B <= n_A votes under equal probabilities, over arrays of whole numbers.

    Raises: ValueError unless 0 <= n_B <= n_A.
    """
    first, second = np.broadcast_arrays(np.asarray(n_A), np.asarray(n_B))
    if (second < 0).any() or (second > first).any():
        raise ValueError("n_A and n_B must satisfy 0 <= n_B <= n_A")
    return np.minimum(1.0, 2 * bdtrc(first - 1.0, first + second, 0.5))


def least_certifying_n(alpha: float, certificate: Certificate = "top") -> int:
    """The smallest n at which a unanimous vote is enough: level^(1/n) >= 1/2, for PREDICT 2 (1/2)^n <= alpha."""
    level = alpha * {"top": 1.0, "multiclass": _W, "cost": _W_COST, "predict": 0.5}[certificate]
    return int(np.ceil(np.log(level) / np.log(0.5)))


def top_class(votes: Mapping[int, int]) -> int:
    """The class with the most votes, the lowest in a tie; NO_PREDICTION without votes."""
    return min(votes, key=lambda k: (-votes[k], k), default=NO_PREDICTION)


class _Counts(NamedTuple):
    """Estimation votes of S samples for K classes, with the level and sigma of their bound."""

    top: NDArray[np.int64]  # the class that the selection chose for each sample
    estimation_SK: NDArray[np.int64]
    costly_SK: NDArray[np.bool_]  # Omega of each sample's label
    alpha: float
    sigma: float

    @property
    def n_A(self) -> NDArray[np.int64]:
        return self.estimation_SK[np.arange(len(self.top)), self.top]

    @property
    def n(self) -> NDArray[np.int64]:
        """Draws of each sample; 1 without votes, so that the bound is defined."""
        return np.maximum(self.estimation_SK.sum(axis=1), 1)


class _Verdict(NamedTuple):
    """What a certificate says about each sample if its votes are complete."""

    top_class: NDArray[np.int64]
    n_A: NDArray[np.int64]
    p_A_lower: NDArray[np.float64]
    p_B_upper: NDArray[np.float64]
    radius: NDArray[np.float64]
    certified: NDArray[np.bool_]  # it does not abstain


def _top(counts: _Counts) -> _Verdict:
    """CERTIFY: the selection's top class, bounded by the estimation's votes for it."""
    n_A, n = counts.n_A, counts.n
    bound = lower_confidence_bound(n_A, n, counts.alpha)
    return _Verdict(
        counts.top, n_A, bound, 1 - bound, certified_radius(n_A, n, counts.alpha, counts.sigma), bound >= 0.5
    )


def _multiclass(counts: _Counts) -> _Verdict:
    """CERTIFY with all other classes bounded too; `counts` has a column for every class of the data set."""
    others_SK = np.ones(counts.estimation_SK.shape, dtype=bool)
    others_SK[np.arange(len(others_SK)), counts.top] = False
    return _against(counts, others_SK, _W)


def _cost(counts: _Counts) -> _Verdict:
    """The selection's top class outside Omega, against the classes in Omega."""
    return _against(counts, counts.costly_SK, _W_COST)


def _against(counts: _Counts, rivals_SK: NDArray[np.bool_], w: float) -> _Verdict:
    """Bound the top class from below at w alpha, and its rivals from above at (1 - w) alpha together."""
    n_A, n = counts.n_A, counts.n
    # the bound grows with the count, so the rival with the most votes has the largest bound
    n_B = np.where(rivals_SK, counts.estimation_SK, 0).max(axis=1)
    level = (1 - w) * counts.alpha / np.maximum(rivals_SK.sum(axis=1), 1)
    rest = _upper_tail(n_A, n, w * counts.alpha)  # 1 - p_A lower bound
    p_B = np.where(n_B == n, 1.0, betainccinv(n_B + 1.0, np.maximum(n - n_B, 1).astype(float), level))
    p_B = p_B * (1 + _ROUNDING * n)
    p_B = np.minimum(rest, p_B)
    certified = 1 - rest >= p_B
    radius = np.where(certified, counts.sigma / 2 * (-ndtri(rest) - ndtri(p_B)), 0.0) + 0.0
    return _Verdict(counts.top, n_A, 1 - rest, p_B, radius, certified)


def _predict(counts: _Counts) -> _Verdict:
    """PREDICT: the top class of the estimation against its runner-up; claims neither a bound nor a radius."""
    ordered = np.sort(np.pad(counts.estimation_SK, ((0, 0), (1, 0))), axis=1)
    n_A, n_B = ordered[:, -1], ordered[:, -2]
    nothing = np.full(len(n_A), np.nan)
    predicted = prediction_p_value(n_A, n_B) <= counts.alpha
    return _Verdict(counts.estimation_SK.argmax(axis=1), n_A, nothing, nothing, np.zeros(len(n_A)), predicted)


_VERDICTS = {"top": _top, "multiclass": _multiclass, "cost": _cost, "predict": _predict}


def certify(
    votes: pd.DataFrame,
    order: Order,
    *,
    sigma: float,
    num_classes: int,
    block: BlockLengths,
    plan: Mapping[int, int] | None = None,
) -> pd.DataFrame:
    """Certificates of an order's samples, from the first n0 and n draws of each.

    `votes` has the columns of `votes.blocks.SCHEMA`; `num_classes` and `block` are the run's; `plan` is the order's in
    planned mode: a sample that it lacks is incomplete.

    Returns a row per sample with COLUMNS; ties go to the lowest class. `status` is certified (predicted, with the
    certificate "predict"), abstained, skipped (its selected class is not its label, with skip_wrong), exempt (its label
    has no costly class, so there is nothing to certify), or incomplete (draws are missing). `prediction` is -1 if
    abstained, -2 if there is none. `n`, `n_A` and `alpha` are those of the bound: with a split alpha, of the look with
    the larger radius. In grid mode `radius` is the largest certified radius of the grid, and `p_A_lower` what it
    implies. The columns `order` and `post_hoc` are left empty: they depend on the other orders of the run.
    """
    votes = votes.astype({"stage": str})
    index = pd.Index(order.samples, name="sample", dtype="int64")
    label = votes.groupby("sample")["label"].first().reindex(index, fill_value=-1).to_numpy()
    costly_SK = _costly(order, label, num_classes)
    selection = _counts(votes, "selection", order.n0, index, num_classes)
    selected = selection.sum(axis=1) == order.n0
    top = np.where(costly_SK, -1, selection).argmax(axis=1)
    grid = order.grid(sigma, block)
    if grid is not None:
        bound = _bound_of_grid(grid, votes, index, top, selected)
    else:
        bounds = []
        for look, share in order.looks.items() if plan is None else [(order.n, order.total_alpha)]:
            wanted = np.array([look if plan is None else plan.get(int(i), -1) for i in index], dtype=np.int64)
            estimation = _counts(votes, "estimation", wanted, index, num_classes)
            found = _VERDICTS[order.certificate](_Counts(top, estimation, costly_SK, share, sigma))
            drawn = estimation.sum(axis=1)
            bounds.append(_Bound(found, drawn, np.full(len(index), share), selected & (drawn == wanted)))
        if not bounds:
            raise ValueError(f"n = {order.n} is below the first look of alpha = {order.alpha}")
        bound = reduce(_larger, bounds)
    harmless = np.asarray(~costly_SK.any(axis=1))
    return _table(order, sigma, bound, selection.sum(axis=1), label, harmless)


def _costly(order: Order, label: NDArray[np.int64], num_classes: int) -> NDArray[np.bool_]:
    """Omega of each sample's label, as a mask over the classes."""
    costly_SK = np.zeros((len(label), num_classes), dtype=bool)
    for row, y in enumerate(label if order.costly else ()):
        costly_SK[row, list((order.costly or {}).get(int(y), ()))] = True
    return costly_SK


def _table(
    order: Order,
    sigma: float,
    bound: "_Bound",
    n0_drawn: NDArray[np.int64],
    label: NDArray[np.int64],
    harmless: NDArray[np.bool_],
) -> pd.DataFrame:
    """The certificates; `harmless` marks the samples whose label has no costly class."""
    verdict, predicts = bound.verdict, order.certificate == "predict"
    selected = n0_drawn == order.n0
    no = np.zeros(len(label), dtype=bool)
    skipped = selected & (verdict.top_class != label) if order.skip_wrong else no
    # without votes, a label is -1 like that of an unlabelled sample, which has no costly class either
    exempt = harmless & ((label >= 0) | bound.complete) if order.certificate == "cost" else no
    judged = bound.complete & ~skipped & ~exempt
    certified = judged & verdict.certified
    prediction = np.where(certified, verdict.top_class, np.where(judged, ABSTAINED, NO_PREDICTION))
    # the cost-sensitive certificate claims that no costly class wins, whichever class does
    correct = certified if order.certificate == "cost" else certified & (prediction == label)
    nothing = np.nan if predicts else 0.0
    chosen = (bound.n if predicts else n0_drawn) > 0
    return pd.DataFrame(
        {
            "sample": np.array(order.samples, dtype=np.int32),
            "label": label.astype(np.int32),
            "status": np.select(
                [exempt, skipped, certified, judged],
                ["exempt", "skipped", "predicted" if predicts else "certified", "abstained"],
                "incomplete",
            ),
            "prediction": prediction.astype(np.int32),
            "top_class": np.where(chosen, verdict.top_class, NO_PREDICTION).astype(np.int32),
            "n0": n0_drawn.astype(np.int32),
            "n": bound.n.astype(np.int32),
            "n_A": np.where(chosen, verdict.n_A, 0).astype(np.int32),
            "p_A_lower": np.where(judged, verdict.p_A_lower, nothing),
            "p_B_upper": np.where(judged, verdict.p_B_upper, 1 - nothing),
            "radius": np.where(judged, verdict.radius, 0.0),
            "correct": correct,
            "sigma": float(sigma),
            "alpha": bound.alpha,
            "certificate": order.certificate,
            "mode": order.mode,
            "order": "",
            "post_hoc": no,
        },
        columns=list(COLUMNS),
    )


class _Bound(NamedTuple):
    """A verdict on each sample, with the draws and the level that it is based on."""

    verdict: _Verdict
    n: NDArray[np.int64]
    alpha: NDArray[np.float64]
    complete: NDArray[np.bool_]


def _larger(earlier: _Bound, later: _Bound) -> _Bound:
    """Of two looks whose levels add up, the one with the larger radius; the later one if its draws are incomplete."""
    take = ~later.complete | (later.verdict.radius >= earlier.verdict.radius)

    def choose(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> list[Any]:
        return [np.where(take, one, other) for one, other in zip(ours, theirs, strict=True)]

    return _Bound(_Verdict(*choose(later.verdict, earlier.verdict)), *choose(later[1:], earlier[1:]))


def _bound_of_grid(
    grid: Grid, votes: pd.DataFrame, index: pd.Index, top: NDArray[np.int64], selected: NDArray[np.bool_]
) -> _Bound:
    """Replay the looks of a grid on the estimation votes of each sample, in the order of the draws."""
    estimation = votes[votes["stage"] == "estimation"]
    of_sample = {int(str(sample)): rows for sample, rows in estimation.groupby("sample")}
    decisions = []
    for sample, chosen, whole in zip(index, top, selected, strict=True):
        rows = of_sample.get(int(sample), estimation.iloc[:0])
        blocks = rows.assign(right=rows["votes"].where(rows["class"] == chosen, 0)).groupby("draw_stop")
        sums = blocks.agg(draw_start=("draw_start", "first"), right=("right", "sum"))
        decisions.append(grid.decide(prefix_counts(grid, sums[["draw_start", "right"]].itertuples()) if whole else []))
    levels = np.array([decision.level for decision in decisions], dtype=np.int64)
    radius = np.array([grid.radius(level) for level in levels])
    final = np.array([decision.final for decision in decisions], dtype=bool)
    p_A = np.where(levels > 0, ndtr(radius / grid.sigma), 0.0)
    n_A = np.array([decision.n_A for decision in decisions], dtype=np.int64)
    n = np.array([decision.n if decision.final else 0 for decision in decisions], dtype=np.int64)
    verdict = _Verdict(top, n_A, p_A, 1 - p_A, radius, levels > 0)
    return _Bound(verdict, n, np.full(len(index), grid.alpha), selected & final)


def prefix_counts(grid: Grid, blocks: Iterable[tuple[int, int, int]]) -> list[int]:
    """The top class's counts at the looks whose draws are all there, from ascending (draw_stop, draw_start, votes)."""
    counts: list[int] = []
    drawn = right = 0
    for draw_stop, draw_start, votes in blocks:
        if draw_start != drawn:
            break
        drawn, right = draw_stop, right + votes
        if len(counts) < len(grid.looks) and grid.looks[len(counts)] == drawn:
            counts.append(right)
    return counts


def _counts(
    votes: pd.DataFrame, stage: str, limit: int | NDArray[np.int64], index: pd.Index, num_classes: int
) -> NDArray[np.int64]:
    """Votes per sample (rows, as `index`) and class (columns) among the first `limit` draws of a stage."""
    chosen = votes[votes["stage"] == stage]
    of_sample = dict(zip(index, np.broadcast_to(limit, len(index)), strict=True))
    chosen = chosen[chosen["draw_stop"] <= chosen["sample"].map(of_sample).fillna(-1)]
    table = chosen.pivot_table(index="sample", columns="class", values="votes", aggfunc="sum", fill_value=0)
    return table.reindex(index=index, columns=range(num_classes), fill_value=0).to_numpy(dtype=np.int64)
