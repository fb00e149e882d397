"""Run: what a folder of votes is. run.json is written once, validated at each reading, and compared on every resume."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.records import Record, shortened
from diffsmooth.pipeline.spec import F_VERSION, MOST_CLASSES, BlockLengths, Identity, RunSpec, identity
from diffsmooth.pipeline.storage.store import Store, read_record

RUN_KEY = "run.json"
SECRET_SEED = 2**64  # a smaller seed can be guessed, or was chosen by hand


class Run(Record):
    """run.json: the identity of all votes below it."""

    votes_id: str = Field(pattern="^[0-9a-f]{32}$")
    num_classes: int = Field(ge=2, le=MOST_CLASSES)
    spec: Identity
    name: str = Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    @model_validator(mode="after")
    def _check_identity(self) -> Self:
        if self.seed == "random":
            raise ValueError("spec.smoothing.seed = 'random' must be a number")
        if self.spec.f_version == F_VERSION and self.spec.votes_id != self.votes_id:
            raise ValueError(f"votes_id = {self.votes_id} is not that of the spec beside it, {self.spec.votes_id}")
        return self

    @property
    def sigma(self) -> float:
        return self.spec.smoothing.sigma

    @property
    def seed(self) -> int | str:
        return self.spec.smoothing.seed

    @property
    def block(self) -> BlockLengths:
        return self.spec.smoothing.block

    def seeded(self, spec: RunSpec) -> RunSpec:
        """The spec, with the run's seed in place of "random"."""
        return spec.with_seed(int(self.seed)) if spec.smoothing.seed == "random" else spec


def describe_run(spec: RunSpec, weights_ids: Mapping[str, str], num_classes: int) -> Run:
    """The run that a spec makes; `weights_ids` are those of `smoothing.weights_ids`, the seed is a number."""
    named = identity(spec, weights_ids)
    return Run(votes_id=named.votes_id, num_classes=num_classes, spec=named, name=spec.name)


def claim_run(store: Store, run: Run) -> None:
    """Make the storage the home of this run, or check that it already is.

    Nothing is written to a storage before: it is tested first. Raises: UserError that names the differing keys if the
    storage holds another run; as `Store.prepare`.
    """
    store.prepare()
    text = json.dumps(run.model_dump(mode="json"), indent=2, sort_keys=True)
    if store.put_if_absent(RUN_KEY, text.encode()):
        return
    stored = read_run(store)
    if stored.votes_id != run.votes_id:
        pairs = _differences(stored.spec.model_dump(mode="json"), run.spec.model_dump(mode="json"))
        differing = [f"{key} is {shortened(before)} there and {shortened(now)} here" for key, before, now in pairs]
        raise UserError(
            f"{store.uri} holds another run: {'; '.join(differing)}; use another folder with --out, or the spec of "
            "that run"
        )


def claim_seeded_run(
    store: Store, spec: RunSpec, weights_ids: Mapping[str, str], num_classes: int
) -> tuple[RunSpec, Run]:
    """Claim the storage for a spec; returns the spec with a number as its seed, and the run.

    A "random" seed is drawn once in the life of a run, and read from run.json ever after.
    Raises: UserError as `claim_run`.
    """
    while True:
        drawn = spec.smoothing.seed == "random" and RUN_KEY not in store.existing([RUN_KEY])
        seeded = spec.with_seed(secrets.randbits(128)) if drawn else spec
        if not drawn and spec.smoothing.seed == "random":
            seeded = read_run(store).seeded(spec)
        run = describe_run(seeded, weights_ids, num_classes)
        try:
            claim_run(store, run)
            return seeded, run
        except UserError:
            if not drawn:
                raise
            read_run(store)  # another driver claimed the storage first, with a seed of its own


def read_run(store: Store) -> Run:
    """Read run.json. Raises: UserError if there is no run, RunError if run.json is damaged."""
    try:
        return read_record(store, RUN_KEY, Run)
    except FileNotFoundError:
        raise UserError(f"{store.uri}: no run here (no {RUN_KEY}); give the folder that certify wrote") from None


def run_sha256(store: Store) -> str:
    """The hash of run.json as stored: published before the first draw, it commits to everything in it."""
    return hashlib.sha256(store.read(RUN_KEY)).hexdigest()


def _differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two identities differ, as (dotted key, before, now)."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            leaf
            for key in sorted(before.keys() | now.keys())
            for leaf in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [(path, before, now)]
