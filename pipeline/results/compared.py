"""A comparison of runs and logs: whether they can be compared, at which radii, and what must be said with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from diffsmooth.pipeline.certify.compare import Comparison, compare, shared_rows
from diffsmooth.pipeline.certify.curve import GROWN, Curve, table_radii
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.stored import OrderResult, comparison_notes


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the compared runs or logs."""

    rows: pd.DataFrame  # as `shared_rows` requires
    curve: Curve
    result: OrderResult | None  # None for a log


def compare_sides(sides: Mapping[str, Side], chosen: np.ndarray | None) -> Comparison:
    """Compare runs and logs by name, at the chosen radii or at round ones.

    Raises: UserError for runs that cannot be compared.
    """
    _check_claims(sides)
    curves = [side.curve for side in sides.values()]
    radii = _radii(curves, chosen)
    rows = shared_rows({name: side.rows for name, side in sides.items()})
    found = compare(rows, radii.tolist(), without_acr=any(curve.tested is not None for curve in curves))
    return found.model_copy(update={"notes": [*_notes(sides, rows, radii), *found.notes]})


def _check_claims(sides: Mapping[str, Side]) -> None:
    """Refuse to compare shares that claim different properties of g."""
    (first, one), *others = sides.items()
    for name, other in others:
        kinds, costs = (one.curve.kind, other.curve.kind), [_costly(side) for side in (one, other)]
        if not kinds[0].comparable_with(kinds[1]) or costs[0] != costs[1]:
            weaker = next((kind for kind in kinds if not kind.claims_label), kinds[0])
            raise UserError(
                f"{first}, {name}: the certificate {weaker.name!r} {weaker.caveat.partition(';')[0]}; compare it with "
                "orders that have the same certificate and the same costly classes"
            )


def _costly(side: Side) -> Mapping[int, Sequence[int]] | None:
    return None if side.result is None else side.result.order.costly


def _radii(curves: Sequence[Curve], chosen: np.ndarray | None) -> np.ndarray:
    """The chosen radii, or round ones; with grid mode, radii that every such order tested. Raises: UserError."""
    grids = [set(curve.tested.tolist()) for curve in curves if curve.tested is not None]
    if not grids:
        return table_radii(curves) if chosen is None else chosen
    tested = sorted(set.intersection(*grids))
    wrong = [] if chosen is None else sorted(set(chosen.tolist()) - set(tested))
    shown = ", ".join(f"{radius:g}" for radius in tested[:20]) or "none"
    if wrong or not tested:
        problem = f"r = {wrong[0]:g} was not tested" if wrong else "no radius was tested"
        raise UserError(f"{problem} by every order in grid mode; use radii that were: {shown}")
    return np.array(tested) if chosen is None else chosen


def _notes(sides: Mapping[str, Side], rows: Mapping[str, pd.DataFrame], radii: np.ndarray) -> list[str]:
    """What must be said with the figures: samples left out, settings that differ, second looks."""
    shared = len(next(iter(rows.values())))
    notes = []
    if any(len(side.rows) > shared for side in sides.values()):
        sizes = ", ".join(f"{shared:,} of {len(side.rows):,} in {name}" for name, side in sides.items())
        notes.append(f"only samples that are complete in all runs are compared: {sizes}")
    sigmas = [side.curve.sigma for side in sides.values()]
    if len(set(sigmas)) > 1:
        shown = ", ".join("unknown" if sigma is None else f"{sigma:g}" for sigma in sigmas)
        notes.append(f"these curves also differ in sigma ({shown}): a gap between them does not come from f alone")
    notes += comparison_notes([side.result for side in sides.values() if side.result is not None])
    notes += _about_attacks([side.curve for side in sides.values()], list(sides), radii)
    if logs := [name for name, side in sides.items() if side.result is None]:
        notes.append(
            f"{', '.join(logs)}: a log does not state n, n0, alpha or its images; only the labels were compared"
        )
    if late := [name for name, table in rows.items() if table["post_hoc"].any()]:
        notes.append(f"post hoc: {', '.join(late)}; an earlier order covers these samples")
    if grown := [name for name, side in sides.items() if side.curve.grown]:
        notes.append(f"{', '.join(grown)}: {GROWN}")
    return notes


def _about_attacks(curves: Sequence[Curve], names: Sequence[str], radii: np.ndarray) -> list[str]:
    """The gap between certified and resisted accuracy of each run that was attacked."""
    notes = []
    for name, curve in zip(names, curves, strict=True):
        if curve.uppers is None:
            continue
        shown = "; ".join(
            f"r = {radius:.10g}: {100 * certified:.1f} certified, {100 * resisted:.1f} not proven wrong"
            for radius, certified, resisted in zip(radii, curve.at(radii), curve.resisted(radii), strict=True)
        )
        attacked = int(np.isfinite(curve.uppers).sum())
        notes.append(f"attacks on {name} (upper bounds for {attacked:,} of {curve.num_samples:,} samples), %: {shown}")
    return notes
