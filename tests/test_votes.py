"""Votes: what is written is read back, and everything that is wrong with a block is found and named."""

import hashlib
import itertools
from contextlib import suppress
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.spec import ClassifierIdentity, DataIdentity, Identity, SmoothingIdentity
from diffsmooth.pipeline.storage.store import FolderStore, MemoryStore
from diffsmooth.pipeline.votes.blocks import (
    block_key,
    encode_block,
    glance,
    list_blocks,
    read_blocks,
    read_votes,
    write_tables,
)
from diffsmooth.pipeline.votes.run import Run, claim_run
from tests.models import METADATA


def run_of(**smoothing) -> Run:
    settings = {"sigma": 0.5, "block": {"selection": 10, "estimation": 20}, **smoothing}
    spec = Identity(
        data=DataIdentity(name="mnist"),
        classifier=ClassifierIdentity(arch="mnist_cnn"),
        smoothing=SmoothingIdentity(**settings),
        f_version=3,
        weights={},
    )
    return Run(votes_id=spec.votes_id, num_classes=3, spec=spec, name="run")


RUN = run_of()
LENGTHS = RUN.block
FIRST = Block(4, "estimation", 20, 40)


def put(store, block, counts, *, votes_id=RUN.votes_id, sha256="s", label=2, key=None):
    changes = {"votes_id": votes_id, "sample_sha256": sha256, "device": "x"}
    data = encode_block(block, label, np.array(counts), METADATA.model_copy(update=changes))
    store.put_if_absent(key or block_key(block), data)


@pytest.fixture
def store(tmp_path):
    store = FolderStore(str(tmp_path))
    claim_run(store, RUN)
    put(store, FIRST, [0, 15, 5])
    put(store, Block(4, "selection", 0, 10), [10, 0, 0])
    return store


def test_round_trip_and_schema(store):
    votes = read_votes(store.uri)
    assert votes.columns.tolist() == ["sample", "label", "stage", "draw_start", "draw_stop", "class", "votes"]
    estimation = votes[votes.stage == "estimation"]
    assert estimation.groupby(["sample", "class"]).votes.sum().to_dict() == {(4, 1): 15, (4, 2): 5}
    assert set(estimation.label) == {2}
    pd.testing.assert_frame_equal(write_tables(store, RUN).votes, votes)
    derived = pq.read_table(f"{store.uri}/votes.parquet")
    assert [str(field.type) for field in derived.schema] == [
        "int32",
        "int32",
        "string",
        "int32",
        "int32",
        "int32",
        "int32",
    ]
    folder = pd.read_parquet(f"{store.uri}/votes")
    assert sorted(folder.votes) == sorted(votes.votes)


def test_listing_opens_no_block(store):
    assert list_blocks(store, LENGTHS) == {FIRST, Block(4, "selection", 0, 10)}


@pytest.mark.parametrize(
    "name", ["votes/estimation/4-21.parquet", "votes/other/4-20.parquet", "votes/estimation/x.parquet"]
)
def test_foreign_names_are_refused(store, name):
    store.put_if_absent(name, b"")
    with pytest.raises(RunError, match=name):
        list_blocks(store, LENGTHS)


def test_truncated_file_is_named_with_its_remedy(store, tmp_path):
    path = tmp_path / block_key(FIRST)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(RunError, match=r"4-20\.parquet is damaged.*delete it and run the same command to cast"):
        read_blocks(store, RUN)


def test_no_flipped_bit_changes_a_vote_or_a_label():
    """In particular not the class of a unanimous block, whose sum stays right."""
    block, store = Block(9, "estimation", 0, 20), MemoryStore()
    put(store, block, [0, 0, 20])
    data, (whole,) = store.read(block_key(block)), read_blocks(store, RUN, [block])
    for place, bit in itertools.product(range(len(data)), (0, 7)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        store.replace(block_key(block), bytes(damaged))
        with suppress(RunError):  # the metadata have no checksum, and may read differently
            assert read_blocks(store, RUN, [block])[0].votes() == whole.votes()


def test_foreign_and_false_blocks_are_refused(store):
    other = Block(5, "estimation", 0, 20)
    put(store, other, [20, 0, 0], votes_id="b" * 32)
    with pytest.raises(RunError, match="belongs to another run"):
        read_blocks(store, RUN)


@pytest.mark.parametrize(
    ("counts", "key", "reason"),
    [
        ([20, 0, 0], "votes/estimation/6-0.parquet", "its name and its contents differ in sample"),
        ([19, 0, 0, 1], None, "a class outside 0 to 2"),
    ],
)
def test_swapped_and_impossible_blocks_are_refused(store, counts, key, reason):
    put(store, Block(5, "estimation", 0, 20), counts, key=key)
    with pytest.raises(RunError, match=reason):
        read_blocks(store, RUN)


def test_votes_that_do_not_sum_are_refused(store, tmp_path):
    path = tmp_path / block_key(FIRST)
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 1), path)
    with pytest.raises(RunError, match="holds 15 votes for 20 draws"):
        read_blocks(store, RUN)


def test_another_image_under_the_same_index_is_refused(store):
    put(store, Block(4, "estimation", 0, 20), [20, 0, 0], sha256="other")
    with pytest.raises(RunError, match="the image of sample 4 differs"):
        read_blocks(store, RUN)


@pytest.fixture
def opened(store, monkeypatch):
    """The keys of the blocks that are read."""
    keys, read = [], store.read

    def note(key):
        keys.extend([key] if key.startswith("votes/") else [])
        return read(key)

    monkeypatch.setattr(store, "read", note)
    return keys


def test_a_glance_opens_only_blocks_that_the_table_lacks(store, opened):
    assert glance(store, RUN, list_blocks(store, LENGTHS))[1] == {"x": 2}
    assert len(opened) == 2
    write_tables(store, RUN)
    put(store, Block(5, "estimation", 0, 20), [0, 0, 20])
    opened.clear()
    votes, devices = glance(store, RUN, list_blocks(store, LENGTHS))
    assert opened == ["votes/estimation/5-0.parquet"]
    assert devices == {"x": 3}
    pd.testing.assert_frame_equal(votes.sort_values(["sample", "stage"], ignore_index=True), read_votes(store.uri))


def change_a_sum(store):
    path = Path(store.uri, "votes.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)


def claim_another_run(store):
    path = Path(store.uri, "votes.parquet")
    table = pq.read_table(path)
    facts = table.schema.metadata[b"diffsmooth"].replace(RUN.votes_id.encode(), b"b" * 32)
    pq.write_table(table.replace_schema_metadata({b"diffsmooth": facts}), path)


@pytest.mark.parametrize(
    "spoil",
    [
        change_a_sum,
        claim_another_run,
        lambda store: Path(store.uri, "votes.parquet").write_bytes(b"PAR1"),
        lambda store: Path(store.uri, block_key(FIRST)).unlink(),
        lambda store: pd.DataFrame({"sample": [4]}).to_parquet(Path(store.uri, "votes.parquet")),
    ],
)
def test_a_glance_ignores_a_false_or_stale_table(store, opened, spoil):
    write_tables(store, RUN)
    spoil(store)
    committed = list_blocks(store, LENGTHS)
    opened.clear()
    votes, devices = glance(store, RUN, committed)
    assert sorted(opened) == sorted(map(block_key, committed))
    assert devices == {"x": len(committed)}
    pd.testing.assert_frame_equal(votes, read_votes(store.uri))


def forget_a_block(store):
    path = Path(store.uri, "blocks.parquet")
    pd.read_parquet(path).iloc[1:].to_parquet(path, index=False)


def test_tables_are_extended_by_new_blocks_alone(store, opened):
    sealed = write_tables(store, RUN).sha256()
    put(store, Block(5, "estimation", 0, 20), [0, 1, 19])
    put(store, Block(4, "estimation", 0, 20), [0, 19, 1])
    opened.clear()
    extended = write_tables(store, RUN, sealed)
    assert sorted(key for key in opened if key.startswith("votes/")) == [
        "votes/estimation/4-0.parquet",
        "votes/estimation/5-0.parquet",
    ]
    stored = [Path(store.uri, name).read_bytes() for name in ("votes.parquet", "blocks.parquet")]
    rebuilt = write_tables(store, RUN)
    pd.testing.assert_frame_equal(extended.votes, rebuilt.votes)
    assert extended.sha256() == rebuilt.sha256()
    assert len(rebuilt.sha256()) == 4
    assert stored == [Path(store.uri, name).read_bytes() for name in ("votes.parquet", "blocks.parquet")]
    assert {key: sha256_of(store, key) for key in rebuilt.sha256()} == rebuilt.sha256()


def sha256_of(store, key):
    return hashlib.sha256(Path(store.uri, key).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "spoil",
    [
        change_a_sum,
        claim_another_run,
        forget_a_block,
        lambda store: Path(store.uri, "votes.parquet").unlink(),
        lambda store: Path(store.uri, "blocks.parquet").unlink(),
        lambda store: Path(store.uri, "blocks.parquet").write_bytes(b"PAR1"),
        lambda store: pd.DataFrame({"sample": ["4"]}).to_parquet(Path(store.uri, "blocks.parquet")),
    ],
)
def test_false_or_damaged_tables_are_rebuilt(store, opened, spoil):
    before = write_tables(store, RUN)
    spoil(store)
    opened.clear()
    again = write_tables(store, RUN, before.sha256())
    assert sorted(key for key in opened if key.startswith("votes/")) == sorted(before.sha256())
    pd.testing.assert_frame_equal(again.votes, before.votes)


def test_only_sealed_blocks_are_taken_from_the_tables(store, opened):
    hashes = write_tables(store, RUN).sha256()
    opened.clear()
    write_tables(store, RUN, {**hashes, block_key(FIRST): "0" * 64})
    assert [key for key in opened if key.startswith("votes/")] == [block_key(FIRST)]


def test_a_new_block_of_another_image_is_refused_without_reading_the_old_ones(store):
    sealed = write_tables(store, RUN).sha256()
    put(store, Block(4, "estimation", 0, 20), [0, 1, 19], sha256="other")
    with pytest.raises(
        RunError, match="the image of sample 4 differs between estimation draw 0 and estimation draw 20"
    ):
        write_tables(store, RUN, sealed)


def test_a_glance_detects_a_flipped_bit(store):
    write_tables(store, RUN)
    path, votes, committed = Path(store.uri, "votes.parquet"), read_votes(store.uri), list_blocks(store, LENGTHS)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    for position in range(4, len(whole) - footer, 7):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        pd.testing.assert_frame_equal(glance(store, RUN, committed)[0], votes)


def test_a_run_is_claimed_once(store):
    claim_run(store, RUN)
    with pytest.raises(UserError, match=r"smoothing\.sigma is 0\.5 there and 1\.0 here.*--out"):
        claim_run(store, run_of(sigma=1.0))


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no run here"):
        read_votes(str(tmp_path / "nothing"))


def totals(votes):
    """Votes per sample, stage and class."""
    return votes.groupby(["sample", "stage", "class"]).votes.sum().to_dict()


def test_pandas_duckdb_and_pyarrow_read_the_blocks(store):
    """Also next to a write in progress, whose name begins with a dot."""
    (Path(store.uri) / "votes/estimation/.unfinished").write_bytes(b"half")
    ours = totals(read_votes(store.uri))
    assert ours == {(4, "estimation", 1): 15, (4, "estimation", 2): 5, (4, "selection", 0): 10}
    assert totals(pd.read_parquet(f"{store.uri}/votes")) == ours
    assert totals(pyarrow.dataset.dataset(f"{store.uri}/votes").to_table().to_pandas()) == ours
    query = f"SELECT * FROM read_parquet('{store.uri}/votes/**/*.parquet')"
    assert totals(duckdb.sql(query).df()) == ours
    summed = duckdb.sql(f"SELECT sum(votes) FROM ({query}) WHERE stage = 'estimation' AND class = 1").fetchall()
    assert summed == [(15,)]


def test_blocks_written_with_dictionaries_and_statistics_are_read(store, tmp_path):
    """As earlier versions wrote them."""
    path = tmp_path / block_key(FIRST)
    before = read_votes(store.uri)
    pq.write_table(pq.read_table(path), path, compression="none")
    pd.testing.assert_frame_equal(read_votes(store.uri), before)


def test_reading_many_blocks_keeps_their_order_and_shares_their_metadata(store):
    for start in range(40, 4000, 20):
        put(store, Block(4, "estimation", start, start + 20), [start % 20, 20 - start % 20, 0])
    stored = read_blocks(store, RUN)
    assert [one.block for one in stored] == sorted(one.block for one in stored)
    assert len(stored) == 200
    assert len({id(one.metadata.device) for one in stored}) == 1
