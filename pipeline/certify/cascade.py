"""Votes of runs with different sigma -> one certificate over all of them (the cascade).

The scales sigma_1 < ... < sigma_S have base classifiers f_1, ..., f_S, and p_jc(x) = P(f_j(x + N(0, sigma_j^2 I)) = c).
G(x) is the class with p_jc(x) > 1/2 at the largest scale j that has such a class; G abstains if no scale has one.

For a scale k and a class A, let

    t_k = sigma_k Phi^-1(p_kA(x))
    t_j = -sigma_j Phi^-1(max over c != A of p_jc(x))    for j > k
    r   = min over j >= k of t_j

Then G(x + d) = A for |d| < r: A keeps a probability above 1/2 at scale k, and no other class reaches 1/2 at a larger
scale (Cohen et al. 2019, arXiv 1902.02918). So the largest scale with a class above 1/2 exists, and its class is A.

The certificate R is the minimum of t_j', which come from the estimation votes: t_k' from the Clopper-Pearson lower
bound of p_kA, and t_j' from the upper bound of the class c != A with the most votes, each at the full alpha.
Nevertheless R > r has probability at most alpha:
- k and A depend on the selection votes alone, which are independent of the estimation votes;
- let m be the scale with t_m = r. R > r implies t_m' > t_m, so the bound at this one scale has to fail;
- if m > k, let b be the class with the largest p_mb, b != A. The class with the most votes has at least as many votes
  as b, so t_m' > t_m implies that the bound of p_mb fails. If m = k, the bound of p_kA fails.
In each case one bound of one fixed probability fails, which has probability at most alpha. The scales may share noise,
because the proof never uses the votes of two scales at once.

k and A are the pair with the largest r if the selection frequencies were the probabilities. k is not always the scale
that answers: if all other classes are rare at the scales above, a smaller sigma with a larger p_kA gives a larger R.
With one scale, this is the certificate `top` of certify/kinds.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import ndtri

from diffsmooth.pipeline.certify.bounds import certified_radius, lower_confidence_bound
from diffsmooth.pipeline.certify.certificates import ABSTAINED, COLUMNS, NO_PREDICTION
from diffsmooth.pipeline.certify.kinds import CASCADE
from diffsmooth.pipeline.records import LARGEST, Record

CASCADE_COLUMNS = (*COLUMNS, "limiting_sigma")

Draws = Annotated[int, Field(ge=1, le=LARGEST)]
Positive = Annotated[float, Field(gt=0)]


class CascadeScale(Record):
    """A run of a cascade, and the draws that the cascade uses of each sample."""

    run: str
    votes_id: str
    sigma: Positive
    n0: Draws
    n: Draws


class CascadeRecord(Record):
    """cascade.json: what the certificates of a cascade follow from."""

    certificate: Literal["cascade"] = CASCADE
    scales: list[CascadeScale] = Field(min_length=1)  # ascending sigma
    samples: list[Annotated[int, Field(ge=0, le=LARGEST)]] = Field(min_length=1)
    alpha: Annotated[float, Field(gt=0, lt=1)]  # of a certificate, over all scales together
    p0: Literal["1/2"] = "1/2"
    split: Literal["none: each bound at alpha, of which one has to fail"] = (
        "none: each bound at alpha, of which one has to fail"
    )
    post_hoc: Literal[True] = True


@dataclass(frozen=True, kw_only=True)
class ScaleVotes:
    """The votes of the run at one scale."""

    votes: pd.DataFrame  # columns of `diffsmooth.pipeline.votes.blocks.SCHEMA`
    sigma: float
    n0: int
    n: int


class _Scale(NamedTuple):
    """The votes of N samples for K classes at one scale."""

    sigma: float
    n0: int
    n: int
    selection_NK: NDArray[np.int64]
    estimation_NK: NDArray[np.int64]


class _Choice(NamedTuple):
    """k and A of each sample."""

    scale: NDArray[np.int64]  # index into the scales, from the largest sigma
    top_class: NDArray[np.int64]


def certify_cascade(
    scales: Sequence[ScaleVotes], samples: Sequence[int], *, alpha: float, num_classes: int
) -> pd.DataFrame:
    """Certificates of the cascade, from the first n0 and n draws of each sample at every scale.

    Returns a row per sample with CASCADE_COLUMNS. `status` is certified, abstained, or incomplete (draws are missing at
    a scale). `sigma`, `n0`, `n`, `n_A` and `p_A_lower` are those of scale k; `p_B_upper` is the largest bound of a
    class other than A at the larger scales, and 1 - p_A_lower if there are none; `limiting_sigma` is the scale whose
    bound is the radius. A certified `prediction` is also what G answers at the sample itself, with error probability
    at most alpha. All rows are post hoc: each run has a claim of its own on the same votes.

    Raises: ValueError without scales, for two scales with one sigma, for one class, and for labels that differ.
    """
    if not scales or len({scale.sigma for scale in scales}) < len(scales):
        raise ValueError("a cascade needs scales with different sigma")
    if num_classes < 2:
        raise ValueError(f"num_classes = {num_classes} must be at least 2")
    index = pd.Index(list(samples), name="sample", dtype="int64")
    label = _labels(scales, index)
    counted = [_counted(scale, index, num_classes) for scale in sorted(scales, key=lambda one: -one.sigma)]
    choice = _choose(counted)
    return _table(counted, choice, _bound(counted, choice, alpha), index, label, alpha)


def _labels(scales: Sequence[ScaleVotes], index: pd.Index) -> NDArray[np.int64]:
    """The label of each sample, -1 without votes."""
    votes = pd.concat([scale.votes[["sample", "label"]] for scale in scales])
    groups = votes.groupby("sample")["label"]
    if (groups.nunique() > 1).any():
        raise ValueError("the label of a sample differs between the scales")
    return groups.first().reindex(index, fill_value=-1).to_numpy(dtype=np.int64)


def _counted(scale: ScaleVotes, index: pd.Index, num_classes: int) -> _Scale:
    counts = []
    for stage, draws in (("selection", scale.n0), ("estimation", scale.n)):
        chosen = scale.votes[(scale.votes["stage"].astype(str) == stage) & (scale.votes["draw_stop"] <= draws)]
        table = chosen.pivot_table(index="sample", columns="class", values="votes", aggfunc="sum", fill_value=0)
        counts.append(table.reindex(index=index, columns=range(num_classes), fill_value=0).to_numpy(dtype=np.int64))
    return _Scale(scale.sigma, scale.n0, scale.n, *counts)


def _rivals(counts_NK: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each class, the largest count among the other classes."""
    first, second = counts_NK.argmax(axis=1), np.sort(counts_NK, axis=1)[:, -2]
    rivals_NK = np.repeat(counts_NK.max(axis=1)[:, None], counts_NK.shape[1], axis=1)
    rivals_NK[np.arange(len(first)), first] = second
    return rivals_NK


def _predicted(counts_NK: NDArray[np.int64], n0: int) -> NDArray[np.float64]:
    """Phi^-1 of the selection frequencies, finite also for counts of 0 and n0."""
    return np.asarray(ndtri((counts_NK + 0.5) / (n0 + 1)))


def _choose(scales: Sequence[_Scale]) -> _Choice:
    """The scale and the class with the largest radius if the selection frequencies were the probabilities.

    A tie goes to the larger sigma, and to the lowest class.
    """
    shape = scales[0].selection_NK.shape
    best = np.full(shape[0], -np.inf)
    choice = _Choice(np.zeros(shape[0], dtype=np.int64), np.zeros(shape[0], dtype=np.int64))
    ceiling_NK = np.full(shape, np.inf)  # the least t_j of the scales above
    for number, scale in enumerate(scales):
        votes_NK = scale.selection_NK
        radius_NK = np.minimum(scale.sigma * _predicted(votes_NK, scale.n0), ceiling_NK)
        better = radius_NK.max(axis=1) > best
        choice.scale[better] = number
        choice.top_class[better] = radius_NK.argmax(axis=1)[better]
        best = np.maximum(best, radius_NK.max(axis=1))
        ceiling_NK = np.minimum(ceiling_NK, -scale.sigma * _predicted(_rivals(votes_NK), scale.n0))
    return choice


class _Bounds(NamedTuple):
    """What the estimation votes say about k and A of each sample."""

    n_A: NDArray[np.int64]
    p_A_lower: NDArray[np.float64]
    p_B_upper: NDArray[np.float64]
    radius: NDArray[np.float64]  # 0: abstain
    limiting_sigma: NDArray[np.float64]


def _bound(scales: Sequence[_Scale], choice: _Choice, alpha: float) -> _Bounds:
    """R and its parts: every bound is at the full alpha."""
    rows = np.arange(len(choice.scale))
    radius, limiting = np.full(len(rows), np.inf), np.zeros(len(rows))
    n_A, p_A, p_B = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows)), np.zeros(len(rows))
    for number, scale in enumerate(scales):
        here, above = choice.scale == number, choice.scale > number
        votes = scale.estimation_NK[rows, choice.top_class]
        # an upper bound of p is 1 - the lower bound of 1 - p, from the votes for all other classes
        kept = np.where(here, votes, scale.n - _rivals(scale.estimation_NK)[rows, choice.top_class])
        bound = lower_confidence_bound(kept, scale.n, alpha)
        reach = np.where(here | above, certified_radius(kept, scale.n, alpha, scale.sigma), np.inf)
        limiting = np.where(reach < radius, scale.sigma, limiting)
        radius = np.minimum(radius, reach)
        n_A, p_A = np.where(here, votes, n_A), np.where(here, bound, p_A)
        p_B = np.where(above, np.maximum(p_B, 1 - bound), p_B)
    return _Bounds(n_A, p_A, np.where(choice.scale == 0, 1 - p_A, p_B), radius, limiting)


def _table(
    scales: Sequence[_Scale],
    choice: _Choice,
    bounds: _Bounds,
    index: pd.Index,
    label: NDArray[np.int64],
    alpha: float,
) -> pd.DataFrame:
    complete = np.ones(len(index), dtype=bool)
    for scale in scales:
        complete &= scale.selection_NK.sum(axis=1) == scale.n0
        complete &= scale.estimation_NK.sum(axis=1) == scale.n
    certified = complete & (bounds.radius > 0)
    prediction = np.where(complete, np.where(certified, choice.top_class, ABSTAINED), NO_PREDICTION)
    sigma, n0, n = (np.array([getattr(one, key) for one in scales])[choice.scale] for key in ("sigma", "n0", "n"))
    return pd.DataFrame(
        {
            "sample": index.to_numpy(dtype=np.int32),
            "label": label.astype(np.int32),
            "status": np.where(complete, np.where(certified, "certified", "abstained"), "incomplete"),
            "prediction": prediction.astype(np.int32),
            "top_class": np.where(complete, choice.top_class, NO_PREDICTION).astype(np.int32),
            "n0": n0.astype(np.int32),
            "n": n.astype(np.int32),
            "n_A": np.where(complete, bounds.n_A, 0).astype(np.int32),
            "p_A_lower": np.where(complete, bounds.p_A_lower, 0.0),
            "p_B_upper": np.where(complete, bounds.p_B_upper, 1.0),
            "radius": np.where(certified, bounds.radius, 0.0),
            "correct": certified & (prediction == label),
            "sigma": sigma,
            "alpha": alpha,
            "certificate": CASCADE,
            "mode": "fixed",
            "order": "",
            "post_hoc": True,
            "limiting_sigma": bounds.limiting_sigma,
        },
        columns=list(CASCADE_COLUMNS),
    )
