"""The losses that trainings minimise, as functions of logits or predictions.

With M noisy copies x_i of each image, F the softmax of the logits and mean F = 1/M sum_i F(x_i) (numbers: arXiv):

    cross entropy   1/M sum_i CE(F(x_i), y)                            Cohen et al. 2019, 1902.02918, section 3.3
    consistency     lambda 1/M sum_i KL(mean F || F(x_i)) + eta H(mean F)           Jeong and Shin 2020, 2006.04062
    MACER           1[right] lambda sigma/2 max(0, gamma - margin), with                    Zhai et al. 2020, 2001.02378
                    margin = Phi^-1(z_y) - Phi^-1(max z_other), z = mean softmax(beta logits)
    confidence      1/M sum_i 1[x_i right] CE(F(x_i), y)                                FT-CADIS: Jang et al., TMLR 2024
                    + lambda 1[all right] max_i KL(mean F || F(x_i + eta_i)), eta_i from PGD in an l2 ball
    similarity      mean over pairs of one class of 1 - cos + mean over pairs of two classes of max(0, cos - margin),
                    on expected features (ours: the paper, imavis 2024.105272, has no public code)
    eps             E |eps(x_t, t) - eps|^2                                           Ho et al. 2020, 2006.11239, (14)
    EDM             E |F(c_in z) - (x - c_skip z) / c_out|^2                   Karras et al. 2022, 2206.00364, (8)

Shapes: M copies, B images, C H W image, K classes, D features.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from diffsmooth.pipeline.models.edm import edm_scalings


def cross_entropy(logits_MBK: Tensor, label_B: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross entropy over images and copies; `smoothing` is that of the labels."""
    label_MB = label_B.expand(len(logits_MBK), -1)
    return F.cross_entropy(logits_MBK.flatten(0, 1), label_MB.flatten(), label_smoothing=smoothing)


def divergence_MB(mean_BK: Tensor, logits_MBK: Tensor) -> Tensor:
    """Return KL(mean || softmax(logits)) of each copy and image, in nats."""
    log_mean_BK = mean_BK.clamp_min(1e-20).log()
    return (mean_BK * (log_mean_BK - logits_MBK.log_softmax(dim=2))).sum(dim=2)


def consistency(logits_MBK: Tensor, *, weight: float, entropy: float) -> Tensor:
    """Return lambda times the mean divergence of the copies from their mean, plus eta times the entropy of the mean."""
    mean_BK = logits_MBK.softmax(dim=2).mean(dim=0)
    entropy_B = -(mean_BK * mean_BK.clamp_min(1e-20).log()).sum(dim=1)
    return weight * divergence_MB(mean_BK, logits_MBK).mean() + entropy * entropy_B.mean()


def macer(logits_MBK: Tensor, label_B: Tensor, sigma_B: Tensor, *, weight: float, gamma: float, beta: float) -> Tensor:
    """Return the hinge on the certified radius of the images that the soft vote gets right, averaged over all images.

    `sigma_B` is the noise of each image, in [0, 1] pixel units.
    """
    soft_BK = (beta * logits_MBK).softmax(dim=2).mean(dim=0)
    (first_B, second_B), top_B = soft_BK.topk(2, dim=1).values.unbind(1), soft_BK.argmax(dim=1)
    margin_B = _quantile(first_B) - _quantile(second_B)
    hinge_B = sigma_B / 2 * (gamma - margin_B).clamp_min(0)
    return weight * torch.where(top_B == label_B, hinge_B, 0).mean()


def _quantile(p_B: Tensor) -> Tensor:
    """Return Phi^-1, finite and with a finite gradient at 0 and 1."""
    return math.sqrt(2) * torch.erfinv(2 * p_B.clamp(1e-6, 1 - 1e-6) - 1)


def confident_cross_entropy(logits_MBK: Tensor, label_B: Tensor, *, keep_least: bool) -> Tensor:
    """Return the cross entropy of the copies that are classified right, summed over them and divided by M B.

    With `keep_least`, for the warm-up, an image without such a copy keeps the copy of the least loss.
    """
    M, B, K = logits_MBK.shape
    label_MB = label_B.expand(M, -1)
    loss_MB = F.cross_entropy(logits_MBK.reshape(-1, K), label_MB.reshape(-1), reduction="none").view(M, B)
    kept_MB = logits_MBK.argmax(dim=2) == label_MB
    if keep_least:
        least_MB = F.one_hot(loss_MB.argmin(dim=0), M).T.bool()
        kept_MB = kept_MB | (least_MB & ~kept_MB.any(dim=0))
    return torch.where(kept_MB, loss_MB, 0).sum() / (M * B)


def masked_adversarial(logits_MBK: Tensor, attacked_MBK: Tensor, label_B: Tensor) -> Tensor:
    """Return the largest divergence of an attacked copy, for the images of which all copies are right; mean over B.

    The mean softmax is a constant target.
    """
    mean_BK = logits_MBK.softmax(dim=2).mean(dim=0).detach()
    worst_B = divergence_MB(mean_BK, attacked_MBK).amax(dim=0)
    all_right_B = (logits_MBK.argmax(dim=2) == label_B).all(dim=0)
    return torch.where(all_right_B, worst_B, 0).mean()


def attack(
    network: Callable[[Tensor], Tensor],
    x_BCHW: Tensor,
    mean_BK: Tensor,
    *,
    radius: float,
    steps: int,
    start_BCHW: Tensor,
) -> Tensor:
    """Return images within l2 `radius` of x that maximise KL(mean || softmax(network)), by normalised gradient steps.

    `start_BCHW` is standard normal; the attack starts at a thousandth of the radius in its direction. The step is twice
    the radius over the number of steps.
    """

    def unit(v_BCHW: Tensor) -> Tensor:
        return v_BCHW / v_BCHW.flatten(1).norm(dim=1).clamp_min(1e-12)[:, None, None, None]

    delta_BCHW = radius / 1000 * unit(start_BCHW)
    for _ in range(steps):
        delta_BCHW = delta_BCHW.detach().requires_grad_()
        with torch.enable_grad():
            loss = divergence_MB(mean_BK, network(x_BCHW + delta_BCHW)[None]).sum()
            (gradient_BCHW,) = torch.autograd.grad(loss, delta_BCHW)
        moved_BCHW = delta_BCHW.detach() + 2 * radius / steps * unit(gradient_BCHW)
        norm_B = moved_BCHW.flatten(1).norm(dim=1).clamp_min(1e-12)
        delta_BCHW = moved_BCHW * (radius / norm_B).clamp(max=1)[:, None, None, None]
    return x_BCHW + delta_BCHW


def similarity(features_MBD: Tensor, label_B: Tensor, *, weight: float, margin: float) -> Tensor:
    """Return how far expected features of one class are apart, and how far those of two classes are too close."""
    expected_BD = F.normalize(features_MBD.mean(dim=0), dim=1)
    cosine_BB = expected_BD @ expected_BD.T
    same_BB = label_B[:, None] == label_B[None]
    apart_BB = ~torch.eye(len(label_B), dtype=torch.bool, device=label_B.device)
    within = _mean_where(same_BB & apart_BB, 1 - cosine_BB)
    return weight * (within + _mean_where(~same_BB, (cosine_BB - margin).clamp_min(0)))


def _mean_where(chosen_BB: Tensor, value_BB: Tensor) -> Tensor:
    return torch.where(chosen_BB, value_BB, 0).sum() / chosen_BB.sum().clamp_min(1)


def eps_loss(
    predict: Callable[[Tensor, Tensor], Tensor], x_BCHW: Tensor, t_B: Tensor, eps_BCHW: Tensor, abar_T: Tensor
) -> Tensor:
    """Return DDPM's loss for images on [-1, 1]; `predict(x_t_BCHW, t_B)` is the network."""
    abar_B111 = abar_T[t_B][:, None, None, None]
    x_t_BCHW = abar_B111.sqrt() * x_BCHW + (1 - abar_B111).sqrt() * eps_BCHW
    return F.mse_loss(predict(x_t_BCHW, t_B), eps_BCHW)


def edm_loss(predict: Callable[[Tensor, Tensor], Tensor], x_BCHW: Tensor, level_B: Tensor, eps_BCHW: Tensor) -> Tensor:
    """Return EDM's loss, with its weights, for images on [-1, 1] and noise levels on that scale.

    `predict(c_in z, c_noise_B)` is the network.
    """
    level_B111 = level_B[:, None, None, None]
    z_BCHW, scale = x_BCHW + level_B111 * eps_BCHW, edm_scalings(level_B111)
    target_BCHW = (x_BCHW - scale.skip * z_BCHW) / scale.out
    return F.mse_loss(predict(scale.inner * z_BCHW, scale.noise.flatten()), target_BCHW)
