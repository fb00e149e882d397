"""Networks after DiffSmooth, each compared with a second implementation that is written straight from its paper."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models import diffusion_classifier, edm, rrcm
from diffsmooth.pipeline.models.classifiers import CifarResNet, resolve_classifier
from diffsmooth.pipeline.models.denoisers import CONSISTENCY_PRESETS, resolve_denoiser
from diffsmooth.pipeline.models.diffusion_classifier import DiffusionClassifier, DiffusionOptions, steps_of
from diffsmooth.pipeline.models.edm import EDMSettings, EDMUNet
from diffsmooth.pipeline.models.unet import UNet
from diffsmooth.pipeline.spec import UNetSettings, load_spec

CPU, FP32 = torch.device("cpu"), torch.float32
SONG = EDMSettings(
    family="song", channels=3, model_channels=16, channel_mult=(1, 2), num_blocks=1, attention_levels=(1,),
    resolution=8, num_classes=4,
)  # fmt: skip
NETWORKS = {
    "ddpm++": SONG,
    "ncsn++": EDMSettings(**{**SONG.__dict__, "fourier": True, "num_classes": 0}),
    "adm": EDMSettings(**{**SONG.__dict__, "family": "dhariwal", "model_channels": 64}),
}


def filled(network, seed=0, dtype=torch.float64):
    """The network with random weights; each part has an effect on the output."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.empty(tensor.shape).uniform_(-0.3, 0.3, generator=generator))
    return network.to(dtype).eval().requires_grad_(False)


def uniform(*shape, seed=1, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Literal:
    """F(x, c_noise, y) of an EDM network, by its key names alone (arXiv 2206.00364, appendix F)."""

    def __init__(self, network: EDMUNet) -> None:
        self.state, self.settings = network.state_dict(), network.settings
        self.song = self.settings.family == "song"
        self.root = math.sqrt(0.5) if self.song else 1.0

    def linear(self, name, x):
        bias = self.state.get(f"{name}.bias")
        return x @ self.state[f"{name}.weight"].T + (0 if bias is None else bias)

    def norm(self, name, x):
        """Group norm from its definition, over at most 32 groups of at least 4 channels."""
        B, C, H, W = x.shape
        groups = min(32, C // 4)
        parts = x.view(B, groups, -1)
        centred = parts - parts.mean(2, keepdim=True)
        scaled = centred / (centred.square().mean(2, keepdim=True) + (1e-6 if self.song else 1e-5)).sqrt()
        weight, bias = (self.state[f"{name}.{part}"][None, :, None, None] for part in ("weight", "bias"))
        return scaled.view(B, C, H, W) * weight + bias

    def filtered(self, x, direction):
        """Upsampling and downsampling as a zero-padded convolution with the separable filter."""
        taps = torch.tensor([1.0, 3, 3, 1] if self.settings.fourier else [1.0, 1], dtype=x.dtype)
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        pad = (len(taps) - 1) // 2
        out = []
        for one in x.flatten(0, 1):
            if direction == "down":
                out.append(F.conv2d(F.pad(one, [pad] * 4)[None, None], kernel[None, None], stride=2)[0, 0])
            else:
                spread = torch.zeros(2 * one.shape[0], 2 * one.shape[1], dtype=x.dtype)
                spread[::2, ::2] = one
                width = len(taps)
                padded = F.pad(spread, [width - 1 - pad, pad, width - 1 - pad, pad])
                out.append(F.conv2d(padded[None, None], 4 * kernel.flip(0, 1)[None, None])[0, 0])
        return torch.stack(out).unflatten(0, x.shape[:2])

    def conv(self, name, x):
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def resampled(self, name, x):
        for direction in ("down", "up"):
            if name.endswith(direction):
                return self.filtered(x, direction)
        return x

    def block(self, name, x, emb):
        silu = F.silu
        h = self.conv(f"{name}.conv0", self.resampled(name, silu(self.norm(f"{name}.norm0", x))))
        affine = self.linear(f"{name}.affine", emb)[:, :, None, None]
        if self.song:
            h = silu(self.norm(f"{name}.norm1", h + affine))
        else:
            scale, shift = affine.chunk(2, 1)
            h = silu(self.norm(f"{name}.norm1", h) * (1 + scale) + shift)
        skip = self.resampled(name, x)
        if f"{name}.skip.weight" in self.state:
            skip = self.conv(f"{name}.skip", skip)
        x = (self.conv(f"{name}.conv1", h) + skip) * self.root
        if f"{name}.qkv.weight" not in self.state:
            return x
        B, C, H, W = x.shape
        heads = 1 if self.song else C // 64
        qkv = self.conv(f"{name}.qkv", self.norm(f"{name}.norm2", x)).view(B * heads, C // heads, 3, H * W)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(C // heads), dim=2)
        a = torch.einsum("bqk,bck->bcq", weights, v).reshape(B, C, H, W)
        return (x + self.conv(f"{name}.proj", a)) * self.root

    def embed(self, c_noise, label):
        base = self.settings.model_channels
        if self.settings.fourier:
            angle = torch.outer(c_noise, 2 * math.pi * self.state["map_noise.freqs"])
        else:
            steps = base // 2 - (1 if self.song else 0)
            angle = torch.outer(c_noise, 10000.0 ** (-torch.arange(base // 2, dtype=c_noise.dtype) / steps))
        emb = torch.cat([angle.sin(), angle.cos()] if self.song else [angle.cos(), angle.sin()], dim=1)
        classes = self.settings.num_classes
        one_hot = torch.zeros(len(c_noise), max(classes, 1), dtype=c_noise.dtype)
        if label is not None:
            one_hot[torch.arange(len(label)), label] = 1
        if self.song:
            emb = emb + (self.linear("map_label", one_hot * math.sqrt(classes)) if classes else 0)
            return F.silu(self.linear("map_layer1", F.silu(self.linear("map_layer0", emb))))
        emb = self.linear("map_layer1", F.silu(self.linear("map_layer0", emb)))
        return F.silu(emb + (self.linear("map_label", one_hot) if classes else 0))

    def __call__(self, x, c_noise, label=None):
        emb, skips, aux = self.embed(c_noise, label), [], x
        for name in dict.fromkeys(key.rsplit(".", 2 if key.count(".") > 2 else 1)[0] for key in self.order("enc")):
            if name.endswith("_conv"):
                x = self.conv(name, x)
                skips.append(x)
            elif "aux_residual" in name:
                weight = self.state[f"{name}.weight"]
                h = F.conv2d(aux, weight, padding=2)
                taps = torch.tensor([1.0, 3, 3, 1], dtype=x.dtype)
                kernel = (torch.outer(taps, taps) / 64).expand(len(weight), 1, 4, 4)
                h = F.conv2d(h, kernel, groups=len(weight), stride=2) + self.state[f"{name}.bias"][:, None, None]
                x = skips[-1] = aux = (x + h) / math.sqrt(2)
            else:
                x = self.block(name, x, emb)
                skips.append(x)
        for name in dict.fromkeys(key.rsplit(".", 2 if key.count(".") > 2 else 1)[0] for key in self.order("dec")):
            if "aux" in name:
                continue
            if x.shape[1] != self.state[f"{name}.norm0.weight"].shape[0]:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self.block(name, x, emb)
        side = self.settings.resolution
        prefix = f"dec.{side}x{side}_aux_" if self.song else "out_"
        return self.conv(f"{prefix}conv", F.silu(self.norm(f"{prefix}norm", x)))

    def order(self, part):
        return [key for key in self.state if key.startswith(f"{part}.")]


@pytest.fixture(params=NETWORKS)
def network(request):
    return filled(EDMUNet(NETWORKS[request.param]))


def test_edm_networks_equal_a_literal_implementation(network):
    x, c_noise = 2 * uniform(2, 3, 8, 8) - 1, torch.tensor([-0.3, 0.2], dtype=torch.float64)
    labels = [None, torch.tensor([1, 3])] if network.settings.num_classes else [None]
    for label in labels:
        found = network(x, network.condition(c_noise, label))
        assert torch.allclose(found.double(), Literal(network)(x, c_noise, label), rtol=1e-5, atol=2e-5)


def test_edm_settings_follow_from_the_keys_alone(network):
    assert edm.settings_in(network.state_dict()) == network.settings
    assert edm.settings_in({"a": torch.zeros(1)}) is None


@pytest.mark.parametrize(("name", "millions", "gflop"), [("edm-cifar10", 55.7, 42.4), ("edm-imagenet64", 295.9, 219.3)])
def test_size_and_cost_of_the_published_edm_networks(name, millions, gflop):
    settings = edm.PRESETS[name]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network = EDMUNet(settings)
        label = torch.zeros(1, dtype=torch.int64) if settings.num_classes else None
        network(torch.zeros(1, 3, settings.resolution, settings.resolution), network.condition(torch.zeros(1), label))
    assert sum(one.numel() for one in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, abs=0.05)


def published(network, extra=()):
    """A file as NVIDIA's: keys under model., with filters and the embedding of augmentations."""
    state = {f"model.{key}": value.float().contiguous() for key, value in network.state_dict().items()}
    state |= {"model.map_augment.weight": torch.zeros(16, 9), "model.enc.4x4_down.conv0.resample_filter": torch.ones(1)}
    return state | dict(extra)


def edm_spec(raw_spec, path, **denoiser):
    return load_spec({**raw_spec, "denoiser": {"arch": "edm", "checkpoint": str(path), **denoiser}})


def test_the_edm_denoiser_is_the_preconditioned_network_at_twice_sigma(raw_spec, tmp_path):
    network = filled(EDMUNet(SONG))
    save_file(published(network), tmp_path / "edm.safetensors")
    spec = edm_spec(raw_spec, tmp_path / "edm.safetensors")
    x, s = uniform(2, 3, 8, 8, dtype=FP32), 2 * spec.smoothing.sigma
    c_in = 1 / math.sqrt(s**2 + 0.25)
    z = 2 * x.double() - 1
    f = Literal(network)(c_in * z, torch.full((2,), math.log(s) / 4, dtype=torch.float64))
    d = 0.25 / (s**2 + 0.25) * z + s * 0.5 / math.sqrt(s**2 + 0.25) * f
    found = resolve_denoiser(spec).build(CPU, FP32, (3, 8, 8))(x, spec.smoothing.sigma)
    assert torch.allclose(found, ((d.clamp(-1, 1) + 1) / 2).float(), atol=2e-4)


def test_two_steps_of_the_edm_denoiser_follow_the_probability_flow(raw_spec, tmp_path):
    save_file(published(filled(EDMUNet(SONG))), tmp_path / "edm.safetensors")
    one, two = (resolve_denoiser(edm_spec(raw_spec, tmp_path / "edm.safetensors", steps=n)) for n in (1, 2))
    x, sigma = uniform(2, 3, 8, 8, dtype=FP32), 0.25
    first = one.build(CPU, FP32, (3, 8, 8))(x, sigma)
    halfway = first + 0.5 * (x - first)  # noise of half the size
    half = load_spec({**edm_spec(raw_spec, tmp_path / "edm.safetensors").model_dump()}, ["smoothing.sigma=0.125"])
    expected = resolve_denoiser(half).build(CPU, FP32, (3, 8, 8))(halfway, 0.125)
    assert torch.allclose(two.build(CPU, FP32, (3, 8, 8))(x, sigma), expected, atol=1e-5)


def test_unsuitable_edm_files_and_levels_give_one_line(raw_spec, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="holds no network of EDM"):
        resolve_denoiser(edm_spec(raw_spec, tmp_path / "other.safetensors")).build(CPU, FP32, (3, 8, 8))
    save_file(published(filled(EDMUNet(SONG))), tmp_path / "edm.safetensors")
    for shape, message in (((1, 8, 8), "3 channels, but the images have 1"), ((3, 9, 8), "sides are multiples of 2")):
        with pytest.raises(UserError, match=message):
            resolve_denoiser(edm_spec(raw_spec, tmp_path / "edm.safetensors")).build(CPU, FP32, shape)
    spec = edm_spec(raw_spec, tmp_path / "edm.safetensors", arch="edm-cifar10")
    with pytest.raises(UserError, match=r"its network is .*, not edm-cifar10"):
        resolve_denoiser(spec).build(CPU, FP32, (3, 32, 32))
    save_file(published(filled(EDMUNet(SONG)), {"model.enc.9": torch.zeros(1)}), tmp_path / "extra.safetensors")
    with pytest.raises(UserError, match=r"enc\.9 \(1,\) is not part of the architecture"):
        resolve_denoiser(edm_spec(raw_spec, tmp_path / "extra.safetensors")).build(CPU, FP32, (3, 8, 8))
    with pytest.raises(UserError, match=r"trained for 0\.002 to 80"):
        edm.levels_of(50, 1)


SMALL = UNetSettings(
    model_channels=16, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[2], num_heads=2, num_groups=4,
    qkv_first=True, resblock_updown=True,
)  # fmt: skip


def test_the_consistency_denoiser_has_boundary_scalings_and_openais_layout(raw_spec, tmp_path):
    """Its file has images' 1 x 1 convolutions in the attention layers, and the embedding of classes."""
    unet = filled(UNet(SMALL, 3), dtype=FP32)
    state = {
        key: value[..., None] if key.endswith(("qkv.weight", "proj_out.weight")) else value
        for key, value in unet.state_dict().items()
    }
    torch.save({**state, "label_emb.weight": torch.zeros(10, 64)}, tmp_path / "cm.pt")
    section = {"arch": "consistency", "checkpoint": str(tmp_path / "cm.pt"), "unet": SMALL.model_dump()}
    spec = load_spec({**raw_spec, "denoiser": section})
    x, s = uniform(2, 3, 8, 8, dtype=FP32), 0.5
    z = 2 * x - 1
    f = unet(z / math.sqrt(s**2 + 0.25), torch.full((2,), 250 * math.log(s)))
    d = 0.25 / ((s - 0.002) ** 2 + 0.25) * z + (s - 0.002) * 0.5 / math.sqrt(s**2 + 0.25) * f
    found = resolve_denoiser(spec).build(CPU, FP32, (3, 8, 8))(x, 0.25)
    assert torch.allclose(found, (d.clamp(-1, 1) + 1) / 2, atol=2e-4)
    assert edm.consistency_scalings(0.002)[:2] == (1, 0)  # at the smallest noise, x0 is the input
    with pytest.raises(UserError, match=r"set \[denoiser.unet\], or choose one of consistency-imagenet64"):
        resolve_denoiser(load_spec({**raw_spec, "denoiser": {**section, "unet": None}}))


@pytest.mark.parametrize(("name", "millions"), [("consistency-imagenet64", 295.9), ("consistency-lsun256", 526.8)])
def test_sizes_of_the_published_consistency_models(name, millions):
    """The file for ImageNet-64 has 0.8 million more, the embedding of its 1,000 classes."""
    with torch.device("meta"):
        unet = UNet(CONSISTENCY_PRESETS[name], 3)
    assert sum(one.numel() for one in unet.parameters()) / 1e6 == pytest.approx(millions, rel=0.06)


def rrcm_network(layernorm):
    settings = rrcm.RRCMSettings(channels=3, patch=4, width=128, hidden=256, depth=2, patches=4, num_classes=5)
    return filled(rrcm.RRCM(settings, rrcm.nearest_level(0.25), layernorm))


@pytest.mark.parametrize("layernorm", [False, True])
def test_rrcm_equals_a_literal_implementation(layernorm):
    network = rrcm_network(layernorm)
    state, x = network.state_dict(), uniform(2, 3, 8, 8)
    s = 0.4927  # of 81 Karras levels, nearest to 0.5
    assert network.level == pytest.approx(s, abs=5e-5)

    def get(name):
        return state[f"base_model.{name}"]

    z = (2 * x - 1) / math.sqrt(network.level**2 + 0.25)
    patches = [
        (z[:, :, i : i + 4, j : j + 4][:, None] * get("patch_embed.proj.weight")).sum((2, 3, 4))
        for i in (0, 4)
        for j in (0, 4)
    ]
    tokens = torch.stack(patches, 1) + get("patch_embed.proj.bias")
    angle = 250 * math.log(network.level) * 10000.0 ** (-torch.arange(64, dtype=torch.float64) / 64)
    time = torch.cat([angle.cos(), angle.sin()]).expand(2, 1, 128)
    h = torch.cat([get("cls_token").expand(2, 1, 128), time, tokens], 1) + get("pos_embed")

    def norm(name, h):
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * get(f"{name}.weight") + get(
            f"{name}.bias"
        )

    for block in ("blocks.0", "blocks.1"):
        q, k, v = (norm(f"{block}.norm1", h) @ get(f"{block}.attn.qkv.weight").T).chunk(3, -1)
        heads = []
        for head in (slice(0, 64), slice(64, 128)):
            heads.append(torch.softmax(q[..., head] @ k[..., head].transpose(1, 2) / 8, -1) @ v[..., head])
        h = h + torch.cat(heads, -1) @ get(f"{block}.attn.proj.weight").T + get(f"{block}.attn.proj.bias")
        inner = norm(f"{block}.norm2", h) @ get(f"{block}.mlp.fc1.weight").T + get(f"{block}.mlp.fc1.bias")
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        h = h + inner @ get(f"{block}.mlp.fc2.weight").T + get(f"{block}.mlp.fc2.bias")
    cls = norm("norm", h)[:, 0] if layernorm else h[:, 0]
    logits = cls @ state["linear_head.weight"].T + state["linear_head.bias"]
    assert torch.allclose(network(x).double(), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sigma", "level"), [(0.12, 0.2341), (0.25, 0.4927), (0.5, 0.9654), (1.0, 2.0036)])
def test_rrcm_levels_are_rounded_as_published(sigma, level):
    assert rrcm.nearest_level(sigma) == pytest.approx(level, abs=5e-5)


@pytest.mark.parametrize(
    ("name", "side", "gflop"), [("rrcm-b16", 224, 35.1), ("rrcm-s16", 224, 8.0), ("rrcm-b4", 32, 11.4)]
)
def test_cost_of_the_published_rrcm_networks(name, side, gflop):
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        rrcm.RRCM(rrcm.PRESETS[name], 0.5, False)(torch.zeros(1, 3, side, side))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.02)


def test_an_rrcm_file_is_loaded_strictly_except_for_its_projector(raw_spec, tmp_path):
    network = rrcm_network(False)
    state = {f"module.{key}": value.float() for key, value in network.state_dict().items()}
    state["module.base_model.projection_head.0.weight"] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "rrcm.net")
    section = {"arch": "rrcm", "checkpoint": str(tmp_path / "rrcm.net")}
    source = resolve_classifier(load_spec({**raw_spec, "classifier": section}))
    x = uniform(2, 3, 8, 8, dtype=FP32)
    assert torch.allclose(source.build(CPU, FP32, 3, 5)(x), network(x.double()), atol=2e-4)
    assert '"level": 0.49' in source.ids()["classifier.input"]
    with pytest.raises(UserError, match="rRCM has 3 channels and 5 classes, but the data set has 3 and 10"):
        source.load(CPU, 3, 10)
    with pytest.raises(UserError, match="images of 4 x 4 have 1 patches"):
        source.load(CPU, 3, 5)(torch.zeros(1, 3, 4, 4))
    torch.save({**state, "module.base_model.extra": torch.zeros(1)}, tmp_path / "rrcm.net")
    with pytest.raises(UserError, match=r"base_model\.extra"):
        source.load(CPU, 3, 5)
    for bad, message in (({"options": {"depth": 3}}, "depth"), ({"normalize": "half"}, "scales its input itself")):
        with pytest.raises(UserError, match=message):
            resolve_classifier(load_spec({**raw_spec, "classifier": {**section, **bad}}))


def classifier(variant, weights="derived", points=40, rows=7, eliminate=True):
    options = DiffusionOptions(variant=variant, weights=weights, points=points, rows=rows)
    made = DiffusionClassifier(filled(EDMUNet(SONG), dtype=FP32), steps_of(options, 0.25), options, 0.25)
    made.eliminate = eliminate
    return made.requires_grad_(False)


def literal_logits(made, x, label):
    """The loss of one image and one class, by loops over the published formulas, on [-1, 1]."""
    options, literal, total = made.options, Literal(made.network.double()), 0.0
    made.network.float()
    first = 1e-4 if options.variant == "dc" else 0.5
    grid = np.linspace(first, 3, options.points)
    noise = diffusion_classifier.fixed_noise("diffusion classifier", 0, (options.points, 3, 8, 8))
    z, index = 2 * x.double() - 1, 0

    def denoise(z, s):
        c_noise = torch.tensor([math.log(s) / 4], dtype=torch.float64)
        f = literal(z / math.sqrt(s**2 + 0.25), c_noise, torch.tensor([label]))
        return 0.25 / (s**2 + 0.25) * z + 0.5 * s / math.sqrt(s**2 + 0.25) * f

    def density(s):
        square = (math.log(s) + 1.2) ** 2
        exponent = square / 2 * 1.44 if options.weights == "published" else square / 2 / 1.44
        return math.exp(-exponent) / (s * 1.2 * math.sqrt(2 * math.pi))

    def weight(s):
        return (s**2 + 0.25) / (s * 0.5) ** 2

    if options.variant == "epndc":
        t = grid[0]
        for i in range(5 if options.weights == "published" else 1, options.points - 2):
            s, u = grid[i], grid[i + 1]
            e = torch.from_numpy(noise[index]).double()[None]
            above = z + math.sqrt(u**2 - t**2) * e
            a = ((u**2 - s**2) * denoise(above, u) + s**2 * above) / u**2
            b = ((u**2 - s**2) * z + (s**2 - t**2) * above) / (u**2 - t**2)
            w = (u**2 - t**2) / (2 * (u**2 - s**2) * (s**2 - t**2))
            if options.weights == "published":
                w = weight(s) * density(s) * (u - s)
                w *= u**2 * (u**2 - t**2) / 4 / (u - s) ** 2 / (s**2 - t**2)
            total += w * float((a - b).square().mean())
            index += 1
        return -total
    for i in range(options.points - 2):
        before, s = grid[i], grid[i + 1]
        e = torch.from_numpy(noise[index]).double()[None]
        p = density(before) if options.weights == "published" else density(s)
        total += weight(s) * p * (s - before) * float((denoise(z + s * e, s) - z).square().mean())
        index += 1
    return -total


@pytest.mark.parametrize("weights", ["derived", "published"])
@pytest.mark.parametrize("variant", ["dc", "apndc", "epndc"])
def test_diffusion_classifiers_equal_their_published_formulas(variant, weights):
    made = classifier(variant, weights, points=10, eliminate=False)
    x = uniform(2, 3, 8, 8, dtype=FP32)
    found = made(x)
    for image in range(2):
        for label in (0, 3):
            assert found[image, label].item() == pytest.approx(
                literal_logits(made, x[image : image + 1], label), rel=2e-4
            )


class Brightness(nn.Module):
    """In place of a network: its error grows with the distance of the class from ten times the image's brightness."""

    def __init__(self):
        super().__init__()
        self.settings = EDMSettings(**{**SONG.__dict__, "num_classes": 10})
        self.map_layer0 = nn.Linear(1, 1)

    def condition(self, c_noise_B, label_B):
        return (label_B,)

    def forward(self, x_BCHW, condition):
        brightness_B = (x_BCHW.mean(dim=(1, 2, 3)) + 1) / 2
        return (condition[0] / 10 - brightness_B)[:, None, None, None].expand_as(x_BCHW)


@pytest.mark.parametrize("variant", ["dc", "apndc", "epndc"])
def test_elimination_never_changes_the_winner_and_needs_fewer_evaluations(variant):
    options, found = DiffusionOptions(variant=variant, points=120), []
    x = uniform(12, 1, 1, 1, dtype=FP32).expand(12, 3, 8, 8)
    for eliminate in (False, True):
        made = DiffusionClassifier(Brightness(), steps_of(options, 0.25), options, 0.25)
        made.eliminate = eliminate
        found.append((made(x).detach(), made.evaluations))
    (scores, all_evaluations), (shortened, evaluations) = found
    assert torch.equal(scores.argmax(1), shortened.argmax(1))
    assert len(set(scores.argmax(1).tolist())) > 3
    kept = shortened.isfinite()
    assert torch.allclose(shortened[kept], scores[kept], rtol=1e-5)
    assert evaluations < 0.9 * all_evaluations


def test_a_diffusion_classifier_is_a_function_of_one_image():
    made, x = classifier("dc"), uniform(5, 3, 8, 8, dtype=FP32)
    together = made(x)
    alone = torch.cat([made(one[None]) for one in x])
    assert torch.equal(together.isfinite(), alone.isfinite())
    assert torch.allclose(together[together.isfinite()], alone[alone.isfinite()], rtol=1e-4)


def test_a_spec_of_a_diffusion_classifier(raw_spec, tmp_path):
    save_file(published(filled(EDMUNet(SONG))), tmp_path / "edm.safetensors")
    section = {"arch": "diffusion", "checkpoint": str(tmp_path / "edm.safetensors"), "options": {"points": 8}}

    def source(**changes):
        return resolve_classifier(load_spec({**raw_spec, "classifier": {**section, **changes}}))

    assert source().build(CPU, FP32, 3, 4)(uniform(1, 3, 8, 8, dtype=FP32)).shape == (1, 4)
    with pytest.raises(UserError, match="has 4 classes, but the data set has 10"):
        source().load(CPU, 3, 10)
    for options, message in (
        ({"variant": "apndc"}, r"'apndc' with denoiser.arch = 'none'.*set denoiser.arch"),
        ({"variant": "x"}, "variant"),
        ({"variant": "epndc", "largest": 0.4}, r"largest = 0.4 is not above the first noise level 0.5"),
        ({"steps": 3}, "steps"),
    ):
        with pytest.raises(UserError, match=message):
            source(options=options)


def restoration_spec(raw_spec, arch, path, sigma=0.25):
    section = {"arch": arch, "checkpoint": str(path)}
    return load_spec({**raw_spec, "denoiser": section}, [f"smoothing.sigma={sigma}"])


def chain(widths, *, norms=False, prefix="model", bias=True):
    """A chain of convolutions and, from the second one on, batch norms, with the keys of its public files."""
    layers = []
    for index, (width, out) in enumerate(pairwise(widths)):
        layers.append(nn.Conv2d(width, out, 3, padding=1, bias=bias))
        if norms and 0 < index < len(widths) - 2:
            layers.append(nn.BatchNorm2d(out))
        layers.append(nn.ReLU())
    network = filled(nn.Sequential(*layers[:-1]), dtype=FP32)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.abs_().add_(0.5)
    return network, {f"{prefix}.{key}": value for key, value in network.state_dict().items()}


@pytest.mark.parametrize(
    "layout",
    [{}, {"norms": True}, {"norms": True, "prefix": "module.dncnn", "bias": False}],
    ids=["merged", "BN", "no bias"],
)
def test_dncnn_subtracts_the_noise_that_it_predicts(raw_spec, tmp_path, layout):
    network, state = chain([3, *[8] * 9, 3], **layout)
    torch.save(state, tmp_path / "dncnn.pth")
    x = uniform(2, 3, 9, 7, dtype=FP32)
    denoiser = resolve_denoiser(restoration_spec(raw_spec, "dncnn", tmp_path / "dncnn.pth")).build(CPU, FP32, (3, 9, 7))
    assert torch.allclose(denoiser(x, 0.25), (x - network(x)).clamp(0, 1), atol=1e-5)


def test_ffdnet_denoises_a_quarter_of_the_pixels_at_a_time(raw_spec, tmp_path):
    network, state = chain([13, *[8] * 9, 12])
    torch.save(state, tmp_path / "ffdnet.pth")
    x = uniform(2, 3, 7, 8, dtype=FP32)
    even = torch.cat([x, x[:, :, -1:]], dim=2)
    corners = [even[:, channel, i::2, j::2] for channel in range(3) for i in (0, 1) for j in (0, 1)]
    out = network(torch.stack([*corners, torch.full_like(corners[0], 0.25)], dim=1))
    expected = torch.zeros_like(even)
    for index, plane in enumerate(out.unbind(1)):
        expected[:, index // 4, index % 4 // 2 :: 2, index % 2 :: 2] = plane
    denoiser = resolve_denoiser(restoration_spec(raw_spec, "ffdnet", tmp_path / "ffdnet.pth")).build(
        CPU, FP32, (3, 7, 8)
    )
    assert torch.allclose(denoiser(x, 0.25), expected[:, :, :7].clamp(0, 1), atol=1e-5)


def test_unsuitable_restoration_networks_give_one_line(raw_spec, tmp_path):
    with pytest.raises(UserError, match=r"sigma = 0.5 is beyond FFDNet's training, which ends at 75/255"):
        resolve_denoiser(restoration_spec(raw_spec, "ffdnet", tmp_path / "a.pth", sigma=0.5))
    for widths, arch, message in (
        ([3, *[8] * 6, 3], "dncnn", "IRCNN"),
        ([1, 8, 8, 1], "dncnn", "has 1 input and 1 output channels, but dncnn for images with 3"),
        (
            [3, 8, 8, 3],
            "ffdnet",
            "has 3 input and 3 output channels, but ffdnet for images with 3 channels has 13 and 12",
        ),
    ):
        torch.save(chain(widths)[1], tmp_path / "a.pth")
        with pytest.raises(UserError, match=message):
            resolve_denoiser(restoration_spec(raw_spec, arch, tmp_path / "a.pth")).build(CPU, FP32, (3, 8, 8))
    for state, message in (
        ({"fc.weight": torch.zeros(2, 2)}, "not a layer"),
        ({"0.weight": torch.zeros(2, 2)}, "neither"),
    ):
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(UserError, match=message):
            resolve_denoiser(restoration_spec(raw_spec, "dncnn", tmp_path / "a.pth")).build(CPU, FP32, (3, 8, 8))


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
@pytest.mark.parametrize("padded", [False, True])
def test_both_public_layouts_of_cifar_resnets_are_told_apart_by_their_keys(raw_spec, tmp_path, depth, padded):
    network = filled(CifarResNet(depth, 10, padded=padded), dtype=FP32)
    for name, tensor in network.state_dict().items():
        if "running_var" in name:
            tensor.abs_().add_(0.5)
    names = {key: key.replace("fc.", "linear.").replace("downsample", "shortcut") for key in network.state_dict()}
    x = uniform(2, 3, 32, 32, dtype=FP32)
    for prefix, renamed in (("", {}), ("module.", names)):
        state = {prefix + renamed.get(key, key): value for key, value in network.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "resnet.th")
        section = {"arch": f"cifar_resnet{depth}", "checkpoint": str(tmp_path / "resnet.th"), "normalize": "none"}
        found = resolve_classifier(load_spec({**raw_spec, "classifier": section})).load(CPU, 3, 10)(x)
        assert torch.allclose(found, network(x), rtol=1e-4, atol=1e-4)


def test_padded_shortcuts_have_no_weights_and_keep_every_second_pixel():
    block = CifarResNet(20, 10, padded=True).layer2[0].downsample
    x = uniform(1, 16, 4, 4)
    assert not list(block.parameters())
    assert torch.equal(block(x)[:, 8:24], x[:, :, ::2, ::2])
    assert block(x).shape == (1, 32, 2, 2)
    assert not block(x)[:, [*range(8), *range(24, 32)]].any()
