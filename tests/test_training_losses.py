"""Every loss against its formula, written out with loops in double precision."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from diffsmooth.pipeline.models.denoisers import alphas_cumprod
from diffsmooth.pipeline.training import losses

M, B, K = 3, 5, 4
LABEL_B = torch.tensor([0, 1, 2, 3, 1])


def normal(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row):
    powers = [math.exp(value) for value in row]
    return [value / sum(powers) for value in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def probabilities(logits_MBK):
    """F[i][b][k] of copy i and image b, and its mean over the copies."""
    F = [[softmax(row) for row in copy] for copy in logits_MBK.tolist()]
    mean = [[sum(F[i][b][k] for i in range(M)) / M for k in range(K)] for b in range(B)]
    return F, mean


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing):
    logits = normal(M, B, K)
    F, _ = probabilities(logits)
    total = 0.0
    for i in range(M):
        for b, label in enumerate(LABEL_B.tolist()):
            target = [smoothing / K + (1 - smoothing) * (k == label) for k in range(K)]
            total -= sum(t * math.log(p) for t, p in zip(target, F[i][b], strict=True))
    assert float(losses.cross_entropy(logits, LABEL_B, smoothing)) == pytest.approx(total / (M * B))


def test_consistency():
    logits = normal(M, B, K, scale=2)
    F, mean = probabilities(logits)
    divergence = sum(kl(mean[b], F[i][b]) for i in range(M) for b in range(B)) / (M * B)
    entropy = -sum(p * math.log(p) for row in mean for p in row) / B
    found = losses.consistency(logits, weight=20.0, entropy=0.5)
    assert float(found) == pytest.approx(20 * divergence + 0.5 * entropy)


def test_consistency_of_equal_copies_is_the_entropy_alone():
    logits = normal(1, B, K).expand(M, -1, -1)
    found = losses.consistency(logits, weight=1e6, entropy=0.0)
    assert float(found) == pytest.approx(0, abs=1e-6)


def test_macer():
    sigma_B = torch.tensor([0.25, 0.5, 1.0, 0.25, 0.5], dtype=torch.float64)
    logits = normal(M, B, K, scale=0.3)
    logits += torch.tensor([0.3, 0.3, 0.3, -2, -2])[:, None] * torch.nn.functional.one_hot(LABEL_B, K)
    _, soft = probabilities(2.0 * logits)
    total, right = 0.0, 0
    for b, label in enumerate(LABEL_B.tolist()):
        if np.argmax(soft[b]) == label:
            other = max(p for k, p in enumerate(soft[b]) if k != label)
            margin = norm.ppf(soft[b][label]) - norm.ppf(other)
            total += 12.0 * float(sigma_B[b]) / 2 * max(0.0, 0.4 - margin)
            right += 1
    assert 0 < right < B
    found = losses.macer(logits, LABEL_B, sigma_B, weight=12.0, gamma=0.4, beta=2.0)
    assert float(found) == pytest.approx(total / B)


def test_macer_has_finite_gradients_at_certainty():
    logits = (1e4 * normal(M, B, K)).requires_grad_()
    losses.macer(logits, LABEL_B, torch.ones(B), weight=12.0, gamma=8.0, beta=16.0).backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("keep_least", [False, True])
def test_confident_cross_entropy(keep_least):
    logits = normal(M, B, K, scale=2)
    F, _ = probabilities(logits)
    total, without = 0.0, 0
    for b, label in enumerate(LABEL_B.tolist()):
        each = [-math.log(F[i][b][label]) for i in range(M)]
        kept = [loss for i, loss in enumerate(each) if np.argmax(F[i][b]) == label]
        without += not kept
        total += sum(kept or ([min(each)] if keep_least else []))
    assert without > 0, "an image must have no copy that is right"
    found = losses.confident_cross_entropy(logits, LABEL_B, keep_least=keep_least)
    assert float(found) == pytest.approx(total / (M * B))


def test_masked_adversarial():
    right = 5.0 * torch.nn.functional.one_hot(LABEL_B, K)
    logits = normal(M, B, K) + right
    logits[0, 1] = logits[0, 1].roll(1)  # image 1 has a copy that is wrong
    attacked = normal(M, B, K, seed=1, scale=3)
    F, mean = probabilities(logits)
    G, _ = probabilities(attacked)
    total, masked = 0.0, 0
    for b, label in enumerate(LABEL_B.tolist()):
        if all(np.argmax(F[i][b]) == label for i in range(M)):
            total += max(kl(mean[b], G[i][b]) for i in range(M))
        else:
            masked += 1
    assert 0 < masked < B
    assert float(losses.masked_adversarial(logits, attacked, LABEL_B)) == pytest.approx(total / B)


def test_the_attack_stays_in_its_ball_and_raises_the_divergence():
    weight = normal(K, 12)
    x, mean_BK = normal(B, 3, 2, 2, seed=1), torch.full((B, K), 1 / K, dtype=torch.float64)

    def network(x_BCHW):
        return x_BCHW.flatten(1) @ weight.T

    start = normal(B, 3, 2, 2, seed=2)
    found = losses.attack(network, x, mean_BK, radius=0.5, steps=4, start_BCHW=start)
    distance_B = (found - x).flatten(1).norm(dim=1)
    assert (distance_B <= 0.5 + 1e-9).all()
    assert (distance_B > 0.4).all()
    before = losses.divergence_MB(mean_BK, network(x)[None])
    after = losses.divergence_MB(mean_BK, network(found)[None])
    assert (after > before).all()


def test_similarity():
    features = normal(M, B, 6)
    mean = features.mean(dim=0).tolist()

    def cosine(a, b):
        return sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))

    within, between = [], []
    for a in range(B):
        for b in range(B):
            if a != b:
                close = cosine(mean[a], mean[b])
                (within if LABEL_B[a] == LABEL_B[b] else between).append(close)
    expected = np.mean([1 - one for one in within]) + np.mean([max(0, one - 0.1) for one in between])
    assert float(losses.similarity(features, LABEL_B, weight=2.0, margin=0.1)) == pytest.approx(2 * expected)


def test_similarity_of_a_batch_without_pairs_is_finite():
    assert torch.isfinite(losses.similarity(normal(M, 1, 6), LABEL_B[:1], weight=1.0, margin=0.0))


def test_eps_loss():
    abar, t = alphas_cumprod("cosine", 10), [0, 3, 5, 7, 9]
    x, eps = normal(B, 1, 2, 2), normal(B, 1, 2, 2, seed=1)

    def predict(x_t, t_B):
        return 0.3 * x_t + 0.01 * t_B[:, None, None, None]

    total = 0.0
    for b in range(B):
        a = abar[t[b]]
        for clean, noise in zip(x[b].flatten().tolist(), eps[b].flatten().tolist(), strict=True):
            x_t = math.sqrt(a) * clean + math.sqrt(1 - a) * noise
            total += (0.3 * x_t + 0.01 * t[b] - noise) ** 2
    found = losses.eps_loss(predict, x, torch.tensor(t), eps, torch.from_numpy(abar))
    assert float(found) == pytest.approx(total / x.numel())


def test_edm_loss():
    x, eps = normal(B, 1, 2, 2, scale=0.5), normal(B, 1, 2, 2, seed=1)
    level = [0.1, 0.5, 1.0, 2.0, 3.0]

    def predict(scaled, c_noise):
        return 0.3 * scaled + c_noise[:, None, None, None]

    total = 0.0
    for b, s in enumerate(level):
        for clean, noise in zip(x[b].flatten().tolist(), eps[b].flatten().tolist(), strict=True):
            z, both = clean + s * noise, s * s + 0.25
            skip, out, inner = 0.25 / both, s * 0.5 / math.sqrt(both), 1 / math.sqrt(both)
            prediction = 0.3 * inner * z + math.log(s) / 4
            total += (prediction - (clean - skip * z) / out) ** 2
    found = losses.edm_loss(predict, x, torch.tensor(level, dtype=torch.float64), eps)
    assert float(found) == pytest.approx(total / x.numel())
