"""What the files of a run show: is a block damaged, swapped, foreign or deleted, and do the certificates follow?

That the votes are those of f is not in the files; see `redraw`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from diffsmooth.pipeline.attack.record import Attack, AttackedSample, attack_ids, attacked, read_attack, read_samples
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.orders import Order, OrderKeys, broken_links, stored_hash
from diffsmooth.pipeline.certify.planning import Pilot, Plan, make_plan
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.noise import Noise, check_known_answers
from diffsmooth.pipeline.records import intact
from diffsmooth.pipeline.results.stored import StoredRun
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.blocks import (
    BLOCK_COLUMNS,
    REBUILD,
    TABLE_KEY,
    StoredBlock,
    block_key,
    list_blocks,
    read_blocks,
    read_derived,
    to_table,
)
from diffsmooth.pipeline.votes.run import SECRET_SEED, Run
from diffsmooth.pipeline.votes.seal import compare, hash_objects, read_seals, record_keys, signature_key, signer

_MOMENT_VALUES = 2_000_000
_MOMENT_LIMIT = 5.0  # standard errors


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the author of a run published, for an auditor to compare with."""

    commitment: str | None = None  # the hash that was published before the first draw
    root: str | None = None  # of a seal
    signers: str | None = None  # file of the SSH keys one of which signed the seal

    def __post_init__(self) -> None:
        if self.signers is not None and not Path(self.signers).is_file():
            raise UserError(f"--signers {self.signers}: no such file; give a file with lines NAME KEYTYPE KEY")


class AttackedImage(NamedTuple):
    """An attacked sample with the image of its upper bound."""

    attack: Attack
    sample: AttackedSample
    number: int  # of the image among those that were tried


class CheckedFiles(NamedTuple):
    """A run whose files were checked: what can be cast again, and what was found."""

    stored: StoredRun
    committed: int  # blocks, also damaged ones
    blocks: list[StoredBlock]
    images: list[AttackedImage]
    noise_moments_largest_z: float
    findings: list[str]
    notes: list[str]


def check_files(run_uri: str, published: Published) -> CheckedFiles:
    """Check the files of a run, each whatever is wrong with the others. Raises: UserError if there is no run."""
    findings: list[str] = []

    def note(error: Exception) -> None:
        findings.append(str(error))

    def collect(check: Callable[[], Iterable[str]]) -> None:
        """Add the findings of a check; a file that it cannot read is one, and the next check goes on."""
        try:
            findings.extend(check())
        except (UserError, RunError) as error:
            note(error)

    stored = StoredRun(open_store(run_uri), on_damage=note)
    try:
        check_known_answers()
    except RunError as error:
        note(error)
    store, run = stored.store, stored.run
    committed = list_blocks(store, run.block, on_damage=note)
    blocks = read_blocks(store, run, committed, on_damage=note)
    votes = to_table(blocks)
    good = {one.block for one in blocks}
    links = broken_links(store, stored.orders)
    collect(lambda: (f"{store.uri}: {broken}" for broken in links))
    collect(lambda: _check_commitment(stored, published.commitment))
    collect(lambda: _check_seal(stored, blocks, published))
    collect(lambda: _check_table(stored, votes))
    collect(lambda: _check_plans(stored, votes))
    for name in stored.orders:
        collect(partial(_check_order, stored, name, votes, good))
    largest, off = _moments(run, blocks)
    findings += off
    images = _read_attacks(stored, findings)
    return CheckedFiles(stored, len(committed), blocks, images, largest, findings, _notes(stored))


def _notes(stored: StoredRun) -> list[str]:
    """What the certificates assume, and no file can show."""
    seed, notes = int(stored.run.seed), []
    if seed < SECRET_SEED:
        notes.append(
            f"the seed {seed} is fixed: the certificates assume that f and the images were chosen without looking at "
            "runs with this seed; confirm a choice with certify --fresh-seed"
        )
    if any(order.previous is None for order in stored.orders.values()):
        notes.append("orders of an earlier version are not chained, so a changed order may go unnoticed")
    return notes


def _check_table(stored: StoredRun, votes: pd.DataFrame) -> list[str]:
    """Blocks of votes.parquet that are missing or changed in the folder."""
    store, findings = stored.store, []
    keys = [*BLOCK_COLUMNS, "class"]
    columns = [*keys, "votes", "label"]
    try:
        table = read_derived(store, TABLE_KEY, columns, 2 * len(votes) + 1000)
        table = _typed_as(table, votes[columns], f"{store.uri}/{TABLE_KEY}")
    except FileNotFoundError:
        return []
    # all rows of its blocks; the run may have other blocks since
    now = votes[columns].merge(table[BLOCK_COLUMNS].drop_duplicates(), on=BLOCK_COLUMNS)
    both = table.merge(now, on=keys, how="outer", suffixes=("", "_now"))
    differs = (both["votes"] != both["votes_now"]) | (both["label"] != both["label_now"])
    changed = both[differs | both.duplicated(keys)]
    for block in changed[BLOCK_COLUMNS].drop_duplicates().itertuples(index=False, name=None):
        key = block_key(Block(*block))
        if key in store.existing([key]):
            findings.append(f"{store.uri}/{key} changed after {TABLE_KEY} was written from it")
        else:
            findings.append(
                f"{store.uri}/{key} was deleted after {TABLE_KEY} was written from it; run certify again to cast its "
                "draws"
            )
    return findings


def _check_order(stored: StoredRun, name: str, votes: pd.DataFrame, good: set[Block]) -> list[str]:
    """Blocks that an order needs and that are missing; certificates that do not follow from the votes."""
    store, order, key = stored.store, stored.orders[name], OrderKeys(name).certificates
    missing = stored.sampler(order, good, name=name).start()
    if missing:
        return [
            f"{store.uri}: order {name} lacks {len(missing)} blocks, the first {block_key(missing[0])}: never "
            "cast, or deleted; run certify again"
        ]
    derived = stored.certificates(votes, name)
    try:
        written = read_derived(store, key, list(derived.columns), 2 * len(derived) + 1000)
    except FileNotFoundError:
        return [f"{store.uri}/{key} is missing; run certify or analyze to derive it from the votes"]
    written = _typed_as(written, derived, f"{store.uri}/{key}")
    if len(written) != len(derived):
        differing = ["its samples"]
    else:
        differing = [column for column in map(str, derived) if not _equal(written[column], derived[column])]
    return [f"{store.uri}/{key} does not follow from the votes ({one}); run certify again" for one in differing[:1]]


def _typed_as(written: pd.DataFrame, derived: pd.DataFrame, place: str) -> pd.DataFrame:
    """A table with the types of another. Raises: RunError if its values do not have them."""
    with intact(place, REBUILD):
        return written.astype(dict(derived.dtypes))


def _equal(written: pd.Series, derived: pd.Series) -> bool:
    """Whether two columns are equal; numbers up to the rounding of another version of SciPy."""
    if derived.dtype.kind == "f":
        return bool(np.allclose(written, derived, rtol=1e-9, atol=1e-9, equal_nan=True))
    return written.equals(derived)


def _check_commitment(stored: StoredRun, commitment: str | None) -> list[str]:
    """Whether the published hash is that of the first order, which commits to run.json too, or of run.json."""
    store, first = stored.store, next(iter(stored.orders), None)
    if commitment is None:
        return []
    known = {stored_hash(store, None)} | ({stored_hash(store, first)} if first else set())
    if commitment.lower() in known:
        return []
    return [
        f"{store.uri}: --commitment {commitment} is neither the sha256 of order {first} nor of run.json; ask its author"
    ]


def _check_seal(stored: StoredRun, blocks: Sequence[StoredBlock], published: Published) -> list[str]:
    """What differs from the seal with the published root; without a root, from the last seal if there is one.

    Without a root, objects that were added after the last seal are no finding: the run may be in progress.
    """
    store, root = stored.store, published.root
    seals = read_seals(store)
    chosen = [one for one in seals.values() if root is None or one.root == root.lower()][-1:]
    if not chosen:
        missing = f"has no seal with the root {root}" if root else "has no seal"
        return [f"{store.uri} {missing}; ask its author"] if root or published.signers else []
    (seal,) = chosen
    blocks_of = {block_key(one.block): one.sha256 for one in blocks}
    others = [key for key in seal.entries if key not in blocks_of]
    found = blocks_of | hash_objects(store, [*others, *record_keys(store)])
    present = {*record_keys(store), *store.keys("votes")} | {key for key in others if key in found}
    lines, findings = compare(seal, found, present=present if root else present & seal.entries.keys()), []
    for line in lines:
        remedy = "; check the run with a later root" if line.endswith("was added") else ""
        findings.append(f"{store.uri}: {line} after seal {seal.name}{remedy}")
    if published.signers is not None:
        key = signature_key(seal.name)
        by = signer(seal, store.read(key), published.signers) if store.exists(key) else None
        if by is None:
            findings.append(f"{store.uri}: seal {seal.name} is signed by none of {published.signers}; ask its author")
    return findings


def _check_plans(stored: StoredRun, votes: pd.DataFrame) -> list[str]:
    """Plans that do not follow from their pilots.

    A plan follows if it is made from the order's own pilots, given what some of the plans that follow had planned
    before; or if it repeats the draws of plans that follow (see `analyze`). Plans that only follow from each other do
    not follow.
    """
    follow: dict[str, Plan] = {}
    while True:
        more = {
            name: plan for name, plan in stored.plans.items() if name in follow or _follows(stored, name, follow, votes)
        }
        if more == follow:
            break
        follow = more
    return [
        f"{stored.store.uri}/{OrderKeys(name).plan} does not follow from the selection votes; restore the run from a "
        "copy"
        for name in stored.plans
        if name not in follow
    ]


def _follows(stored: StoredRun, name: str, follow: Mapping[str, Plan], votes: pd.DataFrame) -> bool:
    """Whether the plan of an order follows from its pilots and the plans that `follow`."""
    run, order, plan = stored.run, stored.orders[name], stored.plans[name]
    repeated = {sample: n for sample, n in _union(follow.values()).items() if sample in set(order.samples)}
    if plan == repeated:
        return True
    pilots = _pilots(votes, order)
    earlier = [one for other, one in follow.items() if stored.orders[other].claim == order.claim]
    given = [{}, *earlier, _union(earlier)]
    return bool(pilots) and any(make_plan(order, run.block, run.sigma, pilots, before) == plan for before in given)


def _union(plans: Iterable[Plan]) -> dict[int, int]:
    """The plans together; the first that has a sample decides."""
    union: dict[int, int] = {}
    for plan in plans:
        union = {**plan, **union}
    return union


def _pilots(votes: pd.DataFrame, order: Order) -> dict[int, Pilot]:
    """The pilots of an order; empty unless all are complete."""
    pilots = {}
    rows = votes[(votes["stage"] == "selection") & (votes["draw_stop"] <= order.n0)]
    for sample, of_sample in rows.groupby("sample"):
        counts = of_sample.groupby("class")["votes"].sum()
        if counts.sum() == order.n0:
            label = int(of_sample["label"].iloc[0])
            pilots[int(str(sample))] = Pilot(label, {int(str(k)): int(n) for k, n in counts.items()})
    return {sample: pilots[sample] for sample in order.samples} if set(order.samples) <= pilots.keys() else {}


def _moments(run: Run, blocks: Sequence[StoredBlock]) -> tuple[float, list[str]]:
    """The largest deviation of mean, variance and kurtosis of the run's own noise, in standard errors; and findings.

    This detects accidents, not attackers: those are detected by casting votes again.
    """
    values, noise = 1000, Noise.of(run.spec.smoothing)
    draws = max(1, _MOMENT_VALUES // values)
    first = blocks[0].block if blocks else Block(0, "estimation", 0, 1)
    out = np.empty((draws, values), np.float32)
    noise.fill(out, first.stage, first.sample, range(draws))
    z = out.astype(np.float64).ravel() * noise.unit
    rounding = noise.unit**2 / 12 if noise.grid else 0.0  # rounding adds the variance of a uniform step
    z /= math.sqrt(noise.sigma**2 + rounding)
    deviations = {
        "mean": z.mean() * math.sqrt(z.size),
        "variance": ((z**2).mean() - 1) * math.sqrt(z.size / 2),
        "fourth moment": ((z**4).mean() - 3) * math.sqrt(z.size / 96),
    }
    findings = [
        f"the {name} of the noise is {deviation:+.1f} standard errors off; install another version of NumPy"
        for name, deviation in deviations.items()
        if abs(deviation) > _MOMENT_LIMIT
    ]
    return max(abs(deviation) for deviation in deviations.values()), findings


def _read_attacks(stored: StoredRun, findings: list[str]) -> list[AttackedImage]:
    """The proven images of all attacks; damaged files are findings."""
    found = []
    for attack_id in attack_ids(stored.store):
        try:
            attack = read_attack(stored.store, attack_id)
        except RunError as error:
            findings.append(str(error))
            continue
        if attack.votes_id != stored.run.votes_id:
            findings.append(f"{stored.store.uri}/{attack.key} belongs to another run ({attack.votes_id})")
            continue
        for index in attacked(stored.store, attack):
            try:
                (sample,) = read_samples(stored.store, stored.run, attack, [index])
            except RunError as error:
                findings.append(str(error))
                continue
            nearest = sample.nearest(attack.alpha)
            if nearest is not None:
                number = next(number for number, rung in enumerate(sample.rungs) if rung is nearest)
                found.append(AttackedImage(attack, sample, number))
    return found
