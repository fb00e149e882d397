"""Checkpoints: the whole state of a training after a step, as one object that appears complete or not at all.

OUT/training.json                 the spec and the images: put-if-absent, compared on every resume
OUT/checkpoints/<step>.safetensors   network, average, optimizer and metrics; put-if-absent, never changed
OUT/metrics.csv, loss.png         derived from the newest checkpoint
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.locations import shown
from diffsmooth.pipeline.records import Record, parse_record, shortened
from diffsmooth.pipeline.storage.store import Store
from diffsmooth.pipeline.training.settings import TrainingSpec

_FOLDER, _SUFFIX, _RECORD = "checkpoints", ".safetensors", "record"

Row = dict[str, float]  # the metrics after one step, by name


class Identity(Record):
    """training.json: what a resumed training must agree with."""

    spec: TrainingSpec
    data_id: str  # hash of the images that are trained on
    validation_id: str
    start: dict[str, str]  # hashes of the files of weights that the training starts from or uses


class History(Record):
    """What a checkpoint holds besides tensors."""

    step: int = Field(ge=0)
    rows: list[Row]
    loss_sum: float  # over the steps since the last row
    loss_count: int = Field(ge=0)
    seconds: float = Field(ge=0)  # of work, over all starts
    training: str = ""  # what `claim` returned; "" in checkpoints of early versions


class Checkpoint(NamedTuple):
    history: History
    tensors: dict[str, Tensor]


def claim(store: Store, identity: Identity) -> str:
    """Store the identity of a new training, or compare it with the stored one; return the hash of what is stored.

    Raises: UserError if the storage holds another training, naming the first difference.
    """
    text = identity.model_dump_json(indent=2).encode()
    if store.put_if_absent("training.json", text):
        return hashlib.sha256(text).hexdigest()
    try:
        text = store.read("training.json", 10_000_000)
        found = parse_record(Identity, text)
    except ValueError as error:
        raise RunError(f"{shown(store.uri)}/training.json: damaged ({error}); use another --out") from None
    if found != identity:
        key, before, now = _difference("", found.model_dump(mode="json"), identity.model_dump(mode="json"))
        raise UserError(
            f"{shown(store.uri)} holds another training: {key} is {shortened(before)} there and {shortened(now)} here; "
            "use another --out, or the settings of that training"
        )
    return hashlib.sha256(text).hexdigest()


def _difference(key: str, before: object, now: object) -> tuple[str, object, object]:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                return _difference(f"{key}.{name}".lstrip("."), before.get(name), now.get(name))
    return key.removeprefix("spec."), before, now


def newest_step(store: Store) -> int:
    """Return the step of the newest checkpoint; 0 if there is none."""
    names = (key.rpartition("/")[2].removesuffix(_SUFFIX) for key in store.keys(_FOLDER) if key.endswith(_SUFFIX))
    return max((int(name) for name in names if name.isdigit()), default=0)


def key_of(step: int) -> str:
    return f"{_FOLDER}/{step:09d}{_SUFFIX}"


def write(store: Store, checkpoint: Checkpoint) -> None:
    """Store a checkpoint unless an equal one exists. Raises: RunError, for example for a full disk."""
    record = np.frombuffer(checkpoint.history.model_dump_json().encode(), dtype=np.uint8).copy()
    tensors = {name: one.contiguous() for name, one in checkpoint.tensors.items()}
    store.put_if_absent(key_of(checkpoint.history.step), save({**tensors, _RECORD: torch.from_numpy(record)}))


def read(store: Store, step: int, training: str | None = None) -> Checkpoint:
    """Return the checkpoint after a step. Raises: RunError for a damaged one, and for one of another `training`.

    A process of an earlier training that was deleted while it ran may have stored the latter.
    """
    place = f"{shown(store.uri)}/{key_of(step)}"
    try:
        tensors = load(store.read(key_of(step)))
        history = parse_record(History, tensors.pop(_RECORD).numpy().tobytes())
    except (ValueError, KeyError, SafetensorError) as error:
        raise RunError(
            f"{place}: damaged checkpoint ({first_line(error)}); delete it to resume from the one before it"
        ) from error
    if training is not None and history.training not in ("", training):
        raise RunError(f"{place}: belongs to another training; use another --out")
    return Checkpoint(history, tensors)
