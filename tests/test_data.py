"""Data sets: what is read, by index, and what is refused."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import open_dataset, sample_indices
from pipeline.spec import Data, UserError
from tests.models import png

CIFAR = Path(os.environ.get("DIFFSMOOTH_TEST_DATA", "../shared/data")) / "cifar10-test-1000.parquet"


def test_embedded_mnist_is_balanced_and_shuffled():
    data = open_dataset(Data(name="mnist", split="heldout"))
    assert (len(data), data.num_classes) == (1000, 10)
    labels = [data[index].label for index in range(0, 1000)]
    assert np.bincount(labels).tolist() == [100] * 10
    assert len(set(labels[:50])) == 10
    sample = data[7]
    assert sample.image_CHW.shape == (1, 28, 28)
    assert sample.image_CHW.dtype == np.float32
    assert sample.image_CHW.min() == 0
    assert sample.image_CHW.max() <= 1
    assert len({data[index].sha256 for index in range(1000)}) == 1000


def test_any_order_of_reading_gives_the_same(images):
    data = open_dataset(Data(name="parquet", path=str(images)))
    forward = [data[index] for index in range(8)]
    for index in (7, 0, 3, 2, 6):
        again = data[index]
        assert (again.image_CHW == forward[index].image_CHW).all()
        assert again[1:] == forward[index][1:]
    assert forward[1].image_CHW[0, 0, 0] == np.float32(155) / np.float32(255)


@pytest.mark.skipif(not CIFAR.exists(), reason="the real CIFAR-10 images are not at hand")
def test_real_photographs():
    data = open_dataset(Data(name="parquet", path=str(CIFAR)))
    assert (len(data), data.num_classes) == (1000, 10)
    assert data[999].image_CHW.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("samples", "expected"), [(":", range(10)), ("2:", range(2, 10)), ("0:10:3", range(0, 10, 3)), ("4:6", range(4, 6))]
)
def test_sample_indices(samples, expected):
    assert sample_indices(samples, 10) == expected


@pytest.mark.parametrize("samples", ["0:11", "-1:3", "0:5:0", "5:5", "7", "a:b", "1:2:3:4", "12:"])
def test_samples_outside_are_refused(samples):
    with pytest.raises(UserError, match=r"data\.samples = "):
        sample_indices(samples, 10)


def write(path, columns):
    pq.write_table(pa.table(columns), path)
    return Data(name="parquet", path=str(path))


def test_bad_files_are_named(tmp_path, images):
    good = png(np.zeros((4, 4), np.uint8))
    (tmp_path / "cut.parquet").write_bytes(images.read_bytes()[:-30])
    cases = [
        (Data(name="parquet"), r"data\.path is missing"),
        (Data(name="parquet", path=str(tmp_path / "no.parquet")), "no such file"),
        (Data(name="parquet", path=str(tmp_path / "cut.parquet")), "damaged"),
        (Data(name="cifar100"), r"'cifar100' is unknown: choose one of"),
        (Data(name="mnist", split="test"), "'heldout' only"),
        (write(tmp_path / "a.parquet", {"pixels": [1]}), "no column 'image' or 'img' among pixels"),
        (write(tmp_path / "b.parquet", {"image": [good], "label": ["x"]}), "must hold integers"),
        (write(tmp_path / "c.parquet", {"image": [good]}), r"set data\.num_classes"),
    ]
    for data, message in cases:
        with pytest.raises(UserError, match=message):
            open_dataset(data)


def test_bad_rows_are_named(tmp_path):
    good = png(np.zeros((4, 4), np.uint8))
    data = write(tmp_path / "a.parquet", {"image": [good, good[:40], good], "label": [0, 1, 5]})
    opened = open_dataset(data.model_copy(update={"num_classes": 3}))
    with pytest.raises(UserError, match="the image of sample 1 is damaged"):
        opened[1]
    with pytest.raises(UserError, match="sample 2 has label 5, beyond the 3 classes"):
        opened[2]
