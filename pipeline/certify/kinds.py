"""Certificate kinds: everything that depends on which certificate an order asks for.

The selection votes choose the top class c_A and never enter the bound; the estimation votes give its count n_A among n.
`top` is CERTIFY (Cohen et al. 2019, arXiv 1902.02918, Algorithm 2): it abstains iff the p_A lower bound is below 1/2.

`multiclass` bounds the runner-up from the same votes instead of setting p_B = 1 - p_A:

    certified radius = sigma / 2 (Phi^-1(p_A lower bound) - Phi^-1(p_B upper bound))    (equation 3)

with the bound of p_A at level w alpha and an upper bound for each of the other C - 1 classes at level
(1 - w) alpha / (C - 1); all hold together with probability 1 - alpha (Bonferroni). p_B is the largest of them, and at
most 1 - p_A lower bound. The class comes from the selection, never from the votes that bound it.

`cost` (Xin et al., arXiv 2310.08732) makes a weaker claim with a larger radius: g(x + d) is none of the classes Omega
that are costly for the label, for |d| < radius. Its class is the top one of the selection outside Omega; only the
classes in Omega are bounded from above, with w = 0.8.

`predict` (PREDICT, Algorithm 1 of Cohen et al.) needs no selection: it returns the class with the most votes, and
abstains unless a two-sided binomial test separates its count from the runner-up's. It claims no radius.

`cascade` is one certificate over several runs (certify/cascade.py); no order of a single run can ask for it.

No other module compares the name of a certificate: what it needs to know is an attribute here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from diffsmooth.pipeline.certify.bounds import (
    certified_radius,
    lower_confidence_bound,
    prediction_p_value,
    upper_confidence_bound,
    upper_tail,
)
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import SamplingMode

TOP: Final = "top"  # the certificate of an order that names none
CASCADE: Final = "cascade"  # also the name of its curve

_W, _W_COST = 0.9, 0.8  # p_A's share of alpha in the multi-class and in the cost-sensitive certificate


class Counts(NamedTuple):
    """Estimation votes of S samples for K classes, with the level and sigma of their bound."""

    top: NDArray[np.int64]  # the class that the selection chose for each sample
    estimation_SK: NDArray[np.int64]
    costly_SK: NDArray[np.bool_]  # Omega of each sample's label
    alpha: float
    sigma: float

    @property
    def n_A(self) -> NDArray[np.int64]:
        return self.estimation_SK[np.arange(len(self.top)), self.top]

    @property
    def n(self) -> NDArray[np.int64]:
        """Draws of each sample; 1 without votes, so that the bound is defined."""
        return np.maximum(self.estimation_SK.sum(axis=1), 1)


class Verdict(NamedTuple):
    """What a certificate says about each sample if its votes are complete."""

    top_class: NDArray[np.int64]
    n_A: NDArray[np.int64]
    p_A_lower: NDArray[np.float64]
    p_B_upper: NDArray[np.float64]
    radius: NDArray[np.float64]
    certified: NDArray[np.bool_]  # it does not abstain


def _top(counts: Counts) -> Verdict:
    """CERTIFY: the selection's top class, bounded by the estimation's votes for it."""
    n_A, n = counts.n_A, counts.n
    bound = lower_confidence_bound(n_A, n, counts.alpha)
    return Verdict(
        counts.top, n_A, bound, 1 - bound, certified_radius(n_A, n, counts.alpha, counts.sigma), bound >= 0.5
    )


def _multiclass(counts: Counts) -> Verdict:
    """CERTIFY with all other classes bounded too; `counts` has a column for every class of the data set."""
    others_SK = np.ones(counts.estimation_SK.shape, dtype=bool)
    others_SK[np.arange(len(others_SK)), counts.top] = False
    return _against(counts, others_SK, _W)


def _cost(counts: Counts) -> Verdict:
    """The selection's top class outside Omega, against the classes in Omega."""
    return _against(counts, counts.costly_SK, _W_COST)


def _against(counts: Counts, rivals_SK: NDArray[np.bool_], w: float) -> Verdict:
    """Bound the top class from below at w alpha, and its rivals from above at (1 - w) alpha together."""
    n_A, n = counts.n_A, counts.n
    # the bound grows with the count, so the rival with the most votes has the largest bound
    n_B = np.where(rivals_SK, counts.estimation_SK, 0).max(axis=1)
    level = (1 - w) * counts.alpha / np.maximum(rivals_SK.sum(axis=1), 1)
    rest = upper_tail(n_A, n, w * counts.alpha)  # 1 - p_A lower bound
    p_B = np.minimum(rest, upper_confidence_bound(n_B, n, level))
    certified = 1 - rest >= p_B
    radius = np.where(certified, counts.sigma / 2 * (-ndtri(rest) - ndtri(p_B)), 0.0) + 0.0
    return Verdict(counts.top, n_A, 1 - rest, p_B, radius, certified)


def _predict(counts: Counts) -> Verdict:
    """PREDICT: the top class of the estimation against its runner-up; claims neither a bound nor a radius."""
    ordered = np.sort(np.pad(counts.estimation_SK, ((0, 0), (1, 0))), axis=1)
    n_A, n_B = ordered[:, -1], ordered[:, -2]
    nothing = np.full(len(n_A), np.nan)
    predicted = prediction_p_value(n_A, n_B) <= counts.alpha
    return Verdict(counts.estimation_SK.argmax(axis=1), n_A, nothing, nothing, np.zeros(len(n_A)), predicted)


@dataclass(frozen=True, kw_only=True)
class CertificateKind:
    """What a certificate claims, what an order needs to ask for it, and how it is computed and worded."""

    name: str
    summary: str  # what it bounds, in a few words
    modes: tuple[SamplingMode, ...]  # that it allows; planned and grid choose n by the top class alone
    level: float  # share of alpha at which the top class is bounded
    verdict: Callable[[Counts], Verdict] | None  # None: not from the votes of one order
    selects: bool = True  # its class comes from selection draws; without them n0 = 0
    has_radius: bool = True
    claims_label: bool = True  # a right certificate names the label; otherwise every certified sample is right
    needs_costs: bool = False  # which classes are costly for each label
    skips_wrong: bool = True  # a sample whose selected class is not its label cannot be certified as right
    caveat: str = ""  # said below tables that show its curve
    sample_claim: str = "no perturbation whose l2 norm is below the sample's radius changes g's prediction"
    set_share: str = "certified accuracy of g on them"
    population_share: str = "accuracy of g in that population"

    def verdict_of(self, counts: Counts) -> Verdict:
        """What it says about each sample. Raises: ValueError for a kind that no order can ask for."""
        if self.verdict is None:
            raise ValueError(f"the certificate {self.name} does not follow from the votes of one order")
        return self.verdict(counts)

    @property
    def mark(self) -> str:
        """What follows the name of its curves."""
        return "" if self.name == TOP else f" [{self.name}]"

    @property
    def verb(self) -> str:
        return "certify" if self.has_radius else "predict"

    @property
    def status(self) -> str:
        """The status of a sample on which it does not abstain."""
        return "certified" if self.has_radius else "predicted"

    def least_n(self, alpha: float) -> int:
        """The smallest n at which a unanimous vote is enough: level^(1/n) >= 1/2, for PREDICT 2 (1/2)^n <= alpha."""
        return int(np.ceil(np.log(alpha * self.level) / np.log(0.5)))

    def comparable_with(self, other: "CertificateKind") -> bool:
        """Whether the certified shares of both claim the same property of g."""
        return self is other or (self.claims_label and other.claims_label and self.has_radius and other.has_radius)


KINDS: dict[str, CertificateKind] = {
    kind.name: kind
    for kind in (
        CertificateKind(
            name=TOP,
            summary="top bounds the top class only",
            modes=("fixed", "planned", "grid"),
            level=1.0,
            verdict=_top,
        ),
        CertificateKind(
            name="multiclass",
            summary="multiclass also bounds the other classes",
            modes=("fixed", "planned"),
            level=_W,
            verdict=_multiclass,
        ),
        CertificateKind(
            name="cost",
            summary="cost excludes costly errors",
            modes=("fixed",),
            level=_W_COST,
            verdict=_cost,
            claims_label=False,
            needs_costs=True,
            skips_wrong=False,
            caveat="claims only that no costly class is predicted; its values are not comparable with those of the "
            "other certificates",
            sample_claim="no perturbation whose l2 norm is below the sample's radius makes g predict a class that is "
            "costly for the sample's label",
            set_share="share of them on which no such perturbation makes g predict a costly class",
            population_share="share of that population, among images whose label has costly classes, on which g "
            "predicts no costly class",
        ),
        CertificateKind(
            name="predict",
            summary="predict names the top class without a radius",
            modes=("fixed",),
            level=0.5,
            verdict=_predict,
            selects=False,
            has_radius=False,
            skips_wrong=False,
            sample_claim="g's prediction at the sample itself is the one stated",
            set_share="accuracy of g on them",
        ),
        CertificateKind(
            name=CASCADE,
            summary="cascade is one certificate over several runs",
            modes=(),
            level=1.0,
            verdict=None,
            sample_claim="no perturbation whose l2 norm is below the sample's radius changes the prediction of the "
            "cascade",
        ),
    )
}


def kind_of(name: str) -> CertificateKind:
    """The kind of a name that a user gave. Raises: UserError."""
    if name not in KINDS:
        raise UserError(f"certificate {name!r} must be one of {', '.join(KINDS)}")
    return KINDS[name]


OF_ORDERS = tuple(kind.name for kind in KINDS.values() if kind.modes)  # those that an order can ask for
