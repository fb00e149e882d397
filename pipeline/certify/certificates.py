"""Votes -> certificates of an order: a row per sample with its bound, its radius, or why it has none.

`certify/kinds.py` has the formulas of each certificate. In the mode `planned` each sample has its own n, chosen before
its first estimation draw, and its bound holds at the full alpha. In the mode `grid` the draws are those of
group-sequential looks (certify/sequential.py). If alpha is split in advance over several n, each look has a bound at
its share, and the sample gets the larger radius.
"""

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr

from diffsmooth.pipeline.certify.kinds import Counts, Verdict
from diffsmooth.pipeline.certify.orders import Order
from diffsmooth.pipeline.certify.sequential import Grid
from diffsmooth.pipeline.spec import BlockLengths

ABSTAINED, NO_PREDICTION = -1, -2

COLUMNS = (
    "sample", "label", "status", "prediction", "top_class", "n0", "n", "n_A", "p_A_lower", "p_B_upper", "radius",
    "correct", "sigma", "alpha", "certificate", "mode", "order", "post_hoc",
)  # fmt: skip


def top_class(votes: Mapping[int, int]) -> int:
    """The class with the most votes, the lowest in a tie; NO_PREDICTION without votes."""
    return min(votes, key=lambda k: (-votes[k], k), default=NO_PREDICTION)


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
            found = order.kind.verdict_of(Counts(top, estimation, costly_SK, share, sigma))
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
    verdict, kind = bound.verdict, order.kind
    selected = n0_drawn == order.n0
    no = np.zeros(len(label), dtype=bool)
    skipped = selected & (verdict.top_class != label) if order.skip_wrong else no
    # without votes, a label is -1 like that of an unlabelled sample, which has no costly class either
    exempt = harmless & ((label >= 0) | bound.complete) if kind.needs_costs else no
    judged = bound.complete & ~skipped & ~exempt
    certified = judged & verdict.certified
    prediction = np.where(certified, verdict.top_class, np.where(judged, ABSTAINED, NO_PREDICTION))
    correct = certified & (prediction == label) if kind.claims_label else certified
    nothing = 0.0 if kind.has_radius else np.nan
    chosen = (n0_drawn if kind.selects else bound.n) > 0
    return pd.DataFrame(
        {
            "sample": np.array(order.samples, dtype=np.int32),
            "label": label.astype(np.int32),
            "status": np.select(
                [exempt, skipped, certified, judged],
                ["exempt", "skipped", kind.status, "abstained"],
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

    verdict: Verdict
    n: NDArray[np.int64]
    alpha: NDArray[np.float64]
    complete: NDArray[np.bool_]


def _larger(earlier: _Bound, later: _Bound) -> _Bound:
    """Of two looks whose levels add up, the one with the larger radius; the later one if its draws are incomplete."""
    take = ~later.complete | (later.verdict.radius >= earlier.verdict.radius)

    def choose(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> list[Any]:
        return [np.where(take, one, other) for one, other in zip(ours, theirs, strict=True)]

    return _Bound(Verdict(*choose(later.verdict, earlier.verdict)), *choose(later[1:], earlier[1:]))


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
    verdict = Verdict(top, n_A, p_A, 1 - p_A, radius, levels > 0)
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
