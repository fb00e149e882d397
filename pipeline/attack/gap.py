"""The gap between certificates and attacks: lower and upper radius of each sample, contradictions, and robustness.

    lower (certificate, level alpha_1) <= true radius of g at the label <= upper (attack, level alpha_2)

Each side fails with probability at most its alpha. A sample with upper <= lower therefore refutes one of them, by
chance with probability at most alpha_1 + alpha_2; the probability that k of m samples do so by chance is at most
P(Bin(m, alpha_1 + alpha_2) >= k). Resisted accuracy at r is the share of samples whose upper bound exceeds r: an upper
bound of g's accuracy under perturbations of norm r, as certified accuracy is a lower bound.

Other papers report an attack by what it reaches, without a proof. On the images found at a declared eps:

    robust accuracy (empirical)  share of samples whose majority vote is still the label
    average robustness           mean over samples of p_y, the probability that one noisy query is right
    worst of N                   mean over samples of p_y^N: all of N queries are right (resubmission)

p_y at x' is bounded by the selection votes, which played no part in finding x'. (DiffHammer, 2024, names the last two.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import bdtrc, gammaln

from diffsmooth.pipeline.attack.record import Attack, AttackedSample, Proof, Rung, prove
from diffsmooth.pipeline.certify.curve import clopper_pearson
from diffsmooth.pipeline.certify.kinds import KINDS

_DELTA = 0.05  # of an interval of robustness
GAP_COLUMNS = (
    "sample", "label", "lower", "upper", "attack", "class", "n_y", "n_c", "p_value", "attacked", "contradiction",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Attacks:
    """The finished samples of one or several attacks on a run."""

    settings: Mapping[str, Attack]  # by id
    samples: Mapping[str, Sequence[AttackedSample]]  # by id

    @property
    def alpha(self) -> float:
        """The error probability of a sample's best upper bound over all attacks."""
        return sum(attack.alpha for attack in self.settings.values())

    def uppers(self) -> dict[int, float]:
        """The smallest proven upper bound of each attacked sample; infinite if there is none."""
        found: dict[int, float] = {}
        for attack_id, attack in self.settings.items():
            for one in self.samples[attack_id]:
                found[one.sample] = min(found.get(one.sample, math.inf), one.upper(attack.alpha))
        return found

    def best(self) -> dict[int, tuple[str, AttackedSample, Rung]]:
        """The nearest proven image of each sample that has one, and the attack that found it."""
        found: dict[int, tuple[str, AttackedSample, Rung]] = {}
        for attack_id, attack in self.settings.items():
            for one in self.samples[attack_id]:
                nearest = one.nearest(attack.alpha)
                if nearest is None:
                    continue
                if one.sample not in found or nearest.distance < found[one.sample][2].distance:
                    found[one.sample] = (attack_id, one, nearest)
        return found


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Certificates and attacks side by side."""

    table: pd.DataFrame  # one row per complete sample of the order; columns as in GAP_COLUMNS
    alpha: float  # of a certificate and an upper bound together

    @property
    def contradictions(self) -> list[int]:
        return self.table.loc[self.table["contradiction"], "sample"].tolist()

    @property
    def chance(self) -> float:
        """The probability that so many contradictions or more are chance; 1 if there is none."""
        count, attacked = len(self.contradictions), int(self.table["attacked"].sum())
        return float(bdtrc(count - 1, attacked, min(self.alpha, 1.0))) if count else 1.0

    def certified(self, radius: float) -> float:
        """The share of all samples that are certified at a radius."""
        return float((self.table["lower"] >= radius).mean())

    def resisted(self, radius: float) -> float:
        """The share of all samples that are not proven wrong within a radius; those not attacked resist."""
        return float((self.table["upper"] > radius).mean())

    def warning(self) -> str | None:
        """What must be said about contradictions; None if there is none."""
        if not self.contradictions:
            return None
        shown = ", ".join(map(str, self.contradictions[:10])) + (", ..." if len(self.contradictions) > 10 else "")
        return (
            f"CONTRADICTION: the upper bound is not above the certified radius at {len(self.contradictions)} of "
            f"{int(self.table['attacked'].sum())} attacked samples ({shown}); the probability that this is chance is "
            f"at most {self.chance:.2g}; if it is small, a certificate or a proof is wrong"
        )


def gap_of(certificates: pd.DataFrame, attacks: Attacks, alpha: float) -> Gap:
    """Certificates of an order, each at level `alpha`, beside the attacks on the same run.

    `lower` is -1 for a sample that is not certified as its label. With the cost-sensitive certificate, whose claim is
    weaker than "the label", nothing can contradict.
    """
    rows = certificates[~certificates["status"].isin(["incomplete", "exempt"])]
    uppers, best, table = attacks.uppers(), attacks.best(), []
    names = ("sample", "label", "radius", "correct", "certificate")
    for sample, label, radius, right, certificate in rows[list(names)].itertuples(index=False, name=None):
        lower = float(radius) if right else -1.0
        upper = uppers.get(sample, math.inf)
        found = best.get(sample)
        proof = None if found is None else prove(found[2], found[1].label)
        proof = proof or Proof(-1, 0, 0, 1.0)
        against = bool(right) and upper <= lower and KINDS[certificate].claims_label
        table.append(
            (sample, label, lower, upper, "" if found is None else found[0], *proof, sample in uppers, against)
        )
    return Gap(table=pd.DataFrame(table, columns=list(GAP_COLUMNS)), alpha=alpha + attacks.alpha)


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """The metrics of other papers at a declared eps, with 95 % intervals over the draws."""

    attack: str
    eps: float
    samples: int
    robust_accuracy: float  # empirical: nothing is proven by it
    average: float
    average_lower: float
    average_upper: float
    queries: int  # N of worst-of-N
    worst: float
    worst_lower: float
    worst_upper: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def robustness(samples: Sequence[AttackedSample], attack: Attack, queries: int = 10) -> list[Robustness]:
    """The metrics of an attack at each of its eps; empty without samples. `queries` is N of worst-of-N."""
    return [_robustness(samples, attack, eps, queries) for eps in attack.eps] if samples else []


def _robustness(samples: Sequence[AttackedSample], attack: Attack, eps: float, queries: int) -> Robustness:
    rungs = [_at(one, eps) for one in samples]
    labels = [one.label for one in samples]
    n_y = np.array([rung.selection_K[label] for rung, label in zip(rungs, labels, strict=True)])
    right = [
        not any(_wrong(rung, one.label) for rung in one.rungs if rung.distance <= eps * (1 + 1e-6)) for one in samples
    ]
    m, n0 = len(samples), attack.n0
    average = float(n_y.mean() / n0)
    half_width = math.sqrt(math.log(2 / _DELTA) / (2 * m * n0))  # Hoeffding, over all m n0 draws
    each = clopper_pearson(n_y, np.full(m, n0), _DELTA / m)
    return Robustness(
        attack=attack.id,
        eps=eps,
        samples=m,
        robust_accuracy=float(np.mean(right)),
        average=average,
        average_lower=max(0.0, average - half_width),
        average_upper=min(1.0, average + half_width),
        queries=queries,
        worst=float(_all_right(n_y, n0, queries).mean()),
        worst_lower=float((each.lower**queries).mean()),
        worst_upper=float((each.upper**queries).mean()),
    )


def _at(one: AttackedSample, eps: float) -> Rung:
    """The image that was found first at a declared eps; the clean image if it was wrong already."""
    return next((rung for rung in one.rungs if rung.eps == eps), one.rungs[0])


def _wrong(rung: Rung, label: int) -> bool:
    """Whether the majority of the votes at an image is not the label."""
    votes_K = rung.selection_K if rung.judging_K is None else rung.judging_K
    return int(votes_K.argmax()) != label


def _all_right(n_y: NDArray[np.int64], n0: int, queries: int) -> NDArray[np.float64]:
    """The unbiased estimate of p^N from n_y of n0 votes: C(n_y, N) / C(n0, N). NaN if n0 < N."""
    if n0 < queries:
        return np.full(len(n_y), math.nan)
    enough = n_y >= queries
    kept = np.where(enough, n_y, queries)
    logarithm = gammaln(kept + 1) - gammaln(kept - queries + 1) - gammaln(n0 + 1) + gammaln(n0 - queries + 1)
    return np.where(enough, np.exp(logarithm), 0.0)
