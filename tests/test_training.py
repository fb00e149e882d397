"""The loop of a training: the same weights however it is cut, and one line for each thing that can go wrong."""

import csv
import errno
import io
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomli_w
import torch
from click.testing import CliRunner
from safetensors.torch import load, load_file

from diffsmooth.jobs.cli import main
from diffsmooth.pipeline.errors import RunError, Stopped, UserError
from diffsmooth.pipeline.models.classifiers import resolve_classifier
from diffsmooth.pipeline.models.rrcm import PRESETS, RRCMSettings, nearest_level
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import MemoryStore, open_store
from diffsmooth.pipeline.training import losses
from diffsmooth.pipeline.training.batches import Order, augment, shards_of
from diffsmooth.pipeline.training.loop import decay, learning_rate, run_training
from diffsmooth.pipeline.training.randomness import Randomness
from diffsmooth.pipeline.training.settings import load_training
from diffsmooth.pipeline.training.tasks import make_task
from diffsmooth.pipeline.training.world import World
from tests.cloud_servers import StoreServer
from tests.models import png

CPU = torch.device("cpu")


def write_images(path: Path, labels, sides=(28,)) -> str:
    """Grey images, brighter for class 1."""
    rng = np.random.default_rng(0)
    rows = []
    for index, label in enumerate(labels):
        side = sides[index % len(sides)]
        pixels = rng.integers(0, 100, (side, side)) + 100 * max(label, 0)
        rows.append({"bytes": png(pixels.astype(np.uint8)), "path": None})
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, image_type), "label": pa.array(labels)}), path)
    return str(path)


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "train.parquet", [0, 1] * 30)


def raw_training(path: str, **changes):
    raw = {
        "name": "tiny",
        "task": "classifier",
        "data": {"name": "parquet", "path": path},
        "classifier": {"arch": "mnist_cnn"},
        "classifier_loss": {"images": "noisy", "sigmas": [0.25, 0.5]},
        "training": {"steps": 6, "batch": 12, "shards": 2, "warmup": 1, "checkpoints": 3, "augment": ["flip", "shift"]},
        "smoothing": {"sigma": 0.25, "n0": 100, "n": 1000},
        "compute": {"device": "cpu"},
    }
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value} if isinstance(value, dict) else value
    return raw


UNET = {"model_channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "num_groups": 4, "patch": 2}


def denoiser_training(path: str, **changes):
    raw = raw_training(path, task="denoiser", denoiser={"arch": "unet", "unet": UNET}, **changes)
    del raw["classifier_loss"]
    if "checkpoint" not in raw["classifier"]:
        del raw["classifier"]
    return raw


def train(raw, store, **options):
    return run_training(load_training(raw), store, device=CPU, world=World(), **options)


def weights(store):
    return load(store.read("weights.safetensors"))


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


class Killed(Exception):
    """Stands for the end of the process."""


def die_after(step):
    def on_step(report):
        if report.step == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("make", [raw_training, denoiser_training])
def test_a_training_that_was_killed_ends_with_the_same_weights_and_metrics(images, make):
    whole, cut = MemoryStore(), MemoryStore()
    rows = train(make(images), whole)
    for step in (3, 5):  # after the checkpoints of steps 2 and 4
        with pytest.raises(Killed):
            train(make(images), cut, on_step=die_after(step))
    again = train(make(images), cut)
    assert_equal(weights(whole), weights(cut))
    for one in (*rows, *again):
        del one["seconds"]
    assert rows == again
    assert [row["step"] for row in rows] == [2, 4, 6]


def test_a_training_in_a_bucket_is_resumed_and_certified_from_there(images, moto_url, monkeypatch, tmp_path):
    StoreServer(scheme="s3", url=moto_url).use(monkeypatch)
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    whole, bucket = MemoryStore(), open_store(f"s3://bucket/{tmp_path.name}")
    train(raw_training(images), whole)
    with pytest.raises(Killed):
        train(raw_training(images), bucket, on_step=die_after(3))
    train(raw_training(images), bucket)
    assert_equal(weights(whole), weights(bucket))
    spec = load_spec(tomllib.loads(bucket.read("certify.toml").decode()))
    assert spec.classifier.checkpoint == f"s3://bucket/{tmp_path.name}/weights.safetensors"
    network = resolve_classifier(spec).load(CPU, 1, 2).network
    assert_equal(network.state_dict(), weights(whole))


def test_a_full_disk_is_reported_and_costs_no_more_than_the_last_checkpoint(images, tmp_path, monkeypatch):
    whole, store, sync = MemoryStore(), open_store(str(tmp_path / "out")), os.fsync
    train(raw_training(images), whole)
    with pytest.raises(Killed):
        train(raw_training(images), store, on_step=die_after(5))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*; free some space") as caught:
        train(raw_training(images), store)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(os, "fsync", sync)
    assert sorted(store.keys("checkpoints")) == [f"checkpoints/00000000{step}.safetensors" for step in (2, 4)]
    train(raw_training(images), store)
    assert_equal(weights(whole), weights(store))


def test_images_on_the_hub_give_the_weights_of_the_same_images_here(images, hub):
    here, there = MemoryStore(), MemoryStore()
    train(raw_training(images), here)
    hub.repositories["datasets/org/set"] = {"main": {"train.parquet": Path(images).read_bytes()}}
    train(raw_training("hf://datasets/org/set/train.parquet"), there)
    assert_equal(weights(here), weights(there))


@pytest.mark.parametrize("make", [raw_training, denoiser_training])
def test_bf16_rounds_the_same_training_and_can_be_resumed(images, make):
    whole, cut, exact = MemoryStore(), MemoryStore(), MemoryStore()
    short = {"steps": 3, "checkpoints": 3}
    bf16 = make(images, training={**short, "precision": "bf16"})
    rows, exact_rows = train(bf16, whole), train(make(images, training=short), exact)
    with pytest.raises(Killed):
        train(bf16, cut, on_step=die_after(2))
    train(bf16, cut)
    assert_equal(weights(whole), weights(cut))
    assert all(one.dtype != torch.bfloat16 for one in weights(whole).values())
    assert rows[-1]["loss"] != exact_rows[-1]["loss"]
    assert rows[-1]["loss"] == pytest.approx(exact_rows[-1]["loss"], rel=0.05)


def test_a_training_that_is_stopped_keeps_the_step_it_stopped_at(images):
    whole, cut, calls = MemoryStore(), MemoryStore(), iter([None, None, 15])
    train(raw_training(images), whole)
    with pytest.raises(Stopped):
        train(raw_training(images), cut, stopped_by=lambda: next(calls))
    assert max(cut.keys("checkpoints")) == "checkpoints/000000003.safetensors"
    train(raw_training(images), cut)
    assert_equal(weights(whole), weights(cut))


def test_the_global_generator_is_neither_seeded_nor_used(images):
    before = torch.random.get_rng_state()
    train(raw_training(images), MemoryStore())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_gives_other_weights(images):
    one, other = MemoryStore(), MemoryStore()
    train(raw_training(images), one)
    train(raw_training(images, training={"seed": 1}), other)
    assert not torch.equal(weights(one)["conv1.weight"], weights(other)["conv1.weight"])


@pytest.mark.parametrize(
    "loss",
    [
        {"images": "clean", "sigmas": []},
        {"copies": 2, "consistency": {"weight": 5.0}},
        {"copies": 2, "macer": {}},
        {"copies": 2, "confidence": {"steps": 1}},
        {"copies": 2, "similarity": {}},
        {"copies": 2, "consistency": {}, "macer": {}, "similarity": {}},
    ],
    ids=["clean", "consistency", "macer", "confidence", "similarity", "combined"],
)
def test_each_loss_changes_what_is_learnt(images, loss):
    plain, store = MemoryStore(), MemoryStore()
    train(raw_training(images), plain)
    rows = train(raw_training(images, classifier_loss=loss), store)
    assert not torch.equal(weights(plain)["fc.weight"], weights(store)["fc.weight"])
    assert all(np.isfinite(list(row.values())).all() for row in rows)


def test_a_classifier_learns_and_its_spec_certifies(images, tmp_path):
    store = open_store(str(tmp_path / "out"))
    rows = train(raw_training(images, training={"steps": 60, "learning_rate": 0.01, "ema": 0.9}), store)
    assert rows[-1]["clean_accuracy"] == rows[-1]["accuracy_at_0.25"] == 1.0
    spec = load_spec(tmp_path / "out" / "certify.toml")
    assert spec.classifier.checkpoint == str(tmp_path / "out" / "weights.safetensors")
    assert spec.data.samples == "0:60:20"
    table = list(csv.DictReader(io.StringIO(store.read("metrics.csv").decode())))
    assert [row["step"] for row in table] == ["20", "40", "60"]
    assert store.read("loss.png").startswith(b"\x89PNG")


def test_a_classifier_is_trained_on_denoised_images_and_certified_with_the_denoiser(images, tmp_path):
    first, second = open_store(str(tmp_path / "denoiser")), open_store(str(tmp_path / "classifier"))
    train(denoiser_training(images), first)
    denoiser = {"arch": "unet", "unet": UNET, "checkpoint": str(tmp_path / "denoiser" / "weights.safetensors")}
    loss = {"images": "denoised", "local_sigma": 0.25}
    rows = train(raw_training(images, denoiser=denoiser, classifier_loss=loss), second)
    assert {"clean_accuracy", "accuracy_at_0.25", "accuracy_at_0.5"} <= rows[-1].keys()
    spec = load_spec(tmp_path / "classifier" / "certify.toml")
    assert spec.denoiser.checkpoint == denoiser["checkpoint"]
    assert spec.denoiser.unet is not None


def test_an_rrcm_is_trained_from_scratch_at_the_noise_level_that_is_certified(images, tmp_path, monkeypatch):
    small = RRCMSettings(channels=1, patch=14, width=8, hidden=8, depth=1, patches=4, num_classes=2)
    monkeypatch.setitem(PRESETS, "rrcm-b4", small)
    raw = raw_training(images, classifier={"arch": "rrcm-b4"}, smoothing={"sigma": 1.0},
                       training={"steps": 1, "checkpoints": 1})  # fmt: skip
    task = make_task(load_training(raw), CPU, (1, 28, 28), 2)
    assert task.network.level == nearest_level(1.0)
    train(raw, open_store(str(tmp_path)))
    with pytest.raises(UserError, match=r"smoothing.sigma is 1.0 there and 0.5 here"):
        train({**raw, "smoothing": {"sigma": 0.5}}, open_store(str(tmp_path)))
    certified = resolve_classifier(load_spec(tmp_path / "certify.toml")).load(CPU, 1, 2)
    assert certified.level == task.network.level
    assert_equal(certified.state_dict(), load_file(tmp_path / "weights.safetensors"))


def test_the_command_finds_own_functions_beside_the_training(images, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_linear.py").write_text(
        "from torch import nn\n\ndef make(spec, device):\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 2))\n"
    )
    raw = raw_training(images, classifier={"arch": "own_linear:make"}, training={"steps": 1, "checkpoints": 1})
    (tmp_path / "training.toml").write_text(tomli_w.dumps(raw))
    result = CliRunner().invoke(main, ["train", str(tmp_path / "training.toml"), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert load_file(tmp_path / "out" / "weights.safetensors")["1.weight"].shape == (2, 784)


def test_the_denoiser_of_edm_is_trained_from_scratch(images):
    store = MemoryStore()
    raw = denoiser_training(images, denoiser_loss={"edm": {"model_channels": 4, "channel_mult": [1, 2]}})
    raw["denoiser"] = {"arch": "edm"}
    rows = train(raw, store)
    assert "squared_error_at_0.25" in rows[-1]
    assert "enc.28x28_conv.weight" in weights(store)


def test_a_denoiser_is_judged_by_a_classifier(images, tmp_path):
    store = open_store(str(tmp_path / "classifier"))
    train(raw_training(images), store)
    classifier = {"arch": "mnist_cnn", "checkpoint": str(tmp_path / "classifier" / "weights.safetensors")}
    rows = train(denoiser_training(images, classifier=classifier), open_store(str(tmp_path / "denoiser")))
    assert 0 <= rows[-1]["accuracy_at_0.25"] <= 1
    spec = load_spec(tmp_path / "denoiser" / "certify.toml")
    assert load_file(spec.denoiser.checkpoint).keys() == weights(open_store(str(tmp_path / "denoiser"))).keys()


def test_a_training_that_diverges_stops_and_keeps_its_checkpoints(images, monkeypatch):
    store, calls, cross_entropy = MemoryStore(), iter(range(1000)), losses.cross_entropy

    def failing(logits_MBK, label_B, smoothing):
        return cross_entropy(logits_MBK, label_B, smoothing) * (float("nan") if next(calls) >= 8 else 1.0)

    monkeypatch.setattr(losses, "cross_entropy", failing)  # two shards a step: step 5 diverges
    with pytest.raises(RunError, match=r"diverged: the loss of step 5 is nan .*; use a lower training.learning_rate"):
        train(raw_training(images), store)
    monkeypatch.undo()
    train(raw_training(images), store)
    whole = MemoryStore()
    train(raw_training(images), whole)
    assert_equal(weights(whole), weights(store))


def test_the_storage_of_another_training_is_refused(images):
    store = MemoryStore()
    train(raw_training(images), store)
    with pytest.raises(UserError, match=r"training.seed is 0 there and 7 here; use another --out"):
        train(raw_training(images, training={"seed": 7}), store)


def test_a_checkpoint_that_another_training_left_here_is_not_resumed(images):
    """A process of a deleted training can end its checkpoint after a new training has begun in the same place."""
    old, new = MemoryStore(), MemoryStore()
    for raw, store in ((raw_training(images), old), (raw_training(images, training={"seed": 1}), new)):
        with pytest.raises(Stopped):
            train(raw, store, stopped_by=lambda: 15)
    key = "checkpoints/000000001.safetensors"
    assert train(raw_training(images), old)[-1]["step"] == 6  # its own
    new.replace(key, old.read(key))
    with pytest.raises(RunError, match=f"{key}: belongs to another training; use another --out"):
        train(raw_training(images, training={"seed": 1}), new)


def test_a_damaged_checkpoint_is_named(images):
    store = MemoryStore()
    with pytest.raises(Killed):
        train(raw_training(images), store, on_step=die_after(5))
    store.replace("checkpoints/000000004.safetensors", b"no checkpoint")
    with pytest.raises(RunError, match=r"000000004.safetensors: damaged checkpoint .*; delete it"):
        train(raw_training(images), store)


@pytest.mark.parametrize(
    ("labels", "sides", "message"),
    [
        ([-1] * 40, (28,), "a sample has no label"),
        ([1] * 40, (28,), "all samples have label 1; use images of at least 2 classes"),
        ([0, 1] * 20, (28, 24), "24 x 24 pixels, but sample 0"),
        ([0, 1] * 4, (28,), "8 images are too few to hold out every 20th"),
    ],
)
def test_unsuitable_images_are_refused(tmp_path, labels, sides, message):
    path = write_images(tmp_path / "images.parquet", labels, sides)
    with pytest.raises(UserError, match=message):
        train(raw_training(path, data={"num_classes": 2}), MemoryStore())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"shards": 13}}, "shards = 13 exceeds batch = 12; use"),
        ({"training": {"checkpoints": 7}}, "checkpoints = 7 exceeds steps = 6; use"),
        ({"training": {"step": 7}}, "training.step = 7: unknown key; the nearest valid key is training.steps"),
        ({"classifier_loss": {"sigmas": []}}, "images = 'noisy' with sigmas = .*; give"),
        ({"classifier_loss": {"consistency": {}}}, "copies = 1, but consistency compares noisy copies; use"),
        ({"classifier_loss": {"images": "denoised"}}, "there is no denoiser; add"),
        ({"classifier_loss": {"local_sigma": 0.1}}, "local_sigma = 0.1 is added after denoising; use"),
        ({"task": "denoiser"}, "classifier_loss is given, but task = 'denoiser'; remove"),
        ({"classifier": {"arch": "diffusion"}}, "classifier.arch = 'diffusion' cannot be trained; use another"),
        ({"classifier": {"arch": "rrcm"}}, "'rrcm' takes its sizes from the checkpoint, which is missing; set"),
        ({"classifier": {"arch": "transformers"}}, "'transformers' takes its sizes from the checkpoint, .*; set"),
        ({"denoiser_loss": {"low": 2.0}}, "low = 2.0 must be less than high = 1.5"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(images, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        load_training(raw_training(images, **changes))
    assert "\n" not in str(caught.value)


def test_the_learning_rate_rises_then_falls_to_zero():
    settings = load_training(raw_training("x", training={"steps": 100, "warmup": 10, "learning_rate": 2.0})).training
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0, rel=0.05)
    assert rates[-1] < 0.01
    assert decay(settings, 0) == pytest.approx(0.1)
    assert decay(settings, 10**6) == settings.ema


def test_an_epoch_uses_every_image_once_and_no_image_is_dropped():
    order = Order(0, 10)
    numbers = order.numbers(range(30))
    assert all(sorted(numbers[start : start + 10]) == list(range(10)) for start in (0, 10, 20))
    assert numbers[:10] != numbers[10:20]
    assert Order(0, 10).numbers(range(7, 23)) == numbers[7:23]


def test_the_shards_are_the_batch():
    assert [list(one) for one in shards_of(2, 5, 2)] == [[10, 11], [12, 13, 14]]


def test_random_values_belong_to_a_position():
    whole, part = Randomness(3, range(10)), Randomness(3, [4, 7])
    assert torch.equal(whole.normal("a", (2, 3))[[4, 7]], part.normal("a", (2, 3)))
    assert torch.equal(whole.copy(1).uniform("a", 2)[[4, 7]], part.copy(1).uniform("a", 2))
    values = [whole.normal("a", (50,)), whole.normal("b", (50,)), whole.copy(1).normal("a", (50,))]
    assert len(torch.unique(torch.cat(values))) == 1500


def test_augmentation_moves_pixels_of_each_image_on_its_own():
    x_BCHW = torch.rand(20, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    mirrored = augment(x_BCHW, ["flip"], Randomness(0, range(20)))
    same = [torch.equal(a, b) for a, b in zip(x_BCHW, mirrored, strict=True)]
    assert 0 < sum(same) < 20
    assert all(torch.equal(a, b if kept else b.flip(2)) for a, b, kept in zip(x_BCHW, mirrored, same, strict=True))
    shifted = augment(x_BCHW, ["shift"], Randomness(0, range(20)))
    inner = shifted[:, :, 4:-4, 4:-4]
    for image, found in zip(x_BCHW, inner, strict=True):
        places = [(down, right) for down in range(2, 7) for right in range(2, 7)]
        assert any(torch.equal(image[:, d : d + 8, r : r + 8], found) for d, r in places)
    assert augment(x_BCHW, ["affine"], Randomness(0, range(20))).shape == x_BCHW.shape


def test_kill_9_then_the_same_command_gives_the_same_weights(images, tmp_path):
    spec = tmp_path / "training.toml"
    spec.write_text(
        f'name = "tiny"\ntask = "classifier"\n[data]\nname = "parquet"\npath = "{images}"\n[classifier]\n'
        'arch = "mnist_cnn"\n[classifier_loss]\nsigmas = [0.25]\n[training]\nsteps = 20\nbatch = 12\n'
        'checkpoints = 20\n[compute]\ndevice = "cpu"\n'
    )
    code = "from diffsmooth.jobs.start import main; main()"

    def command(home):
        return [sys.executable, "-c", code, "train", str(spec), "--out", str(home), "--quiet"]

    killed = subprocess.Popen(command(tmp_path / "killed"))
    checkpoints = tmp_path / "killed" / "checkpoints"
    while not checkpoints.is_dir() or len(list(checkpoints.iterdir())) < 3:
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "weights.safetensors").exists()
    for home in ("killed", "whole"):
        store = open_store(str(tmp_path / home))
        run_training(load_training(spec), store, device=CPU, world=World())
    one, other = (load_file(tmp_path / home / "weights.safetensors") for home in ("killed", "whole"))
    assert_equal(one, other)
