"""The training of small networks: reproducible without the global generator, and its files fit their architectures."""

import pytest
import torch
from safetensors.torch import save_file

from diffsmooth.jobs.train_networks import NETWORKS, Images, karras_levels, train
from diffsmooth.pipeline.models.edm import consistency_scalings
from diffsmooth.pipeline.smoothing import build_base_classifier
from diffsmooth.pipeline.spec import load_spec

CLEAN = {"arch": "mnist_cnn", "checkpoint": "embedded:mnist.safetensors#classifier-0.00"}
UNET = {"model_channels": 16, "channel_mult": [1, 2], "num_res_blocks": 1, "attention_factors": [2], "num_heads": 1,
        "num_groups": 8, "patch": 2}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of all networks after a step or two on random images."""
    folder, state = tmp_path_factory.mktemp("networks"), torch.random.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    images = Images(torch.rand(8, 1, 28, 28, generator=generator), torch.arange(8))
    for name in NETWORKS:
        first, again = (train(name, images, folder, scale=0.001).state_dict() for _ in range(2))
        assert all(torch.equal(first[key], again[key]) for key in first)
        save_file({key: value.contiguous() for key, value in first.items()}, folder / f"{name}.safetensors")
    assert torch.equal(torch.random.get_rng_state(), state)
    return folder


@pytest.mark.parametrize(
    ("sections"),
    [
        {"denoiser": {"arch": "edm", "checkpoint": "edm"}, "classifier": CLEAN},
        {"denoiser": {"arch": "consistency", "checkpoint": "consistency", "unet": UNET}, "classifier": CLEAN},
        {"classifier": {"arch": "rrcm", "checkpoint": "rrcm", "options": {"layernorm": True}}},
        {
            "denoiser": {"arch": "edm", "checkpoint": "edm"},
            "classifier": {
                "arch": "diffusion",
                "checkpoint": "conditional",
                "options": {"variant": "apndc", "points": 4},
            },
        },
    ],
    ids=NETWORKS,
)
def test_each_network_is_certified_from_its_file(folder, sections):
    files = {
        name: section
        | ({} if ":" in section["checkpoint"] else {"checkpoint": f"{folder / section['checkpoint']}.safetensors"})
        for name, section in sections.items()
    }
    smoothing = {"sigma": 0.5, "m": 1, "local_sigma": 0.0, "n0": 100, "n": 1000}
    f = build_base_classifier(
        load_spec({"name": "small", "data": {"name": "mnist", "split": "heldout"}, "smoothing": smoothing, **files}),
        "cpu",
    )
    scores_BK = f(torch.full((2, 1, 28, 28), 0.5))
    assert scores_BK.shape == (2, 10)
    assert torch.allclose(scores_BK.sum(dim=1), torch.ones(2))


def test_the_consistency_model_is_the_identity_at_the_smallest_level():
    level_N = karras_levels(0.002, 1.0, 12)
    assert torch.allclose(level_N[[0, -1]], torch.tensor([0.002, 1.0]))
    assert (level_N.diff() > 0).all()
    skip, out, _, _ = consistency_scalings(float(level_N[0]))
    assert skip == pytest.approx(1)
    assert out == pytest.approx(0, abs=1e-6)
