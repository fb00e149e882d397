"""Checkpoints in all common layouts; other files are refused, and code in a checkpoint is never run."""

import argparse
import os
import pickle
from importlib.resources import files

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pipeline.errors import UserError
from pipeline.models.weights import build, load_weights
from pipeline.smoothing import build_base_classifier, weights_ids
from pipeline.spec import load_spec

CPU = torch.device("cpu")
MNIST = "jobs/specs/mnist.toml"


def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)).eval()


@pytest.fixture
def trained():
    network, generator = make(), torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1, generator=generator)
    return network


def prefixed(network, prefix):
    return {f"{prefix}{key}": value for key, value in network.state_dict().items()}


def same(trained, path):
    x = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return torch.equal(build(make, str(path), CPU)(x), trained(x))


LAYOUTS = {
    "plain": lambda network: network.state_dict(),
    "module": lambda network: prefixed(network, "module."),
    "Cohen's CIFAR-10": lambda network: {"epoch": 90, "arch": "x", "state_dict": prefixed(network, "1."),
                                         "optimizer": {"state": {0: {"momentum": torch.ones(1)}}, "param_groups": []}},
    "Cohen's ImageNet": lambda network: {"state_dict": prefixed(network, "1.module."), "best": np.float64(0.5)},
    "robustness": lambda network: {"model": prefixed(network, "module.model.") | {"module.std": torch.ones(1)},
                                   "args": argparse.Namespace(lr=0.1)},
    "net": lambda network: {"net": network.state_dict(), "acc": np.float32(0.5), "epoch": 3},
    "without counters": lambda network: {
        key: value for key, value in network.state_dict().items() if "num_batches" not in key
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("zipped", [True, False])
def test_layouts(tmp_path, trained, layout, zipped):
    torch.save(LAYOUTS[layout](trained), tmp_path / "a.pth.tar", _use_new_zipfile_serialization=zipped)
    assert same(trained, tmp_path / "a.pth.tar")


def test_safetensors(tmp_path, trained):
    save_file(prefixed(trained, "1."), tmp_path / "a.safetensors")
    assert same(trained, tmp_path / "a.safetensors")


def test_several_networks_in_one_file_need_a_name(tmp_path, trained):
    other = {key: torch.zeros_like(value) for key, value in trained.state_dict().items()}
    torch.save({"model": other, "model_ema": prefixed(trained, "module.")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"holds model, model_ema; choose one, for example '#model'"):
        build(make, f"{tmp_path}/a.pt", CPU)
    assert same(trained, f"{tmp_path}/a.pt#model_ema")
    save_file(
        prefixed(trained, "b.") | {f"a.{key}": value for key, value in other.items()}, tmp_path / "two.safetensors"
    )
    assert same(trained, f"{tmp_path}/two.safetensors#b")


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for name, zipped in (("a.pt", True), ("b.pt", False)):
        torch.save(
            {"state_dict": {"0.weight": torch.ones(1)}, "x": Evil()},
            tmp_path / name,
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(
            UserError, match=r"holds Python objects besides tensors, which are never executed .*mkdir"
        ) as error:
            load_weights(f"{tmp_path}/{name}")
        assert "weights_only" not in str(error.value)
        assert "\n" not in str(error.value)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a file of weights"):
        load_weights(f"{tmp_path}/plain.pt")
    assert not (tmp_path / "ran").exists()


def test_tensors_that_do_not_fit_are_named(tmp_path, trained):
    state = trained.state_dict()
    cases = {
        "shape": (
            {**state, "3.weight": torch.zeros(5, 16)},
            r"3\.weight has shape \(5, 16\).* expects \(3, 16\); use a file of this",
        ),
        "missing": ({key: state[key] for key in state if key != "1.bias"}, r"1\.bias \(4,\) is missing"),
        "superfluous": ({**state, "4.weight": torch.zeros(2)}, r"4\.weight \(2,\) is not part of the architecture"),
    }
    for name, (changed, message) in cases.items():
        torch.save(changed, tmp_path / f"{name}.pt")
        with pytest.raises(UserError, match=message):
            build(make, f"{tmp_path}/{name}.pt", CPU)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        build(make, f"{tmp_path}/list.pt", CPU)


def test_a_file_may_contain_computed_buffers(tmp_path):
    """Early timm files contain BEiT's relative_position_index, which timm now computes."""
    beit = pytest.importorskip("timm").models.beit.Beit

    def tiny():
        return beit(
            img_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2, num_classes=3, use_rel_pos_bias=True
        )

    network, generator = tiny().eval(), torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        nn.init.normal_(parameter, generator=generator)
    index = network.blocks[0].attn.relative_position_index
    state = prefixed(network, "1.") | {"1.blocks.0.attn.relative_position_index": torch.zeros_like(index)}
    torch.save({"arch": "beit", "state_dict": state}, tmp_path / "a.pt")
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    loaded = build(tiny, f"{tmp_path}/a.pt", CPU)
    assert torch.equal(loaded.blocks[0].attn.relative_position_index, index)
    with torch.no_grad():
        assert torch.allclose(loaded(x), network(x), rtol=1e-5)


def test_initial_weights_are_never_generated(tmp_path, trained):
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    before = torch.get_rng_state()
    build(make, f"{tmp_path}/a.pt", CPU)
    assert torch.equal(torch.get_rng_state(), before)
    make()
    assert not torch.equal(torch.get_rng_state(), before)


def test_damaged_and_foreign_checkpoints(tmp_path):
    whole = (files("pipeline.embedded") / "mnist.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1000])
    (tmp_path / "cut.pt").write_bytes(b"PK\x03\x04 not a checkpoint")
    (tmp_path / "page.pt").write_bytes(b"<!DOCTYPE html><html>sign in</html>")
    cases = {
        f"{tmp_path}/nowhere.pt": "no such file",
        f"{tmp_path}/cut.safetensors": "damaged",
        f"{tmp_path}/cut.pt": "damaged",
        f"{tmp_path}/page.pt": "not a file of weights",
        "embedded:mnist.safetensors#denoiser": r"missing; the architecture is mnist_cnn with the data set's 10 classes",
        "embedded:mnist.safetensors#nothing": r"no keys that begin with 'nothing\.'",
    }
    for location, message in cases.items():
        with pytest.raises(UserError, match=message):
            build_base_classifier(load_spec(MNIST, [f"classifier.checkpoint='{location}'"]), "cpu")
    with pytest.raises(UserError, match=r"its sha256 is [0-9a-f]{64}, but the spec expects 0{64}"):
        weights_ids(load_spec(MNIST, [f"classifier.sha256='{'0' * 64}'"]))
