"""hf:// locations on a double of the Hugging Face Hub: revisions, tokens, offline mode, data sets, CIFAR-10."""

import hashlib
import io
import json
import logging
import time
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffsmooth.pipeline.data import cifar10
from diffsmooth.pipeline.data.entry import RawImages
from diffsmooth.pipeline.data.sets import dataset_id, open_dataset
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.models.files import first_file, weights_id
from diffsmooth.pipeline.results.stored import read_result
from diffsmooth.pipeline.show.report import facts_of
from diffsmooth.pipeline.spec import Data, load_spec
from diffsmooth.pipeline.storage.fetch import at_hand, fetch
from diffsmooth.pipeline.storage.hub import cached_commits, hub_files
from tests.hub_server import TOKEN
from tests.models import make_run

OLD, NEW = b"the first weights", b"the second weights"


@pytest.fixture
def model(hub):
    hub.repositories["org/net"] = {"main": {"a/net.pt": NEW, "config.json": b"{}"}, "v1": {"a/net.pt": OLD}}
    return hub


def test_a_file_is_downloaded_once_and_identified_by_its_content(model, caplog):
    caplog.set_level(logging.INFO, "diffsmooth.pipeline.storage.hub")
    uri = "hf://org/net/a/net.pt"
    assert not at_hand(uri)
    assert fetch(uri).read_bytes() == NEW
    assert model.commit("org/net", "main") in caplog.text
    assert at_hand(uri)
    assert weights_id(uri) == hashlib.sha256(NEW).hexdigest()
    assert sum(request.startswith("GET org/net/resolve") for request in model.requests) == 1
    assert first_file(["hf://org/net/none.json", "hf://org/net/config.json"]).endswith("config.json")


def test_a_revision_is_a_branch_a_tag_or_a_commit(model):
    assert fetch("hf://org/net@v1/a/net.pt").read_bytes() == OLD
    assert fetch(f"hf://org/net@{model.commit('org/net', 'v1')}/a/net.pt").read_bytes() == OLD
    assert fetch("hf://models/org/net@main/a/net.pt").read_bytes() == NEW
    with pytest.raises(UserError, match=f"sha256 {hashlib.sha256(NEW).hexdigest()}, not .*delete it from the"):
        fetch("hf://org/net/a/net.pt", hashlib.sha256(OLD).hexdigest())


def test_weights_of_a_repository_are_found(model):
    with pytest.raises(UserError, match=r"contains neither model\.safetensors nor pytorch_model.bin"):
        fetch("hf://org/net")
    model.repositories["org/net"]["main"]["pytorch_model.bin"] = OLD
    assert fetch("hf://org/net").read_bytes() == OLD
    model.repositories["org/net"]["main"]["model.safetensors"] = NEW
    assert fetch("hf://org/net").read_bytes() == NEW


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("hf://org/none/net.pt", "there is no org/none@main, or it is private; if it is private, set HF_TOKEN"),
        ("hf://org/net@v9/net.pt", "there is no revision org/net@v9"),
        ("hf://org/net/none.pt", "there is no such file in org/net@main"),
        ("hf://org/secret/net.pt", "org/secret@main is gated; accept its conditions on its page, and set HF_TOKEN"),
        ("hf://org", "not a place on the Hub; write hf://ORG/REPO/FILE"),
        ("hf://or g/net/x", "not a place on the Hub"),
        ("hf://org/net--x/a", "net--x"),
    ],
)
def test_each_refusal_gives_one_line(model, uri, words):
    model.repositories["org/secret"] = {"main": {"net.pt": OLD}}
    model.gated.add("org/secret")
    with pytest.raises(UserError, match=words) as error:
        fetch(uri)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(uri)


def test_a_token_opens_gated_files_and_is_not_shown(model, monkeypatch):
    model.repositories["org/secret"] = {"main": {"net.pt": OLD}}
    model.gated.add("org/secret")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match="gated") as error:
        fetch("hf://org/secret/net.pt")
    assert "hf_wrong" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetch("hf://org/secret/net.pt").read_bytes() == OLD


def test_offline_only_the_cache_is_used(model, monkeypatch):
    uri = "hf://org/net/a/net.pt"
    fetch(uri)
    model.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch(uri).read_bytes() == NEW
    assert hub_files("hf://org/net") == ["hf://org/net/a/net.pt"]
    with pytest.raises(UserError, match="not in the Hub's cache; unset HF_HUB_OFFLINE"):
        fetch("hf://org/net/config.json")
    assert model.requests == []


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_environment(model, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's tries
    with pytest.raises(RunError, match=r"hf://org/net/a/net.pt: cannot .*check the network"):
        fetch("hf://org/net/a/net.pt")


def parquet(pixels_NHWC, labels, names, column="img", files=None):
    images = []
    for index, pixels_HWC in enumerate(pixels_NHWC):
        Image.fromarray(pixels_HWC).save(file := io.BytesIO(), "PNG")
        images.append({"bytes": file.getvalue(), "path": files and files[index]})
    label = {"names": names, "_type": "ClassLabel"}
    described = {"info": {"features": {column: {"_type": "Image"}, "label": label}}}
    table = pa.table({column: images, "label": labels}).replace_schema_metadata({"huggingface": json.dumps(described)})
    pq.write_table(table, file := io.BytesIO())
    return file.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
LABELS = [index % 10 for index in range(20)]


def test_a_data_set_is_read_by_its_split(hub):
    names = ["a", "b", *"cdefghij"]
    files = {
        f"data/{split}-0000{part}-of-00002.parquet": parquet(PIXELS[part::2], LABELS[part::2], names, "image")
        for split in ("train", "validation")
        for part in range(2)
    }
    hub.repositories["datasets/org/set"] = {"main": {"README.md": b"x", **files}, "v1": {}}
    for path in ("hf://datasets/org/set", "hf://datasets/org/set@main/data"):
        found = open_dataset(Data(name="parquet", path=path, split="validation"))
        assert (len(found), found.num_classes) == (20, 10)
        assert found[10].label == LABELS[1]
    one = open_dataset(Data(name="parquet", path="hf://datasets/org/set/data/train-00001-of-00002.parquet"))
    assert len(one) == 10
    with pytest.raises(UserError, match=r"contains train, validation; set data.split"):
        open_dataset(Data(name="parquet", path="hf://datasets/org/set", split="test"))
    with pytest.raises(UserError, match=r"contains no \*.parquet"):
        open_dataset(Data(name="parquet", path="hf://datasets/org/set@v1"))


def test_cifar10_of_the_hub_is_the_same_data_set_as_the_archive(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    archive, names = RawImages(PIXELS, LABELS, 10), cifar10._CIFAR10_CLASSES
    file = "plain_text/test-00000-of-00001.parquet"
    files = {file: parquet(PIXELS, LABELS, names)}
    hub.repositories["datasets/uoft-cs/cifar10"] = {"main": files}
    found = open_dataset(Data(name="cifar10"))
    assert dataset_id(found) == dataset_id(archive)
    for index in range(20):
        assert found[index].sha256 == archive[index].sha256
        assert np.array_equal(found[index].image_CHW, archive[index].image_CHW)
    files[file] = parquet(PIXELS, LABELS, names[::-1])
    with pytest.raises(UserError, match=r"its classes are .*'truck', .* not those of CIFAR-10 in their order"):
        open_dataset(Data(name="cifar10", path="hf://datasets/uoft-cs/cifar10/plain_text"))


def test_cifar10_comes_from_its_archive_if_the_hub_fails(hub, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    asked = []

    def fetch(uri):
        asked.append(uri)
        raise RunError("no archive; try again")

    monkeypatch.setattr(cifar10, "fetch", fetch)
    with pytest.raises(UserError, match="cannot download cifar10: no archive"):
        open_dataset(Data(name="cifar10"))
    assert asked == ["https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"]
    assert "cannot read cifar10 from the Hugging Face Hub: " in caplog.text


@pytest.fixture(scope="module")
def wordnet():
    """The classes of ILSVRC-2012: their ids, and their names on the Hub."""
    timm = pytest.importorskip("timm")
    folder = Path(timm.__file__).parent / "data" / "_info"
    ids = (folder / "imagenet_synsets.txt").read_text().split()
    lines = (folder / "imagenet_synset_to_lemma.txt").read_text().splitlines()
    names = dict(line.split("\t") for line in lines) | {"n03126707": "crane2"}
    return ids, [names[one] for one in ids]


CLASSES_OF_IMAGES = [999, 0, 5, 0, 999, 0]
FILES = ["val_3", "val_2", "val_9", "val_10", "val_1", "val_1"]  # .JPEG; val_10 comes before val_2


@pytest.fixture
def imagenet(hub, wordnet, tmp_path):
    """Six images as class folders, and on the Hub in another order."""
    ids, names = wordnet
    pixels, labels = PIXELS[:6], CLASSES_OF_IMAGES
    for one in ids:
        (tmp_path / "val" / one).mkdir(parents=True)
    for index, label in enumerate(labels):
        Image.fromarray(pixels[index]).save(tmp_path / "val" / ids[label] / f"{FILES[index]}.JPEG", "PNG")
    files = [f"{name}_{ids[label]}.JPEG" for name, label in zip(FILES, labels, strict=True)]
    hub.repositories["datasets/ILSVRC/imagenet-1k"] = {
        "main": {
            f"data/validation-0000{part}-of-00002.parquet": parquet(
                pixels[part::2], labels[part::2], names, "image", files[part::2]
            )
            for part in range(2)
        }
    }
    return tmp_path


def test_imagenet_of_the_hub_is_the_same_data_set_as_the_class_folders(imagenet):
    folders = open_dataset(Data(name="imagenet", path=str(imagenet), resize=36, crop=32))
    for path in (None, "hf://datasets/ILSVRC/imagenet-1k"):
        found = open_dataset(Data(name="imagenet", path=path, resize=36, crop=32))
        assert [found[index].sha256 for index in range(6)] == [folders[index].sha256 for index in range(6)]
        assert [found[index].label for index in range(6)] == [0, 0, 0, 5, 999, 999]
        assert dataset_id(found) == dataset_id(folders)


def test_imagenet_with_other_classes_or_without_names_is_refused(imagenet, hub, wordnet):
    ids, names = wordnet
    swapped = [names[1], names[0], *names[2:]]
    file = "data/validation-00000-of-00001.parquet"
    cases = [
        (
            parquet(PIXELS[:2], [0, 1], swapped, "image", ["a.JPEG", "b.JPEG"]),
            "its class 0 is 'goldfish', but .*'tench'",
        ),
        (parquet(PIXELS[:2], [0, 1], names[:10], "image", ["a.JPEG", "b.JPEG"]), "it has 10 named classes instead of"),
        (parquet(PIXELS[:2], [0, 1], names, "image"), "the images have no file names"),
    ]
    for content, words in cases:
        hub.repositories["datasets/ILSVRC/imagenet-1k"] = {"main": {file: content}}
        with pytest.raises(UserError, match=words):
            open_dataset(Data(name="imagenet", path="hf://datasets/ILSVRC/imagenet-1k"))
    content = parquet(PIXELS[:2], [0, 1], ids, "image", ["b.JPEG", "a.JPEG"])
    hub.repositories["datasets/ILSVRC/imagenet-1k"] = {"main": {file: content}}
    assert len(open_dataset(Data(name="imagenet"))) == 2


def test_gated_imagenet_needs_a_token(imagenet, hub, monkeypatch):
    hub.gated.add("datasets/ILSVRC/imagenet-1k")
    with pytest.raises(
        UserError, match=r"data.path is missing.*gated; accept its conditions.*HF_TOKEN.*or set data.path"
    ):
        open_dataset(Data(name="imagenet"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert len(open_dataset(Data(name="imagenet"))) == 6


def test_blocks_record_the_commits_that_were_read(hub, raw_spec, images, tmp_path):
    hub.repositories["datasets/org/set"] = {"main": {"test-00000-of-00001.parquet": images.read_bytes()}}
    uri = "hf://datasets/org/set"
    run_of_folder = make_run(load_spec(raw_spec), tmp_path / "a", samples=1)
    raw_spec["data"]["path"] = uri
    run_of_hub = make_run(load_spec(raw_spec), tmp_path / "b", samples=1)
    found, other = read_result(run_of_hub.uri), read_result(run_of_folder.uri)
    assert {tuple(one.metadata.commits.items()) for one in found.blocks} == {
        ((uri, hub.commit("datasets/org/set", "main")),)
    }
    assert facts_of(found)["commits on the Hub"] == f"{uri} {hub.commit('datasets/org/set', 'main')}"
    assert found.result.run.votes_id == other.result.run.votes_id
    assert "commits on the Hub" not in facts_of(other)
    assert cached_commits([f"{uri}@v9", "hf://org/none"]) == {}
