"""The UNet and the prediction of x0, compared with closed forms and independent implementations."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.denoisers import (
    PRESETS,
    DiffusionDenoiser,
    alphas_cumprod,
    resolve_denoiser,
    timestep,
    timesteps,
)
from diffsmooth.pipeline.models.fused import FastGroupNorm, FusedUNet, merge_doubling
from diffsmooth.pipeline.models.unet import Attention, GroupNorm, ResBlock, UNet, settings_in
from diffsmooth.pipeline.spec import UNetSettings, load_spec

CIFAR, IMAGENET = PRESETS["openai-cifar10"], PRESETS["openai-imagenet256"]
SMALL = UNetSettings(
    model_channels=8, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[2], num_heads=2, num_groups=4, patch=2
)
LINEAR = alphas_cumprod("linear", 1000)
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
    abar = alphas_cumprod(settings.schedule, settings.steps)
    assert [timestep(abar, sigma) for sigma in SIGMAS] == expected


def test_sigma_beyond_the_schedule_is_refused_with_the_largest():
    with pytest.raises(UserError, match=r"sigma = 90\.0 is beyond .*1000 steps; use at most 78\.\d+"):
        timestep(LINEAR, 90.0)


def test_cosine_schedule_equals_its_closed_form():
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


def fuse(unet, timesteps, dtype=torch.float32, *, compiled=False):
    return FusedUNet(copy.deepcopy(unet), timesteps, dtype, compiled=compiled)


def test_folding_the_timesteps_does_not_change_the_network(small):
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    fused = fuse(small, [0, 17, 999])
    for t in (0, 17, 999):
        assert torch.allclose(fused(x, t), small(x, torch.full((3,), t)), atol=1e-5)


def test_patches_keep_the_image_shape(small):
    assert small(torch.zeros(2, 1, 12, 8), torch.tensor([3, 3])).shape == (2, 1, 12, 8)


def test_learned_variance_is_dropped(small):
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


def optimal_eps(mu: float, s: float, abar=LINEAR):
    """The optimal eps for images of independent pixels N(mu, s^2) on [-1, 1], in closed form."""

    def predict(x_t, t):
        variance = float(abar[t]) * s**2 + 1 - float(abar[t])
        return math.sqrt(1 - abar[t]) * (x_t - math.sqrt(abar[t]) * mu) / variance

    return predict


def denoiser(predict_eps, sigma, steps=1, abar=LINEAR):
    return DiffusionDenoiser(predict_eps, abar, timesteps(abar, sigma, steps))


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_denoised_is_the_posterior_mean_of_a_known_gaussian(sigma):
    """x0 = E[image | image + noise]: catches a wrong scale, a swapped factor 2, an off-by-one timestep."""
    mu, s = 0.1, 0.3
    x = torch.linspace(-0.2, 1.2, 40).reshape(1, 1, 5, 8)
    found = denoiser(optimal_eps(mu, s), sigma)(x, sigma)
    abar = float(LINEAR[timestep(LINEAR, sigma)])
    noise = (1 - abar) / abar  # the schedule's own noise variance on [-1, 1]: at least (2 sigma)^2, by less than a step
    assert (2 * sigma) ** 2 <= noise < (2 * sigma) ** 2 * 1.03
    expected = (noise * mu + s**2 * (2 * x - 1)) / (noise + s**2)
    assert torch.allclose(found, (expected + 1) / 2, atol=1e-6)


def test_prediction_is_clamped_but_the_input_is_not():
    wide = optimal_eps(0.0, 100.0)  # a prior so wide that x0 = x_t / sqrt(abar)
    x = torch.tensor([[[[-3.0, 0.25, 4.0]]]])
    assert torch.allclose(denoiser(wide, 0.5)(x, 0.5), torch.tensor([[[[0.0, 0.25, 1.0]]]]), atol=1e-3)


@pytest.mark.parametrize("sigma", [0.25, 0.5])
def test_many_ddim_steps_solve_the_probability_flow(sigma):
    """For images N(mu, s^2) the flow from x_t down to t = 0 keeps the standard score (x_t - sqrt(abar) mu) / std_t."""
    mu, s = 0.1, 0.2
    x = torch.linspace(0.4, 0.7, 6).reshape(1, 1, 2, 3)
    first = timestep(LINEAR, sigma)
    x_t = math.sqrt(LINEAR[first]) * (2 * x - 1)
    score = (x_t - math.sqrt(LINEAR[first]) * mu) / math.sqrt(LINEAR[first] * s**2 + 1 - LINEAR[first])
    expected = (mu + s * score + 1) / 2
    errors = [
        (denoiser(optimal_eps(mu, s), sigma, steps)(x, sigma) - expected).abs().max().item() for steps in (1, 8, 64)
    ]
    assert errors[0] > 0.01
    assert errors[2] < 0.15 * errors[1] < 0.15 * errors[0]
    assert errors[2] < 2e-3


def test_denoised_is_the_posterior_mean_of_a_known_mixture():
    """Two Gaussians per pixel: eps is the score of the noised mixture; E[image | noisy] comes from quadrature."""
    sigma, w, mu, s = 0.5, (0.3, 0.7), (-0.5, 0.4), (0.1, 0.2)

    def predict(x_t, t):
        a2, b2 = float(LINEAR[t]), 1 - float(LINEAR[t])
        x_t = x_t.double().requires_grad_()
        density = sum(
            weight * torch.exp(-((x_t - math.sqrt(a2) * m) ** 2) / (2 * (a2 * d**2 + b2))) / math.sqrt(a2 * d**2 + b2)
            for weight, m, d in zip(w, mu, s, strict=True)
        )
        (score,) = torch.autograd.grad(density.log().sum(), x_t)
        return (-math.sqrt(b2) * score).float()

    x = torch.linspace(0.1, 0.9, 9).reshape(1, 1, 3, 3)
    found = denoiser(predict, sigma)(x, sigma).double().numpy().ravel()
    abar = LINEAR[timestep(LINEAR, sigma)]
    image = np.linspace(-2, 2, 20_001)  # on [-1, 1]
    prior = sum(p / d * np.exp(-((image - m) ** 2) / (2 * d**2)) for p, m, d in zip(w, mu, s, strict=True))
    for noisy, value in zip(x.numpy().ravel(), found, strict=True):
        posterior = prior * np.exp(-((2 * noisy - 1 - image) ** 2) / (2 * (1 - abar) / abar))
        assert value == pytest.approx((np.sum(image * posterior) / np.sum(posterior) + 1) / 2, abs=1e-5)


def test_group_norm_adds_its_epsilon_to_the_variance():
    """At a standard deviation of 1e-3 an epsilon of 1e-5 dominates; 1e-6 would triple the output."""
    x = 1e-3 * torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(4))
    groups = x.reshape(2, 4, -1)
    scale = (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = ((groups - groups.mean(2, keepdim=True)) / scale).reshape(x.shape)
    block, attention = ResBlock(8, 8, 6, groups=4), Attention(8, 2, groups=4)
    for norm in (block.in_layers[0], block.out_layers[0], attention.norm):
        assert torch.allclose(norm(x), expected, atol=1e-6)


def meta_state(settings, channels):
    with torch.device("meta"):
        return UNet(settings, channels).state_dict()


def test_public_layouts():
    """Names and shapes that would differ for a wrong number of blocks, place of attention or upsampling."""
    cifar, imagenet = meta_state(CIFAR, 3), meta_state(IMAGENET, 3)
    for state, key, shape in [
        (cifar, "input_blocks.4.0.op.weight", (128, 128, 3, 3)),
        (cifar, "input_blocks.5.1.qkv.weight", (768, 256, 1)),
        (cifar, "output_blocks.3.1.conv.weight", (256, 256, 3, 3)),
        (cifar, "output_blocks.7.2.conv.weight", (256, 256, 3, 3)),
        (cifar, "out.2.weight", (6, 128, 3, 3)),
        (imagenet, "input_blocks.3.0.in_layers.2.weight", (256, 256, 3, 3)),
        (imagenet, "input_blocks.10.1.qkv.weight", (1536, 512, 1)),
        (imagenet, "middle_block.1.qkv.weight", (3072, 1024, 1)),
        (imagenet, "output_blocks.2.2.in_layers.2.weight", (1024, 1024, 3, 3)),
        (imagenet, "output_blocks.17.0.skip_connection.weight", (256, 512, 1, 1)),
    ]:
        assert tuple(state[key].shape) == shape, key


UPDOWN = SMALL.model_copy(update={"resblock_updown": True, "learn_sigma": True, "channel_mult": [1, 2, 3]})


@pytest.mark.parametrize(("settings", "channels"), [(CIFAR, 3), (IMAGENET, 3), (SMALL, 1), (UPDOWN, 2)])
def test_settings_are_inferred_from_the_keys(settings, channels):
    found = settings_in(meta_state(settings, channels), channels)
    assert found == {key: getattr(settings, key) for key in found}
    assert len(found) == 7
    assert settings_in({"fc.weight": torch.zeros(1)}, 3) == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_channels", 16), ("num_res_blocks", 2), ("learn_sigma", True), ("patch", 1), ("channel_mult", [1, 1]),
     ("attention_factors", [1, 2]), ("resblock_updown", True)],
)  # fmt: skip
def test_a_mismatch_names_the_setting_that_causes_it(tmp_path, raw_spec, small, key, value):
    save_file(small.state_dict(), tmp_path / "unet.safetensors")
    section = {"arch": "unet", "checkpoint": str(tmp_path / "unet.safetensors")}
    spec = load_spec({**raw_spec, "denoiser": {**section, "unet": {**SMALL.model_dump(), key: value}}})
    with pytest.raises(UserError) as error:
        resolve_denoiser(spec).build(torch.device("cpu"), torch.float32, (1, 8, 8))
    message = str(error.value)
    assert f"{key} = {getattr(SMALL, key)} instead of {value}" in message
    assert "expects" in message or "missing" in message or "not part of" in message


def test_image_sides_that_do_not_divide_are_refused(tmp_path, raw_spec, small):
    save_file(small.state_dict(), tmp_path / "unet.safetensors")
    section = {"arch": "unet", "checkpoint": str(tmp_path / "unet.safetensors"), "unet": SMALL.model_dump()}
    spec = load_spec({**raw_spec, "denoiser": section})
    with pytest.raises(UserError, match=r"images of 8 x 6 pixels.*multiples of 4"):
        resolve_denoiser(spec).build(torch.device("cpu"), torch.float32, (1, 8, 6))


def test_steps_are_evenly_spaced_from_the_timestep_of_sigma_to_zero():
    assert timesteps(LINEAR, 0.5, 1) == [259]
    assert timesteps(LINEAR, 0.5, 4) == [259, 194, 130, 65]
    with pytest.raises(UserError, match=r"denoiser\.steps = 300.*timestep 259; use at most 259 steps"):
        timesteps(LINEAR, 0.5, 300)


DIFFUSERS_UNET = {
    "sample_size": 8, "in_channels": 3, "out_channels": 3, "layers_per_block": 1, "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4, "attention_head_dim": 8, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
}  # fmt: skip


@pytest.fixture
def pipeline_folder(tmp_path):
    """A DDPM that diffusers saved, like google/ddpm-cifar10-32, with random weights."""
    diffusers = pytest.importorskip("diffusers")
    network, generator = diffusers.UNet2DModel(**DIFFUSERS_UNET), torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02)
    diffusers.DDPMPipeline(network, scheduler).save_pretrained(tmp_path / "ddpm")
    return tmp_path / "ddpm"


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("early", [False, True])
def test_diffusers_folder(pipeline_folder, raw_spec, kind, early):
    """x0 equals that of diffusers' own scheduler, for both layouts of the folder and of the attention's keys."""
    from diffusers import DDPMPipeline, DDPMScheduler

    scheduler_config = pipeline_folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler_config.read_text()) | {"prediction_type": kind}
    scheduler_config.write_text(json.dumps(config))
    pipeline = DDPMPipeline.from_pretrained(pipeline_folder)
    if early:
        state = load_file(pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors")
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
        scheduler_config.rename(pipeline_folder / "scheduler_config.json")
        (pipeline_folder / "unet" / "config.json").rename(pipeline_folder / "config.json")
        (pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        save_file(state, pipeline_folder / "diffusion_pytorch_model.safetensors")
    raw = {**raw_spec, "denoiser": {"arch": "diffusers", "checkpoint": str(pipeline_folder)}}
    raw["smoothing"] = {**raw["smoothing"], "sigma": 0.5}
    spec = load_spec(raw)
    assert set(resolve_denoiser(spec).ids()) == {"denoiser", "denoiser.config", "denoiser.scheduler"}
    found = resolve_denoiser(spec).build(torch.device("cpu"), torch.float32, (3, 8, 8))
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(6))
    scheduler = DDPMScheduler.from_config(config)
    x_t = scheduler.alphas_cumprod[259].sqrt() * (2 * x - 1)
    with torch.no_grad():
        output = pipeline.unet(x_t, 259).sample
        step = scheduler.step(output, 259, x_t, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(found(x, 0.5), (step.pred_original_sample + 1) / 2, atol=1e-5)


def test_diffusers_mistakes(pipeline_folder, raw_spec):
    spec = load_spec({**raw_spec, "denoiser": {"arch": "diffusers", "checkpoint": str(pipeline_folder)}})
    with pytest.raises(UserError, match="the denoiser processes 3 channels, but the images have 1"):
        resolve_denoiser(spec).build(torch.device("cpu"), torch.float32, (1, 8, 8))
    (pipeline_folder / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        resolve_denoiser(spec).build(torch.device("cpu"), torch.float32, (3, 8, 8))
    (pipeline_folder / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        resolve_denoiser(spec)


@pytest.mark.parametrize("channels_last", [False, True])
def test_doubling_and_convolution_equal_one_transposed_convolution(channels_last):
    generator = torch.Generator().manual_seed(4)
    conv, x = torch.nn.Conv2d(6, 5, 3, padding=1), torch.randn(2, 6, 7, 4, generator=generator)
    for parameter in conv.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    expected = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    merged = merge_doubling(conv)
    if channels_last:
        x, merged = x.to(memory_format=torch.channels_last), merged.to(memory_format=torch.channels_last)
    assert torch.allclose(merged(x), expected, atol=1e-5)


@pytest.mark.parametrize("settings", [SMALL, SMALL.model_copy(update={"resblock_updown": True})])
def test_fused_network_equals_the_trained_one(settings):
    """The fused network is channels-last, where group norms of few channels use another algorithm."""
    unet, generator = UNet(settings, 1), torch.Generator().manual_seed(5)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    x = torch.randn(3, 1, 16, 16, generator=generator)
    with torch.no_grad():
        fused = fuse(unet, [17, 18])
        for t in (17, 18):
            assert torch.allclose(fused(x, t), unet(x, torch.full((3,), t)), atol=1e-4)
    assert not any(isinstance(module, GroupNorm) for module in fused.modules())
    merged = sum(isinstance(module, torch.nn.ConvTranspose2d) for module in fused.modules())
    assert merged == len(settings.channel_mult) - 1
    with pytest.raises(KeyError):
        fused(x, 19)


@pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="torch was built without NNPACK")
@pytest.mark.parametrize("updown", [False, True])
def test_winograd_convolutions_equal_the_trained_network(updown, monkeypatch):
    """Sides of 28 and 14 use Winograd's algorithm, sides of 7 do not; 28 is not a multiple of its tiles of 6."""
    called: list[tuple[int, int]] = []
    convolve = torch._nnpack_spatial_convolution

    def spy(x, *args, **kwargs):
        called.append((len(x), x.shape[-1]))
        return convolve(x, *args, **kwargs)

    monkeypatch.setattr(torch, "_nnpack_spatial_convolution", spy)
    wide = {"model_channels": 128, "channel_mult": [1, 1, 1], "patch": 1, "num_groups": 32, "resblock_updown": updown}
    unet, generator = UNet(SMALL.model_copy(update=wide), 1), torch.Generator().manual_seed(7)
    for parameter in unet.parameters():
        fan_in = parameter[0].numel()
        torch.nn.init.normal_(parameter, std=fan_in**-0.5 if parameter.ndim > 1 else 0.2, generator=generator)
    x = torch.randn(2, 1, 28, 28, generator=generator)
    with torch.no_grad():
        trained = unet.double()(x.double(), torch.full((2,), 17)).float()
        plain = fuse(unet.float(), [17], compiled=True)(x, 17)
        assert not called
        fused = fuse(unet, [17])
        fast = fused(x, 17)
        assert {side for _, side in called} == {28, 14}
        assert torch.allclose(fast, plain, atol=1e-4)
        assert torch.allclose(fast, trained, atol=1e-4)
        assert torch.allclose(fused(x[:1], 17), fast[:1], atol=1e-4)  # NNPACK uses another code path for one image
        assert called[-1][0] == 1


def test_winograd_is_used_only_for_wide_float32_networks_on_a_cpu():
    wide = UNet(SMALL.model_copy(update={"model_channels": 128, "num_groups": 32}), 1)
    assert fuse(wide, [17]).winograd == torch.backends.nnpack.is_available()
    assert not fuse(wide, [17], compiled=True).winograd
    assert not fuse(UNet(SMALL, 1), [17]).winograd
    assert not fuse(wide, [17], torch.bfloat16).winograd
    assert not fuse(wide.to("meta"), [17]).winograd


@pytest.mark.parametrize(("channels", "groups"), [(16, 8), (12, 2), (8, 8)])
def test_fast_group_norm_is_the_same_in_every_layout(channels, groups):
    norm, generator = GroupNorm(groups, channels), torch.Generator().manual_seed(6)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x, fast = 3 + torch.randn(4, channels, 5, 6, generator=generator), FastGroupNorm(norm)
    last = x.to(memory_format=torch.channels_last)
    assert torch.allclose(fast(last), norm(x), atol=1e-5)
    assert torch.equal(fast(x), norm(x))
    assert fast(last).is_contiguous(memory_format=torch.channels_last)
    affine = (torch.randn(channels, generator=generator), torch.randn(channels, generator=generator))
    assert torch.allclose(fast(last, affine), F.group_norm(x, groups, *affine), atol=1e-5)


IMPOSSIBLE = [
    ({"channel_mult": [1, 0]}, r"channel_mult\.1 = 0: input should be greater than or equal to 1"),
    ({"channel_mult": [-1]}, r"channel_mult\.0 = -1: input should be greater"),
    ({"channel_mult": [10**9]}, r"channel_mult\.0 = 1000000000: input should be less than or equal to 64"),
    ({"channel_mult": [1] * 50}, r"channel_mult = .*at most 10 items"),
    ({"channel_mult": []}, r"channel_mult = .*at least 1 item"),
    ({"model_channels": 10**9}, r"model_channels = 1000000000: input should be less than or equal to 4096"),
    ({"model_channels": 4096, "channel_mult": [64]}, r"model_channels \* channel_mult = 262144 exceeds 16384; use"),
    ({"num_res_blocks": 10**6}, r"num_res_blocks = 1000000: input should be less than or equal to 32"),
    ({"num_groups": 3}, r"num_groups = 3 does not divide the width 8 .*; use a divisor"),
    ({"num_groups": 16}, r"num_groups = 16 does not divide the width 8"),
    ({"num_heads": 3}, r"num_heads = 3 does not divide the width 16 of an attention layer; use a divisor"),
    ({"num_head_channels": 5}, r"num_head_channels = 5 does not divide the width 16"),
    ({"num_heads": 16, "attention_factors": [1]}, r"num_heads = 16 does not divide the width 8"),
    ({"attention_factors": [0]}, r"attention_factors\.0 = 0: input should be greater"),
    ({"attention_factors": [-2]}, r"attention_factors\.0 = -2: input should be greater"),
    ({"patch": 10**6}, r"patch = 1000000: input should be less than or equal to 64"),
    ({"steps": 10**9}, r"steps = 1000000000: input should be less than or equal to 100000"),
    ({"steps": 5}, r"steps = 5 is too few for a linear schedule; use at least 21"),
    ({"schedule": "square"}, r"schedule = 'square'"),
]


@pytest.mark.parametrize(("changes", "message"), IMPOSSIBLE)
def test_hyper_parameters_that_cannot_be_built_are_refused(raw_spec, changes, message):
    section = {"arch": "unet", "unet": {**SMALL.model_dump(), **changes}}
    with pytest.raises(UserError, match=message) as error:
        load_spec({**raw_spec, "denoiser": section})
    assert "\n" not in str(error.value)
    assert "denoiser.unet" in str(error.value)


@pytest.mark.parametrize("settings", [CIFAR, IMAGENET, SMALL, UPDOWN])
def test_hyper_parameters_that_pass_the_checks_can_be_built(settings):
    assert UNetSettings.model_validate(settings.model_dump()) == settings
    with torch.device("meta"):
        unet = UNet(settings, 3)
        side = settings.side_multiple
        assert unet(torch.zeros(1, 3, side, side), torch.zeros(1)).shape == (1, 3, side, side)


CONFIGS = [
    ("unet/config.json", [], r"config\.json: holds a JSON list, not an object"),
    ("unet/config.json", {}, r"config\.json: in_channels: Field required"),
    ("unet/config.json", {"in_channels": "3"}, r"config\.json: in_channels: Input should be a valid integer"),
    ("unet/config.json", {"in_channels": 3, "_class_name": "AutoencoderKL"}, "holds a AutoencoderKL, which cannot"),
    ("unet/config.json", {"in_channels": 3, "block_out_channels": "wide"}, r"config\.json: cannot be used \("),
    ("unet/config.json", {"in_channels": 3, "block_out_channels": [7]}, r"config\.json: cannot be used \("),
    ("scheduler/scheduler_config.json", 5, "holds a JSON int, not an object"),
    (
        "scheduler/scheduler_config.json",
        {"prediction_type": "flow"},
        "prediction_type: Input should be 'epsilon', 'v_p",
    ),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps: Input should be less"),
    ("scheduler/scheduler_config.json", {"beta_end": "x"}, r"scheduler_config\.json: cannot be used \("),
    ("scheduler/scheduler_config.json", {"beta_end": 7.0}, "its betas must lie between 0 and 1"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "none"}, r"scheduler_config\.json: cannot be used \("),
]


@pytest.mark.parametrize(("file", "content", "message"), CONFIGS)
def test_hostile_diffusers_configurations_give_one_line(pipeline_folder, raw_spec, file, content, message):
    (pipeline_folder / file).write_text(json.dumps(content))
    spec = load_spec({**raw_spec, "denoiser": {"arch": "diffusers", "checkpoint": str(pipeline_folder)}})
    with pytest.raises(UserError, match=message) as error:
        resolve_denoiser(spec).build(torch.device("cpu"), torch.float32, (3, 8, 8))
    assert "\n" not in str(error.value)


def test_a_folder_with_a_name_that_is_too_long_gives_one_line(raw_spec):
    spec = load_spec({**raw_spec, "denoiser": {"arch": "diffusers", "checkpoint": "/" + "n" * 300}})
    with pytest.raises(UserError, match=r"^/n+.*: cannot read: File name too long; use a shorter path") as error:
        resolve_denoiser(spec)
    assert len(str(error.value)) < 400
