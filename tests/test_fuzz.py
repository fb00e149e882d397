"""Every reader of foreign files: whatever the bytes, it returns something valid or refuses them in one line."""

import contextlib
import hashlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from diffsmooth.jobs.places import parse_source
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.cascade import CascadeRecord
from diffsmooth.pipeline.certify.orders import read_costly
from diffsmooth.pipeline.certify.planning import read_plan
from diffsmooth.pipeline.data.images import Sample
from diffsmooth.pipeline.data.sets import open_dataset, sample_indices
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.models.files import load_json
from diffsmooth.pipeline.models.weights import load_weights
from diffsmooth.pipeline.results.cascades import read_record
from diffsmooth.pipeline.results.stored import StoredRun
from diffsmooth.pipeline.show.grids import parse_grid
from diffsmooth.pipeline.show.logs import read_log
from diffsmooth.pipeline.spec import Data, load_spec
from diffsmooth.pipeline.storage.folder import Entry
from diffsmooth.pipeline.storage.published import ARCHIVE, INDEX, write_published
from diffsmooth.pipeline.storage.store import FolderStore, MemoryStore, open_store
from diffsmooth.pipeline.votes.blocks import block_key, glance, list_blocks, read_derived
from diffsmooth.pipeline.votes.seal import SampleProof, read_seals
from tests.fuzzing import FUZZ
from tests.models import png

CHANGES = st.tuples(st.integers(0, 10**7), st.integers(0, 40), st.binary(max_size=12))


def changed(whole: bytes, changes) -> bytes:
    """The bytes with some removed and others inserted, at several places."""
    for position, removed, inserted in changes:
        at = position % (len(whole) + 1)
        whole = whole[:at] + inserted + whole[at + removed :]
    return whole


def read_or_refused(call) -> object:
    """What a call returns; None if it refuses in one line."""
    try:
        return call()
    except (UserError, RunError) as error:
        line = str(error)
        assert "\n" not in line.strip()
        assert line.isprintable()
        assert len(line) < 3000
        return None


SPEC = b"""name = "a"
[data]
name = "parquet"
path = "${DATA}/x.parquet"
[denoiser]
arch = "unet"
[denoiser.unet]
model_channels = 32
channel_mult = [1, 2]
num_res_blocks = 1
[classifier]
arch = "mnist_cnn"
normalize = {mean = [0.5], std = [0.5]}
[smoothing]
sigma = 0.5
alpha = {1000 = 0.0005, 2000 = 0.0005}
n = 2000
"""


@FUZZ
@given(st.lists(CHANGES, min_size=1, max_size=3), st.text(max_size=40))
def test_fuzzed_toml(tmp_path_factory, changes, override):
    path = tmp_path_factory.getbasetemp() / "fuzzed.toml"
    path.write_bytes(changed(SPEC, changes))
    read_or_refused(lambda: load_spec(path))
    read_or_refused(lambda: load_spec({}, [override]))
    read_or_refused(lambda: sample_indices(override, 10))
    read_or_refused(lambda: parse_grid(override))
    read_or_refused(lambda: parse_source(override))


LOG = b"idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t1\t1\t0.5\t1\t0:00:01\n7\t1\t-1\t0.0\t0\t0:00:01\n"


@FUZZ
@given(st.lists(CHANGES, min_size=1, max_size=4))
def test_fuzzed_logs(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "fuzzed.tsv"
    path.write_bytes(changed(LOG, changes))
    rows = read_or_refused(lambda: read_log(path))
    assert rows is None or (rows["radius"] >= 0).all()


@FUZZ
@given(st.lists(CHANGES, min_size=1, max_size=3), st.sampled_from(["a.toml", "a.csv"]))
def test_fuzzed_cost_files(tmp_path_factory, changes, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(changed(b"0 = [1, 2]\n1 = [0]\n" if name == "a.toml" else b"0,1,1\n1,0,0\n0,0,0\n", changes))
    costly = read_or_refused(lambda: read_costly("cost", str(path), 3))
    assert costly is None or all(0 <= k < 3 and k != y for y, classes in costly.items() for k in classes)


RECORDS = {
    "orders/001/plan.json": (b'{"0": 100, "1": 200}', lambda store: read_plan(store, "001")),
    "seals/001.sha256": (b"0" * 64 + b"  run.json\n" + b"1" * 64 + b"  votes/selection/0-0.parquet\n", read_seals),
    "cascade.json": (b"{}", read_record),
}


@pytest.mark.parametrize("key", RECORDS)
def test_fuzzed_records(key):
    example, read = RECORDS[key]

    @FUZZ
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def fuzz(changes):
        store = MemoryStore()
        store.put_if_absent(key, changed(example, changes))
        read_or_refused(lambda: read(store))

    fuzz()


PROOF = SampleProof(
    root="0" * 64, sample=3, blocks={"votes/selection/3-0.parquet": "1" * 64}, index=2, size=5, path=["2" * 64] * 3
)


@FUZZ
@given(st.lists(CHANGES, max_size=3), st.integers(0, 2**70), st.integers(1, 2**70))
def test_fuzzed_proofs_are_not_accepted(changes, index, size):
    assert not PROOF.model_copy(update={"index": index, "size": size}).follows()
    with contextlib.suppress(ValueError):
        assert not SampleProof.model_validate_json(changed(PROOF.model_dump_json().encode(), changes)).follows()


def checkpoints(folder: Path) -> dict[str, bytes]:
    state = {"0.weight": torch.arange(24.0).reshape(2, 3, 2, 2), "0.bias": torch.ones(2)}
    save_file(state, folder / "a.safetensors")
    torch.save({"state_dict": state, "epoch": 3}, folder / "b.pt")
    torch.save(state, folder / "c.pt", _use_new_zipfile_serialization=False)
    return {name: (folder / name).read_bytes() for name in ("a.safetensors", "b.pt", "c.pt")}


@pytest.mark.parametrize("name", ["a.safetensors", "b.pt", "c.pt"])
def test_fuzzed_checkpoints(tmp_path, name):
    whole = checkpoints(tmp_path)[name]

    @FUZZ
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def fuzz(changes):
        path = tmp_path / name
        path.unlink()  # it may be mapped
        path.write_bytes(changed(whole, changes))
        state = read_or_refused(lambda: load_weights(str(path)))
        assert state is None or all(isinstance(tensor, torch.Tensor) for tensor in state.values())

    fuzz()


@FUZZ
@given(st.lists(CHANGES, min_size=1, max_size=3))
def test_fuzzed_configurations(tmp_path_factory, changes):
    path = tmp_path_factory.getbasetemp() / "config.json"
    path.write_bytes(changed(b'{"image_mean": [0.5], "size": {"height": 32}}', changes))
    read_or_refused(lambda: load_json(str(path)))


def encodings() -> dict[str, bytes]:
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    found = {}
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"):
        buffer = io.BytesIO()
        image.save(buffer, format=kind)
        found[kind] = buffer.getvalue()
    return found


@pytest.mark.filterwarnings("ignore")  # of Pillow, about damaged files
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM"])
def test_fuzzed_images(tmp_path, kind):
    whole = encodings()[kind]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encodings()["PNG"])
    path = tmp_path / "b" / "1.png"
    path.write_bytes(whole)
    data = open_dataset(Data(name="imagefolder", path=str(tmp_path)))

    @FUZZ
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def fuzz(changes):
        path.write_bytes(changed(whole, changes))
        sample = read_or_refused(lambda: data[2])
        assert sample is None or sample.image_CHW.shape == (3, 4, 4)

    fuzz()


def test_fuzzed_parquet_data_sets(tmp_path):
    rows = [{"bytes": png(np.full((4, 4), 20 * index, np.uint8)), "path": None} for index in range(5)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": pa.array(rows, kind), "label": [0, 1, 0, 1, 0]}), path, row_group_size=2)
    whole = path.read_bytes()

    def read():
        data = open_dataset(Data(name="parquet", path=str(path)))
        return [data[index] for index in range(min(len(data), 5))]

    @FUZZ
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def fuzz(changes):
        path.unlink()
        path.write_bytes(changed(whole, changes))
        samples = read_or_refused(read)
        assert samples is None or all(isinstance(one, Sample) for one in samples)

    fuzz()


@pytest.mark.parametrize("key", ["votes.parquet", "orders/001/certificates.parquet"])
def test_fuzzed_derived_tables(raw_spec, tmp_path, key):
    from tests.models import make_run

    make_run(load_spec(raw_spec), tmp_path / "run", samples=2)
    folder = shutil.copytree(tmp_path / "run", tmp_path / "fuzzed")
    store, whole = FolderStore(str(folder)), (folder / key).read_bytes()
    stored = StoredRun(store)
    committed = list_blocks(store, stored.run.block)
    assert block_key(Block(0, "selection", 0, 50)) in set(map(block_key, committed))

    @FUZZ
    @given(st.lists(CHANGES, min_size=1, max_size=3))
    def fuzz(changes):
        store.replace(key, changed(whole, changes))
        read_or_refused(lambda: read_derived(store, key, ["sample", "label"], 100))
        votes, _ = glance(store, stored.run, committed)
        assert votes["votes"].sum() == sum(block.draws for block in committed)

    fuzz()


@FUZZ
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
                    max_leaves=8))  # fmt: skip
def test_fuzzed_cascade_records(value):
    store = MemoryStore()
    store.put_if_absent("cascade.json", json.dumps(dict.fromkeys(CascadeRecord.model_fields, value)).encode())
    read_or_refused(lambda: read_record(store))


def test_published_runs(tmp_path):
    """Bytes of the index and of the archive are changed; the index has the hash of the changed archive."""
    objects = {"run.json": b"{}", "votes/selection/0-0.parquet": b"x" * 100, "votes/selection/1-0.parquet": b"y"}
    packed = [Entry(key, 0, 1e9) for key in objects if key.startswith("votes")]
    write_published(tmp_path, objects.__getitem__, ["run.json"], packed, 1)
    index, archive = ((tmp_path / name).read_bytes() for name in (INDEX, ARCHIVE))

    def read_all():
        store = open_store(tmp_path)
        for entry in [*store.list("votes"), *store.list("orders"), Entry("run.json", 0, 0.0)]:
            read_or_refused(lambda key=entry.key: store.read(key, limit=10**6))

    @FUZZ
    @given(st.sampled_from([INDEX, ARCHIVE]), st.lists(CHANGES, min_size=1, max_size=3))
    def fuzz(name, changes):
        written = {INDEX: index, ARCHIVE: archive}
        written[name] = changed(written[name], changes)
        if name == ARCHIVE:
            facts = json.loads(index)
            facts["files"][ARCHIVE] = {
                "size": len(written[ARCHIVE]),
                "sha256": hashlib.sha256(written[ARCHIVE]).hexdigest(),
            }
            written[INDEX] = json.dumps(facts).encode()
        for one, data in written.items():
            (tmp_path / one).write_bytes(data)
        read_or_refused(read_all)

    fuzz()
