"""Votes in storage: the file of one block, reading with every draw counted once, and the derived table.

    RUN/votes/<stage>/<sample>-<draw_start>.parquet  one block, put if absent, never rewritten
    RUN/votes.parquet                                derived: the votes of all blocks in one table
    RUN/blocks.parquet                               derived: a row per block, with the sha256 of its file

Columns: sample | label | stage | draw_start | draw_stop | class | votes, with a row for each class that got votes.
"""

import hashlib
import io
import json
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from diffsmooth.pipeline.block import STAGES, Block, Stage
from diffsmooth.pipeline.errors import RunError
from diffsmooth.pipeline.records import LARGEST, Record, intact, parse_record
from diffsmooth.pipeline.spec import BlockLengths
from diffsmooth.pipeline.storage.parquet import METADATA_KEY, open_table
from diffsmooth.pipeline.storage.remote import in_parallel
from diffsmooth.pipeline.storage.store import Entry, Store, open_store
from diffsmooth.pipeline.votes.run import Run, read_run

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
TABLE_KEY = "votes.parquet"
BLOCKS_KEY = "blocks.parquet"
_BLOCKS_SCHEMA = pa.schema(
    {
        "sample": pa.int32(),
        "stage": pa.string(),
        "draw_start": pa.int32(),
        "draw_stop": pa.int32(),
        "label": pa.int32(),
        "device": pa.string(),
        "sample_sha256": pa.string(),
        "sha256": pa.string(),  # of the block's file
    }
)
BLOCK_COLUMNS = ["sample", "stage", "draw_start", "draw_stop"]  # the fields of a Block
REBUILD = "run certify again to rebuild it"  # the remedy for a derived file
_CAST_AGAIN = "run the same command to cast its draws again"
_BATCH = 64  # blocks that a thread reads at a time
_NAME = re.compile(rf"votes/({'|'.join(STAGES)})/(0|[1-9]\d{{0,9}})-(0|[1-9]\d{{0,9}})\.parquet")  # one name per block


class Votes(NamedTuple):
    """A committed block as it travels between worker, driver, and sampler."""

    block: Block
    label: int
    counts: dict[int, int]  # class -> votes


class BlockMetadata(BaseModel):
    """How a block was cast. Keys that another version added are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    votes_id: str
    sample_sha256: str  # of the image's stored bytes and its label
    attempt: str
    device: str
    versions: dict[str, str]  # of the packages that can change a vote
    batch_size: int = Field(ge=1, le=LARGEST)
    threads: int = Field(ge=1, le=4096)
    precision: str
    seconds: float = Field(ge=0)
    tf32: bool = False
    cudnn_benchmark: bool = False
    compiled: bool = False
    commits: dict[str, str] = {}  # hf:// location of weights or data -> the commit that was read


class StoredBlock(NamedTuple):
    """A block as it was read back."""

    block: Block
    label: int
    classes: NDArray[np.int32]
    counts: NDArray[np.int32]  # votes for each of `classes`
    metadata: BlockMetadata
    sha256: str = ""  # of the object

    def votes(self) -> Votes:
        return Votes(self.block, self.label, dict(zip(self.classes.tolist(), self.counts.tolist(), strict=True)))


class BlockImage(NamedTuple):
    """On which image a block was cast."""

    block: Block
    label: int
    sample_sha256: str


class TableFacts(Record):
    """The metadata of votes.parquet."""

    votes_id: str
    devices: dict[str, int]  # device -> blocks that it cast


def block_key(block: Block) -> str:
    return f"votes/{block.stage}/{block.sample}-{block.draw_start}.parquet"


def sample_of_key(key: str) -> int | None:
    """The sample whose block has this key; None for a key that no block has."""
    match = _NAME.fullmatch(key)
    return int(match[2]) if match and int(match[2]) <= LARGEST else None


def encode_block(block: Block, label: int, counts_K: NDArray[np.int64], metadata: BlockMetadata) -> bytes:
    """A block as Parquet bytes; `counts_K` are its votes per class."""
    assert counts_K.sum() == block.draws
    classes = np.flatnonzero(counts_K)
    columns = {
        "sample": block.sample,
        "label": label,
        "stage": block.stage,
        "draw_start": block.draw_start,
        "draw_stop": block.draw_stop,
    }
    described = json.dumps(metadata.model_dump(mode="json"), sort_keys=True)
    table = pa.table(
        {
            **{name: [value] * len(classes) for name, value in columns.items()},
            "class": classes,
            "votes": counts_K[classes],
        },
        schema=SCHEMA.with_metadata({METADATA_KEY: described}),
    )
    buffer = io.BytesIO()
    # for a few rows, dictionaries and statistics cost more bytes and time than the values
    pq.write_table(
        table, buffer, compression="none", use_dictionary=False, write_statistics=False, write_page_checksum=True
    )
    return buffer.getvalue()


OnDamage = Callable[[RunError], None]


def list_blocks(
    store: Store,
    lengths: BlockLengths,
    entries: Iterable[Entry] | None = None,
    *,
    on_damage: OnDamage | None = None,
) -> set[Block]:
    """The committed blocks, from one listing (a new one, unless `entries` is given); no block is opened.

    Raises: RunError for an object under votes/ that is not a block of this run. With `on_damage`, which gets the error,
    such an object is skipped instead.
    """
    blocks = set()
    stages: dict[str, tuple[Stage, int]] = {stage: (stage, lengths.of(stage)) for stage in STAGES}
    for key in store.keys("votes") if entries is None else (entry.key for entry in entries):
        match = _NAME.fullmatch(key)
        stage, length = stages[match[1]] if match else (STAGES[0], 1)
        sample, start = (int(match[2]), int(match[3])) if match else (0, 0)
        if match is None or start % length or sample > LARGEST or start + length > LARGEST:
            _refuse(RunError(f"{store.uri}/{key} is not a block of this run; move it elsewhere"), on_damage)
            continue
        blocks.add(Block(sample, stage, start, start + length))
    return blocks


def read_blocks(
    store: Store,
    run: Run,
    blocks: Iterable[Block] | None = None,
    *,
    on_damage: OnDamage | None = None,
    images: Iterable["BlockImage"] = (),
) -> list[StoredBlock]:
    """Read and check blocks (all committed ones by default), in the order of their coordinates.

    `images` are those of blocks that were read before.

    Raises: RunError, naming the object, if a block is damaged, belongs to another run, or if its votes do not sum to
    its draws; and if two blocks of a sample were cast on different images. With `on_damage`, which gets the error, such
    a block is skipped instead.
    """
    wanted = sorted(list_blocks(store, run.block) if blocks is None else blocks)
    size = max(1, min(_BATCH, len(wanted) // store.readers))
    decoder = _Decoder(store, run)

    def read(start: int) -> list[StoredBlock]:
        return [one for block in wanted[start : start + size] if (one := decode(block)) is not None]

    def decode(block: Block) -> StoredBlock | None:
        try:
            return decoder.read(block)
        except RunError as error:
            _refuse(error, on_damage)
            return None

    batches = in_parallel(read, range(0, len(wanted), size), store.readers)
    stored = [one for some in batches for one in some]
    return _of_one_image(store, stored, images, on_damage)


def _of_one_image(
    store: Store, stored: Sequence[StoredBlock], images: Iterable["BlockImage"], on_damage: OnDamage | None
) -> list[StoredBlock]:
    """The blocks whose sample had the same image in all of them, and in those of `images`."""
    first_of: dict[int, BlockImage] = {}
    for image in images:
        first_of.setdefault(image.block.sample, image)
    kept = []
    for one in stored:
        image = BlockImage(one.block, one.label, one.metadata.sample_sha256)
        first = first_of.setdefault(one.block.sample, image)
        if (image.sample_sha256, image.label) == (first.sample_sha256, first.label):
            kept.append(one)
            continue
        error = RunError(
            f"{store.uri}: the image of sample {one.block.sample} differs between {one.block.stage} draw "
            f"{one.block.draw_start} and {first.block.stage} draw {first.block.draw_start}; the data set has "
            "changed, so start a new run"
        )
        _refuse(error, on_damage)
    return kept


def _refuse(error: RunError, on_damage: OnDamage | None) -> None:
    if on_damage is None:
        raise error
    on_damage(error)


class _Decoder:
    """Reads and checks blocks. Strings that the metadata of many blocks share are kept once."""

    def __init__(self, store: Store, run: Run) -> None:
        self._uri, self._run, self._fetch = store.uri, run, store.read
        self._shared: dict[str, str] = {}

    def read(self, block: Block) -> StoredBlock:
        key = block_key(block)
        try:
            data = self._fetch(key)
        except FileNotFoundError:
            raise RunError(f"{self._uri}/{key} is missing; {_CAST_AGAIN}") from None
        with intact(f"{self._uri}/{key}", f"delete it and {_CAST_AGAIN}"):
            table = self._read_table(data)
            columns = {name: table.column(name).to_numpy() for name in SCHEMA.names}
            metadata = self._parse((table.schema.metadata or {}).get(METADATA_KEY, b"{}"))
        if metadata.votes_id != self._run.votes_id:
            raise RunError(
                f"{self._uri}/{key} belongs to another run (votes_id {metadata.votes_id[:32]}, not "
                f"{self._run.votes_id}); move it elsewhere and {_CAST_AGAIN}"
            )
        classes, counts, labels = columns["class"], columns["votes"], columns["label"]
        for name, value in zip(BLOCK_COLUMNS, block, strict=True):
            if (columns[name] != value).any():
                found = columns[name][0]
                raise self._refusal(
                    key, f"is damaged: its name and its contents differ in {name} ({value} and {found})"
                )
        if counts.sum() != block.draws or (counts < 1).any():
            raise self._refusal(key, f"holds {counts.sum()} votes for {block.draws} draws")
        num_classes = self._run.num_classes
        if len(set(classes)) != len(classes) or (classes < 0).any() or (classes >= num_classes).any():
            raise self._refusal(key, f"lists a class twice, or a class outside 0 to {num_classes - 1}")
        if (labels != labels[0]).any() or not -1 <= labels[0] < num_classes:
            listed = ", ".join(map(str, sorted(set(labels))[:3]))
            raise self._refusal(key, f"has the labels {listed}; a block has one label, from -1 to {num_classes - 1}")
        # copies: a view would keep all of the file's buffers
        sha256 = hashlib.sha256(data).hexdigest()
        return StoredBlock(block, int(labels[0]), classes.copy(), counts.copy(), metadata, sha256)

    def _read_table(self, data: bytes) -> pa.Table:
        table = open_table(data, self._run.num_classes, least_rows=1, schema=SCHEMA).read(use_threads=False)
        if any(column.null_count for column in table.columns):
            raise ValueError("empty cells")
        return table

    def _parse(self, text: bytes) -> BlockMetadata:
        raw = json.loads(
            text, object_pairs_hook=lambda pairs: {sys.intern(name): self._once(value) for name, value in pairs}
        )
        return BlockMetadata.model_validate(raw)

    def _once(self, value: Any) -> Any:
        return self._shared.setdefault(value, value) if isinstance(value, str) else value

    def _refusal(self, key: str, reason: str) -> RunError:
        return RunError(f"{self._uri}/{key} {reason}; delete it and {_CAST_AGAIN}")


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
            "votes": np.concatenate([np.empty(0, np.int32), *(one.counts for one in stored)]),
        }
    )


def read_derived(store: Store, key: str, columns: Sequence[str], most_rows: int) -> pd.DataFrame:
    """Some columns of a derived table, which has at most `most_rows` rows.

    Raises: FileNotFoundError (a UserError as well), RunError for a file that is damaged or declares more.
    """
    data = store.read(key)
    with intact(f"{store.uri}/{key}", REBUILD):
        return open_table(data, most_rows).read(columns=list(columns)).to_pandas()[list(columns)]


def read_votes(run_uri: str) -> pd.DataFrame:
    """All votes of a run, read from its blocks and checked; `read_blocks` says what is refused."""
    store = open_store(run_uri)
    return to_table(read_blocks(store, read_run(store)))


class Tables(NamedTuple):
    """The derived tables of a run."""

    votes: pd.DataFrame  # with the columns of SCHEMA
    blocks: pd.DataFrame  # a row per block

    def sha256(self) -> dict[str, str]:
        """The sha256 of the blocks' files by their keys."""
        return dict(zip(map(block_key, _blocks_of(self.blocks)), self.blocks["sha256"], strict=True))


def write_tables(
    store: Store,
    run: Run,
    unchanged: Mapping[str, str] = types.MappingProxyType({}),
    entries: Iterable[Entry] | None = None,
) -> Tables:
    """Write RUN/votes.parquet and RUN/blocks.parquet for all committed blocks, and return their contents.

    `unchanged` are the sha256 of blocks that a seal of the run lists and that are as they were then, by key. Those
    blocks are not read if the tables as they are hold them with the same sha256. All others are read and checked.
    `entries` is a listing of votes/, a new one by default. Raises: RunError, as `read_blocks`.
    """
    committed = list_blocks(store, run.block, entries)
    kept = _unchanged_rows(store, run, committed, unchanged)
    known = _blocks_of(kept.blocks)
    images = map(BlockImage, known, kept.blocks["label"], kept.blocks["sample_sha256"])
    stored = read_blocks(store, run, committed.difference(known), images=images)
    tables = kept
    if stored:
        rows = [(*one.block, one.label, one.metadata.device, one.metadata.sample_sha256, one.sha256) for one in stored]
        new = Tables(to_table(stored), pd.DataFrame(rows, columns=_BLOCKS_SCHEMA.names))
        votes, blocks = (pd.concat([a, b], ignore_index=True) if len(a) else b for a, b in zip(kept, new, strict=True))
        tables = Tables(
            votes.sort_values([*BLOCK_COLUMNS, "class"], ignore_index=True),
            blocks.sort_values(BLOCK_COLUMNS, ignore_index=True),
        )
    facts = TableFacts(votes_id=run.votes_id, devices=dict(Counter(tables.blocks["device"])))
    store.replace(TABLE_KEY, _encoded(tables.votes, SCHEMA, facts))
    store.replace(BLOCKS_KEY, _encoded(tables.blocks, _BLOCKS_SCHEMA, facts))
    return tables


def _unchanged_rows(store: Store, run: Run, committed: set[Block], unchanged: Mapping[str, str]) -> Tables:
    """What the derived tables say about the blocks that did not change; empty if the two disagree, or are damaged."""
    nothing = Tables(to_table([]), pd.DataFrame(columns=_BLOCKS_SCHEMA.names))
    votes, _ = _read_table(store, run, committed) if unchanged else (nothing.votes, {})
    if votes.empty:
        return nothing
    try:
        table = open_table(store.read(BLOCKS_KEY), len(committed)).read()
        blocks = table.select(_BLOCKS_SCHEMA.names).cast(_BLOCKS_SCHEMA).to_pandas()
    except Exception:  # it is derived: the blocks are read instead
        return nothing
    known = _blocks_of(blocks)
    if len(set(known)) != len(known) or set(known) != set(_blocks_of(votes[BLOCK_COLUMNS].drop_duplicates())):
        return nothing
    same = np.array([unchanged.get(block_key(one)) == row for one, row in zip(known, blocks["sha256"], strict=True)])
    blocks = blocks[same]
    return Tables(votes.merge(blocks[BLOCK_COLUMNS], on=BLOCK_COLUMNS), blocks)


def _blocks_of(table: pd.DataFrame) -> list[Block]:
    return [Block(*row) for row in table[BLOCK_COLUMNS].itertuples(index=False, name=None)]


def _encoded(rows: pd.DataFrame, schema: pa.Schema, facts: TableFacts) -> bytes:
    table, buffer = pa.Table.from_pandas(rows, schema=schema, preserve_index=False), io.BytesIO()
    table = table.replace_schema_metadata({**table.schema.metadata, METADATA_KEY: facts.model_dump_json()})
    pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
    return buffer.getvalue()


def glance(store: Store, run: Run, committed: set[Block]) -> tuple[pd.DataFrame, dict[str, int]]:
    """The votes of the committed blocks, and how many blocks each device cast; for people, not for claims.

    Only blocks that votes.parquet lacks are opened, so damage since that table was written is not noticed. A table that
    is damaged, belongs to another run, or holds blocks that are not committed is ignored.
    """
    table, devices = _read_table(store, run, committed)
    stored = read_blocks(store, run, committed.difference(_blocks_of(table[BLOCK_COLUMNS].drop_duplicates())))
    return pd.concat([table, to_table(stored)], ignore_index=True), dict(Counter(devices) + Counter(_devices(stored)))


def _read_table(store: Store, run: Run, committed: set[Block]) -> tuple[pd.DataFrame, dict[str, int]]:
    """votes.parquet and its devices if they agree with the run and its blocks, else an empty table."""
    nothing: tuple[pd.DataFrame, dict[str, int]] = to_table([]), {}
    try:
        stored = open_table(store.read(TABLE_KEY), len(committed) * run.num_classes).read()
        facts = parse_record(TableFacts, stored.schema.metadata[METADATA_KEY])
        votes = stored.select(SCHEMA.names).cast(SCHEMA).to_pandas()
        drawn = votes.groupby(BLOCK_COLUMNS)["votes"].sum()
        blocks = [Block(*block) for block in drawn.index]
    except Exception:  # it is derived: the blocks are read instead
        return nothing
    consistent = (
        facts.votes_id == run.votes_id
        and committed.issuperset(blocks)
        and [block.draws for block in blocks] == drawn.tolist()
        and bool(votes["class"].between(0, run.num_classes - 1).all())
    )
    return (votes, facts.devices) if consistent else nothing


def _devices(stored: Iterable[StoredBlock]) -> dict[str, int]:
    """Device -> number of the blocks that it cast."""
    return dict(Counter(one.metadata.device for one in stored))
