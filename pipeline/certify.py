"""Votes -> p_A lower bound, abstain, certified radius (Cohen et al. 2019, arXiv 1902.02918, Algorithm 2: CERTIFY).

The selection votes choose the top class c_A and never enter the bound; the estimation votes give its count n_A among n:

    p_A lower bound  = inf{p : P(Bin(n, p) >= n_A) > alpha}    one-sided Clopper-Pearson
    abstain          iff p_A lower bound < 1/2
    certified radius = sigma * Phi^-1(p_A lower bound)         (equation 3 with p_B = 1 - p_A)

Both are computed from the upper tail q = 1 - p_A, which keeps its digits where p_A is close to 1.

The multi-class certificate bounds the runner-up from the same votes instead of taking p_B = 1 - p_A:

    certified radius = sigma / 2 (Phi^-1(p_A lower bound) - Phi^-1(p_B upper bound))    (equation 3)

with p_A's bound at level w alpha and an upper bound for each of the other C - 1 classes at level
(1 - w) alpha / (C - 1); all hold together with probability 1 - alpha (Bonferroni). p_B's is the largest of these,
at most 1 - p_A lower bound. The class comes from selection, never from the votes that bound it.

The cost-sensitive certificate (Xin et al., arXiv 2310.08732) claims less and further: g(x + d) is none of the classes
Omega that are costly for the label, for |d| < radius. Its class is the selection's top one outside Omega; only the
classes in Omega are bounded from above, with w = 0.8.

Other than by `mode = "fixed"`, the draws of a sample are those of its plan (`planned`: another n for each sample,
chosen before its first estimation draw, with the bound at full alpha), or those that group-sequential looks took
(`grid`, see pipeline/sequential.py). Where alpha is split in advance over several n, each look has a bound at its share
and the sample the larger radius.

PREDICT (the same paper's Algorithm 1) needs no selection: it answers the class with the most votes, and abstains unless
a two-sided binomial test tells its count from the runner-up's. It says nothing of a radius.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtrc, betaincinv, ndtr, ndtri

from pipeline.sequential import Grid
from pipeline.spec import Alpha

ABSTAINED, NO_PREDICTION = -1, -2

Certificate = Literal["top", "multiclass", "cost", "predict"]
_W, _W_COST = 0.9, 0.8  # p_A's share of alpha in the multi-class and the cost-sensitive certificate
CERTIFICATES: tuple[Certificate, ...] = get_args(Certificate)

COLUMNS = (
    "sample", "label", "status", "prediction", "top_class", "n0", "n", "n_A", "p_A_lower", "p_B_upper", "radius",
    "correct", "sigma", "alpha", "certificate", "mode", "order", "post_hoc",
)  # fmt: skip


def _upper_tail(n_A: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """q = 1 - p_A lower bound: the 1 - alpha quantile of Beta(n - n_A + 1, n_A), and 1 where n_A = 0."""
    count, total = np.broadcast_arrays(np.asarray(n_A), np.asarray(n))
    for name, values in (("n_A", count), ("n", total)):
        if not np.issubdtype(values.dtype, np.integer):
            raise ValueError(f"{name} must be whole numbers, got {values.dtype}")
    if (total < 1).any() or (count < 0).any() or (count > total).any():
        raise ValueError("n_A and n must satisfy 0 <= n_A <= n and n >= 1")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha = {alpha} must lie between 0 and 1")
    q = betaincinv(total - count + 1.0, np.maximum(count, 1).astype(float), 1 - alpha)
    q = np.where(count == total, -np.expm1(np.log(alpha) / total), q)
    return np.where(count == 0, 1.0, q)


def lower_confidence_bound(n_A: ArrayLike, n: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """One-sided Clopper-Pearson lower bound at confidence 1 - alpha, over arrays of whole numbers.

    0 where n_A = 0, alpha^(1/n) where n_A = n. Raises: ValueError unless 0 <= n_A <= n, n >= 1 and 0 < alpha < 1.
    """
    return 1 - _upper_tail(n_A, n, alpha)


def certified_radius(n_A: ArrayLike, n: ArrayLike, alpha: float, sigma: float) -> NDArray[np.float64]:
    """l2 radius in [0, 1] pixel units, over arrays; 0 where the bound lies below 1/2 (abstain).

    Raises: ValueError as `lower_confidence_bound`, and unless sigma > 0.
    """
    if not sigma > 0:
        raise ValueError(f"sigma = {sigma} must be above 0")
    q = _upper_tail(n_A, n, alpha)
    return np.where(q <= 0.5, -sigma * ndtri(np.minimum(q, 0.5)), 0.0) + 0.0


def prediction_p_value(n_A: ArrayLike, n_B: ArrayLike) -> NDArray[np.float64]:
    """Two-sided p-value of n_A against n_B <= n_A votes, were both classes equally likely, over whole numbers.

    Raises: ValueError unless 0 <= n_B <= n_A.
    """
    first, second = np.broadcast_arrays(np.asarray(n_A), np.asarray(n_B))
    if (second < 0).any() or (second > first).any():
        raise ValueError("n_A and n_B must satisfy 0 <= n_B <= n_A")
    return np.minimum(1.0, 2 * bdtrc(first - 1.0, first + second, 0.5))


def least_certifying_n(alpha: float, certificate: Certificate = "top") -> int:
    """The least n with which votes that all agree are enough: alpha^(1/n) >= 1/2, for PREDICT 2 (1/2)^n <= alpha."""
    return int(np.ceil(np.log(alpha if certificate != "predict" else alpha / 2) / np.log(0.5)))


def looks_at(alpha: Alpha, n: int) -> dict[int, float]:
    """The looks up to n and their shares of alpha; one look at n, where alpha is not split."""
    if isinstance(alpha, Mapping):
        return {look: share for look, share in sorted(alpha.items()) if look <= n}
    return {n: alpha}


def top_class(votes: Mapping[int, int]) -> int:
    """The class with most votes, the lowest of several; NO_PREDICTION where there are none."""
    return min(votes, key=lambda k: (-votes[k], k), default=NO_PREDICTION)


class _Counts(NamedTuple):
    """Estimation votes of S samples for K classes, and what bounds them."""

    top: NDArray[np.int64]  # the selection's class of each sample
    estimation_SK: NDArray[np.int64]
    costly_SK: NDArray[np.bool_]  # Omega
    alpha: float
    sigma: float

    @property
    def n_A(self) -> NDArray[np.int64]:
        return self.estimation_SK[np.arange(len(self.top)), self.top]

    @property
    def n(self) -> NDArray[np.int64]:
        """1 where there are no votes."""
        return np.maximum(self.estimation_SK.sum(axis=1), 1)


class _Verdict(NamedTuple):
    """What a certificate says of each sample, were its votes complete."""

    top_class: NDArray[np.int64]
    n_A: NDArray[np.int64]
    p_A_lower: NDArray[np.float64]
    p_B_upper: NDArray[np.float64]
    radius: NDArray[np.float64]
    stands: NDArray[np.bool_]  # it does not abstain


def _top(counts: _Counts) -> _Verdict:
    """CERTIFY: the selection's top class, bounded by the estimation's votes for it."""
    n_A, n = counts.n_A, counts.n
    bound = lower_confidence_bound(n_A, n, counts.alpha)
    return _Verdict(
        counts.top, n_A, bound, 1 - bound, certified_radius(n_A, n, counts.alpha, counts.sigma), bound >= 0.5
    )


def _multiclass(counts: _Counts) -> _Verdict:
    """CERTIFY with all other classes bounded too; there is a column for every class of the data set."""
    others_SK = np.ones(counts.estimation_SK.shape, dtype=bool)
    others_SK[np.arange(len(others_SK)), counts.top] = False
    return _against(counts, others_SK, _W)


def _cost(counts: _Counts) -> _Verdict:
    """The selection's top class outside Omega, against the classes in Omega."""
    return _against(counts, counts.costly_SK, _W_COST)


def _against(counts: _Counts, rivals_SK: NDArray[np.bool_], w: float) -> _Verdict:
    """The top class bounded from below at w alpha, its rivals from above at (1 - w) alpha together."""
    n_A, n = counts.n_A, counts.n
    # the bound grows with the count, so the rival with most votes has the largest
    n_B = np.where(rivals_SK, counts.estimation_SK, 0).max(axis=1)
    level = (1 - w) * counts.alpha / np.maximum(rivals_SK.sum(axis=1), 1)
    rest = _upper_tail(n_A, n, w * counts.alpha)  # 1 - p_A lower bound
    p_B = np.where(n_B == n, 1.0, betaincinv(n_B + 1.0, np.maximum(n - n_B, 1).astype(float), 1 - level))
    p_B = np.minimum(rest, p_B)
    stands = 1 - rest >= p_B
    radius = np.where(stands, counts.sigma / 2 * (-ndtri(rest) - ndtri(p_B)), 0.0) + 0.0
    return _Verdict(counts.top, n_A, 1 - rest, p_B, radius, stands)


def _predict(counts: _Counts) -> _Verdict:
    """PREDICT: the estimation's top class against its runner-up; a bound or a radius is not claimed."""
    ordered = np.sort(np.pad(counts.estimation_SK, ((0, 0), (1, 0))), axis=1)
    n_A, n_B = ordered[:, -1], ordered[:, -2]
    nothing = np.full(len(n_A), np.nan)
    stands = prediction_p_value(n_A, n_B) <= counts.alpha
    return _Verdict(counts.estimation_SK.argmax(axis=1), n_A, nothing, nothing, np.zeros(len(n_A)), stands)


_VERDICTS = {"top": _top, "multiclass": _multiclass, "cost": _cost, "predict": _predict}


def certify(
    votes: pd.DataFrame,
    *,
    sigma: float,
    alpha: Alpha,
    n0: int,
    n: int | Mapping[int, int],
    samples: Sequence[int] | None = None,
    certificate: Certificate = "top",
    num_classes: int | None = None,
    costly: Mapping[int, Sequence[int]] | None = None,
    skip_wrong: bool = False,
    grid: Grid | None = None,
    order: str = "",
    mode: str = "fixed",
    post_hoc: Callable[[int], bool] = lambda sample: False,
) -> pd.DataFrame:
    """Certificates of samples (all that have votes, unless some are named) from the first n0 and n draws of each.

    `n` may differ by sample (a plan; a sample that it lacks is incomplete), or be what the looks of `grid` took. The
    multi-class certificate needs `num_classes` of the data set (run.json's): a class without votes has no row; the
    cost-sensitive one needs `costly`: label -> its Omega. With `skip_wrong` a sample whose selected class is not its
    label needs no estimation.

    Returns one row a sample with COLUMNS; ties go to the lowest class. `status` is certified (predicted, with
    certificate "predict"), abstained, skipped, exempt (the label has no costly class: nothing to certify), or
    incomplete where draws lack. `prediction` is -1 for abstained, -2 where none was made. `n`, `n_A` and `alpha` are
    those of the bound: with a split alpha, of the look with the larger radius. In grid mode `radius` is the largest of
    the grid's that is certified, and `p_A_lower` what that says. `post_hoc` tells of a sample whether an earlier order
    has looked at it with other settings.

    Raises: ValueError for a certificate without what it needs.
    """
    if certificate == "multiclass" and num_classes is None:
        raise ValueError("the multi-class certificate needs num_classes: how many classes the data set has")
    if certificate == "cost" and costly is None:
        raise ValueError("the cost-sensitive certificate needs the costly classes of each label")
    if grid is not None and certificate != "top":
        raise ValueError("the looks of a grid give the certificate 'top' alone")
    votes = votes.astype({"stage": str})
    index = pd.Index(sorted(set(votes["sample"])) if samples is None else list(samples), name="sample", dtype="int64")
    label = votes.groupby("sample")["label"].first().reindex(index, fill_value=-1).to_numpy()
    columns = max([num_classes or 1, *(votes["class"] + 1), *(k + 1 for one in (costly or {}).values() for k in one)])
    costly_SK = np.zeros((len(index), columns), dtype=bool)
    for row, y in enumerate(label):
        costly_SK[row, list((costly or {}).get(int(y), ()))] = True
    selection = _counts(votes, "selection", n0, index, columns)
    n0_drawn = selection.sum(axis=1)
    selected, predicts = n0_drawn == n0, certificate == "predict"
    top = np.where(costly_SK, -1, selection).argmax(axis=1)

    if grid is not None:
        bound = _bound_of_grid(grid, votes, index, top, selected)
    else:
        last = max(n.values(), default=0) if isinstance(n, Mapping) else n
        bounds = []
        for look, share in looks_at(alpha, last).items():
            wanted = np.array([n.get(int(i), -1) if isinstance(n, Mapping) else look for i in index], dtype=np.int64)
            estimation = _counts(votes, "estimation", wanted, index, columns)
            found = _VERDICTS[certificate](_Counts(top, estimation, costly_SK, share, sigma))
            drawn = estimation.sum(axis=1)
            bounds.append(_Bound(found, drawn, np.full(len(index), share), selected & (drawn == wanted)))
        if not bounds:
            raise ValueError(f"n = {n} lies before the first look of alpha = {alpha}")
        bound = reduce(_larger, bounds)
    verdict = bound.verdict
    skipped = selected & (top != label) if skip_wrong else np.zeros(len(index), dtype=bool)
    exempt = ~costly_SK.any(axis=1) if certificate == "cost" else np.zeros(len(index), dtype=bool)
    judged = bound.complete & ~skipped & ~exempt
    stands = judged & verdict.stands
    prediction = np.where(stands, verdict.top_class, np.where(judged, ABSTAINED, NO_PREDICTION))
    correct = stands if certificate == "cost" else stands & (prediction == label)  # no costly class is what is claimed
    nothing = np.nan if predicts else 0.0
    chosen = (bound.n if predicts else n0_drawn) > 0
    return pd.DataFrame(
        {
            "sample": index.to_numpy(dtype=np.int32),
            "label": label.astype(np.int32),
            "status": np.select(
                [exempt, skipped, stands, judged],
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
            "certificate": certificate,
            "mode": mode,
            "order": order,
            "post_hoc": np.array([post_hoc(int(sample)) for sample in index], dtype=bool),
        },
        columns=list(COLUMNS),
    )


class _Bound(NamedTuple):
    """A verdict on each sample and what it rests on."""

    verdict: _Verdict
    n: NDArray[np.int64]
    alpha: NDArray[np.float64]
    complete: NDArray[np.bool_]


def _larger(earlier: _Bound, later: _Bound) -> _Bound:
    """Of two looks, whose levels add up, the one with the larger radius; the later where its draws are not complete."""
    take = ~later.complete | (later.verdict.radius >= earlier.verdict.radius)

    def choose(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> list[Any]:
        return [np.where(take, one, other) for one, other in zip(ours, theirs, strict=True)]

    return _Bound(_Verdict(*choose(later.verdict, earlier.verdict)), *choose(later[1:], earlier[1:]))


def _bound_of_grid(
    grid: Grid, votes: pd.DataFrame, index: pd.Index, top: NDArray[np.int64], selected: NDArray[np.bool_]
) -> _Bound:
    """Replay a grid's looks on each sample's estimation votes, in the order of their draws."""
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
    """The top class's counts at the looks that stand, from (draw_stop, draw_start, its votes) in ascending order."""
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
