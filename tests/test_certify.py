"""The bound: golden values, edge cases, coverage, and what never enters it."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, binomtest, norm

from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify import certificates as certification
from diffsmooth.pipeline.certify.bounds import certified_radius, lower_confidence_bound, prediction_p_value
from diffsmooth.pipeline.certify.kinds import KINDS
from diffsmooth.pipeline.certify.orders import Order
from diffsmooth.pipeline.spec import BlockLengths
from diffsmooth.pipeline.votes.blocks import StoredBlock, to_table
from tests.models import METADATA

LENGTHS = BlockLengths(selection=100, estimation=100)

# k, n, alpha, lower bound, 1 - lower bound, radius / sigma (None: abstain), computed from 60-digit binomial tail sums
GOLDEN = [
    (0, 100, 0.001, 0.0, 1.0, None),
    (1, 100, 0.001, 1.0004953285956e-5, 0.99998999504671, None),
    (50, 100, 0.001, 0.34479800642532, 0.65520199357468, None),
    (65, 100, 0.001, 0.4913756114936, 0.5086243885064, None),
    (66, 100, 0.001, 0.50164995133687, 0.49835004866313, 0.0041358264633336),
    (99, 100, 0.001, 0.91137311129604, 0.088626888703958, 1.3492590388104),
    (100, 100, 0.001, 0.93325430079699, 0.066745699203009, 1.5004750241206),
    (500, 1000, 0.001, 0.45077105398478, 0.54922894601522, None),
    (600, 1000, 0.001, 0.55107547393705, 0.44892452606295, 0.12837899630553),
    (990, 1000, 0.001, 0.97603618715531, 0.023963812844689, 1.9780095821412),
    (1000, 1000, 0.001, 0.99311604842093, 0.0068839515790662, 2.4632626147808),
    (5154, 10000, 0.001, 0.49989991120697, 0.50010008879303, None),
    (5155, 10000, 0.001, 0.49999993940747, 0.50000006059253, None),
    (8000, 10000, 0.001, 0.78738939597127, 0.21261060402873, 0.79739578224939),
    (9990, 10000, 0.001, 0.99758830803257, 0.0024116919674318, 2.8185983003982),
    (9999, 10000, 0.001, 0.99907703866934, 0.00092296133066051, 3.1139635921826),
    (10000, 10000, 0.001, 0.99930946300259, 0.00069053699741008, 3.1985775147383),
    (50488, 100000, 0.001, 0.49998894820482, 0.50001105179518, None),
    (50489, 100000, 0.001, 0.49999894848864, 0.50000105151136, None),
    (50490, 100000, 0.001, 0.5000089487744, 0.4999910512256, 2.2431250945137e-5),
    (69146, 100000, 0.001, 0.68692858622535, 0.31307141377465, 0.48716299434316),
    (84134, 100000, 0.001, 0.83774179240161, 0.16225820759839, 0.98521919255836),
    (97725, 100000, 0.001, 0.97575563495157, 0.024244365048431, 1.973059971399),
    (99865, 100000, 0.001, 0.99825131108315, 0.0017486889168471, 2.9202614986959),
    (99990, 100000, 0.001, 0.99975867734359, 0.00024132265640884, 3.4902076801466),
    (99999, 100000, 0.001, 0.99990766966627, 9.2330333734554e-5, 3.7391266685434),
    (100000, 100000, 0.001, 0.99993092483301, 6.9075166990607e-5, 3.81145656339),
    (100000, 100000, 0.0001, 0.99990790083767, 9.209916233149e-5, 3.7397568796608),
    (100000, 100000, 0.05, 0.99997004312598, 2.9956874019428e-5, 4.0131502572206),
    (1000000, 1000000, 0.001, 0.99999309226858, 6.9077314204956e-6, 4.3467736987007),
    (999000, 1000000, 1e-06, 0.99884143890999, 0.001158561090009, 3.0462537184089),
    (70, 100, 0.05, 0.6157793872058, 0.3842206127942, 0.29441445114607),
]


def certify(votes, *, sigma, num_classes=4, plan=None, samples=None, **settings):
    """Certificates of an order with these settings over all samples that have votes."""
    order = Order(samples=sorted(set(votes["sample"])) if samples is None else samples, **settings)
    return certification.certify(votes, order, sigma=sigma, num_classes=num_classes, block=LENGTHS, plan=plan)


@pytest.mark.parametrize(("n_A", "n", "alpha", "lower", "upper_tail", "radius"), GOLDEN)
def test_golden_values(n_A, n, alpha, lower, upper_tail, radius):
    """At most the exact value, and below it by no more than what is reserved for rounding."""
    slack = 3e-15 * n
    bound = float(lower_confidence_bound(n_A, n, alpha))
    assert lower - slack - 1e-12 <= bound <= lower + 1e-13
    assert upper_tail - 1e-13 <= 1 - bound <= upper_tail + slack + 1e-12
    found = float(certified_radius(n_A, n, alpha, sigma=0.5))
    if radius is None:
        assert found == 0.0
    else:
        assert 0.5 * radius - slack - 1e-12 <= found <= 0.5 * radius + 1e-13
    assert (bound < 0.5) == (radius is None)


@pytest.mark.parametrize("n", [100, 1000, 10_000, 1_000_000])
@pytest.mark.parametrize("alpha", [1e-3, 1e-12, 1e-16, 1e-30])
def test_a_tiny_alpha_is_not_rounded_away(n, alpha):
    """For an almost unanimous vote: P(Bin(n, p) >= n - 1) = p^n + n p^(n - 1) (1 - p) is alpha at the bound p."""
    p = lower_confidence_bound(n - 1, n, alpha)
    log_tail = (n - 1) * np.log(p) + np.log(p + n * (1 - p))
    assert np.log(alpha) - 1e-6 <= log_tail <= np.log(alpha) + 1e-9


@pytest.mark.parametrize(("n", "least"), [(100, 66), (1000, 550), (10_000, 5156), (100_000, 50_490)])
def test_least_certifying_counts(n, least):
    radii = certified_radius(np.arange(n + 1), n, 0.001, 1.0)
    assert np.flatnonzero(radii > 0)[0] == least
    assert (np.diff(radii[least:]) > 0).all()


def test_arrays_broadcast_and_extremes_are_exact():
    bounds = lower_confidence_bound(np.array([0, 10]), np.array([[10], [20]]), 0.01)
    assert bounds.shape == (2, 2)
    assert (bounds[:, 0] == 0).all()
    assert bounds[0, 1] == pytest.approx(0.01 ** (1 / 10), abs=1e-15)


@pytest.mark.parametrize(
    ("n_A", "n", "alpha"), [(11, 10, 0.1), (-1, 10, 0.1), (0, 0, 0.1), (5, 10, 0.0), (5.5, 10, 0.1)]
)
def test_impossible_counts_are_refused(n_A, n, alpha):
    with pytest.raises(ValueError, match=r"n_A|alpha"):
        lower_confidence_bound(n_A, n, alpha)


@pytest.mark.parametrize("p", [0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("n", [100, 1000])
def test_coverage_is_exact(p, n):
    """P(bound > p) summed over the binomial law, without simulation: never above alpha."""
    alpha = 0.01
    counts = np.arange(n + 1)
    too_high = lower_confidence_bound(counts, n, alpha) > p
    assert binom.pmf(counts, n, p)[too_high].sum() <= alpha


def test_least_certifying_n():
    n = KINDS["top"].least_n(0.001)
    assert certified_radius(n, n, 0.001, 1.0) > 0
    assert certified_radius(n - 1, n - 1, 0.001, 1.0) == 0


@pytest.mark.parametrize("certificate", ["top", "multiclass", "cost", "predict"])
def test_a_unanimous_vote_is_enough_at_the_least_certifying_n(certificate):
    costly = {0: [1]} if certificate == "cost" else None
    statuses = []
    for n in (KINDS[certificate].least_n(0.001) - 1, KINDS[certificate].least_n(0.001)):
        votes = votes_of((0, 0, "selection", 0, 10, {0: 10}), (0, 0, "estimation", 0, n, {0: n}))
        order = {"alpha": 0.001, "n0": 0 if certificate == "predict" else 10, "n": n, "costly": costly}
        statuses += certify(votes, sigma=1.0, certificate=certificate, **order)["status"].tolist()
    assert statuses == ["abstained", "predicted" if certificate == "predict" else "certified"]


def votes_of(*rows: tuple[int, int, str, int, int, dict[int, int]]) -> pd.DataFrame:
    return to_table(
        [
            StoredBlock(
                Block(sample, stage, start, stop),
                label,
                np.array(list(k), np.int32),
                np.array(list(k.values()), np.int32),
                METADATA,
            )
            for sample, label, stage, start, stop, k in rows
        ]
    )


def test_selection_votes_choose_the_class_and_never_enter_the_bound():
    votes = votes_of(
        (3, 1, "selection", 0, 100, {0: 50, 1: 50}),
        (3, 1, "estimation", 0, 1000, {0: 10, 1: 990}),
        (5, 1, "selection", 0, 100, {1: 100}),
        (5, 1, "estimation", 0, 1000, {0: 10, 1: 990}),
    )
    tie, right = certify(votes, sigma=0.5, alpha=0.001, n0=100, n=1000).to_dict("records")
    assert (tie["top_class"], tie["status"], tie["n_A"], tie["prediction"], tie["correct"]) == (
        0,
        "abstained",
        10,
        -1,
        False,
    )
    assert right["radius"] == pytest.approx(0.5 * 1.9780095821412, abs=1e-12)
    assert (right["n"], right["n_A"], right["prediction"], right["correct"]) == (1000, 990, 1, True)
    assert right["p_B_upper"] == 1 - right["p_A_lower"]


def test_samples_with_missing_draws_are_incomplete():
    votes = votes_of((0, 1, "selection", 0, 100, {1: 100}), (0, 1, "estimation", 0, 1000, {1: 1000}))
    rows = certify(votes, sigma=1.0, alpha=0.001, n0=100, n=2000, samples=[0, 7])
    assert rows["status"].tolist() == ["incomplete", "incomplete"]
    assert (rows["radius"] == 0).all()
    assert not rows["correct"].any()


def test_a_smaller_n_uses_the_first_draws_only():
    votes = votes_of(
        (0, 0, "selection", 0, 100, {0: 100}),
        (0, 0, "estimation", 0, 1000, {0: 1000}),
        (0, 0, "estimation", 1000, 2000, {1: 1000}),
    )
    both = certify(votes, sigma=1.0, alpha=0.001, n0=100, n=2000).iloc[0]
    first = certify(votes, sigma=1.0, alpha=0.001, n0=100, n=1000).iloc[0]
    assert (both["n_A"], both["n"], both["status"]) == (1000, 2000, "abstained")
    assert (first["n_A"], first["n"], first["status"]) == (1000, 1000, "certified")


def test_certify_errs_with_probability_at_most_alpha():
    """CERTIFY with two classes in the worst case, p_A just above 1/2, simulated with a fixed stream."""
    rng, alpha, p, runs = np.random.default_rng(7), 0.05, 0.52, 40_000
    top_is_A = rng.binomial(100, p, runs) >= 50
    p_top = np.where(top_is_A, p, 1 - p)
    radii = certified_radius(rng.binomial(1000, p_top), 1000, alpha, 1.0)
    wrong = (radii > 0) & (radii > norm.ppf(p_top))
    assert wrong.mean() < 1.5 * alpha
    assert wrong.mean() > alpha / 4  # the simulation does reach the bound


def estimation_votes(counts_SK):
    """A table with the estimation votes of samples 0, 1, ... only, labelled 0."""
    blocks = [
        StoredBlock(
            Block(sample, "estimation", 0, int(sum(counts))), 0, np.flatnonzero(counts).astype(np.int32),
            np.asarray(counts)[np.flatnonzero(counts)].astype(np.int32), METADATA,
        )
        for sample, counts in enumerate(counts_SK)
    ]  # fmt: skip
    return to_table(blocks)


@pytest.mark.parametrize(("n_A", "n_B"), [(0, 0), (1, 0), (10, 0), (11, 0), (60, 40), (66, 34), (500, 500), (580, 420)])
def test_prediction_p_value_is_the_two_sided_binomial_test(n_A, n_B):
    expected = binomtest(n_A, n_A + n_B, 0.5).pvalue if n_A + n_B else 1.0
    assert prediction_p_value(n_A, n_B) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="n_B <= n_A"):
        prediction_p_value(3, 4)


def test_predict_separates_the_two_top_classes_or_abstains():
    """67 to 33 of 100 has p = .0009; 66 to 34 has .0018; a third class does not enter the test."""
    votes = estimation_votes([[67, 33], [66, 34], [0, 100], [50, 50], [60, 10, 30], [40, 10, 50]])
    table = certify(votes, sigma=0.5, alpha=0.001, n0=0, n=100, certificate="predict")
    assert table["prediction"].tolist() == [0, -1, 1, -1, -1, -1]
    assert table["status"].tolist() == ["predicted", "abstained", "predicted", "abstained", "abstained", "abstained"]
    assert table["correct"].tolist() == [True, False, False, False, False, False]
    assert table["top_class"].tolist() == [0, 0, 1, 0, 0, 2]
    assert table["p_A_lower"].isna().all()
    assert (table["radius"] == 0).all()
    short = certify(votes, sigma=0.5, alpha=0.001, n0=0, n=200, certificate="predict")
    assert (short["status"] == "incomplete").all()


def test_predict_errs_with_probability_at_most_alpha():
    """In the worst case, two equally likely classes, every answer counts as an error."""
    rng, paths, alpha, n = np.random.default_rng(7), 40_000, 0.05, 60
    n_A = rng.binomial(n, 0.5, paths)
    answered = prediction_p_value(np.maximum(n_A, n - n_A), np.minimum(n_A, n - n_A)) <= alpha
    assert 0.5 * alpha < answered.mean() <= alpha
    assert KINDS["predict"].least_n(0.001) == 11
    assert prediction_p_value(11, 0) <= 0.001 < prediction_p_value(10, 0)


def multiclass(counts_SK, top=0, alpha=0.001, n0=10):
    """Certificates of samples with these estimation votes, all of whose selection votes are for class `top`."""
    estimation = estimation_votes(counts_SK)
    selection = estimation.drop_duplicates("sample").assign(
        stage="selection", draw_start=0, draw_stop=n0, votes=n0, **{"class": top}
    )
    votes, n = pd.concat([selection, estimation]), int(sum(counts_SK[0]))
    arguments = {"sigma": 1.0, "alpha": alpha, "n0": n0, "n": n, "num_classes": len(counts_SK[0])}
    return (certify(votes, certificate=one, **arguments) for one in ("multiclass", "top"))


def test_multiclass_also_bounds_the_runner_up():
    """Errors spread over classes certify more, even for p_A < 1/2; with one wrong class p_A has 0.9 alpha."""
    counts = [[700, 100, 100, 100], [480, 180, 170, 170], [800, 200, 0, 0], [1000, 0, 0, 0], [450, 400, 100, 50]]
    both, alone = multiclass(counts)
    assert both["radius"][0] > 1.2 * alone["radius"][0] > 0
    assert (both["status"][1], alone["status"][1]) == ("certified", "abstained")
    assert both["p_A_lower"][1] < 0.5
    for sample in (2, 3):
        at_share = certified_radius(counts[sample][0], 1000, 0.0009, 1.0)
        assert both["radius"][sample] == pytest.approx(at_share, rel=1e-12)
        assert 0.997 * alone["radius"][sample] < both["radius"][sample] < alone["radius"][sample]
    assert both["status"][4] == "abstained"
    low, high = both["p_A_lower"][0], both["p_B_upper"][0]
    assert both["radius"][0] == pytest.approx((norm.ppf(low) - norm.ppf(high)) / 2)
    assert binom.cdf(100, 1000, high) == pytest.approx(0.0001 / 3)  # each of three classes at a third of 0.1 alpha


@pytest.mark.parametrize("p", [(0.5, 0.5, 0, 0), (0.4, 0.2, 0.2, 0.2), (0.34, 0.33, 0.33, 0), (0.9, 0.1, 0, 0)])
def test_multiclass_claims_too_much_with_probability_at_most_alpha(p):
    """The radius exceeds sigma / 2 (Phi^-1(p_A) - Phi^-1(p_B)) with probability at most alpha, in the worst cases."""
    paths, alpha, rng = 20_000, 0.02, np.random.default_rng(11)
    both, _ = multiclass(rng.multinomial(200, p, size=paths).tolist(), alpha=alpha)
    true = (norm.ppf(p[0]) - norm.ppf(max(p[1:]))) / 2
    assert (both["radius"] > true + 1e-12).mean() <= alpha * 1.15


def whole(counts_SK, selection, n0=10, label=0):
    """Votes of samples whose estimation votes are given and whose selection votes are all for one class."""
    estimation = estimation_votes(counts_SK).assign(label=label)
    chosen = estimation.drop_duplicates("sample").assign(
        stage="selection", draw_start=0, draw_stop=n0, votes=n0, **{"class": selection}
    )
    return pd.concat([chosen, estimation])


def test_cost_claims_only_that_no_costly_class_wins():
    """For label 0 only class 2 is costly: votes for class 1 do no harm, and the selection chooses outside {2}."""
    votes = whole([[600, 380, 20], [600, 20, 380], [20, 600, 380]], selection=1)
    arguments = {"sigma": 1.0, "alpha": 0.001, "n0": 10, "n": 1000}
    rows = certify(votes, certificate="cost", costly={0: [2]}, num_classes=3, **arguments)
    assert rows["top_class"].tolist() == [1, 1, 1]
    assert rows["status"].tolist() == ["certified", "abstained", "certified"]
    assert rows["correct"].tolist() == [True, False, True]  # class 1 is wrong, but not a costly error
    low, high = rows["p_A_lower"][2], rows["p_B_upper"][2]
    assert binom.sf(599, 1000, low) == pytest.approx(0.8 * 0.001)
    assert binom.cdf(380, 1000, high) == pytest.approx(0.2 * 0.001)
    assert rows["radius"][2] == pytest.approx((norm.ppf(low) - norm.ppf(high)) / 2)
    top = certify(votes, **arguments)
    assert not top["correct"].any()
    exempt = certify(votes, certificate="cost", costly={1: [2]}, num_classes=3, **arguments)
    assert (exempt["status"] == "exempt").all()
    with pytest.raises(ValueError, match="needs costly"):
        certify(votes, certificate="cost", **arguments)


@pytest.mark.parametrize("p", [(0.5, 0.0, 0.5), (0.4, 0.3, 0.3), (0.1, 0.45, 0.45)])
def test_cost_claims_too_much_with_probability_at_most_alpha(p):
    """The true radius of "not class 2" is sigma / 2 (Phi^-1(p_A) - Phi^-1(p_2)), with p_A of the chosen class."""
    paths, alpha, chosen = 20_000, 0.02, int(np.argmax(p[:2]))
    votes = whole(np.random.default_rng(5).multinomial(200, p, size=paths).tolist(), selection=chosen)
    rows = certify(votes, sigma=1.0, alpha=alpha, n0=10, n=200, certificate="cost", costly={0: [2]}, num_classes=3)
    true = (norm.ppf(p[chosen]) - norm.ppf(p[2])) / 2
    assert (rows["radius"] > true + 1e-12).mean() <= 1.15 * alpha


def test_skipped_samples_are_neither_abstained_nor_incomplete():
    votes = whole([[1000, 0], [1000, 0]], selection=[1, 0])
    votes = votes[~((votes["sample"] == 0) & (votes["stage"] == "estimation"))]
    rows = certify(votes, sigma=1.0, alpha=0.001, n0=10, n=1000, skip_wrong=True)
    assert rows["status"].tolist() == ["skipped", "certified"]
    assert rows["prediction"].tolist() == [-2, 0]
    assert rows["radius"][0] == 0
    assert not rows["correct"][0]
    assert certify(votes, sigma=1.0, alpha=0.001, n0=10, n=1000)["status"].tolist() == ["incomplete", "certified"]


def test_a_plan_bounds_only_its_own_draws():
    votes = whole([[1000, 0], [1000, 0], [1000, 0]], selection=0)
    planned = {"n": 1000, "mode": "planned", "max_acr_loss": 0.01, "plan": {0: 1000, 1: 0}}
    rows = certify(votes, sigma=1.0, alpha=0.001, n0=10, **planned)
    assert rows["status"].tolist() == ["certified", "abstained", "incomplete"]  # 1,000 planned draws, 0, no plan
    assert rows["n"].tolist()[:2] == [1000, 0]
    assert rows["radius"][0] == pytest.approx(float(certified_radius(1000, 1000, 0.001, 1.0)))


def block_rows(sample, stage, counts, length):
    """One block of `length` draws for each count of class 0, the rest for class 1."""
    return [
        (sample, 0, stage, index * length, (index + 1) * length, {0: count, 1: length - count})
        for index, count in enumerate(counts)
    ]


def test_a_split_alpha_gives_the_larger_radius_of_its_looks():
    """Sample 0 gains from the second look; sample 1 would lose by it and keeps the first."""
    votes = votes_of(
        *block_rows(0, "selection", [100], 100), *block_rows(0, "estimation", [990, 999], 1000),
        *block_rows(1, "selection", [100], 100), *block_rows(1, "estimation", [1000, 500], 1000),
    )  # fmt: skip
    split, arguments = {1000: 0.0004, 2000: 0.0006}, {"sigma": 1.0, "n0": 100}
    early = certify(votes, alpha=split, n=1000, **arguments)
    assert early["radius"].tolist() == pytest.approx(certified_radius([990, 1000], 1000, 0.0004, 1.0).tolist())
    both = certify(votes, alpha=split, n=2000, **arguments)
    assert both["n"].tolist() == [2000, 1000]
    assert both["alpha"].tolist() == [0.0006, 0.0004]
    expected = [float(certified_radius(1989, 2000, 0.0006, 1.0)), float(certified_radius(1000, 1000, 0.0004, 1.0))]
    assert both["radius"].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="n = 500 has no share of alpha"):
        certify(votes, alpha=split, n=500, **arguments)


def test_a_split_alpha_errs_with_probability_at_most_alpha():
    rng, paths, p, split = np.random.default_rng(2), 40_000, 0.6, {100: 0.02, 400: 0.03}
    first = rng.binomial(100, p, paths)
    second = first + rng.binomial(300, p, paths)
    radii = [certified_radius(k, n, split[n], 1.0) for k, n in ((first, 100), (second, 400))]
    assert 0.02 < (np.maximum(*radii) > norm.ppf(p)).mean() <= 0.05 * 1.05


def test_grid_replays_its_looks_on_the_draws_in_order():
    """Votes after the stop change nothing; a gap leaves the sample incomplete."""
    settings = {"sigma": 0.5, "alpha": 0.001, "n0": 100, "n": 400, "mode": "grid", "radii": [0.0, 0.5]}
    rows = [*block_rows(0, "selection", [100], 100), *block_rows(0, "estimation", [100, 100, 0, 0], 100)]
    both = certify(votes_of(*rows), **settings).iloc[0]
    grid = Order(samples=[0], **{key: value for key, value in settings.items() if key != "sigma"}).grid(0.5, LENGTHS)
    expected = grid.decide([100, 200, 200, 200])
    assert (both["status"], both["n"], both["radius"]) == ("certified", expected.n, grid.radius(expected.level))
    assert expected.n < 400
    assert both["p_A_lower"] == pytest.approx(norm.cdf(both["radius"] / 0.5))
    without_first = certify(votes_of(rows[0], *rows[2:]), **settings)
    assert without_first["status"].tolist() == ["incomplete"]
    with pytest.raises(ValueError, match=r"not available in sampling\.mode = 'grid'"):
        certify(votes_of(*rows), **settings, certificate="multiclass")


def test_a_sample_without_votes_is_incomplete_and_not_exempt():
    """Its label is not known, so nobody can say that the label has no costly class."""
    votes = whole([[600, 380, 20]], selection=0)
    arguments = {"sigma": 1.0, "alpha": 0.001, "n0": 10, "n": 1000, "certificate": "cost", "num_classes": 3}
    rows = certify(votes, samples=[0, 1], costly={1: [2]}, **arguments)
    assert rows["status"].tolist() == ["exempt", "incomplete"]


def test_an_unlabelled_sample_is_exempt_from_the_cost_certificate():
    """It has no costly class, so a class that wins against all of them would claim nothing."""
    votes = whole([[600, 380, 20]], selection=0).assign(label=-1)
    arguments = {"sigma": 1.0, "alpha": 0.001, "n0": 10, "n": 1000, "certificate": "cost", "num_classes": 3}
    assert certify(votes, costly={0: [2]}, **arguments)["status"].tolist() == ["exempt"]
