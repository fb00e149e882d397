"""Trainings on Ray Train: two workers, one of which is killed, end where one process ends."""

import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffsmooth.cluster.cast import Cluster
from diffsmooth.cluster.trainer import Workers, train_on_ray
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.storage.store import MemoryStore, open_store
from diffsmooth.pipeline.training.loop import run_training
from diffsmooth.pipeline.training.settings import load_training
from diffsmooth.pipeline.training.world import World
from tests.test_training import raw_training, write_images


class Mortal(nn.Sequential):
    """Ends its process with SIGKILL in the 9th training pass, unless an earlier one has done so.

    It has no batch norms: the bias before one has a gradient of 0, whose rounding errors Adam would magnify.
    """

    def __init__(self, marker: Path) -> None:
        super().__init__(nn.Flatten(), nn.Linear(28 * 28, 8), nn.Tanh(), nn.Linear(8, 2))
        self._marker, self._passes = marker, 0

    def forward(self, x_BCHW):
        self._passes += self.training
        if self._passes == 9 and not self._marker.exists():
            self._marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x_BCHW)


def mortal(spec, device):
    return Mortal(Path(spec.data.path).with_name("killed"))


def test_two_workers_of_which_one_is_killed_give_the_weights_of_one_process(ray_session, tmp_path):
    path = write_images(tmp_path / "train.parquet", [0, 1] * 30)
    raw = raw_training(path, classifier={"arch": "tests.test_trainer:mortal"}, training={"steps": 12, "checkpoints": 4})
    spec, marker, home = load_training(raw), tmp_path / "killed", str(tmp_path / "out")
    with Cluster(address=None, device="cpu", actors=2) as cluster:
        row = train_on_ray(spec, home, cluster, Workers(least=2, most=2))
    assert marker.exists()
    assert row["step"] == 12
    alone = str(tmp_path / "alone")
    run_training(spec, open_store(alone), device=torch.device("cpu"), world=World())
    one, two = (load_file(f"{folder}/weights.safetensors") for folder in (alone, home))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5)


def test_more_workers_than_shards_are_refused():
    spec = load_training(raw_training("images.parquet"))
    with pytest.raises(UserError, match=r"--workers 3 exceeds training.shards = 2, .*; use fewer workers"):
        train_on_ray(spec, MemoryStore().uri, None, Workers(least=1, most=3))


@pytest.mark.parametrize("text", ["0", "2:1", "a", "", ":2", "1:2:3"])
def test_impossible_numbers_of_workers_are_refused(text):
    with pytest.raises(UserError, match=r"is not K or K:L .*; use"):
        Workers.parse(text)


def test_numbers_of_workers():
    assert Workers.parse("4") == Workers(least=4, most=4)
    assert Workers.parse("2:8") == Workers(least=2, most=8)
