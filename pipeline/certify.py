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

PREDICT (the same paper's Algorithm 1) needs no selection: it answers the class with the most votes, and abstains unless
a two-sided binomial test tells its count from the runner-up's. It says nothing of a radius.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtrc, betaincinv, ndtri

ABSTAINED, NO_PREDICTION = -1, -2

Certificate = Literal["top", "multiclass", "predict"]
_W = 0.9  # p_A's share of alpha in the multi-class certificate
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
    return int(np.ceil(np.log(alpha if certificate == "top" else alpha / 2) / np.log(0.5)))


class _Verdict(NamedTuple):
    """What a certificate says of each sample, were its votes complete."""

    top_class: NDArray[np.int64]
    n_A: NDArray[np.int64]
    p_A_lower: NDArray[np.float64]
    p_B_upper: NDArray[np.float64]
    radius: NDArray[np.float64]
    stands: NDArray[np.bool_]  # it does not abstain


def _top(selection: NDArray[np.int64], estimation: NDArray[np.int64], alpha: float, sigma: float) -> _Verdict:
    """CERTIFY: the selection's top class, bounded by the estimation's votes for it."""
    top_class, n_A, n = _selected(selection, estimation)
    bound = lower_confidence_bound(n_A, n, alpha)
    return _Verdict(top_class, n_A, bound, 1 - bound, certified_radius(n_A, n, alpha, sigma), bound >= 0.5)


def _multiclass(selection: NDArray[np.int64], estimation: NDArray[np.int64], alpha: float, sigma: float) -> _Verdict:
    """CERTIFY with the runner-up bounded too; `estimation` has a column for every class of the data set."""
    top_class, n_A, n = _selected(selection, estimation)
    others = estimation.copy()
    others[np.arange(len(others)), top_class] = 0
    n_B = others.max(axis=1)  # the bound grows with the count, so the class with most votes has the largest
    level = (1 - _W) * alpha / max(estimation.shape[1] - 1, 1)
    rest = _upper_tail(n_A, n, _W * alpha)  # 1 - p_A lower bound
    p_B = np.where(n_B == n, 1.0, betaincinv(n_B + 1.0, np.maximum(n - n_B, 1).astype(float), 1 - level))
    p_B = np.minimum(rest, p_B)
    stands = 1 - rest >= p_B
    radius = np.where(stands, sigma / 2 * (-ndtri(rest) - ndtri(p_B)), 0.0) + 0.0
    return _Verdict(top_class, n_A, 1 - rest, p_B, radius, stands)


def _predict(selection: NDArray[np.int64], estimation: NDArray[np.int64], alpha: float, sigma: float) -> _Verdict:
    """PREDICT: the estimation's top class against its runner-up; a bound or a radius is not claimed."""
    top_class = estimation.argmax(axis=1)
    ordered = np.sort(np.pad(estimation, ((0, 0), (1, 0))), axis=1)
    n_A, n_B = ordered[:, -1], ordered[:, -2]
    nothing = np.full(len(n_A), np.nan)
    stands = prediction_p_value(n_A, n_B) <= alpha
    return _Verdict(top_class, n_A, nothing, nothing, np.zeros(len(n_A)), stands)


def _selected(selection: NDArray[np.int64], estimation: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """The selection's top class, its estimation votes, and all estimation votes (1 where there are none)."""
    top_class = selection.argmax(axis=1)
    return top_class, estimation[np.arange(len(estimation)), top_class], np.maximum(estimation.sum(axis=1), 1)


_VERDICTS = {"top": _top, "multiclass": _multiclass, "predict": _predict}


def certify(
    votes: pd.DataFrame,
    *,
    sigma: float,
    alpha: float,
    n0: int,
    n: int,
    samples: Sequence[int] | None = None,
    certificate: Certificate = "top",
    num_classes: int | None = None,
    order: str = "",
    mode: str = "fixed",
    post_hoc: Callable[[int], bool] = lambda sample: False,
) -> pd.DataFrame:
    """Certificates of samples (all that have votes, unless some are named) from the first n0 and n draws of each.

    The multi-class certificate needs `num_classes` of the data set (run.json's): a class without votes has no row.

    A sample that lacks draws is `incomplete`; ties go to the lowest class. Returns one row a sample with COLUMNS:
    `status` is certified (predicted, with certificate "predict"), abstained or incomplete; `prediction` is -1 for
    abstained, -2 where none was made. `post_hoc` tells of a sample whether an earlier order has looked at it with other
    settings.

    Raises: ValueError for the multi-class certificate without `num_classes`.
    """
    if certificate == "multiclass" and num_classes is None:
        raise ValueError("the multi-class certificate needs num_classes: how many classes the data set has")
    votes = votes.astype({"stage": str})
    index = pd.Index(sorted(set(votes["sample"])) if samples is None else list(samples), name="sample", dtype="int64")
    columns = max(num_classes or 1, int(votes["class"].max()) + 1 if len(votes) else 1)
    selection = _counts(votes, "selection", n0, index, columns)
    estimation = _counts(votes, "estimation", n, index, columns)
    n0_drawn, n_drawn = selection.sum(axis=1), estimation.sum(axis=1)
    complete = (n0_drawn == n0) & (n_drawn == n)
    verdict = _VERDICTS[certificate](selection, estimation, alpha, sigma)
    chosen = (n_drawn if certificate == "predict" else n0_drawn) > 0
    stands = complete & verdict.stands
    prediction = np.where(stands, verdict.top_class, np.where(complete, ABSTAINED, NO_PREDICTION))
    nothing = np.nan if certificate == "predict" else 0.0
    label = votes.groupby("sample")["label"].first().reindex(index, fill_value=-1).to_numpy()
    positive = "predicted" if certificate == "predict" else "certified"
    return pd.DataFrame(
        {
            "sample": index.to_numpy(dtype=np.int32),
            "label": label.astype(np.int32),
            "status": np.where(stands, positive, np.where(complete, "abstained", "incomplete")),
            "prediction": prediction.astype(np.int32),
            "top_class": np.where(chosen, verdict.top_class, NO_PREDICTION).astype(np.int32),
            "n0": n0_drawn.astype(np.int32),
            "n": n_drawn.astype(np.int32),
            "n_A": np.where(chosen, verdict.n_A, 0).astype(np.int32),
            "p_A_lower": np.where(complete, verdict.p_A_lower, nothing),
            "p_B_upper": np.where(complete, verdict.p_B_upper, 1 - nothing),
            "radius": np.where(complete, verdict.radius, 0.0),
            "correct": stands & (prediction == label),
            "sigma": float(sigma),
            "alpha": float(alpha),
            "certificate": certificate,
            "mode": mode,
            "order": order,
            "post_hoc": np.array([post_hoc(int(sample)) for sample in index], dtype=bool),
        },
        columns=list(COLUMNS),
    )


def _counts(votes: pd.DataFrame, stage: str, limit: int, index: pd.Index, num_classes: int) -> NDArray[np.int64]:
    """Votes per sample (rows, as `index`) and class (columns) among the first `limit` draws of a stage."""
    chosen = votes[(votes["stage"] == stage) & (votes["draw_stop"] <= limit)]
    table = chosen.pivot_table(index="sample", columns="class", values="votes", aggfunc="sum", fill_value=0)
    return table.reindex(index=index, columns=range(num_classes), fill_value=0).to_numpy(dtype=np.int64)
