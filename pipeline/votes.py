"""The votes on storage: their schema, one object per block, each draw counted once.

    RUN/run.json                                     what the run is: compared on every resume
    RUN/votes/<stage>/<sample>-<draw_start>.parquet  one block, put if absent, never rewritten
    RUN/votes.parquet                                derived: all blocks in one table

Columns: sample | label | stage | draw_start | draw_stop | class | votes, a row for each class that got votes.
"""

import hashlib
import io
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.block import STAGES, Block, Stage
from pipeline.errors import RunError, UserError
from pipeline.spec import BlockLengths, RunSpec, identity, votes_id
from pipeline.storage.store import Entry, Store, open_store

SCHEMA = pa.schema(
    {
        "sample": pa.int32(),
        "label": pa.int32(),
        "stage": pa.string(),
        "draw_start": pa.int32(),
        "draw_stop": pa.int32(),
        "class": pa.int32(),
        "votes": pa.int32(),
    }
)
RUN_KEY = "run.json"
TABLE_KEY = "votes.parquet"
_METADATA_KEY = b"diffsmooth"
BLOCK_COLUMNS = ["sample", "stage", "draw_start", "draw_stop"]  # that name a block
_BATCH = 64  # blocks that a thread reads at a time
_NAME = re.compile(rf"votes/({'|'.join(STAGES)})/(0|[1-9]\d*)-(0|[1-9]\d*)\.parquet")  # one name for each block


Votes = tuple[Block, int, dict[int, int]]  # a committed block, its label, votes per class: what travels


class StoredBlock(NamedTuple):
    block: Block
    label: int
    classes: NDArray[np.int32]
    votes: NDArray[np.int32]
    metadata: dict[str, Any]


def block_votes(stored: StoredBlock) -> Votes:
    return stored.block, stored.label, dict(zip(stored.classes.tolist(), stored.votes.tolist(), strict=True))


def block_key(block: Block) -> str:
    return f"votes/{block.stage}/{block.sample}-{block.draw_start}.parquet"


def run_of(spec: RunSpec, weights_ids: Mapping[str, str], num_classes: int) -> dict[str, Any]:
    """What run.json holds."""
    return {
        "votes_id": votes_id(spec, weights_ids),
        "num_classes": num_classes,
        "spec": identity(spec, weights_ids),
        "name": spec.name,
    }


def claim_run(store: Store, run: Mapping[str, Any]) -> None:
    """Make the storage the home of this run, or check that it is.

    `run` is what `run_of` gives.

    Raises: UserError that names what differs, where the storage holds another run's votes.
    """
    if store.put_if_absent(RUN_KEY, json.dumps(run, indent=2, sort_keys=True).encode()):
        return
    stored = read_run(store)
    if stored["votes_id"] != run["votes_id"]:
        differing = [
            f"{key} is {before!r} there, {now!r} here" for key, before, now in _differences(stored["spec"], run["spec"])
        ]
        raise UserError(
            f"{store.uri} holds the votes of another run: {'; '.join(differing)}. "
            "Choose another folder with --out, or the spec that the run was made with"
        )


def read_run(store: Store) -> dict[str, Any]:
    """What run.json says. Raises: UserError where there is no run, RunError where run.json is damaged."""
    try:
        return json.loads(store.read(RUN_KEY))
    except FileNotFoundError:
        raise UserError(f"{store.uri}: no run there (no {RUN_KEY}); give the folder that certify wrote") from None
    except ValueError as error:
        raise RunError(f"{store.uri}/{RUN_KEY} is damaged ({error}); restore it from a copy") from error


def run_sha256(store: Store) -> str:
    """The hash of run.json as it is stored: published before the first draw, it commits to everything in it."""
    return hashlib.sha256(store.read(RUN_KEY)).hexdigest()


def block_lengths(run: Mapping[str, Any]) -> BlockLengths:
    return BlockLengths(**run["spec"]["smoothing"]["block"])


def encode_block(block: Block, label: int, counts_K: NDArray[np.int64], metadata: Mapping[str, Any]) -> bytes:
    """A block as Parquet bytes; `counts_K` are its votes per class, `metadata` says how it was made."""
    assert counts_K.sum() == block.draws
    classes = np.flatnonzero(counts_K)
    columns = {
        "sample": block.sample,
        "label": label,
        "stage": block.stage,
        "draw_start": block.draw_start,
        "draw_stop": block.draw_stop,
    }
    table = pa.table(
        {
            **{name: [value] * len(classes) for name, value in columns.items()},
            "class": classes,
            "votes": counts_K[classes],
        },
        schema=SCHEMA.with_metadata({_METADATA_KEY: json.dumps(metadata, sort_keys=True)}),
    )
    buffer = io.BytesIO()
    # for a handful of rows dictionaries and statistics are more bytes and time than the values
    pq.write_table(table, buffer, compression="none", use_dictionary=False, write_statistics=False)
    return buffer.getvalue()


def list_blocks(
    store: Store,
    lengths: BlockLengths,
    entries: Iterable[Entry] | None = None,
    *,
    on_damage: Callable[[RunError], None] | None = None,
) -> set[Block]:
    """The blocks that stand, from one listing (of its own, unless one is given), none of them opened.

    Raises: RunError for an object under votes/ that is no block of this run. With `on_damage`, which is given the
    error, such an object is left out instead.
    """
    blocks = set()
    stages: dict[str, tuple[Stage, int]] = {stage: (stage, lengths.of(stage)) for stage in STAGES}
    for key in store.keys("votes") if entries is None else (entry.key for entry in entries):
        match = _NAME.fullmatch(key)
        stage, length = stages[match[1]] if match else (STAGES[0], 1)
        start = int(match[3]) if match else 0
        if match is None or start % length:
            _refuse(RunError(f"{store.uri}/{key} is no block of this run; move it elsewhere"), on_damage)
            continue
        blocks.add(Block(int(match[2]), stage, start, start + length))
    return blocks


def read_blocks(
    store: Store, blocks: Iterable[Block] | None = None, *, on_damage: Callable[[RunError], None] | None = None
) -> list[StoredBlock]:
    """Read and check blocks (all that stand, unless some are named), in the order of their coordinates.

    Raises: RunError, naming the object, for one that is damaged, of another run, or whose votes do not sum to its
    draws; and for two blocks of a sample that were cast on different images. With `on_damage`, which is given the
    error, such a block is left out instead.
    """
    run = read_run(store)
    wanted = sorted(list_blocks(store, block_lengths(run)) if blocks is None else blocks)
    size = max(1, min(_BATCH, len(wanted) // store.readers))
    shared: dict[str, str] = {}
    fetch = store.reader()

    def read(start: int) -> list[StoredBlock]:
        return [one for block in wanted[start : start + size] if (one := decode(block)) is not None]

    def decode(block: Block) -> StoredBlock | None:
        try:
            return _decode(store.uri, fetch, block, run, shared)
        except RunError as error:
            _refuse(error, on_damage)
            return None

    with ThreadPoolExecutor(max_workers=store.readers) as pool:
        stored = [one for some in pool.map(read, range(0, len(wanted), size)) for one in some]
    images: dict[int, tuple[str, Block]] = {}
    of_one_image = []
    for one in stored:
        sha256, first = images.setdefault(one.block.sample, (one.metadata["sample_sha256"], one.block))
        if one.metadata["sample_sha256"] == sha256:
            of_one_image.append(one)
            continue
        error = RunError(
            f"{store.uri}: sample {one.block.sample} was another image for its {one.block.stage} draws "
            f"{one.block.draw_start} than for its {first.stage} draws {first.draw_start}; "
            "the data set has changed: start a new run"
        )
        _refuse(error, on_damage)
    return of_one_image


def _refuse(error: RunError, on_damage: Callable[[RunError], None] | None) -> None:
    if on_damage is None:
        raise error
    on_damage(error)


def to_table(stored: Sequence[StoredBlock]) -> pd.DataFrame:
    """The blocks' votes as one DataFrame with the columns of SCHEMA."""
    rows = [len(one.classes) for one in stored]

    def repeated(values: list[Any], dtype: Any) -> NDArray[Any]:
        return np.repeat(np.array(values, dtype=dtype), rows)

    return pd.DataFrame(
        {
            "sample": repeated([one.block.sample for one in stored], np.int32),
            "label": repeated([one.label for one in stored], np.int32),
            "stage": repeated([one.block.stage for one in stored], np.str_),
            "draw_start": repeated([one.block.draw_start for one in stored], np.int32),
            "draw_stop": repeated([one.block.draw_stop for one in stored], np.int32),
            "class": np.concatenate([np.empty(0, np.int32), *(one.classes for one in stored)]),
            "votes": np.concatenate([np.empty(0, np.int32), *(one.votes for one in stored)]),
        }
    )


def read_votes(run_uri: str) -> pd.DataFrame:
    """All votes of a run, read from its blocks and checked; see `read_blocks` for what is refused."""
    return to_table(read_blocks(open_store(run_uri)))


def write_table(store: Store, stored: Sequence[StoredBlock]) -> pd.DataFrame:
    """Rebuild RUN/votes.parquet, and return what it holds."""
    votes, buffer = to_table(stored), io.BytesIO()
    table = pa.Table.from_pandas(votes, schema=SCHEMA, preserve_index=False)
    facts = {"votes_id": read_run(store)["votes_id"], "devices": _devices(stored)}
    table = table.replace_schema_metadata({**table.schema.metadata, _METADATA_KEY: json.dumps(facts)})
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    store.replace(TABLE_KEY, buffer.getvalue())
    return votes


def glance(store: Store, standing: set[Block]) -> tuple[pd.DataFrame, dict[str, int]]:
    """The votes of the blocks that stand, and how many of them each device cast; for people, not for claims.

    Opens only the blocks that votes.parquet lacks, so that damage since it was made goes unseen; a table that is
    damaged, of another run, or holds blocks that do not stand is left aside.
    """
    table, devices = _read_table(store, standing)
    covered = {Block(*row) for row in table[BLOCK_COLUMNS].drop_duplicates().itertuples(index=False, name=None)}
    stored = read_blocks(store, standing - covered)
    return pd.concat([table, to_table(stored)], ignore_index=True), dict(Counter(devices) + Counter(_devices(stored)))


def _read_table(store: Store, standing: set[Block]) -> tuple[pd.DataFrame, dict[str, int]]:
    """votes.parquet and its devices where it can be believed, else an empty one."""
    nothing: tuple[pd.DataFrame, dict[str, int]] = to_table([]), {}
    try:
        stored = pq.read_table(pa.BufferReader(store.read(TABLE_KEY)), page_checksum_verification=True)
        facts = json.loads(stored.schema.metadata[_METADATA_KEY])
        votes = stored.select(SCHEMA.names).cast(SCHEMA).to_pandas()
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return nothing
    drawn = votes.groupby(BLOCK_COLUMNS)["votes"].sum()
    blocks = [Block(*block) for block in drawn.index]
    believed = (
        facts["votes_id"] == read_run(store)["votes_id"]
        and standing.issuperset(blocks)
        and [block.draws for block in blocks] == drawn.tolist()
    )
    return (votes, facts["devices"]) if believed else nothing


def _devices(stored: Iterable[StoredBlock]) -> dict[str, int]:
    """How many of the blocks each device cast."""
    return dict(Counter(one.metadata["device"] for one in stored))


def _decode(
    uri: str, fetch: Callable[[str], bytes], block: Block, run: Mapping[str, Any], shared: dict[str, str]
) -> StoredBlock:
    """Read and check a block; `shared` holds the texts that many blocks' metadata have in common, once."""
    key = block_key(block)

    def refuse(reason: str) -> RunError:
        return RunError(f"{uri}/{key} {reason}; delete it and run the same command: its draws will be cast again")

    try:
        # not pq.read_table, which takes four times as long: it sets up a data set for each file
        table = pq.ParquetFile(pa.BufferReader(fetch(key))).read(use_threads=False)
        metadata = json.loads(
            table.schema.metadata[_METADATA_KEY],
            object_pairs_hook=lambda pairs: {sys.intern(name): _once(value, shared) for name, value in pairs},
        )
        columns = {name: table.column(name).to_numpy() for name in SCHEMA.names}
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise refuse(f"is damaged or missing ({str(error).splitlines()[0]})") from error
    if metadata["votes_id"] != run["votes_id"]:
        raise refuse(f"belongs to another run (votes_id {metadata['votes_id']}, not {run['votes_id']})")
    classes, votes = columns["class"], columns["votes"]
    for name, value in zip(BLOCK_COLUMNS, block, strict=True):
        if (columns[name] != value).any():
            raise refuse(f"says {name} = {columns[name][0]} inside")
    if votes.sum() != block.draws or (votes < 1).any():
        raise refuse(f"holds {votes.sum()} votes for {block.draws} draws")
    if len(set(classes)) != len(classes) or (classes < 0).any() or (classes >= run["num_classes"]).any():
        raise refuse(f"names a class twice or beyond the {run['num_classes']} classes")
    # copies: a view would keep all of the file's buffers
    return StoredBlock(block, int(columns["label"][0]), classes.copy(), votes.copy(), metadata)


def _once(value: Any, shared: dict[str, str]) -> Any:
    return shared.setdefault(value, value) if isinstance(value, str) else value


def _differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """The leaves in which two identities differ, as (dotted key, before, now)."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            leaf
            for key in keys
            for leaf in _differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [(path, before, now)]
