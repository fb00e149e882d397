"""Attacks without Ray on the half-space, whose exact radius is known."""

import numpy as np
import torch
from torch import nn

from diffsmooth.cluster.attacker import Attacker, block_of
from diffsmooth.cluster.worker import Setup
from diffsmooth.pipeline.attack.record import (
    Attack,
    claim_attack,
    read_samples,
)

VALUES = torch.tensor([85.0, 95.0, 160.0, 165.0]) / 255
GREY = VALUES[:, None, None, None].expand(4, 1, 4, 4)
LABELS = torch.tensor([0, 0, 1, 1])
DISTANCE = 4 * np.abs(VALUES.numpy() - 0.5)  # the exact radius of the half-space
QUICK = {"steps": 2, "draws": 8, "n0": 200, "n": 400}


class HalfSpace(nn.Module):
    def forward(self, x_BCHW):
        margin_B = 1e3 * (x_BCHW.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-margin_B, margin_B], dim=1)


def attack_alone(spec, store, samples=range(8), **settings):
    """Attack with one worker, without Ray."""
    from diffsmooth.pipeline.votes.run import read_run

    run = read_run(store)
    attack = Attack(votes_id=run.votes_id, **{"attack": "pgd", "eps": [2.0, 1.0, 0.5], **QUICK, **settings})
    claim_attack(store, attack)
    worker = Attacker.load(Setup(spec, store.uri, run.votes_id, 16, attack=attack))
    worker.run([block_of(sample, attack) for sample in samples], "0")
    return attack, read_samples(store, run, attack)
