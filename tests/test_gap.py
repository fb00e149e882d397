"""What votes at adversarial images prove, and certificates and attacks side by side."""

import math

import numpy as np
import pandas as pd
import pytest

from diffsmooth.pipeline.attack.gap import Attacks, gap_of, robustness
from diffsmooth.pipeline.attack.record import (
    Attack,
    AttackedSample,
    Rung,
    expected_margin,
    judging_order,
    prove,
    rival,
)


def rung(n_y, n_c, distance, judged=-1, judging=None):
    counts = None if judging is None else np.array(judging)
    return Rung(distance, distance, np.zeros((1, 1, 1), np.float32), np.array([n_y, n_c, 0]), judged, counts)


ATTACK = Attack(attack="pgd", eps=[2.0, 1.0], n0=100, n=1000, alpha=0.001, votes_id="0" * 32)


def test_a_proof_is_the_one_sided_binomial_test():
    from scipy.stats import binomtest

    found = prove(rung(10, 90, 1.0, 0, [400, 500, 100]), 0)
    assert (found.target, found.n_y, found.n_c) == (1, 400, 500)
    assert found.p_value == pytest.approx(binomtest(500, 900, 0.5, alternative="greater").pvalue, rel=1e-9)
    assert prove(rung(10, 90, 1.0, 0, [1000, 0, 0]), 0).p_value == 1.0
    assert rival(np.array([5, 3, 3]), 0) == 1


def test_judging_starts_at_the_nearest_sure_image_and_stops_at_the_first_failure():
    rungs = [rung(100, 0, 0.0), rung(0, 100, 4.0), rung(20, 80, 2.0), rung(40, 60, 1.0), rung(90, 10, 0.5)]
    assert judging_order(rungs, 0, ATTACK) == [2, 3]
    assert judging_order(rungs[:1], 0, ATTACK) == []
    judged = [
        rung(20, 80, 2.0, 0, [200, 800, 0]),
        rung(40, 60, 1.0, 1, [500, 500, 0]),
        rung(40, 60, 0.5, 2, [0, 1000, 0]),  # after a failure nothing counts
    ]
    one = AttackedSample(sample=0, label=0, rungs=judged, metadata=None)
    assert one.upper(0.001) == 2.0


def test_the_error_of_a_proof_is_at_most_alpha():
    """Three images at which g ties (the worst case), found by votes that are themselves a lottery."""
    random = np.random.Generator(np.random.Philox(11))
    attack = ATTACK.model_copy(update={"alpha": 0.05})
    wrong = 0
    for _ in range(4000):
        rungs = []
        for distance in (3.0, 2.0, 1.0):
            n_y = random.binomial(100, 0.5)
            rungs.append(rung(n_y, 100 - n_y, distance))
        for place, number in enumerate(judging_order(rungs, 0, attack)):
            n_y = random.binomial(1000, 0.5)
            rungs[number] = rungs[number]._replace(judged=place, judging_K=np.array([n_y, 1000 - n_y, 0]))
        one = AttackedSample(sample=0, label=0, rungs=rungs, metadata=None)
        wrong += math.isfinite(one.upper(0.05))
    assert wrong <= 4000 * 0.05 + 4 * math.sqrt(4000 * 0.05)


def test_the_expected_margin_is_where_half_of_the_tests_pass():
    random = np.random.Generator(np.random.Philox(12))
    for n_c in (52, 56, 60):
        counts = np.array([100 - n_c, n_c, 0]) * 1000  # the selection is nearly exact
        n_C = random.binomial(1000, n_c / 100, size=2000)
        passed = np.mean([prove(rung(0, 1, 1.0, 0, [1000 - k, k, 0]), 0).p_value <= 0.001 for k in n_C])
        expected = 0.5 * (1 + math.erf(expected_margin(counts, 0, 1000, 0.001) / math.sqrt(2)))
        assert passed == pytest.approx(expected, abs=0.05)


def test_contradictions_are_reported_with_their_probability():
    certificates = pd.DataFrame(
        {"sample": [0, 1, 2], "label": [0, 0, 0], "status": ["certified"] * 3, "radius": [1.5, 0.5, 0.1],
         "correct": [True, True, False], "certificate": "top"}
    )  # fmt: skip
    samples = [
        AttackedSample(sample=i, label=0, rungs=[rung(20, 80, 1.0, 0, [200, 800, 0])], metadata=None) for i in range(3)
    ]
    attacks = Attacks(settings={"a": ATTACK}, samples={"a": samples})
    gap = gap_of(certificates, attacks, 0.001)
    assert gap.contradictions == [0]
    assert gap.chance == pytest.approx(1 - 0.998**3)
    assert "CONTRADICTION" in gap.warning()
    assert gap_of(certificates.assign(certificate="cost"), attacks, 0.001).contradictions == []
    assert gap_of(certificates.iloc[1:], attacks, 0.001).warning() is None
    assert [gap.certified(0.4), gap.resisted(0.4), gap.resisted(1.0)] == [pytest.approx(2 / 3), 1.0, 0.0]


def test_robustness_is_covered_by_its_intervals():
    """m samples with known p_y: the intervals of the average and of the worst of N hold, the estimates are unbiased."""
    random = np.random.Generator(np.random.Philox(13))
    p_M = np.array([0.99, 0.9, 0.6, 0.2])
    attack = ATTACK.model_copy(update={"eps": [1.0]})
    outside, averages, worsts = np.zeros(2), [], []
    for _ in range(300):
        samples = []
        for i, n_y in enumerate(random.binomial(100, p_M)):
            rungs = [rung(100, 0, 0.0), rung(n_y, 100 - n_y, 1.0)]
            samples.append(AttackedSample(sample=i, label=0, rungs=rungs, metadata=None))
        (found,) = robustness(samples, attack, queries=5)
        averages.append(found.average)
        worsts.append(found.worst)
        outside += [
            not found.average_lower <= p_M.mean() <= found.average_upper,
            not found.worst_lower <= (p_M**5).mean() <= found.worst_upper,
        ]
        assert found.robust_accuracy in (0.5, 0.75)
    assert (outside <= 300 * 0.05).all()
    assert np.mean(averages) == pytest.approx(p_M.mean(), abs=0.01)
    assert np.mean(worsts) == pytest.approx((p_M**5).mean(), abs=0.01)
