"""The device that runs the networks and the facts recorded about it."""

import platform
from importlib.metadata import version

import pytest
import torch
from pydantic import ValidationError

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.device import device_facts, device_of
from diffsmooth.pipeline.spec import load_spec


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
