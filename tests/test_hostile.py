"""Damaged and hostile run folders: every command reports one line with exit status 1 or 2, and never a traceback."""

import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from diffsmooth.jobs.cli import main
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.orders import Order, OrderKeys
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.records import parse_record
from diffsmooth.pipeline.results.stored import Progress, StoredRun
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import FolderStore
from diffsmooth.pipeline.votes.blocks import block_key, read_blocks
from diffsmooth.pipeline.votes.run import RUN_KEY, Run, read_run
from tests.fuzzing import FUZZ
from tests.models import make_run

BLOCK = block_key(Block(3, "estimation", 100, 200))
DEEP = "[" * 100_000
COMMANDS = (["status"], ["analyze"], ["audit"], ["curve"], ["report", "--samples", "0", "--output", os.devnull])


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A complete run that the cases damage copies of."""
    from tests.conftest import write_images

    folder = tmp_path_factory.mktemp("hostile")
    spec = load_spec(
        {
            "name": "half-space",
            "data": {"name": "parquet", "path": str(write_images(folder / "images.parquet"))},
            "classifier": {"arch": "tests.models:half_space"},
            "smoothing": {"sigma": 0.25, "n0": 50, "n": 200, "block": {"selection": 50, "estimation": 100}},
            "compute": {"device": "cpu"},
        }
    )
    make_run(spec, folder / "run")
    return folder / "run"


@pytest.fixture
def run(template, tmp_path) -> Path:
    return shutil.copytree(template, tmp_path / "run", symlinks=True)


def refused(folder: Path, command: list[str], *, harmless: bool = False) -> str:
    """The line that a command prints about a damaged run; it must not end in a traceback."""
    result = CliRunner().invoke(main, [command[0], str(folder), *command[1:]])
    assert result.exception is None or isinstance(result.exception, SystemExit), (command, result.exception)
    assert "Traceback" not in result.output
    if harmless:
        return ""
    assert result.exit_code in (1, 2), result.output
    if command[0] != "audit" or result.stderr:
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert len(result.stderr) < 2000
    return result.output


def changed(path: Path, **values) -> str:
    """The JSON of a file with other values; a key with dots is a path, a value of None removes the key."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        *parents, last = key.split("__")
        table = content
        for parent in parents:
            table = table[parent]
        if value is None:
            del table[last]
        else:
            table[last] = value
    return json.dumps(content)


RUN_CHANGES = [
    {"votes_id": None},
    {"votes_id": 7},
    {"votes_id": "x" * 32},
    {"votes_id": "0" * 32},
    {"name": 0},
    {"name": ""},
    {"name": "[/x]"},
    {"name": "/proc/self/cwd/gift/evil"},
    {"name": "a" * 100_000},
    {"name": "\x1b[31mred"},
    {"num_classes": 1},
    {"num_classes": 10**10},
    {"num_classes": 1e10},
    {"num_classes": "2"},
    {"spec": []},
    {"spec__smoothing": None},
    {"spec__smoothing__sigma": "0.5"},
    {"spec__smoothing__sigma": float("inf")},
    {"spec__smoothing__sigma": float("nan")},
    {"spec__smoothing__sigma": -1},
    {"spec__smoothing__sigma": 5.0},  # another sigma than the votes were cast with
    {"spec__smoothing__seed": "random"},
    {"spec__smoothing__seed": -1},
    {"spec__smoothing__block": {}},
    {"spec__smoothing__block": {"selection": 0, "estimation": 100}},
    {"spec__smoothing__unknown": 1},
    {"spec__weights": ["a"]},
    {"spec__f_version": 0},
    {"unknown": 1},
]


@pytest.mark.parametrize("change", RUN_CHANGES, ids=str)
def test_a_changed_run_json_is_refused(run, change):
    path = run / RUN_KEY
    path.write_text(changed(path, **change))
    for command in COMMANDS:
        assert RUN_KEY in refused(run, command)


DAMAGED_JSON = [
    *(b"", b"{", b"null", b"[]", b"7", b'"x"', b"NaN", b"\xff\xfe"),
    *(DEEP.encode(), b'{"a":' * 5000, b"9" * 5000),
]


@pytest.mark.parametrize("content", DAMAGED_JSON, ids=lambda content: repr(content[:12]))
@pytest.mark.parametrize("key", [RUN_KEY, "orders/001.json", "progress.json"])
def test_damaged_json_is_refused(run, key, content):
    (run / key).write_bytes(content)
    for command in COMMANDS:
        refused(run, command, harmless=key == "progress.json")


ORDER_CHANGES = [
    {"samples": []},
    {"samples": None},
    {"samples": "0:8"},
    {"samples": [0, 0, 1]},
    {"samples": [-1]},
    {"samples": [2**63]},
    {"samples": [10**400]},
    {"samples": [0.5]},
    {"n": 0},
    {"n": 10**12},
    {"n": 10**400},
    {"n": "200"},
    {"n0": -1},
    {"alpha": 0},
    {"alpha": {}},
    {"alpha": 1.0},
    {"alpha": float("nan")},
    {"alpha": {"100": 0.0005}},
    {"alpha": {"x": 0.0005}},
    {"mode": "other"},
    {"mode": "grid"},
    {"mode": "grid", "radii": []},
    {"mode": "grid", "radii": [float("nan")]},
    {"mode": "grid", "radii": [0.5, 0.25]},
    {"mode": "planned"},
    {"mode": "planned", "max_acr_loss": 2.0},
    {"certificate": "cost"},
    {"certificate": "cost", "costly": {"0": [-1]}},
    {"certificate": "cost", "costly": {"x": [1]}},
    {"certificate": "none"},
    {"unknown": 1},
]


@pytest.mark.parametrize("change", ORDER_CHANGES, ids=lambda change: str(change)[:60])
def test_a_changed_order_is_refused(run, change):
    path = run / "orders" / "001.json"
    path.write_text(changed(path, **change))
    for command in COMMANDS:
        assert "orders/001.json" in refused(run, command)


def test_an_order_with_more_draws_than_were_cast_is_incomplete_and_ends(run):
    """Even with 2 million missing blocks per sample."""
    path = run / "orders" / "001.json"
    path.write_text(changed(path, n=200_000_000, samples=[0]))
    result = CliRunner().invoke(main, ["audit", str(run)])
    assert result.exit_code == 1
    assert "order 001 lacks 1999998 blocks" in result.output


@pytest.mark.parametrize(
    "plan", ["", "[]", '{"0": -100}', '{"x": 100}', '{"0": "many"}', '{"0": 1e400}', '{"0": {}}', DEEP]
)
def test_a_changed_plan_is_refused(run, plan):
    order = run / "orders" / "001.json"
    order.write_text(changed(order, mode="planned", max_acr_loss=0.01))
    (run / "orders" / "001").mkdir(exist_ok=True)
    (run / OrderKeys("001").plan).write_text(plan)
    for command in COMMANDS:
        refused(run, command)


def rewritten(path: Path, *, metadata=None, **columns) -> None:
    """Write a block again with other columns (None removes one) or other metadata."""
    table = pq.read_table(path)
    for name, values in columns.items():
        index = table.schema.get_field_index(name)
        table = table.remove_column(index) if values is None else table.set_column(index, name, values)
    described = {b"diffsmooth": json.dumps(metadata).encode()} if metadata is not None else table.schema.metadata
    pq.write_table(table.replace_schema_metadata(described), path)


def metadata_of(path: Path) -> dict:
    return json.loads(pq.read_schema(path).metadata[b"diffsmooth"])


METADATA_CHANGES = [
    *({key: None} for key in ("votes_id", "device", "sample_sha256", "versions", "batch_size", "threads", "seconds")),
    {"threads": 0},
    {"threads": -1},
    {"threads": 10**6},
    {"batch_size": 0},
    {"batch_size": 10**12},
    {"batch_size": "16"},
    {"versions": []},
    {"versions": {"torch": 2}},
    {"seconds": float("nan")},
    {"seconds": "x"},
    {"device": 7},
]


@pytest.mark.parametrize("change", METADATA_CHANGES, ids=str)
def test_changed_block_metadata_is_refused(run, change):
    described = metadata_of(run / BLOCK)
    for key, value in change.items():
        described[key] = value
        if value is None:
            del described[key]
    rewritten(run / BLOCK, metadata=described)
    (run / "votes.parquet").unlink()
    for command in COMMANDS:
        assert BLOCK in refused(run, command)


def column(values, kind) -> pa.Array:
    return pa.array(values, kind)


COLUMNS = [
    {"votes": None},
    {"class": None},
    {"votes": column([100.0], pa.float64())},
    {"votes": column(["100"], pa.string())},
    {"votes": column([[100]], pa.list_(pa.int32()))},
    {"votes": column([None], pa.int32())},
    {"votes": column([100], pa.int64())},
    {"votes": column([101], pa.int32())},
    {"votes": column([-100], pa.int32())},
    {"class": column([2], pa.int32())},
    {"class": column([-1], pa.int32())},
    {"label": column([10**12], pa.int64())},
    {"label": column([2], pa.int32())},
    {"label": column([-2], pa.int32())},
    {"sample": column([4], pa.int32())},
    {"stage": column(["selection"], pa.string())},
    {"draw_start": column([0], pa.int32())},
]


@pytest.mark.parametrize("columns", COLUMNS, ids=lambda one: str({k: v and str(v.type) for k, v in one.items()}))
def test_a_block_with_other_columns_is_refused(run, columns):
    path = run / BLOCK
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    rewritten(path, **columns)
    (run / "votes.parquet").unlink()
    for command in COMMANDS:
        assert BLOCK in refused(run, command)


def test_a_block_that_declares_a_huge_table_is_refused_unread(run):
    path = run / BLOCK
    table = pq.read_table(path).slice(0, 1)
    pq.write_table(table.take([0] * 1_000_000), path)
    for command in (["audit"], ["analyze"]):
        assert "1000000 rows" in refused(run, command)


@pytest.mark.parametrize("key", ["votes.parquet", OrderKeys("001").certificates])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet" * 100])
def test_damaged_derived_files_are_found_by_audit_and_rebuilt(run, key, content):
    (run / key).write_bytes(content)
    assert f"{key} is damaged" in refused(run, ["audit"])
    result = CliRunner().invoke(main, ["analyze", str(run)])
    assert result.exit_code == 0, result.output
    assert CliRunner().invoke(main, ["audit", str(run)]).exit_code == 0


def test_audit_goes_on_after_each_damaged_file(run):
    """Every kind of file is damaged at once; each is a finding, and none hides another."""
    shutil.copy(run / "orders" / "001.json", run / "orders" / "003.json")
    order = run / "orders" / "002.json"
    order.write_text(changed(run / "orders" / "001.json", mode="planned", max_acr_loss=0.01, previous=None))
    (run / "orders" / "002").mkdir()
    (run / OrderKeys("002").plan).write_text("[]")
    (run / "orders" / "003.json").write_text("{")
    (run / BLOCK).write_bytes(b"PAR1")
    (run / "votes.parquet").unlink()
    os.mkfifo(run / "votes.parquet")
    (run / OrderKeys("001").certificates).unlink()
    (run / OrderKeys("001").certificates).symlink_to("/dev/zero")
    (run / "seals" / "001.sha256").write_text("x")
    output = refused(run, ["audit"])
    for words in (
        "orders/003.json is damaged",
        "orders/002/plan.json is damaged",
        f"{BLOCK} is damaged",
        "votes.parquet: a named pipe, not a regular file",
        "seals/001.sha256 is damaged",
        "order 001 lacks 1 blocks",
    ):
        assert f"{words}" in output, words
    shutil.copy(run / "votes" / "estimation" / "3-0.parquet", run / BLOCK)  # another damage: the file of other draws
    assert "its name and its contents differ in draw_start" in refused(run, ["audit"])


def test_audit_reports_certificates_that_cannot_be_read(run):
    key = OrderKeys("001").certificates
    (run / key).unlink()
    (run / key).symlink_to("/dev/zero")
    (run / "votes.parquet").write_bytes(b"x")
    output = refused(run, ["audit"])
    assert f"{key}: a device, not a regular file" in output
    assert "votes.parquet is damaged" in output


@pytest.mark.parametrize("key", ["votes.parquet", OrderKeys("001").certificates])
def test_a_derived_table_that_declares_a_huge_table_is_not_decoded(run, key):
    table = pq.read_table(run / key).slice(0, 1)
    pq.write_table(table.take([0] * 2_000_000), run / key, compression="zstd")
    assert f"{key} is damaged: 2000000 rows of" in refused(run, ["audit"])
    assert CliRunner().invoke(main, ["status", str(run)]).exit_code == 0


@pytest.mark.parametrize("key", ["votes.parquet", OrderKeys("001").certificates])
def test_derived_tables_with_other_columns_are_found_by_audit(run, key):
    pq.write_table(pa.table({"sample": ["a"], "votes": [[1]]}), run / key)
    assert f"{key} is damaged" in refused(run, ["audit"])


@pytest.mark.parametrize(
    "name", ["3-100.parquet.bak", "99999999999-0.parquet", "3-99999999900.parquet", "x.parquet", "03-0.parquet"]
)
def test_foreign_names_among_the_blocks_are_refused(run, name):
    shutil.copy(run / BLOCK, run / "votes" / "estimation" / name)
    for command in COMMANDS:
        assert name in refused(run, command)


def make_loop(path: Path) -> None:
    path.symlink_to(path)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, make_loop, make_endless], ids=lambda make: make.__name__)
@pytest.mark.parametrize("key", [RUN_KEY, "orders/001.json", BLOCK])
def test_what_is_not_a_regular_file_is_refused_and_never_waited_for(run, make, key):
    (run / key).unlink()
    make(run / key)
    for command in COMMANDS:
        refused(run, command, harmless=key == BLOCK or make is os.mkdir)  # a folder is no object: it is missing


def outcome(call, *errors):
    """What a call returns and "", or None and the text of the error that it may raise."""
    try:
        return call(), ""
    except errors as error:
        return None, str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def mutated(content, draw):
    """A JSON value in which one part, chosen by hypothesis, is replaced by another value or removed."""
    if isinstance(content, dict) and content and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(content)))
        if draw(st.integers(0, 4)) == 0:
            return {name: value for name, value in content.items() if name != key}
        return {**content, key: mutated(content[key], draw)}
    return draw(JSON)


@pytest.mark.parametrize(("model", "key"), [(Run, RUN_KEY), (Order, "orders/001.json"), (Progress, None)])
def test_fuzzed_json_is_parsed_or_refused_with_one_line(template, model, key):
    example = {} if key is None else json.loads((template / key).read_text())

    @FUZZ
    @given(st.data())
    def fuzz(data):
        text = json.dumps(mutated(example, data.draw))
        record, refusal = outcome(lambda: parse_record(model, text.encode()), ValueError)
        assert "\n" not in refusal
        assert len(refusal) < 1000
        assert record is None or parse_record(model, record.model_dump_json().encode()) == record

    fuzz()


@FUZZ
@given(st.binary(max_size=200))
def test_fuzzed_bytes_are_refused_with_one_line(data):
    for model in (Run, Order, Progress):
        with pytest.raises(ValueError, match=r"^[^\n]*$"):
            parse_record(model, data)


def test_fuzzed_files_of_a_run_are_read_or_refused(template, tmp_path):
    """Bytes of run.json, orders and a block are flipped, removed and inserted."""
    keys = [RUN_KEY, "orders/001.json", BLOCK]
    original = {key: (template / key).read_bytes() for key in keys}
    folder = shutil.copytree(template, tmp_path / "fuzzed")

    @FUZZ
    @given(st.sampled_from(keys), st.integers(0, 10**6), st.binary(max_size=8), st.integers(0, 20))
    def fuzz(key, position, inserted, removed):
        whole = original[key]
        at = position % (len(whole) + 1)
        (folder / key).write_bytes(whole[:at] + inserted + whole[at + removed :])
        store = FolderStore(str(folder))
        _, refusal = outcome(lambda: (StoredRun(store), read_blocks(store, read_run(store))), UserError, RunError)
        assert "\n" not in refusal
        (folder / key).write_bytes(whole)

    fuzz()
