"""Trains a small network of each later kind on MNIST, for the comparison in docs/results.md.

The images are the 4,000 that no run of the embedded default certifies (split `train` of the data set mnist).

    edm          the denoiser of EDM, without labels: E |F(c_in z) - (x - c_skip z) / c_out|^2, which is EDM's loss with
                 its weights (Karras et al. 2022, arXiv 2206.00364, equation 8)
    consistency  a distillation of edm: E |D(z_n+1, s_n+1) - sg D(z_n, s_n)|^2, with z_n from one step of Heun's method
                 with the teacher (Song et al. 2023, arXiv 2303.01469, algorithm 2; no second network as the target)
    conditional  edm with the labels of all 4,000 images, smaller, for the diffusion classifier
    rrcm         the transformer of rRCM, trained with cross-entropy on noisy images and all labels; without the
                 pre-training of the paper

All randomness comes from generators seeded here, on one thread, so the same machine always writes the same files.

    python -m diffsmooth.jobs.train_networks --output FOLDER [edm] [consistency] [conditional] [rrcm]
"""

import argparse
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.models.edm import EDMSettings, EDMUNet, Scalings, consistency_scalings, edm_scalings, load_edm
from diffsmooth.pipeline.models.fused import use_fast_group_norms
from diffsmooth.pipeline.models.rrcm import RRCM, RRCMSettings, nearest_level
from diffsmooth.pipeline.models.unet import UNet
from diffsmooth.pipeline.spec import Data

logger = logging.getLogger(__name__)

SEED = 20_240
BATCH = 32
SIGMA = 0.5  # of the certificates, on [0, 1]
NETWORKS = ("edm", "consistency", "conditional", "rrcm")

EDM = EDMSettings(
    family="song", channels=1, model_channels=8, channel_mult=(1, 2, 4), num_blocks=1, attention_levels=(),
    resolution=28,
)  # fmt: skip
CONDITIONAL = EDMSettings(
    family="song", channels=1, model_channels=4, channel_mult=(1, 2, 8), num_blocks=1, attention_levels=(),
    resolution=28, num_classes=10,
)  # fmt: skip
VIT = RRCMSettings(channels=1, patch=4, width=128, hidden=256, depth=4, patches=49, num_classes=10)


class Images(NamedTuple):
    """The training images on [0, 1] and their labels."""

    x_NCHW: Tensor
    label_N: Tensor


class LogNormal(NamedTuple):
    """The distribution of ln(s) in training, with s the noise on [-1, 1]."""

    mean: float
    std: float


class Columns(NamedTuple):
    """The scalings of a batch of noise levels; c_skip, c_out and c_in are B x 1 x 1 x 1, c_noise has length B."""

    skip: Tensor
    out: Tensor
    inner: Tensor
    noise: Tensor


class Batch(NamedTuple):
    """Augmented images on [0, 1], and their labels."""

    x_BCHW: Tensor
    label_B: Tensor


def augment(x_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Apply a small random rotation, scaling, shear and shift to every image."""
    B = len(x_BCHW)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(B, generator=generator) * 2 - 1) * limit

    angle, scale, shear = uniform(0.2), 1 + uniform(0.1), uniform(0.1)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    row_0 = torch.stack([cos, shear - sin, uniform(0.1)], dim=1)
    row_1 = torch.stack([sin, cos, uniform(0.1)], dim=1)
    grid = F.affine_grid(torch.stack([row_0, row_1], dim=1), list(x_BCHW.shape), align_corners=False)
    return F.grid_sample(x_BCHW, grid, padding_mode="zeros", align_corners=False)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Return the learning-rate factor: linear warm-up, then half a cosine down to zero."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


class Trainer:
    """Minimises a loss with Adam, and leaves the moving average of the weights in the network."""

    def __init__(self, name: str, images: Images, steps: int, learning_rate: float = 2e-3) -> None:
        self._name, self._images, self._steps, self._learning_rate = name, images, steps, learning_rate
        self.generator = torch.Generator().manual_seed(SEED + NETWORKS.index(name))

    def initialise(self, make: Callable[[], nn.Module]) -> nn.Module:
        """Return the network with uniform weights, zero biases and identity norms, from the trainer's generator."""
        with torch.device("meta"):
            network = make()
        network.to_empty(device="cpu")
        for name, parameter in network.named_parameters():
            if name.endswith(("cls_token", "pos_embed")):
                nn.init.normal_(parameter, std=0.02, generator=self.generator)
            elif parameter.ndim > 1:
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=self.generator)
            else:  # of a norm, or a bias
                nn.init.constant_(parameter, float(name.endswith("weight")))
        return network.to(memory_format=torch.channels_last)

    def noise(self, x_BCHW: Tensor) -> Tensor:
        return torch.randn(x_BCHW.shape, generator=self.generator)

    def batch(self) -> Batch:
        index_B = torch.randint(len(self._images.x_NCHW), (BATCH,), generator=self.generator)
        x_BCHW = augment(self._images.x_NCHW[index_B], self.generator)
        return Batch(x_BCHW, self._images.label_N[index_B])

    def train(self, network: nn.Module, loss_of: Callable[[Batch], Tensor]) -> None:
        average = {key: value.clone() for key, value in network.state_dict().items()}
        optimizer = torch.optim.AdamW(network.parameters(), lr=self._learning_rate, weight_decay=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, self._steps, 100))
        total, start = 0.0, time.process_time()
        for step in range(self._steps):
            loss = loss_of(self.batch())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            decay = min(0.995, (1 + step) / (10 + step))
            for key, value in network.state_dict().items():
                average[key].lerp_(value, 1 - decay)
            total += loss.item()
            if (step + 1) % 100 == 0:
                seconds = time.process_time() - start
                logger.info("%s: step %d, loss %.4f, %.0f core-seconds", self._name, step + 1, total / 100, seconds)
                total = 0.0
        network.load_state_dict(average)


def columns(scalings: Callable[[float], Scalings], level_B: Tensor) -> Columns:
    skip_B, out_B, inner_B, noise_B = torch.tensor([scalings(level) for level in level_B.tolist()]).unbind(1)
    shape = (-1, 1, 1, 1)
    return Columns(skip_B.view(shape), out_B.view(shape), inner_B.view(shape), noise_B)


def train_edm(settings: EDMSettings, trainer: Trainer, levels: LogNormal) -> EDMUNet:
    """Train a denoiser of EDM; with classes, a class-conditional one."""
    network = trainer.initialise(lambda: EDMUNet(settings))
    assert isinstance(network, EDMUNet)
    side = settings.resolution
    nn.init.zeros_(network.dec[f"{side}x{side}_aux_conv"].get_parameter("weight"))

    def loss_of(batch: Batch) -> Tensor:
        x_BCHW = 2 * batch.x_BCHW - 1
        level_B = torch.exp(levels.mean + levels.std * torch.randn(BATCH, generator=trainer.generator))
        z_BCHW = x_BCHW + level_B[:, None, None, None] * trainer.noise(x_BCHW)
        one = columns(edm_scalings, level_B)
        condition = network.condition(one.noise, batch.label_B if settings.num_classes else None)
        return F.mse_loss(network(one.inner * z_BCHW, condition), (x_BCHW - one.skip * z_BCHW) / one.out)

    trainer.train(network, loss_of)
    return network


def karras_levels(smallest: float, largest: float, count: int, rho: float = 7.0) -> Tensor:
    """Return increasing noise levels (arXiv 2206.00364, equation 5)."""
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    return torch.linspace(low, high, count, dtype=torch.float64).pow(rho).float()


def train_consistency(teacher: EDMUNet, trainer: Trainer, count: int = 12) -> UNet:
    """Distil a denoiser of EDM into one pass. The largest noise level is that of `SIGMA`."""
    settings = load_named("mnist").denoiser.unet
    assert settings is not None
    network = trainer.initialise(lambda: UNet(settings, 1))
    use_fast_group_norms(network)
    level_N = karras_levels(0.002, 2 * SIGMA, count)

    def predict(z_BCHW: Tensor, level_B: Tensor) -> Tensor:
        one = columns(consistency_scalings, level_B)
        return one.skip * z_BCHW + one.out * network(one.inner * z_BCHW, one.noise)

    def slope(z_BCHW: Tensor, level_B: Tensor) -> Tensor:
        """dz/ds of the probability flow of the teacher."""
        one = columns(edm_scalings, level_B)
        denoised = one.skip * z_BCHW + one.out * teacher(one.inner * z_BCHW, teacher.condition(one.noise))
        return (z_BCHW - denoised) / level_B[:, None, None, None]

    def loss_of(batch: Batch) -> Tensor:
        x_BCHW = 2 * batch.x_BCHW - 1
        index_B = torch.randint(1, count, (BATCH,), generator=trainer.generator)
        upper_B, lower_B = level_N[index_B], level_N[index_B - 1]
        z_BCHW = x_BCHW + upper_B[:, None, None, None] * trainer.noise(x_BCHW)
        with torch.no_grad():
            step = (lower_B - upper_B)[:, None, None, None]
            first = slope(z_BCHW, upper_B)
            below = z_BCHW + step / 2 * (first + slope(z_BCHW + step * first, lower_B))
            target = predict(below, lower_B)
        return F.mse_loss(predict(z_BCHW, upper_B), target)

    trainer.train(network, loss_of)
    assert isinstance(network, UNet)
    return network


def train_rrcm(settings: RRCMSettings, trainer: Trainer) -> RRCM:
    """Train rRCM's transformer to classify images with noise of `SIGMA`."""
    network = trainer.initialise(lambda: RRCM(settings, nearest_level(SIGMA), layernorm=True))
    assert isinstance(network, RRCM)

    def loss_of(batch: Batch) -> Tensor:
        noisy_BCHW = batch.x_BCHW + SIGMA * trainer.noise(batch.x_BCHW)
        return F.cross_entropy(network(noisy_BCHW), batch.label_B)

    trainer.train(network, loss_of)
    return network


def train(name: str, images: Images, folder: Path, scale: float = 1.0) -> nn.Module:
    """Train one of NETWORKS with its number of steps times `scale`. `consistency` reads edm's file in `folder`."""

    def trainer(steps: int, learning_rate: float = 2e-3) -> Trainer:
        return Trainer(name, images, max(1, round(scale * steps)), learning_rate)

    if name == "edm":
        return train_edm(EDM, trainer(1000), LogNormal(-0.7, 1.0))
    if name == "conditional":  # the classifier uses levels from 2 SIGMA to 3
        return train_edm(CONDITIONAL, trainer(1400), LogNormal(0.4, 0.6))
    if name == "consistency":
        return train_consistency(load_edm("edm", str(folder / "edm.safetensors"), torch.device("cpu"), 1), trainer(400))
    return train_rrcm(VIT, trainer(2000, 1e-3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("networks", nargs="*", help=f"which to train, of {', '.join(NETWORKS)}; default all")
    parser.add_argument("--output", type=Path, required=True, help="folder to write NETWORK.safetensors to")
    arguments = parser.parse_args()
    unknown = set(arguments.networks) - set(NETWORKS)
    if unknown:
        parser.error(f"{min(unknown)!r} is unknown; choose of {', '.join(NETWORKS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    data = open_dataset(Data(name="mnist", split="train"))
    samples = [data[index] for index in range(len(data))]
    x_NCHW = torch.stack([torch.from_numpy(one.image_CHW) for one in samples])
    images = Images(x_NCHW, torch.tensor([one.label for one in samples]))
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.networks or NETWORKS:
        network = train(name, images, arguments.output)
        state = {key: value.contiguous() for key, value in network.state_dict().items()}
        save_file(state, arguments.output / f"{name}.safetensors")


if __name__ == "__main__":
    main()
