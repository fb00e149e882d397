"""The UNet and the one-shot prediction, against closed forms and independent re-derivations."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.denoisers import OneShotDenoiser, alphas_cumprod, timestep
from pipeline.spec import UNetSettings, UserError
from pipeline.unet import Attention, ResBlock, UNet

CIFAR = UNetSettings(
    model_channels=128, channel_mult=[1, 2, 2, 2], num_res_blocks=3, attention_factors=[2, 4], num_heads=4,
    learn_sigma=True, schedule="cosine", steps=4000, rescale_timesteps=True,
)  # fmt: skip
IMAGENET = UNetSettings(
    model_channels=256, channel_mult=[1, 1, 2, 2, 4, 4], num_res_blocks=2, attention_factors=[8, 16, 32],
    num_head_channels=64, resblock_updown=True, learn_sigma=True, schedule="linear", steps=1000,
)  # fmt: skip
SMALL = UNetSettings(
    model_channels=8, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[2], num_heads=2, num_groups=4, patch=2
)
SIGMAS = (0.12, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture
def small() -> UNet:
    unet, generator = UNet(SMALL, 1), torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        torch.nn.init.uniform_(parameter, -0.2, 0.2, generator=generator)
    return unet.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("settings", "expected"), [(CIFAR, [573, 1158, 1984, 2490, 2809]), (IMAGENET, [70, 145, 259, 339, 396])]
)
def test_published_timesteps(settings, expected):
    assert [timestep(settings, sigma) for sigma in SIGMAS] == expected


def test_sigma_beyond_the_schedule_names_the_largest():
    with pytest.raises(UserError, match=r"sigma = 90\.0 is beyond .*1000 steps: it reaches 78\.\d+ at most"):
        timestep(IMAGENET, 90.0)


def test_cosine_schedule_is_its_closed_form():
    """Before the clipping of beta at 0.999, abar is cos^2 at t + 1 over cos^2 at 0."""
    abar = alphas_cumprod("cosine", 1000)
    t = np.arange(1, 900)
    angle = (t / 1000 + 0.008) / 1.008 * math.pi / 2
    assert np.allclose(abar[:899], np.cos(angle) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2, rtol=1e-10)


@pytest.mark.parametrize(("settings", "channels", "millions"), [(CIFAR, 3, 52.5), (IMAGENET, 3, 552.8)])
def test_sizes_of_the_published_networks(settings, channels, millions):
    with torch.device("meta"):
        unet = UNet(settings, channels)
    assert sum(parameter.numel() for parameter in unet.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_folded_timestep_changes_nothing(small):
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for t in (0, 17, 999):
        small.fold_timestep(t)
        assert torch.allclose(small(x), small(x, torch.full((3,), t)), atol=1e-5)


def test_patches_keep_the_image_shape(small):
    assert small(torch.zeros(2, 1, 12, 8), torch.tensor([3, 3])).shape == (2, 1, 12, 8)


def test_learned_variance_is_left_out(small):
    wide = UNet(SMALL.model_copy(update={"learn_sigma": True}), 1).eval().requires_grad_(False)
    state = wide.state_dict()
    for key, value in small.state_dict().items():
        state[key][: len(value)] = value
    wide.load_state_dict(state)
    x, t = torch.ones(1, 1, 8, 8), torch.tensor([5])
    assert torch.allclose(wide(x, t), small(x, t), atol=1e-6)


def test_attention_splits_heads_before_q_k_v():
    """One position attends to all by hand: head h of width w owns rows 3wh..3wh+3w of qkv."""
    attention, generator = Attention(8, heads=2, groups=4), torch.Generator().manual_seed(2)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(1, 8, 2, 3, generator=generator)
    qkv = attention.qkv(F.group_norm(x.reshape(1, 8, 6), 4, attention.norm.weight, attention.norm.bias, 1e-5))[0]
    heads = []
    for h in range(2):
        q, k, v = qkv[12 * h : 12 * h + 4], qkv[12 * h + 4 : 12 * h + 8], qkv[12 * h + 8 : 12 * h + 12]
        weight = torch.softmax((q / 4**0.25).T @ (k / 4**0.25), dim=1)
        heads.append(v @ weight.T)
    expected = x + attention.proj_out(torch.cat(heads)[None]).reshape(1, 8, 2, 3)
    assert torch.allclose(attention(x), expected, atol=1e-5)


def test_residual_block_by_hand():
    block, generator = ResBlock(4, 8, 6, groups=2), torch.Generator().manual_seed(3)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x, emb = torch.randn(2, 4, 5, 5, generator=generator), torch.randn(2, 6, generator=generator)
    state = block.state_dict()

    def norm(h, name):
        groups = h.reshape(2, 2, -1)
        z = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return z.reshape(h.shape) * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    h = F.conv2d(F.silu(norm(x, "in_layers.0")), state["in_layers.2.weight"], state["in_layers.2.bias"], padding=1)
    time = F.silu(emb) @ state["emb_layers.1.weight"].T + state["emb_layers.1.bias"]
    h = norm(h, "out_layers.0") * (1 + time[:, :8, None, None]) + time[:, 8:, None, None]
    h = F.conv2d(F.silu(h), state["out_layers.3.weight"], state["out_layers.3.bias"], padding=1)
    skip = F.conv2d(x, state["skip_connection.weight"], state["skip_connection.bias"])
    assert torch.allclose(block(x, emb), skip + h, atol=1e-4)


class _GaussianUNet(torch.nn.Module):
    """The optimal eps for images of independent pixels N(mu, s^2) on [-1, 1], in closed form."""

    def __init__(self, mu: float, s: float) -> None:
        super().__init__()
        self.settings, self.mu, self.s, self.t = IMAGENET, mu, s, -1

    def fold_timestep(self, t: int) -> None:
        self.t = t

    def forward(self, x_t):
        abar = float(alphas_cumprod("linear", 1000)[self.t])
        variance = abar * self.s**2 + 1 - abar
        return math.sqrt(1 - abar) * (x_t - math.sqrt(abar) * self.mu) / variance


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_denoised_is_the_posterior_mean_of_a_known_gaussian(sigma):
    """x0 = E[image | image + noise]: catches a wrong scale, a swapped factor 2, an off-by-one timestep."""
    mu, s = 0.1, 0.3
    x = torch.linspace(-0.2, 1.2, 40).reshape(1, 1, 5, 8)
    found = OneShotDenoiser(_GaussianUNet(mu, s))(x, sigma)  # type: ignore[arg-type]
    abar = float(alphas_cumprod("linear", 1000)[timestep(IMAGENET, sigma)])
    noise = (1 - abar) / abar  # the schedule's own noise variance on [-1, 1]: at least (2 sigma)^2, by less than a step
    assert (2 * sigma) ** 2 <= noise < (2 * sigma) ** 2 * 1.03
    expected = (noise * mu + s**2 * (2 * x - 1)) / (noise + s**2)
    assert torch.allclose(found, (expected + 1) / 2, atol=1e-6)


def test_prediction_is_clamped_and_the_input_is_not():
    unet = _GaussianUNet(0.0, 100.0)  # a prior so wide that x0 = x_t / sqrt(abar)
    x = torch.tensor([[[[-3.0, 0.25, 4.0]]]])
    assert torch.allclose(OneShotDenoiser(unet)(x, 0.5), torch.tensor([[[[0.0, 0.25, 1.0]]]]), atol=1e-3)  # type: ignore[arg-type]
