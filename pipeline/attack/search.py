"""The search for an adversarial image of the smoothed classifier g: gradients of the smoothed loss, and step rules.

The loss is that of SmoothAdv (Salman et al. 2019, arXiv 1906.04584): with p_k the mean of f_k(x' + noise) over N draws
(EOT), -log p_y grows with the error of g. Its gradient has the direction of that of the log odds

    J(x') = log(sum of p_k over k != y) - log p_y

which does not vanish where f is confident, and is what is computed. x' stays at l2 distance eps from x, or nearer if
the box [0, 1] ends before.

| attack     | gradient                                           | steps                                        |
|------------|----------------------------------------------------|----------------------------------------------|
| pgd        | over all N draws                                   | normalised, of falling length (PGD)          |
| apgd       | over all N draws                                   | APGD (Croce and Hein 2020, arXiv 2003.01690) |
| diffhammer | one chosen draw through the denoiser (DiffHammer)  | APGD                                         |
| votes      | none: score-function estimate from the scores of f | along the mean of all estimates              |
| random     | none: a random direction                           | one                                          |

Shapes: B batch, C channels, H W image, K classes, N draws.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffsmooth.pipeline.attack.record import BEYOND, HOPEFUL, Attack, Rung, expected_margin, judging_order, prove
from diffsmooth.pipeline.block import Block, Stage
from diffsmooth.pipeline.casting import CastOptions, cast_votes
from diffsmooth.pipeline.data.images import Sample
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.smoothing import BaseClassifier

_SURE = 4.0  # standard errors; a clean image that is so clearly wrong is judged without a search


class Gradient(NamedTuple):
    """The smoothed loss J at an image, and its gradient, of which only the direction is used."""

    loss: float
    direction_CHW: Tensor


class Problem:
    """One sample under attack: f, the image, its label, and the EOT draws that are used one after another."""

    def __init__(self, f: BaseClassifier, sample: Sample, index: int, attack: Attack, noise: Noise, batch: int) -> None:
        self.f, self.label, self.index, self.attack = f, sample.label, index, attack
        self.x_CHW = torch.from_numpy(sample.image_CHW).to(f.device)
        self.batch = batch  # draws per gradient pass
        self.grid = noise.grid
        self._noise = Noise(attack.seed, noise.sigma, noise.grid, f"attack-search-{attack.id}")
        self.sigma = noise.sigma
        self._drawn = 0

    def draws(self, count: int) -> Tensor:
        """The next EOT draws, N x C x H x W, in [0, 1] pixel units."""
        noise_NCHW = np.empty((count, *self.x_CHW.shape), np.float32)
        self._noise.fill(noise_NCHW, "selection", self.index, range(self._drawn, self._drawn + count))
        self._drawn += count
        return torch.from_numpy(noise_NCHW).to(self.f.device).mul_(self._noise.unit)

    def at_distance(self, delta_CHW: Tensor, eps: float) -> Tensor:
        """The image in the box in direction delta whose distance from x is eps; nearer if the box ends before.

        The distance of clip(x + s delta) grows with s, so s is found by bisection.
        """
        norm = float(delta_CHW.norm())
        if norm == 0 or not math.isfinite(norm):
            return self.x_CHW.clone()
        unit_CHW = delta_CHW / norm

        def image(length: float) -> Tensor:
            return (self.x_CHW + length * unit_CHW).clamp_(0, 1)

        low, high = 0.0, eps
        for _ in range(12):  # a few pixels can absorb most of the length
            if float((image(high) - self.x_CHW).norm()) >= eps * (1 - 1e-6):
                break
            low, high = high, 2 * high
        for _ in range(24):
            middle = (low + high) / 2
            inside = float((image(middle) - self.x_CHW).norm()) <= eps
            low, high = (middle, high) if inside else (low, middle)
        return image(low)

    def free_direction(self, at_CHW: Tensor, g_CHW: Tensor) -> Tensor:
        """The unit vector along a gradient, without the pixels that would leave the box."""
        blocked_CHW = ((at_CHW <= 0) & (g_CHW < 0)) | ((at_CHW >= 1) & (g_CHW > 0))
        free_CHW = g_CHW.masked_fill(blocked_CHW, 0.0)
        free_CHW = free_CHW / free_CHW.abs().max().clamp_min(1e-300)  # so that no square underflows
        return (free_CHW / free_CHW.norm().clamp_min(1e-300)).to(at_CHW.dtype)

    def random_direction(self) -> Tensor:
        return self.draws(1)[0]

    def check(self, gradient: Gradient) -> Gradient:
        """Refuse a gradient that is not finite, or zero. Raises: UserError."""
        largest = float(gradient.direction_CHW.abs().max())
        if not (math.isfinite(largest) and math.isfinite(gradient.loss)):
            raise UserError(
                f"the gradient of f is not finite at sample {self.index}, because of NaN or overflow "
                "in its networks; check them and smoothing.precision, or use --attack votes, which needs no gradient"
            )
        if largest == 0:
            raise UserError(
                f"the gradient of f is 0 for all {self.attack.draws} draws at sample {self.index}, so f hides it (a "
                "rounding, an argmax, or detached tensors); use --attack votes or foolbox.attacks.HopSkipJumpAttack, "
                "which need no gradient"
            )
        return gradient


Estimate = Callable[[Problem, Tensor], Gradient]
Search = Callable[[Problem, Tensor, float], Tensor]  # problem, start_CHW, eps -> x'_CHW


def smoothed_gradient(f: BaseClassifier, x_CHW: Tensor, noise_NCHW: Tensor, label: int, batch: int) -> Gradient:
    """J and its gradient over the draws of `noise_NCHW`, computed `batch` draws at a time.

    With W and R the sums over all draws of the wrong scores and of the label's, W + R = N, so the gradient of
    J = log W - log R is (1/W + 1/R) times that of W, or minus that of R. The smaller of the two is differentiated in
    each batch, as the gradient of its logarithm, which keeps its digits in the networks' precision.
    """
    wrong = right = -math.inf  # log W, log R
    parts: list[tuple[float, Tensor]] = []
    for chunk_NCHW in noise_NCHW.split(batch):
        x = x_CHW.detach().clone().requires_grad_()
        scores_NK = f.differentiable_log_scores(f.differentiable_denoise(x + chunk_NCHW))
        log_wrong, log_right = _others(scores_NK, label).logsumexp(dim=(0, 1)), scores_NK[:, label].logsumexp(dim=0)
        smaller, sign = (log_wrong, 1) if log_wrong < log_right else (log_right, -1)
        parts.append((float(smaller.detach()), sign * _gradient(smaller, x).double()))
        wrong, right = (
            float(np.logaddexp(total, float(part.detach()))) for total, part in ((wrong, log_wrong), (right, log_right))
        )
    total_CHW = torch.zeros_like(x_CHW, dtype=torch.float64)
    for logarithm, part_CHW in parts:
        total_CHW += part_CHW * math.exp(min(logarithm + float(np.logaddexp(-wrong, -right)), 700.0))
    return Gradient(wrong - right, total_CHW)


def _others(scores_NK: Tensor, label: int) -> Tensor:
    """The columns of all classes but the label."""
    return scores_NK[:, torch.arange(scores_NK.shape[1], device=scores_NK.device) != label]


def _gradient(value: Tensor, x: Tensor) -> Tensor:
    """The gradient, 0 if `value` does not depend on x in a differentiable way."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(value, x, allow_unused=True)
    return torch.zeros_like(x) if found is None else found


def eot_gradient(problem: Problem, x_CHW: Tensor) -> Gradient:
    """The gradient over all draws."""
    noise_NCHW = problem.draws(problem.attack.draws)
    found = smoothed_gradient(problem.f, x_CHW, noise_NCHW, problem.label, problem.batch)
    if float(found.direction_CHW.abs().max()) == 0:  # every draw is decided beyond the networks' precision
        found = Gradient(found.loss, _mean_margin_gradient(problem, x_CHW, noise_NCHW))
    return problem.check(found)


def _mean_margin_gradient(problem: Problem, x_CHW: Tensor, noise_NCHW: Tensor) -> Tensor:
    """The gradient of the mean over draws of each draw's own log odds, which no confidence makes vanish."""
    f, total_CHW = problem.f, torch.zeros_like(x_CHW, dtype=torch.float64)
    for chunk_NCHW in noise_NCHW.split(problem.batch):
        x = x_CHW.detach().clone().requires_grad_()
        scores_NK = f.differentiable_log_scores(f.differentiable_denoise(x + chunk_NCHW))
        odds_N = _others(scores_NK, problem.label).logsumexp(dim=1) - scores_NK[:, problem.label]
        total_CHW += _gradient(odds_N.sum(), x).double()
    return total_CHW


def hammer_gradient(problem: Problem, x_CHW: Tensor) -> Gradient:
    """DiffHammer's gradient: cheap gradients of all draws, grafted onto the denoised image of one draw.

    The cheap gradient g_i of a draw is that at its denoised image (BPDA). The reference draw maximises
    sum_j ELU(l_j + eps <g_i / |g_i|, g_j>); one round of EM weighs the draws by w_j = sigmoid(5 (l_j + <r / |r|, g_j>))
    with r their mean. The weighted mean is propagated exactly through the denoiser for the reference draw alone.
    """
    f, label = problem.f, problem.label
    noise_NCHW = problem.draws(problem.attack.draws)
    losses, cheap = [], []
    for chunk_NCHW in noise_NCHW.split(problem.batch):
        x0 = f.denoise(x_CHW + chunk_NCHW).clone().requires_grad_()
        scores_NK = f.differentiable_log_scores(x0)
        loss_N = _others(scores_NK, label).logsumexp(dim=1) - scores_NK[:, label]
        cheap.append(_gradient(loss_N.sum(), x0).flatten(1).double())
        losses.append(loss_N.detach())
    loss_N, g_NP = torch.cat(losses), torch.cat(cheap)
    unit_NP = g_NP / g_NP.norm(dim=1, keepdim=True).clamp_min(1e-300)
    gram_NN = unit_NP @ g_NP.T
    reference = int(torch.nn.functional.elu(loss_N + problem.sigma * gram_NN).sum(dim=1).argmax())
    mean_P = g_NP.mean(dim=0)
    w_N = torch.sigmoid(5 * (loss_N + g_NP @ (mean_P / mean_P.norm().clamp_min(1e-300))))
    r_P = (w_N @ g_NP) / w_N.sum().clamp_min(1e-300)
    r_P = r_P / r_P.norm().clamp_min(1e-300)
    x = x_CHW.detach().clone().requires_grad_()
    x0 = f.differentiable_denoise(x + noise_NCHW[reference : reference + 1])
    through = _gradient((x0.flatten() * r_P.to(x0.dtype)).sum(), x)
    return problem.check(Gradient(float(loss_N.mean()), through))


def votes_gradient(problem: Problem, x_CHW: Tensor) -> Gradient:
    """An estimate from the scores of f alone: the gradient of E[s(x + noise)] is E[s(x + noise) noise] / sigma^2.

    s is the score of all classes but the label. Its mean is subtracted, which changes no expectation and lowers
    the variance.
    """
    noise_NCHW = problem.draws(problem.attack.draws)
    scores_NK = torch.cat([problem.f(x_CHW + chunk).double() for chunk in noise_NCHW.split(problem.batch)])
    wrong_N = 1 - scores_NK[:, problem.label]
    g_CHW = torch.einsum("n,nchw->chw", wrong_N - wrong_N.mean(), noise_NCHW.double())
    if not bool(g_CHW.isfinite().all()):
        return problem.check(Gradient(math.nan, g_CHW))
    if float(g_CHW.norm()) == 0:  # all draws alike: any direction is as good
        g_CHW = problem.random_direction().double()
    return Gradient(float(wrong_N.mean()), g_CHW)


def steps_of_pgd(problem: Problem, start_CHW: Tensor, eps: float, estimate: Estimate) -> Tensor:
    """Normalised steps whose length falls from eps / 2 to eps / 20, on the sphere of radius eps."""
    at_CHW, steps = start_CHW, problem.attack.steps
    for step in range(steps):
        direction_CHW = problem.free_direction(at_CHW, estimate(problem, at_CHW).direction_CHW)
        length = eps * 0.5 * 0.1 ** (step / steps)
        at_CHW = problem.at_distance(at_CHW + length * direction_CHW - problem.x_CHW, eps)
    return at_CHW


_CHECKPOINTS = (0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93)  # shares of the steps
_RHO, _MOMENTUM = 0.75, 0.75


def steps_of_apgd(problem: Problem, start_CHW: Tensor, eps: float, estimate: Estimate) -> Tensor:
    """APGD: momentum, and a step length that is halved at checkpoints if the loss rises too rarely, or no longer.

    The loss is an estimate from fresh draws at each step. After a halving the search goes on from the best image.
    """
    steps, length = problem.attack.steps, eps
    checkpoints = {max(1, round(share * steps)) for share in _CHECKPOINTS}
    at_CHW = before_CHW = best_CHW = start_CHW
    best, previous, rises, since, halved, best_before = -math.inf, -math.inf, 0, 0, False, -math.inf
    for step in range(steps):
        gradient = estimate(problem, at_CHW)
        rises, since = rises + (gradient.loss > previous), since + 1
        previous = gradient.loss
        if gradient.loss > best:
            best, best_CHW, best_direction_CHW = gradient.loss, at_CHW, gradient.direction_CHW
        if step in checkpoints:
            if rises < _RHO * since or (not halved and best == best_before):
                length, halved, at_CHW, before_CHW = length / 2, True, best_CHW, best_CHW
                gradient = Gradient(best, best_direction_CHW)
            else:
                halved = False
            rises, since, best_before = 0, 0, best
        ahead_CHW = problem.at_distance(
            at_CHW + length * problem.free_direction(at_CHW, gradient.direction_CHW) - problem.x_CHW, eps
        )
        share = 1.0 if step == 0 else _MOMENTUM
        moved_CHW = at_CHW + share * (ahead_CHW - at_CHW) + (1 - share) * (at_CHW - before_CHW)
        before_CHW, at_CHW = at_CHW, problem.at_distance(moved_CHW - problem.x_CHW, eps)
    return at_CHW


def steps_by_votes(problem: Problem, start_CHW: Tensor, eps: float) -> Tensor:
    """Steps along a running mean of all estimates so far: each alone is mostly noise."""
    at_CHW, mean_CHW = start_CHW, torch.zeros_like(start_CHW, dtype=torch.float64)
    for step in range(problem.attack.steps):
        mean_CHW = mean_CHW + votes_gradient(problem, at_CHW).direction_CHW
        direction_CHW = problem.free_direction(at_CHW, mean_CHW)
        length = eps * (1.0 if step == 0 else 0.5)
        at_CHW = problem.at_distance(at_CHW + length * direction_CHW - problem.x_CHW, eps)
    return at_CHW


def random_image(problem: Problem, start_CHW: Tensor, eps: float) -> Tensor:
    """An image in a random direction, to compare attacks with."""
    return problem.at_distance(problem.random_direction(), eps)


ATTACKS: dict[str, Search] = {
    "pgd": lambda problem, start, eps: steps_of_pgd(problem, start, eps, eot_gradient),
    "apgd": lambda problem, start, eps: steps_of_apgd(problem, start, eps, eot_gradient),
    "diffhammer": lambda problem, start, eps: steps_of_apgd(problem, start, eps, hammer_gradient),
    "votes": steps_by_votes,
    "random": random_image,
}


def proof_noise(attack: Attack, noise: Noise) -> Noise:
    """The noise of all votes at images that an attack tried; `noise` is that of the run."""
    return Noise(attack.seed, noise.sigma, noise.grid, f"attack-proof-{attack.id}")


class _Voter:
    """Casts votes at images, with draws that no search and no other image uses."""

    def __init__(self, problem: Problem, sample: Sample, noise: Noise, options: CastOptions) -> None:
        attack = problem.attack
        self._problem, self._sample, self._options = problem, sample, options
        self._noise = proof_noise(attack, noise)
        self._lengths: dict[Stage, int] = {"selection": attack.n0, "estimation": attack.n}

    def votes(self, image_CHW: NDArray[np.float32], stage: Stage, place: int) -> NDArray[np.int64]:
        return votes_at(self._problem.f, image_CHW, self._sample, self._block(stage, place), self._noise, self._options)

    def _block(self, stage: Stage, place: int) -> Block:
        length = self._lengths[stage]
        return Block(self._problem.index, stage, place * length, (place + 1) * length)


def votes_at(
    f: BaseClassifier,
    image_CHW: NDArray[np.float32],
    sample: Sample,
    block: Block,
    noise: Noise,
    options: CastOptions,
) -> NDArray[np.int64]:
    """The votes of a block at an image in place of the sample's own; counts_K."""
    (cast,) = cast_votes(f, [block], {block.sample: sample._replace(image_CHW=image_CHW)}, noise, options)
    return cast.counts_K


def attack_sample(
    f: BaseClassifier, sample: Sample, index: int, attack: Attack, noise: Noise, options: CastOptions, search: Search
) -> list[Rung]:
    """Attack one sample; returns every image that was tried, with its votes. The result is deterministic.

    The search tries every declared eps from the largest, each from the image that was found before, and then bisects.
    `noise` is that of the run.

    Raises: UserError for gradients that are not finite, or zero.
    """
    problem = Problem(f, sample, index, attack, noise, max(1, min(options.batch_size, attack.draws)))
    voter = _Voter(problem, sample, noise, options)
    rungs = [Rung(0.0, 0.0, sample.image_CHW, voter.votes(sample.image_CHW, "selection", 0))]

    def margin(rung: Rung) -> float:
        return expected_margin(rung.selection_K, sample.label, attack.n, attack.alpha)

    def add(eps: float, found_CHW: Tensor) -> Rung:
        image_CHW = _stored(problem, found_CHW)
        distance = float(np.linalg.norm((image_CHW.astype(np.float64) - sample.image_CHW).ravel()))
        rungs.append(Rung(eps, distance, image_CHW, voter.votes(image_CHW, "selection", len(rungs))))
        return rungs[-1]

    def attempt(eps: float, start_CHW: Tensor) -> Rung:
        best: Rung | None = None
        for restart in range(1 + attack.restarts):
            first = start_CHW if restart == 0 else problem.at_distance(problem.random_direction(), eps)
            tried = add(eps, search(problem, first, eps))
            if best is None or margin(tried) > margin(best):
                best = tried
        assert best is not None
        return best

    if margin(rungs[0]) < _SURE:
        nearest = _descend(problem, attempt, margin)
        for factor in BEYOND if nearest else ():
            assert nearest is not None
            add(nearest[1] * factor, problem.at_distance(nearest[0] - problem.x_CHW, nearest[1] * factor))
    for place, number in enumerate(judging_order(rungs, sample.label, attack)):
        judging_K = voter.votes(rungs[number].image_CHW, "estimation", place)
        rungs[number] = rungs[number]._replace(judged=place, judging_K=judging_K)
        proof = prove(rungs[number], sample.label)
        if proof is None or proof.p_value > attack.alpha:
            break
    return rungs


def _descend(
    problem: Problem, attempt: Callable[[float, Tensor], Rung], margin: Callable[[Rung], float]
) -> tuple[Tensor, float] | None:
    """Try the declared eps from the largest, then bisect between the nearest success and the failure below it.

    Returns the nearest image that is likely to be proven and its eps; None if there is none.
    """
    tried = {}
    start_CHW = problem.x_CHW
    for eps in problem.attack.eps:
        tried[eps] = attempt(eps, problem.at_distance(start_CHW - problem.x_CHW, eps))
        start_CHW = _on_device(problem, tried[eps])
    reached = [eps for eps, rung in tried.items() if margin(rung) >= HOPEFUL]
    if not reached:
        return None
    high, start_CHW = min(reached), _on_device(problem, tried[min(reached)])
    low = max((eps for eps in tried if eps < high), default=0.0)
    high = min(high, tried[high].distance)
    for _ in range(problem.attack.refine):
        middle = math.sqrt(low * high) if low > 0 else high / 2
        rung = attempt(middle, problem.at_distance(start_CHW - problem.x_CHW, middle))
        if margin(rung) >= HOPEFUL:
            high, start_CHW = min(middle, rung.distance), _on_device(problem, rung)
        else:
            low = middle
    return start_CHW, high


def _on_device(problem: Problem, tried: Rung) -> Tensor:
    return torch.from_numpy(tried.image_CHW).to(problem.f.device)


def _stored(problem: Problem, image_CHW: Tensor) -> NDArray[np.float32]:
    """An image as it is stored: float32 in [0, 1], and on the grid of the noise if there is one."""
    image_CHW = image_CHW.detach().float().clamp(0, 1)
    if problem.grid is not None:
        image_CHW = (image_CHW * problem.grid).round() / problem.grid
    return np.ascontiguousarray(image_CHW.cpu().numpy())
