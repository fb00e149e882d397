"""Data sets: samples by index, and errors for data that cannot be used."""

import hashlib
import importlib.util
import io
import json
import logging
import os
import pickle
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffsmooth.pipeline.data import cifar10 as cifar10_module
from diffsmooth.pipeline.data import imagenet, sources
from diffsmooth.pipeline.data import images as images_module
from diffsmooth.pipeline.data.entry import Facts
from diffsmooth.pipeline.data.images import Sample
from diffsmooth.pipeline.data.sets import dataset_id, known_facts, open_dataset, sample_indices
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.spec import Data, load_spec, votes_id
from diffsmooth.pipeline.storage.remote import ObjectFile
from tests.models import png
from tests.s3_servers import credentials, moto_server

FOOLBOX = importlib.util.find_spec("foolbox")
PHOTOGRAPHS = Path(str(FOOLBOX.origin)).parent / "data" if FOOLBOX else Path("no-foolbox")
needs_photographs = pytest.mark.skipif(FOOLBOX is None, reason="foolbox, which ships the photographs, is missing")
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


def test_samples_do_not_depend_on_the_order_of_reading(images):
    data = open_dataset(Data(name="parquet", path=str(images)))
    forward = [data[index] for index in range(8)]
    for index in (7, 0, 3, 2, 6):
        again = data[index]
        assert (again.image_CHW == forward[index].image_CHW).all()
        assert again[1:] == forward[index][1:]
    assert forward[1].image_CHW[0, 0, 0] == np.float32(155) / np.float32(255)


@pytest.mark.skipif(not CIFAR.exists(), reason="the real CIFAR-10 images are missing")
def test_real_cifar10_images():
    data = open_dataset(Data(name="parquet", path=str(CIFAR)))
    assert (len(data), data.num_classes) == (1000, 10)
    assert data[999].image_CHW.shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("samples", "expected"), [(":", range(10)), ("2:", range(2, 10)), ("0:10:3", range(0, 10, 3)), ("4:6", range(4, 6))]
)
def test_sample_indices(samples, expected):
    assert sample_indices(samples, 10) == expected


@pytest.mark.parametrize(
    "samples", ["0:11", "-1:3", "0:5:0", "5:5", "7", "a:b", "1:2:3:4", "12:", f"0:{10**40}", "9" * 5000 + ":"]
)
def test_samples_outside_are_refused(samples):
    with pytest.raises(UserError, match=r"data\.samples = ") as error:
        sample_indices(samples, 10)
    assert len(str(error.value)) < 300


def write(path, columns):
    pq.write_table(pa.table(columns), path)
    return Data(name="parquet", path=str(path))


def test_unusable_files_are_named(tmp_path, images):
    good = png(np.zeros((4, 4), np.uint8))
    (tmp_path / "cut.parquet").write_bytes(images.read_bytes()[:-30])
    cases = [
        (Data(name="parquet"), r"data\.path is missing"),
        (Data(name="parquet", path=str(tmp_path / "no.parquet")), "no such file"),
        (Data(name="parquet", path=str(tmp_path / "cut.parquet")), "damaged"),
        (Data(name="cifar100"), r"'cifar100' is unknown; choose one of"),
        (Data(name="mnist", split="test"), "mnist has heldout .* train, labelled and unlabelled; choose"),
        (Data(name="mnist", split="train", resize=14), "not applied to data.split = 'train' of mnist"),
        (write(tmp_path / "a.parquet", {"pixels": [1]}), "no column 'image' or 'img' among pixels"),
        (write(tmp_path / "b.parquet", {"image": [good], "label": ["x"]}), "must hold integers"),
        (write(tmp_path / "c.parquet", {"image": [good]}), r"set data\.num_classes"),
    ]
    for data, message in cases:
        with pytest.raises(UserError, match=message):
            open_dataset(data)


def test_unusable_rows_are_named(tmp_path):
    good = png(np.zeros((4, 4), np.uint8))
    data = write(tmp_path / "a.parquet", {"image": [good, good[:40], good], "label": [0, 1, 5]})
    opened = open_dataset(data.model_copy(update={"num_classes": 3}))
    with pytest.raises(UserError, match=r"cannot decode sample 1 .*; replace or exclude it"):
        opened[1]
    with pytest.raises(UserError, match="sample 2 has label 5, but classes are 0 to 2; correct the label"):
        opened[2]


LABELS_BEYOND = [(-2, "has label -2"), (3, "has label 3"), (2**31, "has label 2147483648"), (-(2**40), "has label -10")]


@pytest.mark.parametrize(("label", "message"), LABELS_BEYOND)
def test_labels_outside_the_classes_are_refused(tmp_path, label, message):
    good = png(np.zeros((4, 4), np.uint8))
    data = write(tmp_path / "a.parquet", {"image": [good] * 2, "label": [0, label]})
    with pytest.raises(UserError, match=rf"{message}.*classes are 0 to 2; correct the label, or set data\.num_classes"):
        open_dataset(data.model_copy(update={"num_classes": 3}))[1]


def hostile_parquet(folder: Path) -> dict[str, str]:
    """Write unusable files to a folder; return name -> expected message."""
    good = png(np.zeros((4, 4), np.uint8))
    os.mkfifo(folder / "fifo.parquet")
    (folder / "folder.parquet").mkdir()
    (folder / "loop.parquet").symlink_to(folder / "loop.parquet")
    (folder / "zero.parquet").symlink_to("/dev/zero")
    (folder / "empty.parquet").write_bytes(b"")
    nested = pa.array([{"bytes": {"bytes": good}}])
    duplicate = pa.table([pa.array([good]), pa.array([0]), pa.array([1])], ["image", "label", "label"])
    tables = {
        "float": (pa.table({"image": [0.5], "label": [0]}), "column 'image' is double; it must hold encoded images"),
        "nested": (
            pa.table({"image": nested, "label": [0]}),
            "column 'image' is struct<.*; it must hold encoded images",
        ),
        "list": (pa.table({"image": [[good]], "label": [0]}), "column 'image' is list<.*; it must hold encoded images"),
        "label-float": (pa.table({"image": [good], "label": [1.0]}), "column 'label' is double; it must hold integers"),
        "label-list": (pa.table({"image": [good], "label": [[1]]}), "column 'label' is list<.*; it must hold integers"),
        "duplicate": (duplicate, "several columns 'label'; remove all but one"),
        "large": (
            pa.table({"image": [good], "label": [10**12]}),
            r"label 1000000000000 exceeds the limit of 1,000,000",
        ),
        "null": (pa.table({"image": [good], "label": pa.array([None], pa.int64())}), r"set data\.num_classes"),
        "one class": (pa.table({"image": [good], "label": [0]}), r"the only class is 0, .*; set data\.num_classes"),
        "rowless": (
            pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int8())}),
            "there are no labels, so the classes cannot be counted",
        ),
    }
    for name, (table, _) in tables.items():
        pq.write_table(table, folder / f"{name}.parquet")
    return {
        **{f"{name}.parquet": message for name, (_, message) in tables.items()},
        "fifo.parquet": "not a regular file; give the path of a Parquet file",
        "zero.parquet": "not a regular file; give the path of a Parquet file",
        "folder.parquet": r"contains no \*\.parquet",
        "loop.parquet": "symbolic links",
        "empty.parquet": "damaged, or not a Parquet file",
        "n" * 300: "File name too long",
    }


def test_hostile_parquet_files_give_one_line(tmp_path):
    for name, message in hostile_parquet(tmp_path).items():
        with pytest.raises(UserError, match=message) as error:
            open_dataset(Data(name="parquet", path=str(tmp_path / name)))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "imagefolder", "mnist", "parquet"])
def test_a_path_that_is_too_long_gives_one_line(name):
    split = "heldout" if name == "mnist" else "test"
    with pytest.raises(UserError, match=r"^data\.path = '/n+.*: .*too long") as error:
        open_dataset(Data(name=name, path="/" + "n" * 300, split=split))
    assert "\n" not in str(error.value)


def test_any_damage_to_a_parquet_file_gives_one_line(tmp_path, images):
    generator, whole = np.random.default_rng(1), images.read_bytes()
    lines = []
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[generator.integers(len(damaged))] ^= 1 << generator.integers(8)
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            data = open_dataset(Data(name="parquet", path=str(tmp_path / "a.parquet")))
            assert all(isinstance(data[index], Sample) for index in range(min(len(data), 8)))
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > 20
    assert not any("\n" in line for line in lines)


def test_hostile_image_files_give_one_line(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b" / "folder.png").mkdir(parents=True)
    (tmp_path / "b" / "folder.png" / "inner.png").write_bytes(png(np.zeros((4, 4), np.uint8)))
    (tmp_path / "a" / "0.png").write_bytes(png(np.zeros((4, 4), np.uint8)))
    (tmp_path / "a" / "1.png").write_bytes(b"")
    os.mkfifo(tmp_path / "a" / "2.png")
    (tmp_path / "a" / "3.png").symlink_to(tmp_path / "a" / "3.png")
    (tmp_path / "a" / "4.png").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")  # neither a folder nor an image: not a class
    data = open_dataset(Data(name="imagefolder", path=str(tmp_path)))
    assert len(data) == 6
    assert [data[index].label for index in (0, 5)] == [0, 1]
    cases = {
        1: (UserError, r"1\.png: cannot decode sample 1 \(not one of JPEG, .*; replace or exclude it"),
        2: (RunError, r"2\.png: cannot read the image of sample 2 \(not a regular file\); check the file"),
        3: (RunError, r"3\.png: cannot read the image of sample 3 \(Too many levels of symbolic links\); check"),
        4: (RunError, r"4\.png: cannot read the image of sample 4 \(not a regular file\); check the file"),
    }
    for index, (kind, message) in cases.items():
        with pytest.raises(kind, match=message):
            data[index]
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"b/up.*: this link leads to a folder that contains it; remove the link"):
        open_dataset(Data(name="imagefolder", path=str(tmp_path)))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def folder_of(tmp_path, first: bytes, **others: bytes) -> Data:
    """Class folders with the images 0.png, and others in the order of their names."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "b" / "z.png").write_bytes(first)
    (tmp_path / "a" / "0.png").write_bytes(first)
    for name, content in others.items():
        (tmp_path / "a" / f"{name}.png").write_bytes(content)
    return Data(name="imagefolder", path=str(tmp_path))


def test_only_listed_image_formats_are_opened(tmp_path, monkeypatch):
    """Pillow hands an EPS to Ghostscript, which runs the program in it."""
    from PIL import EpsImagePlugin

    def started(*_, **__):
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", started)
    image = Image.new("RGB", (4, 4))
    good, others = encoded(image, "PNG"), ("EPS", "GIF", "ICO", "PCX", "TGA")
    contents = {f"x{number}": encoded(image, kind) for number, kind in enumerate(others)}
    data = open_dataset(folder_of(tmp_path, good, **contents))
    for index in range(1, 1 + len(others)):
        with pytest.raises(UserError, match=rf"cannot decode sample {index} .*; replace or exclude it"):
            data[index]
    assert {one.lower() for one in images_module._FORMATS} >= {"jpeg", "png", "webp", "tiff", "bmp", "ppm"}


@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "PNG"])
def test_animated_images_are_refused(tmp_path, kind):
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (0, 100, 200)]
    animated = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    data = open_dataset(folder_of(tmp_path, encoded(frames[0], "PNG"), x=animated))
    with pytest.raises(UserError, match="the image of sample 1 is animated, or has 3 pages; store one of them"):
        data[1]


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P", "LA"])
def test_conversions_to_rgb_are_stated_once(tmp_path, mode, caplog):
    image = Image.new("RGB", (4, 4), (10, 20, 30)).convert("L" if mode == "LA" else "RGB").convert(mode)
    stored = encoded(image, "TIFF" if mode == "CMYK" else "PNG")
    data = open_dataset(folder_of(tmp_path, encoded(Image.new("RGB", (4, 4)), "PNG"), x=stored, y=stored))
    expected = np.asarray(image.convert("RGB"), np.float32).transpose(2, 0, 1) / np.float32(255)
    for index in (1, 2, 1):
        assert (data[index].image_CHW == expected).all()
    assert caplog.text.count(f"has mode {mode}; it is converted to RGB") == 1


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "_MOST_PIXELS", 20)
    small, large = (encoded(Image.new("RGB", (4, side)), "PNG") for side in (4, 6))
    data = open_dataset(folder_of(tmp_path, small, x=large))
    with pytest.raises(UserError, match="sample 1 has 4 x 6 pixels, the limit is 20; replace or exclude it"):
        data[1]


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "use_dictionary": False}], ids=["dictionary", "zstd"])
def test_a_row_group_that_decodes_to_far_more_than_its_size_is_refused(tmp_path, monkeypatch, options):
    monkeypatch.setattr(sources, "_MOST_DECODED", 20_000_000)
    image = bytes(1_000_000)
    table = pa.table({"image": [image] * 100, "label": [0] * 100})
    pq.write_table(table, tmp_path / "bomb.parquet", **options)
    assert (tmp_path / "bomb.parquet").stat().st_size < 2_000_000
    before = pa.total_allocated_bytes()
    data = open_dataset(Data(name="parquet", path=str(tmp_path / "bomb.parquet"), num_classes=2))
    with pytest.raises(UserError, match=r"bomb\.parquet: row group 0 holds more than 20,000,000 bytes; write smaller"):
        data[0]
    assert pa.total_allocated_bytes() - before < 40_000_000


def photographs(kind: str) -> list[tuple[Path, int]]:
    """foolbox's 20 labelled images of a data set."""
    paths = sorted(PHOTOGRAPHS.glob(f"{kind}_*"))
    return [(path, int(path.stem.rpartition("_")[2])) for path in paths]


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def by_class(tmp_path_factory) -> Path:
    """foolbox's ImageNet photographs in a folder per class."""
    root = tmp_path_factory.mktemp("imagenet")
    for path, label in photographs("imagenet"):
        (root / f"class-{label:03}").mkdir(exist_ok=True)
        shutil.copy(path, root / f"class-{label:03}" / path.name)
    (root / "class-022" / "notes.txt").write_text("no image")
    return root


@needs_photographs
@pytest.mark.parametrize(("resize", "crop"), [(256, 224), (300, None), (None, 200), (73, 51)])
def test_resize_and_crop_equal_torchvisions_bit_for_bit(by_class, resize, crop):
    from torchvision import datasets, transforms

    steps = [transforms.Resize(resize)] if resize else []
    steps += [transforms.CenterCrop(crop)] if crop else []
    truth = datasets.ImageFolder(str(by_class), transforms.Compose([*steps, transforms.ToTensor()]))
    data = open_dataset(Data(name="imagefolder", path=str(by_class), resize=resize, crop=crop))
    assert (len(data), data.num_classes) == (20, 19)
    for index, (expected, label) in enumerate(truth):
        if crop is None and expected.shape != truth[0][0].shape:
            with pytest.raises(UserError, match=rf"sample {index} is 449 x 300 pixels, but sample 0 .* is 300 x 300"):
                data[index]
            continue
        sample = data[index]
        assert sample.image_CHW.dtype == np.float32
        assert (sample.image_CHW == expected.numpy()).all()
        assert sample.label == label
        stored = Path(truth.samples[index][0]).read_bytes()
        assert sample.sha256 == hashlib.sha256(stored + str(label).encode()).hexdigest()


def test_file_endings_equal_torchvisions():
    from torchvision.datasets.folder import IMG_EXTENSIONS

    assert sources.IMAGE_ENDINGS == IMG_EXTENSIONS


@needs_photographs
def test_images_of_different_or_too_small_size_are_refused(by_class):
    data = open_dataset(Data(name="imagefolder", path=str(by_class)))
    assert data[1].image_CHW.shape == (3, 512, 512)
    unequal = next(index for index in range(20) if "_541" in data._source.place(index))
    with pytest.raises(UserError, match=r"_541\.jpg: sample \d+ is 1024 x 683 pixels, but sample 0 \(.*imagenet_17_22"
                                        r"\.jpg\) is 512 x 512.*set data\.resize and data\.crop"):  # fmt: skip
        data[unequal]
    small = open_dataset(Data(name="imagefolder", path=str(by_class), crop=600))
    with pytest.raises(UserError, match=r"sample 0 is 512 x 512 pixels, smaller than data\.crop = 600"):
        small[0]


def test_wrong_class_folders_are_named(tmp_path):
    def folder(**classes):
        root = tmp_path / f"set-{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        for name, files in classes.items():
            (root / name).mkdir()
            for file in files:
                (root / name / file).write_bytes(png(np.zeros((4, 4), np.uint8)))
        return str(root)

    cases = [
        (None, r"data\.path is missing"),
        ("s3://bucket/images", "reads only folders of this node"),
        (str(tmp_path / "none"), "No such file or directory; give the folder of class folders"),
        (folder(), "contains no folder"),
        (folder(a=["1.png"], b=["notes.txt"]), "the class folder b contains no image .*, but counts as a class"),
        (folder(train=["1.png"], test=["1.png"]), "contains test, train, which are splits, not classes"),
        (folder(a=["1.png"]), r"contains only the class folder a; set data\.num_classes"),
    ]
    for path, message in cases:
        with pytest.raises(UserError, match=message):
            open_dataset(Data(name="imagefolder", path=path))
    grey = open_dataset(Data(name="imagefolder", path=folder(b=["2.PNG", "1.png"], a=["3.jpeg"])))
    assert [grey[index].label for index in range(3)] == [0, 1, 1]
    assert [Path(grey._source.place(index)).name for index in range(3)] == ["3.jpeg", "1.png", "2.PNG"]
    assert grey[0].image_CHW.shape == (3, 4, 4)


@pytest.fixture(scope="module")
def imagenet_classes() -> list[str]:
    timm = importlib.util.find_spec("timm")
    if timm is None:
        pytest.skip("timm, which ships ImageNet's class names, is missing")
    return (Path(str(timm.origin)).parent / "data" / "_info" / "imagenet_synsets.txt").read_text().split()


def test_imagenet_classes_are_in_sorted_order(imagenet_classes):
    assert imagenet_classes == sorted(imagenet_classes)
    assert hashlib.sha256("\n".join(imagenet_classes).encode()).hexdigest() == imagenet._IMAGENET_CLASSES


@needs_photographs
def test_imagenet(imagenet_classes, tmp_path, caplog):
    from torchvision import transforms

    for name in imagenet_classes:
        (tmp_path / "val" / name).mkdir(parents=True)
    for path, label in photographs("imagenet"):
        shutil.copy(path, tmp_path / "val" / imagenet_classes[label] / path.name)
    caplog.set_level(logging.INFO, "diffsmooth.pipeline.data")
    data = open_dataset(Data(name="imagenet", path=str(tmp_path)))
    assert "classes 0 n01440764 to 999 n15075141, 20 images" in caplog.text
    assert (len(data), data.num_classes) == (20, 1000)
    truth = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])
    expected = sorted(photographs("imagenet"), key=lambda one: (one[1], one[0].name))
    for index, (path, label) in enumerate(expected):
        assert data[index].label == label
        assert (data[index].image_CHW == truth(Image.open(path).convert("RGB")).numpy()).all()
    flat = open_dataset(Data(name="imagenet", path=str(tmp_path / "val"), resize=300, crop=299))
    assert flat[0].image_CHW.shape == (3, 299, 299)
    (tmp_path / "val" / "n15075141").rename(tmp_path / "val" / "n15075142")
    with pytest.raises(UserError, match=r"\(n01440764 to n15075142\) are not those of ILSVRC-2012"):
        open_dataset(Data(name="imagenet", path=str(tmp_path)))
    shutil.rmtree(tmp_path / "val" / "n15075142")
    with pytest.raises(UserError, match=r"found 999 class folders .*, starting with n01440764, but ImageNet has 1000"):
        open_dataset(Data(name="imagenet", path=str(tmp_path)))


def test_imagenet_without_class_folders(tmp_path):
    with pytest.raises(UserError, match="found 0 class folders"):
        open_dataset(Data(name="imagenet", path=str(tmp_path)))
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(UserError, match="sort them into the 1000 class folders"):
        open_dataset(Data(name="imagenet", path=str(tmp_path)))
    with pytest.raises(UserError, match=r"data\.split = 'heldout': imagenet has the splits"):
        open_dataset(Data(name="imagenet", path=str(tmp_path), split="heldout"))


def test_resize_and_crop_are_part_of_votes_id(raw_spec):
    before = votes_id(load_spec(raw_spec), {})
    assert votes_id(load_spec(raw_spec, ["data.resize=8"]), {}) != before
    raw_spec["data"]["name"] = "imagenet"
    spec = load_spec(raw_spec)
    assert (spec.data.resize, spec.data.crop) == (256, 224)
    assert votes_id(load_spec(raw_spec, ["data.resize=256", "data.crop=224"]), {}) == votes_id(spec, {})
    with pytest.raises(UserError, match=r"\[data\] crop = 224 exceeds resize = 128, the shorter side"):
        load_spec(raw_spec, ["data.resize=128"])
    with pytest.raises(UserError, match=r"data\.crop = 0: input should be greater"):
        load_spec(raw_spec, ["data.crop=0"])


def pickled(pixels_NHWC, labels) -> bytes:
    return pickle.dumps({"data": pixels_NHWC.transpose(0, 3, 1, 2).reshape(len(labels), -1), "labels": labels})


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A small CIFAR-10 made of foolbox's photographs, in the format of its Python version, with matching md5 sums."""
    from torchvision.datasets import CIFAR10

    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    pixels_NHWC = np.stack([np.asarray(Image.open(path)) for path, _ in photographs("cifar10")])
    labels = [label for _, label in photographs("cifar10")]
    folder = tmp_path / "given" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    files = {
        "test_batch": pickled(pixels_NHWC, labels),
        "batches.meta": pickle.dumps({"label_names": list("abcdefghij")}),
    }
    files |= {f"data_batch_{batch}": pickled(pixels_NHWC[batch::6], labels[batch::6]) for batch in range(1, 6)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    sums = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        CIFAR10, "train_list", [[f"data_batch_{batch}", sums[f"data_batch_{batch}"]] for batch in range(1, 6)]
    )
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    with tarfile.open(tmp_path / CIFAR10.filename, "w:gz") as archive:
        archive.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5((tmp_path / CIFAR10.filename).read_bytes()).hexdigest())
    return tmp_path, pixels_NHWC, labels


@needs_photographs
def test_cifar10_from_a_folder(cifar10):
    root, pixels_NHWC, labels = cifar10
    data = open_dataset(Data(name="cifar10", path=str(root / "given")))
    assert (len(data), data.num_classes) == (20, 10)
    for index, label in enumerate(labels):
        expected = pixels_NHWC[index].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        assert (data[index].image_CHW == expected).all()
        assert data[index].image_CHW.dtype == np.float32
        assert data[index].sha256 == hashlib.sha256(pixels_NHWC[index].tobytes() + str(label).encode()).hexdigest()
    train = open_dataset(Data(name="cifar10", path=str(root / "given"), split="train"))
    assert [train[index].label for index in range(3)] == labels[1::6][:3]
    with pytest.raises(IndexError):
        data[20]
    (root / "given" / "cifar-10-batches-py" / "test_batch").write_bytes(b"other")
    with pytest.raises(UserError, match="a file is missing or damaged"):
        open_dataset(Data(name="cifar10", path=str(root / "given")))


@needs_photographs
def test_cifar10_from_its_archive_and_by_download(cifar10, monkeypatch):
    from torchvision.datasets import CIFAR10

    root, _, labels = cifar10
    asked = []

    def fetch(uri):
        asked.append(uri)
        return root / CIFAR10.filename

    monkeypatch.setattr(cifar10_module, "fetch", fetch)
    for path in (str(root), str(root / CIFAR10.filename), None, "s3://bucket/cifar-10-python.tar.gz", None):
        if path != str(root / CIFAR10.filename):  # the cache of the previous call is used
            shutil.rmtree(root / "cache", ignore_errors=True)
        assert [open_dataset(Data(name="cifar10", path=path))[3].label] == labels[3:4]
    assert asked == [CIFAR10.url, "s3://bucket/cifar-10-python.tar.gz", CIFAR10.url]
    (root / "cache" / "cifar10" / CIFAR10.base_folder / "data_batch_3").unlink()  # as if killed while unpacking
    assert open_dataset(Data(name="cifar10"))[3].label == labels[3]
    shutil.rmtree(root / "cache")
    (root / CIFAR10.filename).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"differs from the published cifar-10-python\.tar\.gz \(md5 \w{32}\); use the"):
        open_dataset(Data(name="cifar10"))


def test_missing_cifar10_is_reported(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))

    def fail(uri):
        raise UserError(f"{uri}: unknown host")

    monkeypatch.setattr(cifar10_module, "fetch", fail)
    with pytest.raises(UserError, match=r"cannot download cifar10: https://.*and set data\.path to its folder"):
        open_dataset(Data(name="cifar10"))
    with pytest.raises(UserError, match=r"contains neither cifar-10-batches-py nor cifar-10-python\.tar\.gz"):
        open_dataset(Data(name="cifar10", path=str(tmp_path)))
    with pytest.raises(UserError, match="cifar10 has test and train"):
        open_dataset(Data(name="cifar10", split="val"))
    with pytest.raises(UserError, match="all 32 x 32"):
        open_dataset(Data(name="cifar10", resize=64))


def test_published_facts_are_known_without_opening():
    assert known_facts(Data(name="cifar10")) == Facts(10_000, (3, 32, 32), 10)
    assert known_facts(Data(name="cifar10", split="train")) == Facts(50_000, (3, 32, 32), 10)
    assert known_facts(Data(name="imagenet")) == Facts(50_000, (3, 224, 224), 1000)
    assert known_facts(Data(name="imagenet", resize=512, crop=512)) == Facts(50_000, (3, 512, 512), 1000)
    assert known_facts(Data(name="parquet", path="a")) is None
    mnist = open_dataset(Data(name="mnist", split="heldout"))
    found = Facts(len(mnist), mnist[0].image_CHW.shape, mnist.num_classes)
    assert known_facts(Data(name="mnist", split="heldout")) == found


def test_images_of_different_modes(tmp_path):
    """Grey images after a colour image become RGB; colour after grey is refused; resizing makes all images RGB."""
    grey = png(np.arange(16, dtype=np.uint8).reshape(4, 4))
    colour = png(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    data = open_dataset(write(tmp_path / "a.parquet", {"image": [colour, grey], "label": [0, 1]}))
    assert (data[1].image_CHW == data[1].image_CHW[:1]).all()
    assert data[1].image_CHW.shape == (3, 4, 4)
    path = write(tmp_path / "b.parquet", {"image": [grey, colour], "label": [0, 1]})
    assert open_dataset(path)[0].image_CHW.shape == (1, 4, 4)
    with pytest.raises(UserError, match="sample 1 has mode RGB, but sample 0 is greyscale"):
        open_dataset(path)[1]
    resized = open_dataset(path.model_copy(update={"resize": 2}))
    assert [resized[index].image_CHW.shape for index in (1, 0)] == [(3, 2, 2)] * 2


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("RGB", 100), ("RGBA", 100), ("LA", 100), ("P", None), ("1", 0), ("CMYK", None), ("I;16", UserError)],
)
def test_every_mode_is_decoded_or_refused(tmp_path, caplog, mode, expected):
    with io.BytesIO() as buffer:
        image = Image.new("RGB", (4, 4), (100, 100, 100)).convert(mode) if mode != "I;16" else Image.new(mode, (4, 4))
        image.save(buffer, format="JPEG" if mode == "CMYK" else "PNG")
        stored = buffer.getvalue()
    data = open_dataset(write(tmp_path / "a.parquet", {"image": [stored] * 2, "label": [0, 1]}))
    if expected is UserError:
        with pytest.raises(
            UserError, match=r"image of sample 1 has more than 8 bits per channel .*convert the images to 8 bits"
        ):
            data[1]
        assert not caplog.messages
        return
    assert data[1].image_CHW.shape == (3, 4, 4)
    if expected is not None and mode != "1":
        assert (data[1].image_CHW == np.float32(expected) / np.float32(255)).all()


def test_any_damage_to_an_image_gives_one_line(tmp_path):
    """Truncated or flipped bytes give an image or a UserError, never another exception."""
    noise = np.random.default_rng(0)
    picture = Image.fromarray(noise.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    stored = []
    for good in (jpeg(picture), png(np.asarray(picture))):
        stored += [good[:length] for length in range(0, len(good), 41)]
        for _ in range(40):
            bad = bytearray(good)
            bad[noise.integers(len(bad))] ^= 1 << noise.integers(8)
            stored.append(bytes(bad))
    data = open_dataset(
        write(tmp_path / "a.parquet", {"image": [jpeg(picture), *stored], "label": [0, 1] + [0] * (len(stored) - 1)})
    )
    outcomes = set()
    for index in range(1, len(data)):
        try:
            outcomes.add(type(data[index]))
        except UserError as error:
            outcomes.add((UserError, f"sample {index} " in str(error)))
    assert outcomes == {Sample, (UserError, True)}


def in_parts(folder: Path, split: str = "test", **changed) -> list[bytes]:
    """Write ten 4 x 4 images in three files with Hugging Face's names, in row groups of two."""
    stored = [png(np.full((4, 4), 10 * index, np.uint8)) for index in range(10)]
    folder.mkdir(exist_ok=True)
    for part, (start, stop) in enumerate([(0, 5), (5, 6), (6, 10)]):
        columns = {"image": stored[start:stop], "label": [index % 2 for index in range(start, stop)]}
        if part == 2:
            columns |= changed
        pq.write_table(pa.table(columns), folder / f"{split}-0000{part}-of-00003.parquet", row_group_size=2)
    return stored


def test_a_folder_of_parquet_files(tmp_path):
    stored = in_parts(tmp_path / "a")
    in_parts(tmp_path / "a", "train")
    data = open_dataset(Data(name="parquet", path=str(tmp_path / "a")))
    assert (len(data), data.num_classes) == (10, 2)
    for index in (9, 0, 5, 4, 6, 1, 8):
        assert data[index].image_CHW[0, 0, 0] == np.float32(10 * index) / np.float32(255)
        assert data[index].label == index % 2
        assert data[index].sha256 == hashlib.sha256(stored[index] + str(index % 2).encode()).hexdigest()
    assert data._source.place(5).endswith("test-00001-of-00003.parquet")
    with pytest.raises(IndexError):
        data[10]
    with pytest.raises(UserError, match=r"data\.split = 'validation': .*/a contains test, train; set data\.split"):
        open_dataset(Data(name="parquet", path=str(tmp_path / "a"), split="validation"))
    for number, name in enumerate(("x.parquet", "y.parquet")):
        (tmp_path / "b").mkdir(exist_ok=True)
        pq.write_table(pa.table({"image": stored[number : number + 1], "label": [number]}), tmp_path / "b" / name)
    assert len(open_dataset(Data(name="parquet", path=str(tmp_path / "b"), split="validation"))) == 2


def test_parquet_files_of_different_data_sets_are_refused(tmp_path):
    in_parts(tmp_path / "a", label=["x"] * 4)
    with pytest.raises(UserError, match=r"test-00002-of.*column 'label' is string; it must hold integers"):
        open_dataset(Data(name="parquet", path=str(tmp_path / "a")))
    in_parts(tmp_path / "b", more=[1] * 4)
    with pytest.raises(UserError, match=r"test-00002-of.*more: int64\) differ from those of"):
        open_dataset(Data(name="parquet", path=str(tmp_path / "b")))
    (tmp_path / "c").mkdir()
    with pytest.raises(UserError, match=r"contains no \*\.parquet"):
        open_dataset(Data(name="parquet", path=str(tmp_path / "c")))
    with pytest.raises(UserError, match="column 'image' is string; it must hold encoded images"):
        open_dataset(write(tmp_path / "d.parquet", {"image": ["a.png"], "label": [0]}))
    empty = pa.array([{"bytes": None, "path": "a.png"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    data = write(tmp_path / "e.parquet", {"image": empty, "label": [1]})
    with pytest.raises(UserError, match="sample 0 has no image bytes"):
        open_dataset(data)[0]


def test_classes_are_counted_in_hugging_faces_metadata(tmp_path):
    stored = [png(np.zeros((4, 4), np.uint8))] * 2
    names = {"info": {"features": {"label": {"names": list("abcdefg"), "_type": "ClassLabel"}}}}
    table = pa.table({"image": stored, "label": [0, 1]}).replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, tmp_path / "a.parquet")
    data = Data(name="parquet", path=str(tmp_path / "a.parquet"))
    assert open_dataset(data).num_classes == 7
    assert open_dataset(data.model_copy(update={"num_classes": 9})).num_classes == 9
    pq.write_table(table.replace_schema_metadata({"huggingface": "{"}), tmp_path / "a.parquet")
    assert open_dataset(data).num_classes == 2


@pytest.fixture
def moto(monkeypatch) -> Iterator[object]:
    credentials(monkeypatch)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it would keep the first credentials
    with moto_server() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="bucket")
        yield client


def test_parquet_on_s3_is_read_by_row_group(moto, tmp_path, monkeypatch):
    stored = [
        np.random.default_rng(index).bytes(50_000) for index in range(100)
    ]  # most are not images: only the number of bytes matters
    stored[7] = png(np.full((4, 4), 70, np.uint8))
    stored[0] = stored[50] = stored[88] = stored[7]
    for part in range(2):
        rows = slice(50 * part, 50 * (part + 1))
        table = pa.table({"image": stored[rows], "label": [index % 10 for index in range(100)][rows]})
        pq.write_table(table, tmp_path / "part.parquet", row_group_size=5)
        moto.upload_file(str(tmp_path / "part.parquet"), "bucket", f"set/test-0000{part}-of-00002.parquet")
    read = []
    readinto = ObjectFile.readinto

    def counting(self, buffer):
        read.append(readinto(self, buffer))
        return read[-1]

    monkeypatch.setattr(ObjectFile, "readinto", counting)
    data = open_dataset(Data(name="parquet", path="s3://bucket/set", num_classes=10))
    assert len(data) == 100
    assert sum(read) < 200_000
    read.clear()
    assert data[7].sha256 == hashlib.sha256(stored[7] + b"7").hexdigest()
    assert sum(read) < 2 * 5 * 50_000 + 100_000  # the sample's row group, and that of sample 0 for the mode
    read.clear()
    assert data[88].label == 8
    assert sum(read) < 5 * 50_000 + 10_000
    one = open_dataset(Data(name="parquet", path="s3://bucket/set/test-00001-of-00002.parquet"))
    assert (len(one), one.num_classes) == (50, 10)
    assert one[38][1:] == data[88][1:]
    for path, message in [
        ("s3://bucket/none.parquet", "no such file"),
        ("s3://nobucket/none.parquet", r"no such file|there is no bucket"),
        ("s3://nobucket/set", "there is no bucket nobucket"),
        ("s3://bucket/empty", r"contains no \*\.parquet"),
    ]:
        with pytest.raises(UserError, match=message):
            open_dataset(Data(name="parquet", path=path))


def test_a_data_set_is_identified_by_its_size_and_samples(images):
    rows = pq.read_table(images).to_pylist()
    before = dataset_id(open_dataset(Data(name="parquet", path=str(images))))
    assert dataset_id(open_dataset(Data(name="parquet", path=str(images)))) == before
    for changed in (rows[:-1], rows[::-1], [*rows[:-1], {**rows[-1], "label": 0}]):
        pq.write_table(pa.Table.from_pylist(changed), images)
        assert dataset_id(open_dataset(Data(name="parquet", path=str(images)))) != before


def array_data(path, name="npz", **options):
    return open_dataset(Data(name=name, path=str(path), **options))


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_images_and_labels_of_numpy(tmp_path, layout, kind):
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (4, 5, 6) if layout == "NHW" else (4, 5, 6, 3), dtype=np.uint8)
    expected = (x[:, None] if layout == "NHW" else x.transpose(0, 3, 1, 2)) / 255
    stored = x if kind == np.uint8 else x / 255
    np.savez(tmp_path / "a.npz", x=stored.transpose(0, 3, 1, 2) if layout == "NCHW" else stored, y=[0, 2, 1, -1])
    data = array_data(tmp_path / "a.npz")
    assert (len(data), data.num_classes) == (4, 3)
    assert [data[index].label for index in range(4)] == [0, 2, 1, -1]
    assert np.allclose(np.stack([data[index].image_CHW for index in range(4)]), expected, atol=1e-7)
    assert len({data[index].sha256 for index in range(4)}) == 4


@pytest.mark.parametrize("header", ["", "label,a,b,c,d,e,f,g,h,i,j,k,l\n"])
def test_rows_of_labels_and_pixels(tmp_path, header):
    """Twelve pixels are a colour image of 2 x 2: red, then green, then blue."""
    (tmp_path / "a.csv").write_text(f"{header}1,{','.join(map(str, range(12)))}\n0,{','.join(['255'] * 12)}\n")
    data = array_data(tmp_path / "a.csv", "csv")
    assert [data[index].label for index in range(2)] == [1, 0]
    assert np.array_equal(data[0].image_CHW * 255, np.arange(12).reshape(3, 2, 2))
    (tmp_path / "grey.csv").write_text("0,1,2,3,4\n")
    assert array_data(tmp_path / "grey.csv", "csv")[0].image_CHW.shape == (1, 2, 2)


def test_unsuitable_arrays_and_tables_give_one_line(tmp_path):
    good = np.zeros((2, 4, 4), np.uint8)
    for arrays, message in (
        ({"images": good}, r"npz': holds images; save the arrays x \(images\) and y \(labels\)$"),
        ({"x": good, "y": np.array([None, 1], dtype=object)}, "without Python objects"),
        ({"x": good[0], "y": [0]}, r"x has shape \(4, 4\)"),
        ({"x": good + 2.0, "y": [0, 1]}, "float with values in"),
        ({"x": good.astype(np.int32), "y": [0, 1]}, "it must be uint8"),
        ({"x": good, "y": [0]}, r"labels have shape \(1,\)"),
        ({"x": good, "y": [0.5, 1]}, "type float64"),
        ({"x": good, "y": [-2, 1]}, "labels reach from -2 to 1"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)
        with pytest.raises(UserError, match=message):
            array_data(tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", x=good, y=[0, 1])
    content = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(content[: len(content) // 2])
    np.save(tmp_path / "one.npy", good)
    for name, text, message in (
        ("one.npy", None, r"numpy\.savez \(it holds one array\); save"),
        ("half.npz", None, r"cannot be read as a file of numpy\.savez"),
        ("none.npz", None, "there is no such file"),
        ("a.csv", "0,1,2,3,4,5\n", "a row has 5 pixels after its label"),
        ("a.csv", "0,1,2,3,256\n", "they must be 0 to 255"),
        ("a.csv", "0,1,2,x,4\n", "write whole numbers"),
        ("a.csv", "0,1,2,0.5,4\n", r"\(0.5 is not a whole number\); write whole numbers"),
        ("a.csv", "0,1,2,,4\n", r"\(nan is not a whole number\); write whole numbers"),
        ("a.csv", "", "write whole numbers"),
        ("a.csv", "label,a\n", "contains no row"),
    ):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            array_data(tmp_path / name, "csv" if name.endswith(".csv") else "npz")
    with pytest.raises(UserError, match=r"are not applied to data\.name = 'npz'"):
        array_data(tmp_path / "a.npz", resize=8)
