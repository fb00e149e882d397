"""Gradients of the smoothed loss, and the search, compared with finite differences, exact radii and random images."""

import numpy as np
import pytest
import torch
from torch import nn

import diffsmooth as ds
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.attack.record import (
    Attack,
)
from diffsmooth.pipeline.attack.search import ATTACKS, Problem, smoothed_gradient
from diffsmooth.pipeline.data.images import Sample
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.smoothing import BaseClassifier, build_base_classifier
from tests.attacking import DISTANCE, GREY, LABELS, HalfSpace


def network(channels: int = 1) -> nn.Module:
    """A small smooth network with three classes, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 25, 3))
    return layers.double().requires_grad_(False)


def smooth_f(m: int = 2, denoiser=lambda x_BCHW, sigma: x_BCHW.sigmoid()) -> BaseClassifier:
    random = np.random.Generator(np.random.Philox(1))
    return BaseClassifier(
        denoiser=denoiser,
        classifier=network(),
        local_noise_MCHW=torch.from_numpy(random.normal(size=(m, 1, 5, 5))),
        sigma=0.5,
        num_classes=3,
    )


def inputs(draws: int = 6):
    random = np.random.Generator(np.random.Philox(2))
    return torch.from_numpy(random.random((1, 5, 5))), torch.from_numpy(random.normal(size=(draws, 1, 5, 5)) / 2)


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_the_gradient_of_the_smoothed_loss_equals_finite_differences(batch):
    """Through denoiser, local copies and classifier, in float64, however the draws are batched."""
    f, (x_CHW, noise_NCHW) = smooth_f(), inputs()
    found = smoothed_gradient(f, x_CHW, noise_NCHW, 1, batch)

    def loss(at_CHW):
        p_K = f.differentiable_log_scores(f.differentiable_denoise(at_CHW + noise_NCHW)).exp().mean(dim=0)
        return float(torch.log1p(-p_K[1]) - torch.log(p_K[1]))

    expected = torch.zeros_like(x_CHW).flatten()
    for pixel in range(25):
        step = torch.zeros(25, dtype=torch.float64)
        step[pixel] = 1e-5
        step = step.reshape(1, 5, 5)
        expected[pixel] = (loss(x_CHW + step) - loss(x_CHW - step)) / 2e-5
    assert found.loss == pytest.approx(loss(x_CHW), abs=1e-12)
    torch.testing.assert_close(found.direction_CHW.flatten(), expected, rtol=1e-6, atol=1e-9)


def test_the_direction_is_that_of_smoothadv():
    """The gradient of -log of the mean softmax, normalised."""
    f, (x_CHW, noise_NCHW) = smooth_f(), inputs()
    x = x_CHW.clone().requires_grad_()
    p_K = f.differentiable_log_scores(f.differentiable_denoise(x + noise_NCHW)).exp().mean(dim=0)
    (expected,) = torch.autograd.grad(-p_K[1].log(), x)
    found = smoothed_gradient(f, x_CHW, noise_NCHW, 1, 6).direction_CHW
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())


def test_a_confident_f_keeps_its_gradient():
    """All float32 scores are 0 or 1, so the gradient of -log p_y is 0, but that of the log odds is not."""
    f = BaseClassifier(
        denoiser=None, classifier=HalfSpace(), local_noise_MCHW=torch.zeros(1, 1, 4, 4), sigma=0.1, num_classes=2
    )
    noise_NCHW = torch.zeros(2, 1, 4, 4)
    assert set(f(GREY[:1] + noise_NCHW).flatten().tolist()) == {0.0, 1.0}
    for values in (GREY[0], torch.zeros(1, 4, 4), torch.ones(1, 4, 4)):  # the last is wrong beyond any doubt
        assert float(smoothed_gradient(f, values, noise_NCHW, 0, 2).direction_CHW.min()) > 0


def test_the_exact_radius_lies_between_certificate_and_attack():
    """Half-space: lower <= exact < upper for every sample, and the upper bound within 3 %."""
    result = ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=20_000, batch_size=500)
    found = ds.attack(
        HalfSpace(), GREY, LABELS, sigma=0.25, certified=result, steps=2, draws=8, n0=8_000, n=32_000, refine=7,
        batch_size=500,
    )  # fmt: skip
    table = found.gap.table
    assert (table["lower"] <= DISTANCE).all()
    assert (table["upper"] > DISTANCE).all()
    assert (table["upper"] < 1.03 * DISTANCE).all()
    assert found.gap.contradictions == []
    for sample in range(4):
        moved = np.linalg.norm(found.image(sample).astype(float) - GREY[sample].numpy())
        assert moved == pytest.approx(found.uppers[sample], rel=1e-6)


def run_search(name, f, sample, **settings):
    """The images that an attack finds at one eps, without votes."""
    attack = Attack(attack=name, eps=[1.0], votes_id="0" * 32, **settings)
    problem = Problem(f, sample, 0, attack, Noise(0, f._sigma), 16)
    return ATTACKS[name](problem, problem.x_CHW, 1.0)


@pytest.mark.parametrize("name", ["pgd", "apgd", "diffhammer", "votes"])
def test_attacks_beat_a_random_direction_by_far(name):
    """By the smoothed loss at the same distance, over fresh draws; the network is that of the embedded model."""
    spec = load_named("mnist-dds-0.50", ["compute.device=cpu"])
    data, f = open_dataset(spec.data), build_base_classifier(spec, "cpu")
    noise_NCHW = torch.from_numpy(np.random.Generator(np.random.Philox(9)).normal(size=(64, 1, 28, 28)) * 0.5).float()
    gains = {}
    for attack in (name, "random"):
        gains[attack] = []
        for index in (1, 2, 3):
            sample = data[index]
            x_CHW = run_search(attack, f, sample, steps=6, draws=64 if attack == "votes" else 16)
            assert float((x_CHW - torch.from_numpy(sample.image_CHW)).norm()) <= 1.0 + 1e-5
            loss = smoothed_gradient(f, x_CHW, noise_NCHW, sample.label, 64).loss
            clean = smoothed_gradient(f, torch.from_numpy(sample.image_CHW), noise_NCHW, sample.label, 64).loss
            gains[attack].append(loss - clean)
    assert np.mean(gains[name]) > (2.5 if name == "votes" else 5) * np.mean(np.abs(gains["random"]))


def test_an_image_is_at_its_distance_and_inside_the_box():
    f = smooth_f()
    random = np.random.Generator(np.random.Philox(5))
    sample = Sample(random.choice([0.0, 0.5, 1.0], size=(1, 5, 5)).astype(np.float32), 1, "s")
    problem = Problem(f, sample, 0, Attack(attack="pgd", eps=[1.0], votes_id="0" * 32), Noise(0, 0.5), 8)
    for eps in (0.01, 0.5, 1.5):
        image = problem.at_distance(torch.from_numpy(random.normal(size=(1, 5, 5))).float(), eps)
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        assert float((image - problem.x_CHW).norm()) == pytest.approx(eps, rel=1e-3)
    far = problem.at_distance(torch.ones(1, 5, 5), 100.0)
    assert float((far - problem.x_CHW).norm()) < 5  # the corner of the box
