"""DiffSmooth on one page: from an image to its certificate, in the functions that `diffsmooth certify` uses.

    python examples/diffsmooth_on_one_page.py [SPEC] [SAMPLE]

The command does the same on many GPUs, and stores the votes. Noise, votes and radius are equal.

- CERTIFY: Cohen, Rosenfeld, Kolter 2019, "Certified adversarial robustness via randomized smoothing", arXiv 1902.02918
- Denoising: Carlini et al. 2023, "(Certified!!) adversarial robustness for free!", arXiv 2206.10550
- Local smoothing: Zhang et al. 2023, "DiffSmooth", arXiv 2308.14333

Shapes: N draws, M local copies, C H W image, K classes.
"""

import sys
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsmooth import load_spec
from diffsmooth.pipeline.block import Stage
from diffsmooth.pipeline.casting import noisy_images
from diffsmooth.pipeline.certify.bounds import certified_radius, lower_confidence_bound
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.smoothing import BaseClassifier, check_spec
from diffsmooth.pipeline.spec import Smoothing

BATCH = 100
Image = NDArray[np.float32]


class Certificate(NamedTuple):
    """With confidence 1 - alpha, g(x + delta) = c_A for every delta with |delta| < R; g abstains if R is 0."""

    c_A: int
    n_A: int
    p_A: float
    R: float


def vote(f: BaseClassifier, x_NCHW: Tensor) -> Tensor:
    """Return f(x), a class for each noisy image (DiffSmooth, Algorithm 1)."""
    # Denoise in one step (DDS, Algorithm 1), at the timestep t whose noise is that of x. With x scaled to [-1, 1] and
    # a = abar_t: (1 - a) / a = (2 sigma)^2, x_t = sqrt(a) x, x0 = (x_t - sqrt(1 - a) eps(x_t, t)) / sqrt(a).
    x0_NCHW = f.denoise(x_NCHW)
    # Smooth locally: M copies of each image, each with its own noise N(0, local_sigma^2 I). It is fixed, a part of f.
    copies_NMCHW = x0_NCHW[:, None] + f.local_noise_MCHW
    # Classify all copies, average their softmax, and take the class with the largest mean.
    logits = f.classify(copies_NMCHW.flatten(0, 1))
    scores_NMK = logits.softmax(dim=1).unflatten(0, copies_NMCHW.shape[:2])
    return scores_NMK.mean(dim=1).argmax(dim=1)


def sample_under_noise(f: BaseClassifier, x_CHW: Image, index: int, noise: Noise, stage: Stage, n: int) -> Tensor:
    """Return counts_K, the votes of f for n draws of x + epsilon with epsilon ~ N(0, sigma^2 I) (SAMPLEUNDERNOISE)."""
    counts_K = torch.zeros(f.num_classes, dtype=torch.int64)
    for start in range(0, n, BATCH):
        draws = range(start, min(start + BATCH, n))
        # epsilon depends on seed, stage, index and draw alone, so it is the same on every machine
        votes_N = vote(f, noisy_images(x_CHW, noise, stage, index, draws))
        counts_K += torch.bincount(votes_N, minlength=f.num_classes)
    return counts_K


def certify(f: BaseClassifier, x_CHW: Image, index: int, smoothing: Smoothing) -> Certificate:
    """Certify g around x, where g(x) is the class that f(x + epsilon) returns most often (CERTIFY; equation 1)."""
    noise, n, alpha = Noise.of(smoothing), smoothing.n, smoothing.alpha
    assert isinstance(alpha, float), "alpha is for one n"
    # Guess the top class c_A from n0 draws, then count its votes among n new ones.
    c_A = int(sample_under_noise(f, x_CHW, index, noise, "selection", smoothing.n0).argmax())
    n_A = int(sample_under_noise(f, x_CHW, index, noise, "estimation", n)[c_A])
    # LOWERCONFBOUND: Clopper and Pearson's p_A, which is at most P(f(x + epsilon) = c_A) with confidence 1 - alpha.
    p_A = float(lower_confidence_bound(n_A, n, alpha))
    # Theorem 1: R = sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)) (equation 3) with p_B = 1 - p_A; 0, abstain, if p_A < 1/2.
    R = float(certified_radius(n_A, n, alpha, smoothing.sigma))
    return Certificate(c_A, n_A, p_A, R)


def main(name: str = "fashion", sample: str = "0") -> None:
    spec, index = load_spec(name), int(sample)
    checked = check_spec(spec)
    image_CHW, label, _ = checked.data[index]
    c_A, n_A, p_A, R = certify(checked.build("cpu"), image_CHW, index, spec.smoothing)
    print(f"sample {index} of {name} with label {label}: {n_A} of {spec.smoothing.n} votes for class {c_A}")
    print(f"p_A >= {p_A:.4f}, so g(x + delta) = {c_A} for all |delta| < {R:.4f}" if R else "g abstains")


if __name__ == "__main__":
    main(*sys.argv[1:])
