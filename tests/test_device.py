"""The device that runs the networks and the facts recorded about it."""

import platform
from importlib.metadata import version

import pytest
import torch
from pydantic import ValidationError

from diffsmooth.cluster.worker import Setup, Worker
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.device import device_facts, device_of
from diffsmooth.pipeline.smoothing import BaseClassifier
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.parquet import described, open_table
from diffsmooth.pipeline.storage.store import MemoryStore
from diffsmooth.pipeline.votes.blocks import BlockMetadata
from tests.models import make_run


@pytest.mark.parametrize(
    ("selected", "has_gpu", "expected"),
    [("cpu", True, "cpu"), ("cpu", False, "cpu"), ("auto", False, "cpu"), ("auto", True, "cuda:0"),
     ("cuda", True, "cuda:0")],
)  # fmt: skip
def test_the_spec_selects_the_device(raw_spec, monkeypatch, selected, has_gpu, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert device_of(load_spec(raw_spec, [f"compute.device={selected}"])) == torch.device(expected)


def test_a_missing_gpu_is_an_error(raw_spec, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"compute\.device = 'cuda', but torch .* sees no GPU on .*; run on a GPU node"):
        device_of(load_spec(raw_spec, ["compute.device=cuda"]))


def test_facts_name_device_settings_and_versions():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    facts = device_facts(torch.device("cpu"))
    torch.backends.cuda.matmul.allow_tf32 = before
    assert facts.device.startswith("cpu ")
    assert facts.tf32
    assert facts.versions["python"] == platform.python_version()
    assert facts.versions["torch"] == version("torch")
    assert set(facts.model_dump()) == {"device", "tf32", "cudnn_benchmark", "versions"}
    with pytest.raises(ValidationError):
        facts.device = "other"


def test_settings_are_those_of_the_run_while_it_casts_and_those_of_before_afterwards(raw_spec, tmp_path):
    """Whatever a process did before, also in a process of the user's own."""
    seen = set()

    class Recording(torch.nn.Module):
        def forward(self, x_BCHW):
            cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
            seen.add((cuda.allow_tf32, cudnn.allow_tf32, torch.get_num_threads()))
            return torch.stack([x_BCHW.mean(dim=(1, 2, 3)), 1 - x_BCHW.mean(dim=(1, 2, 3))], dim=1)

    spec = load_spec(raw_spec)
    run = make_run(spec, tmp_path / "run", samples=1)
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_num_threads()
    for precision in ("fp32", "tf32"):
        changed = load_spec(raw_spec, [f"smoothing.precision={precision}", "smoothing.seed=1"])
        f = BaseClassifier(
            denoiser=None, classifier=Recording(), local_noise_MCHW=torch.zeros(1, 1, 4, 4), sigma=0.25, num_classes=2
        )
        store = MemoryStore()
        worker = Worker(Setup(changed, run.uri, "0" * 32, 16, 1), f, open_dataset(spec.data), store)
        worker.run([Block(0, "selection", 0, 50)], "0")
        worker.clean_accuracy()
        assert seen == {(precision == "tf32", precision == "tf32", 1)}
        (key,) = store.keys("votes")
        assert BlockMetadata.model_validate_json(described(open_table(store.read(key), 2))).tf32 == (
            precision == "tf32"
        )
        seen.clear()
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32, torch.get_num_threads()) == before
