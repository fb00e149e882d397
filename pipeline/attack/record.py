"""Attacks in storage: what an attack is, the file of one attacked sample, and what its votes prove.

    RUN/attacks/<id>/attack.json               the settings, put if absent; <id> is the attack's name and their hash
    RUN/attacks/<id>/samples/<sample>.parquet  one attacked sample, put if absent, never rewritten
    RUN/attacks/<id>/table.parquet             derived: one row per image that was judged

A file of a sample holds every image x' that was tried, losslessly, with its votes. x' was found with one set of draws.
Fresh selection draws at x' choose a class c other than the label y, and fresh judging draws give n_c and n_y. Then
g(x') != y is proven at level alpha if

    P(Bin(n_c + n_y, 1/2) >= n_c) <= alpha    one-sided binomial test

and the true radius of g at x is at most |x' - x|. The order in which the images of a sample are judged is fixed before
the first judging draw, and judging stops at the first image that is not proven. All proofs of a sample therefore hold
together at level alpha (fixed-sequence testing: Maurer, Hothorn and Lehmacher 1995).
"""

import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, NamedTuple, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.special import bdtrc, ndtri

from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.records import LARGEST, Record, intact, parse_record
from diffsmooth.pipeline.storage.parquet import METADATA_KEY, ROW_BYTES, described, open_table
from diffsmooth.pipeline.storage.remote import in_parallel
from diffsmooth.pipeline.storage.store import Store, read_record
from diffsmooth.pipeline.votes.run import Run

ATTACK_VERSION = 1  # raised by hand whenever a change to the search can change an image that it finds
FOLDER = "attacks"

_MOST_RUNGS = 10_000  # images that are tried for one sample
_MOST_VALUES = 3 * 2048**2  # of an image
_SCHEMA = pa.schema(
    {
        "sample": pa.int32(),
        "label": pa.int32(),
        "eps": pa.float64(),
        "distance": pa.float64(),
        "image": pa.binary(),
        "judged": pa.int32(),
        "selection": pa.list_(pa.int32()),
        "judging": pa.list_(pa.int32()),
    }
)
TABLE_COLUMNS = (
    "sample", "label", "attack", "eps", "distance", "class", "n_y", "n_c", "n", "p_value", "proven", "upper",
)  # fmt: skip
_CONFIDENT = 3.0  # standard errors by which the first judged image is expected to be proven
BEYOND = (1.015, 1.03, 1.06)  # the nearest image found is also tried this much farther away, if its proof should fail
HOPEFUL = 1.0  # standard errors from which the search takes an image for one that will be proven

Counts = NDArray[np.int64]


class Attack(Record):
    """attack.json: everything that determines the images that an attack finds, and what it may claim."""

    attack: str = Field(min_length=1, max_length=200)
    eps: list[Annotated[float, Field(gt=0, le=10_000)]] = Field(min_length=1, max_length=100)  # descending
    # bisections between the last eps that succeeds and the first that fails
    refine: int = Field(default=5, ge=0, le=40)
    steps: int = Field(default=10, ge=1, le=100_000)  # gradient steps per eps
    draws: int = Field(default=32, ge=1, le=100_000)  # EOT draws per gradient
    restarts: int = Field(default=0, ge=0, le=1000)  # further random starts per eps
    n0: int = Field(default=500, ge=1, le=LARGEST)  # selection draws at each x'
    n: int = Field(default=1000, ge=1, le=LARGEST)  # judging draws at each x' that is judged
    alpha: float = Field(default=0.001, gt=0, lt=0.5)
    seed: int = Field(default=0, ge=0)
    votes_id: str = Field(pattern="^[0-9a-f]{32}$")
    version: int = Field(default=ATTACK_VERSION, ge=1)
    # of an attack that is not ours: the hash of its source, or its package's version
    code: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _check_eps(self) -> Self:
        if any(after >= before for before, after in pairwise(self.eps)):
            raise ValueError(f"eps = {self.eps} must decrease")
        return self

    @property
    def id(self) -> str:
        """The name of the attack's folder: 8 hex digits of the hash of its settings after its name."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        name = self.attack.rpartition(":")[2].rpartition(".")[2]
        return f"{name}-{hashlib.blake2b(canonical.encode(), digest_size=4).hexdigest()}"

    @property
    def key(self) -> str:
        return f"{FOLDER}/{self.id}/attack.json"

    @property
    def table_key(self) -> str:
        return f"{FOLDER}/{self.id}/table.parquet"

    def sample_key(self, sample: int) -> str:
        return f"{FOLDER}/{self.id}/samples/{sample}.parquet"

    @property
    def gradients(self) -> int:
        """Gradients of f per sample, at most: one per EOT draw."""
        return (len(self.eps) + self.refine) * (1 + self.restarts) * self.steps * self.draws

    @property
    def votes(self) -> int:
        """Votes per sample, at most: selection draws at each x', and judging draws at each x' that is judged."""
        tried = 1 + (len(self.eps) + self.refine) * (1 + self.restarts) + len(BEYOND)
        return tried * (self.n0 + self.n)

    @property
    def passes(self) -> int:
        """Forward passes of f per sample, at most; a gradient counts as three."""
        return 3 * self.gradients + self.votes


class AttackMetadata(BaseModel):
    """How a sample was attacked. Keys that another version added are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    attack: str  # the id
    votes_id: str
    sample_sha256: str
    shape: tuple[int, int, int] = Field(strict=False)
    attempt: str
    device: str
    versions: dict[str, str]
    batch_size: int = Field(ge=1, le=LARGEST)
    threads: int = Field(ge=1, le=4096)
    seconds: float = Field(ge=0)
    compiled: bool = False


class Rung(NamedTuple):
    """An image that was tried: the clean image, or what the search found within `eps`."""

    eps: float  # 0 for the clean image
    distance: float  # l2, in [0, 1] pixel units, of the image as stored
    image_CHW: NDArray[np.float32]
    selection_K: Counts
    judged: int = -1  # its place in the sequence of judged images; -1: not judged
    judging_K: Counts | None = None


class Proof(NamedTuple):
    """What the judging votes at an image say; `target` comes from the selection votes."""

    target: int
    n_y: int
    n_c: int
    p_value: float


def rival(selection_K: Counts, label: int) -> int:
    """The class with the most selection votes among those that are not the label; the lowest in a tie."""
    others = selection_K.copy()
    others[label] = -1
    return int(others.argmax())


def prove(rung: Rung, label: int) -> Proof | None:
    """The test of a judged image; None if it was not judged."""
    if rung.judging_K is None:
        return None
    target = rival(rung.selection_K, label)
    n_y, n_c = int(rung.judging_K[label]), int(rung.judging_K[target])
    return Proof(target, n_y, n_c, float(bdtrc(n_c - 1.0, n_c + n_y, 0.5)) if n_c else 1.0)


def expected_margin(selection_K: Counts, label: int, n: int, alpha: float) -> float:
    """By how many standard errors n judging draws are expected to pass or to miss the test, from the selection votes.

    Above 0 the test is more likely to be passed than not.
    """
    n0 = int(selection_K.sum())
    n_y, n_c = int(selection_K[label]), int(selection_K[rival(selection_K, label)])
    both = n_y + n_c
    if not both:
        return -math.inf
    judged = both * n / n0
    share = (n_c + 0.5) / (both + 1)
    needed = 0.5 - float(ndtri(alpha)) * 0.5 / math.sqrt(judged)
    return (share - needed) / math.sqrt(share * (1 - share) * (1 / judged + 1 / both))


def judging_order(rungs: Sequence[Rung], label: int, attack: Attack) -> list[int]:
    """Which images are judged, in which order: a function of the selection votes alone.

    The first is the nearest image that is almost certain to be proven, or else the most promising one; nearer ones that
    are more likely to be proven than not follow, by falling distance.
    """
    margins = [expected_margin(rung.selection_K, label, attack.n, attack.alpha) for rung in rungs]
    hopeful = sorted((i for i, margin in enumerate(margins) if margin > 0), key=lambda i: -rungs[i].distance)
    if not hopeful:
        return []
    confident = [place for place, i in enumerate(hopeful) if margins[i] >= _CONFIDENT]
    first = confident[-1] if confident else max(range(len(hopeful)), key=lambda place: margins[hopeful[place]])
    return hopeful[first:]


@dataclass(frozen=True, kw_only=True)
class AttackedSample:
    """An attacked sample as it was read back."""

    sample: int
    label: int
    rungs: list[Rung]
    metadata: AttackMetadata

    def proven(self, alpha: float) -> list[Rung]:
        """The images at which g is proven to be wrong: those before the first judged one that is not."""
        found = []
        for rung in sorted((rung for rung in self.rungs if rung.judged >= 0), key=lambda rung: rung.judged):
            proof = prove(rung, self.label)
            if proof is None or proof.p_value > alpha:
                break
            found.append(rung)
        return found

    def nearest(self, alpha: float) -> Rung | None:
        """The nearest image at which g is proven to be wrong."""
        return min(self.proven(alpha), key=lambda rung: rung.distance, default=None)

    def upper(self, alpha: float) -> float:
        """The proven upper bound of the radius; infinite if none is proven."""
        nearest = self.nearest(alpha)
        return math.inf if nearest is None else nearest.distance

    def within(self, eps: float) -> Rung:
        """The farthest image that was tried within eps: a choice that depends on no vote at that image."""
        return max((rung for rung in self.rungs if rung.distance <= eps), key=lambda rung: rung.distance)


def encode_sample(sample: int, label: int, rungs: Sequence[Rung], metadata: AttackMetadata) -> bytes:
    """An attacked sample as Parquet bytes."""
    rows: dict[str, list[Any]] = {
        "sample": [sample] * len(rungs),
        "label": [label] * len(rungs),
        "eps": [rung.eps for rung in rungs],
        "distance": [rung.distance for rung in rungs],
        "image": [rung.image_CHW.astype("<f4").tobytes() for rung in rungs],
        "judged": [rung.judged for rung in rungs],
        "selection": [rung.selection_K.tolist() for rung in rungs],
        "judging": [[] if rung.judging_K is None else rung.judging_K.tolist() for rung in rungs],
    }
    facts = json.dumps(metadata.model_dump(mode="json"), sort_keys=True)
    table = pa.table(rows, schema=_SCHEMA.with_metadata({METADATA_KEY: facts}))
    buffer = io.BytesIO()
    options = {"use_dictionary": False, "write_statistics": False, "write_page_checksum": True}
    pq.write_table(table, buffer, compression="zstd", **options)
    return buffer.getvalue()


def claim_attack(store: Store, attack: Attack) -> None:
    """Store the settings of an attack unless they are stored. Raises: RunError if others are stored under its id."""
    text = json.dumps(attack.model_dump(mode="json"), indent=2, sort_keys=True)
    if not store.put_if_absent(attack.key, text.encode()) and read_attack(store, attack.id) != attack:
        raise RunError(f"{store.uri}/{attack.key} holds other settings; change --seed, which gives another id")


def read_attack(store: Store, attack_id: str) -> Attack:
    """The settings of an attack. Raises: UserError if there is none, RunError if the file is damaged."""
    key = f"{FOLDER}/{attack_id}/attack.json"
    try:
        found = read_record(store, key, Attack)
    except FileNotFoundError:
        raise UserError(f"{store.uri} has no attack {attack_id}; run diffsmooth attack first") from None
    if found.id != attack_id:
        raise RunError(f"{store.uri}/{key} is damaged: it holds the settings of attack {found.id}")
    return found


def attack_ids(store: Store) -> list[str]:
    """The ids of the attacks on a run."""
    keys = store.keys(FOLDER)
    return sorted(key.split("/")[1] for key in keys if key.endswith("/attack.json") and key.count("/") == 2)


def read_attacks(store: Store) -> dict[str, Attack]:
    """The attacks on a run by id. Raises: RunError as `read_attack`."""
    return {attack_id: read_attack(store, attack_id) for attack_id in attack_ids(store)}


def attacked(store: Store, attack: Attack) -> list[int]:
    """The samples that an attack has finished, from one listing."""
    prefix = f"{FOLDER}/{attack.id}/samples"
    names = (key.removeprefix(f"{prefix}/").removesuffix(".parquet") for key in store.keys(prefix))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit() and int(name) <= LARGEST)


def read_samples(store: Store, run: Run, attack: Attack, samples: Iterable[int] | None = None) -> list[AttackedSample]:
    """The samples that an attack has finished, by default all. Raises: RunError, naming the file, for a damaged one."""
    wanted = attacked(store, attack) if samples is None else sorted(samples)

    def read(sample: int) -> AttackedSample:
        key = attack.sample_key(sample)
        data = store.read(key)
        with intact(f"{store.uri}/{key}", "delete it and run the same attack again"):
            return _decode(data, sample, run, attack)

    return in_parallel(read, wanted, store.readers)


def _decode(data: bytes, sample: int, run: Run, attack: Attack) -> AttackedSample:
    row_bytes = 4 * _MOST_VALUES + 16 * run.num_classes + ROW_BYTES
    file = open_table(data, _MOST_RUNGS, least_rows=1, row_bytes=row_bytes, schema=_SCHEMA)
    metadata = parse_record(AttackMetadata, described(file))
    if (metadata.attack, metadata.votes_id) != (attack.id, run.votes_id):
        raise ValueError(f"it belongs to attack {metadata.attack} on {metadata.votes_id}")
    rows = file.read(use_threads=False).to_pylist()
    label = rows[0]["label"]
    if any((row["sample"], row["label"]) != (sample, label) for row in rows) or not 0 <= label < run.num_classes:
        raise ValueError(f"it holds sample {rows[0]['sample']} with label {label}")
    rungs = [_rung(row, metadata.shape, run.num_classes, attack) for row in rows]
    places = sorted(rung.judged for rung in rungs if rung.judged >= 0)
    if places != list(range(len(places))):
        raise ValueError("its sequence of judged images has gaps")
    return AttackedSample(sample=sample, label=label, rungs=rungs, metadata=metadata)


def _rung(row: Mapping[str, Any], shape: tuple[int, ...], num_classes: int, attack: Attack) -> Rung:
    selection_K, judging_K = (np.array(row[name], dtype=np.int64) for name in ("selection", "judging"))
    for counts_K, draws in ((selection_K, attack.n0), (judging_K, attack.n)):
        if len(counts_K) == 0 and counts_K is judging_K and row["judged"] < 0:
            continue
        if len(counts_K) != num_classes or (counts_K < 0).any() or counts_K.sum() != draws:
            raise ValueError(f"it holds {counts_K.sum()} votes for {draws} draws")
    image_CHW = np.frombuffer(row["image"], dtype="<f4").reshape(shape).astype(np.float32)
    distance = float(row["distance"])
    if not (np.isfinite(image_CHW).all() and image_CHW.min() >= 0 and image_CHW.max() <= 1 and distance >= 0):
        raise ValueError("an image or a distance is out of range")
    return Rung(
        float(row["eps"]), distance, image_CHW, selection_K, int(row["judged"]), judging_K if len(judging_K) else None
    )


def table_of(samples: Sequence[AttackedSample], attack: Attack) -> pd.DataFrame:
    """One row per judged image, and one for each sample without any; columns as in TABLE_COLUMNS.

    `upper` is the proven upper bound of the sample, infinite if none is proven.
    """
    rows = []
    for one in samples:
        proven, upper = one.proven(attack.alpha), one.upper(attack.alpha)
        judged = sorted((rung for rung in one.rungs if rung.judged >= 0), key=lambda rung: rung.judged)
        for rung in judged or [max(one.rungs, key=lambda rung: rung.eps)]:
            proof = prove(rung, one.label)
            votes = (rival(rung.selection_K, one.label), 0, 0, 1.0) if proof is None else proof
            counted = 0 if proof is None else attack.n
            found = any(rung is other for other in proven)
            rows.append(
                (one.sample, one.label, attack.id, rung.eps, rung.distance, *votes[:3], counted, votes[3], found, upper)
            )
    return pd.DataFrame(rows, columns=list(TABLE_COLUMNS))


def write_table(store: Store, attack: Attack, table: pd.DataFrame) -> None:
    """Rebuild RUN/attacks/<id>/table.parquet."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    store.replace(attack.table_key, buffer.getvalue())
