"""The cascade over several runs: which runs fit together, which draws it uses, and where its files are.

FOLDER/cascade.json          the runs, their votes_ids, the draws, alpha
FOLDER/certificates.parquet  and curve.csv, curve.png: what follows from them
"""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd

from diffsmooth.pipeline.block import STAGES
from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.certify.cascade import CascadeRecord, CascadeScale, ScaleVotes, certify_cascade
from diffsmooth.pipeline.certify.curve import Curve, curve_of, grid, plot, table_radii
from diffsmooth.pipeline.certify.kinds import CASCADE
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.records import MOST_BYTES, intact, parse_record
from diffsmooth.pipeline.results.stored import StoredRun, sample_set_grew
from diffsmooth.pipeline.spec import check_alpha, check_multiple
from diffsmooth.pipeline.storage.store import Store, open_store
from diffsmooth.pipeline.votes.blocks import to_table
from diffsmooth.pipeline.votes.run import RUN_KEY, Run

logger = logging.getLogger(__name__)

CASCADE_KEY = "cascade.json"


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """A cascade of stored runs: `certificates` has a row per sample, columns as in CASCADE_COLUMNS."""

    record: CascadeRecord
    certificates: pd.DataFrame
    curve: Curve

    @property
    def complete(self) -> bool:
        """Whether no sample lacks draws in any of the runs."""
        return self.curve.incomplete == 0

    def accuracy_at(self, radius: float) -> float:
        """Certified accuracy at an l2 radius in [0, 1] pixel units."""
        return float(self.curve.at([radius])[0])

    def to_json(self) -> dict[str, Any]:
        radii, curve = table_radii([self.curve]), self.curve
        accuracy = zip(radii, curve.at(radii).tolist(), strict=True)
        return self.record.model_dump() | {
            "samples": curve.num_samples,
            "incomplete": curve.incomplete,
            "complete": self.complete,
            "abstention_rate": curve.abstention_rate,
            "acr": curve.acr,
            "certified_accuracy": {f"{radius:g}": value for radius, value in accuracy},
        }


class _Member(NamedTuple):
    """A run of a cascade, as it was read."""

    uri: str
    run: Run
    alpha: float
    n0: int
    n: int
    samples: set[int]
    images: dict[int, str]  # sample -> hash of its image and label
    grown: bool  # an order has other samples than an earlier one
    votes: pd.DataFrame


def cascade(runs: Sequence[str], *, alpha: float | None = None, n0: int | None = None, n: int | None = None) -> Cascade:
    """The cascade of runs over the samples that they share, from their committed votes.

    alpha, n0 and n are those of the runs' first orders, unless they are given.
    Raises: UserError for runs that do not fit together, and if no shared sample is complete.
    """
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run was given; a cascade needs at least two, with different sigma")
    members = sorted((_read(uri, n0, n) for uri in runs), key=lambda one: one.run.sigma)
    samples = _shared(members)
    level = _alpha(members) if alpha is None else alpha
    check_alpha("--alpha", level, members[0].n)
    scales = [ScaleVotes(votes=one.votes, sigma=one.run.sigma, n0=one.n0, n=one.n) for one in members]
    rows = certify_cascade(scales, samples, alpha=level, num_classes=members[0].run.num_classes)
    reach = max(float(certified_radius(one.n, one.n, level, one.run.sigma)) for one in members)
    curve = replace(
        curve_of(CASCADE, rows, None, reach, level, certificate=CASCADE),
        scales=tuple(one.run.sigma for one in members),
        grown=any(one.grown for one in members),
    )
    if not curve.num_samples:
        draws = ", ".join(f"n0 = {one.n0} and n = {one.n} in {one.uri}" for one in members)
        raise UserError(f"no sample is complete with {draws}; use smaller --n0 and --n, or run certify again")
    record = CascadeRecord(
        scales=[
            CascadeScale(run=one.uri, votes_id=one.run.votes_id, sigma=one.run.sigma, n0=one.n0, n=one.n)
            for one in members
        ],
        samples=samples,
        alpha=level,
    )
    return Cascade(record=record, certificates=rows, curve=curve)


def _read(uri: str, n0: int | None, n: int | None) -> _Member:
    """Open a run, and read and check its votes.

    The cascade can use draws whose number is the same for all samples, and does not depend on the label.
    """
    stored = StoredRun.open(uri)
    orders = [one for one in stored.orders.values() if one.mode == "fixed" and not one.skip_wrong and one.n0 > 0]
    if not orders:
        raise UserError(
            f"{uri} has no order that draws equally often from every sample; certify it with "
            "--set sampling.mode=fixed --set sampling.skip_wrong=false"
        )
    first, lengths = orders[0], stored.run.block
    n0, n = first.n0 if n0 is None else n0, first.n if n is None else n
    for name, value, stage in zip(("n0", "n"), (n0, n), STAGES, strict=True):
        if value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
        check_multiple(f"{uri}: {name}", value, lengths.of(stage), stage)
    blocks = stored.read_blocks()
    return _Member(
        uri=stored.store.uri,
        run=stored.run,
        alpha=first.total_alpha,
        n0=n0,
        n=n,
        samples={sample for order in orders for sample in order.samples},
        images={one.block.sample: one.metadata.sample_sha256 for one in blocks},
        grown=any(sample_set_grew(stored.orders, name) for name in stored.orders),
        votes=to_table(blocks),
    )


def _shared(members: Sequence[_Member]) -> list[int]:
    """The samples that all runs have. Raises: UserError for runs that do not fit together."""
    for one, other in pairwise(members):
        if one.run.sigma == other.run.sigma:
            raise UserError(
                f"{one.uri} and {other.uri} both have sigma = {one.run.sigma:g}; give one run for each sigma"
            )
    first = members[0]
    for other in members[1:]:
        for name, ours, theirs in (
            ("num_classes", first.run.num_classes, other.run.num_classes),
            ("data.resize", first.run.spec.data.resize, other.run.spec.data.resize),
            ("data.crop", first.run.spec.data.crop, other.run.spec.data.crop),
        ):
            if ours != theirs:
                raise UserError(
                    f"{name} is {ours} in {first.uri} and {theirs} in {other.uri}; a cascade needs runs over the same "
                    "images and classes"
                )
        for sample in sorted(first.images.keys() & other.images.keys()):
            if first.images[sample] != other.images[sample]:
                raise UserError(
                    f"sample {sample} has another image or label in {other.uri} than in {first.uri}; a cascade needs "
                    "runs over the same data set"
                )
    shared = sorted(set.intersection(*(one.samples for one in members)))
    if not shared:
        raise UserError("the runs have no sample in common; certify the same data.samples in each")
    _note_differences(members, len(shared))
    return shared


def _note_differences(members: Sequence[_Member], shared: int) -> None:
    """Report what differs between the runs but does not make the cascade invalid."""
    for name in ("n0", "n"):
        values = [getattr(one, name) for one in members]
        if len(set(values)) > 1:
            listed = ", ".join(map(str, values))
            logger.warning("%s differs between the runs (%s); each bound uses the draws of its own run", name, listed)
    total = len(set().union(*(one.samples for one in members)))
    if shared < total:
        logger.warning("the cascade uses the %d of %d samples that all runs share", shared, total)


def _alpha(members: Sequence[_Member]) -> float:
    """The alpha of the runs' first orders, which must be the same."""
    values = sorted({one.alpha for one in members})
    if len(values) > 1:
        raise UserError(f"alpha differs between the runs ({', '.join(f'{value:g}' for value in values)}); give --alpha")
    return values[0]


def write_cascade(found: Cascade, uri: str) -> str:
    """Write the record, the certificates and the curve to a folder or s3://BUCKET/PREFIX, and return its location.

    Raises: UserError if a run or another cascade is there, RunError for a damaged record.
    """
    store = open_store(uri)
    if RUN_KEY in store.existing([RUN_KEY]):
        raise UserError(f"{store.uri} holds a run; choose another folder with --out")
    earlier = read_record(store)
    if earlier is not None and _ids(earlier) != _ids(found.record):
        runs = ", ".join(scale.run for scale in earlier.scales)
        raise UserError(f"{store.uri} holds the cascade of other runs ({runs}); choose another folder with --out")
    store.prepare()
    table, picture = io.BytesIO(), io.BytesIO()
    found.certificates.to_parquet(table, index=False)
    missing = found.curve.incomplete
    fine = found.curve.table(grid(0.01, found.curve.max_radius))
    curve = fine.assign(certificate=CASCADE, post_hoc=True, incomplete=missing)
    plot([found.curve], picture, f"{missing} samples are incomplete and left out" if missing else None)
    store.replace(CASCADE_KEY, found.record.model_dump_json(indent=2).encode())
    store.replace("certificates.parquet", table.getvalue())
    store.replace("curve.csv", curve.to_csv(index=False).encode())
    store.replace("curve.png", picture.getvalue())
    return store.uri


def read_record(store: Store) -> CascadeRecord | None:
    """cascade.json, None if there is none. Raises: RunError if it is damaged."""
    try:
        data = store.read(CASCADE_KEY, limit=MOST_BYTES)
    except FileNotFoundError:
        return None
    with intact(f"{store.uri}/{CASCADE_KEY}", "delete it"):
        return parse_record(CascadeRecord, data)


def _ids(record: CascadeRecord) -> set[str]:
    return {scale.votes_id for scale in record.scales}
