"""Comparisons: tests against scipy and by hand, coverage by simulation with a fixed stream, refusals and notes."""

import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from scipy.stats import binom, binomtest, bootstrap

import diffsmooth as ds
from diffsmooth.jobs.analyze import Request, analyze
from diffsmooth.jobs.cli import main
from diffsmooth.jobs.compare import compare_sources
from diffsmooth.pipeline.certify.compare import (
    bca_interval,
    compare,
    difference_bounds,
    holm,
    samples_needed,
    shared_rows,
)
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import load_spec
from tests.models import make_run, png
from tests.test_logs import HEADER


def stream(key):
    return np.random.Generator(np.random.Philox(key=key))


def rows(radii, correct=None, **columns):
    """A table of samples 0, 1, ... with these radii; a sample without a radius abstained."""
    radii = np.asarray(radii, dtype=float)
    table = pd.DataFrame({"radius": radii, "correct": radii > 0 if correct is None else correct})
    table = table.assign(label=0, status="certified", image="", post_hoc=False, **columns)
    return table.rename_axis("sample").reset_index()


def compared(radii=(0.0, 0.5), **tables):
    return compare(shared_rows({name: rows(values) for name, values in tables.items()}), radii)


def test_figures_of_a_pair_by_hand():
    """Of ten samples, A certifies six at 0.5 and B three; they share two."""
    found = compared(radii=[0.5], A=[1, 1, 1, 1, 1, 1, 0, 0, 0, 0], B=[0, 0, 0, 0, 0.75, 0.5, 0.6, 0, 0, 0.2])
    (pair,) = found.pairs
    (row,) = pair.radii
    assert (found.samples, row.first_accuracy, row.second_accuracy) == (10, 0.6, 0.3)
    assert (row.first_only, row.second_only, row.difference) == (4, 1, pytest.approx(0.3))
    assert row.p_value == row.p_holm == pytest.approx(2 * (1 + 5) / 2**5)
    assert (pair.first_acr, pair.second_acr) == (pytest.approx(0.6), pytest.approx(0.205))
    assert pair.acr_difference == pytest.approx(0.395)


def test_a_wrong_sample_is_not_certified_at_radius_0():
    tables = {"A": rows([0.0, 0.0], correct=[True, False]), "B": rows([0.0, 0.7], correct=[False, False])}
    (pair,) = compare(shared_rows(tables), [0.0]).pairs
    assert (pair.radii[0].first_accuracy, pair.radii[0].second_accuracy) == (0.5, 0.0)


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (7, 2), (2, 7), (12, 12), (40, 15)])
def test_mcnemar_is_the_binomial_test_of_the_discordant_samples(b, c):
    values = {"A": [1] * b + [0] * c + [1] * 5, "B": [0] * b + [1] * c + [1] * 5}
    (pair,) = compared(radii=[0.5], **values).pairs
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert pair.radii[0].p_value == pytest.approx(expected, rel=1e-9)


def test_holm_by_hand():
    """.01 x 4 = .04; .02 x 3 = .06; .03 x 2 = .06; .5 x 1."""
    assert holm(np.array([0.03, 0.01, 0.5, 0.02])) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm(np.array([0.6, 0.7])).tolist() == [1.0, 1.0]


def test_holm_covers_all_pairs_and_radii():
    """Three runs at two radii are six tests: the smallest p-value is multiplied by six."""
    good, poor = [1.0] * 20, [1.0] * 5 + [0.0] * 15
    pairs = compared(A=good, B=poor, C=good).pairs
    assert [(pair.first, pair.second) for pair in pairs] == [("A", "B"), ("A", "C"), ("B", "C")]
    p_values = [row.p_value for pair in pairs for row in pair.radii]
    smallest = 2 * 0.5**15
    assert min(p_values) == pytest.approx(smallest)
    assert min(row.p_holm for pair in pairs for row in pair.radii) == pytest.approx(6 * smallest)
    assert [row.p_holm for row in pairs[1].radii] == [1.0, 1.0]


@pytest.mark.parametrize(("first_only", "second_only"), [(0.2, 0.2), (0.1, 0.03), (0.05, 0.0), (0.01, 0.02)])
@pytest.mark.parametrize("m", [100, 1000])
def test_the_interval_of_a_difference_covers(m, first_only, second_only):
    """20,000 data sets: the 95 % interval misses the true difference in at most 5 % of them."""
    counts = stream(1).multinomial(m, [first_only, second_only, 1 - first_only - second_only], 20_000)
    bounds = difference_bounds(counts[:, 0], counts[:, 1], m, 0.05)
    truth = first_only - second_only
    assert np.mean((bounds.lower > truth) | (bounds.upper < truth)) <= 0.05


def test_intervals_cover_at_all_radii_at_once():
    """1,000 pairs of runs on 100 samples at five radii: any of the five intervals misses in at most 5 %."""
    generator, radii = stream(2), [0.0, 0.25, 0.5, 0.75, 1.0]
    truth = [(1 - radius) - (1 - radius) ** 2 for radius in radii]  # A uniform on [0, 1], B the minimum of two
    missed = 0
    for _ in range(1000):
        first = generator.random(100)
        second = np.minimum(first, generator.random(100))
        (pair,) = compare(shared_rows({"A": rows(first), "B": rows(second)}), radii, without_acr=True).pairs
        missed += any(not row.lower <= value <= row.upper for row, value in zip(pair.radii, truth, strict=True))
    assert missed <= 50


def test_an_interval_excludes_zero_only_if_the_test_rejects():
    b, c = (values.ravel() for values in np.meshgrid(np.arange(30), np.arange(30)))
    bounds = difference_bounds(b, c, 100, 0.05)
    for first, second, lower, upper in zip(b, c, bounds.lower, bounds.upper, strict=True):
        assert lower <= (first - second) / 100 <= upper
        if lower > 0 or upper < 0:
            assert binomtest(first, first + second, 0.5).pvalue <= 0.05


def differences(generator, m, scenario):
    """Paired differences of radii, and their true mean."""
    chance, size = generator.random(m), generator.random(m)
    if scenario == "typical":  # a quarter equal, half better, a quarter worse
        return np.where(chance < 0.25, 0, np.where(chance < 0.75, 0.6 * size, -0.4 * size)), 0.1
    if scenario == "skewed":  # most are equal, a few are much better
        return np.where(chance < 0.7, 0.0, 1.5 * size**2), 0.15
    return np.where(chance < 0.5, 0.0, np.where(chance < 0.8, 1.2, -1.2)), 0.12  # saturated radii


@pytest.mark.parametrize("scenario", ["typical", "skewed", "saturated"])
def test_coverage_of_the_bca_interval(scenario):
    """2,000 data sets of 100 samples; the standard error of a coverage of 95 % is 0.5 %."""
    generator, covered = stream(3), 0
    for _ in range(2000):
        values, truth = differences(generator, 100, scenario)
        lower, upper = bca_interval(values, 0.95, resamples=1000)
        covered += lower <= truth <= upper
    assert 0.93 <= covered / 2000 <= 0.965


def test_bca_agrees_with_scipy_and_is_deterministic():
    values, _ = differences(stream(4), 200, "skewed")
    ours = bca_interval(values, 0.95)
    theirs = bootstrap((values,), np.mean, n_resamples=10_000, method="BCa", random_state=stream(5))
    assert ours == bca_interval(values, 0.95)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=0.002)


def test_the_bootstrap_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    bca_interval(np.arange(50.0), 0.95, resamples=10)
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_few_different_samples_have_no_interval_of_acr():
    found = compared(A=[1.0] * 100, B=[1.0] * 91 + [0.5] * 9)
    assert found.pairs[0].acr_lower is None
    assert "A - B: the radii of 9 samples differ, too few" in found.notes[0]
    assert compared(A=[1.0] * 100, B=[1.0] * 90 + [0.5] * 10).pairs[0].acr_lower is not None


@pytest.mark.parametrize(("discordant", "delta"), [(0.01, 0.05), (0.05, 0.05), (0.2, 0.05), (0.1, 0.004)])
def test_the_number_of_samples_gives_the_power(discordant, delta):
    """The exact power for a difference of one point is 80 % or somewhat more."""
    m = samples_needed(discordant, delta)
    theta = (1 + 0.01 / discordant) / 2
    sizes = np.unique(binom.ppf(np.linspace(0.002, 0.998, 60), m, discordant).astype(int))
    weights = binom.pmf(sizes, m, discordant)
    power = []
    for d in sizes:
        b = binom.ppf(1 - delta / 2, d, 0.5) + 1  # the smallest count that can be rejected, or one above
        while b > 0 and 2 * binom.sf(b - 2, d, 0.5) <= delta:
            b -= 1
        power.append(binom.sf(b - 1, d, theta))
    assert 0.78 <= np.average(power, weights=weights) <= 0.89


def test_samples_that_are_not_complete_in_all_tables_are_left_out():
    first, second = rows([1.0, 1.0, 1.0, 1.0]), rows([1.0, 1.0, 1.0])
    first.loc[0, "status"], second.loc[1, "status"] = "incomplete", "exempt"
    assert list(shared_rows({"A": first, "B": second})["A"].index) == [2]
    with pytest.raises(UserError, match="no complete sample in common"):
        shared_rows({"A": first.head(1), "B": second})


def test_other_labels_or_images_are_refused():
    with pytest.raises(UserError, match="sample 1 has label 0 in A and 5 in B"):
        shared_rows({"A": rows([1.0, 1.0]), "B": rows([1.0, 1.0]).assign(label=[0, 5])})
    image = rows([1.0, 1.0]).assign(image=["a", "b"])
    with pytest.raises(UserError, match="sample 1 is another image in A than in B"):
        shared_rows({"A": image, "B": image.assign(image=["a", "c"])})
    assert len(shared_rows({"A": image, "B": rows([1.0, 1.0])})["A"]) == 2  # a log has no hashes


def command(*words):
    return CliRunner().invoke(main, ["compare", *map(str, words)])


def test_a_run_against_another_sigma(home, tmp_path, raw_spec):
    make_run(load_spec(raw_spec, ["smoothing.sigma=0.5"]), tmp_path / "wide", samples=6)
    found = json.loads(command(f"narrow={home}", f"wide={tmp_path / 'wide'}", "--json", "--grid", "0:0.5:0.25").stdout)
    assert found["samples"] == 6
    assert [row["radius"] for row in found["pairs"][0]["radii"]] == [0, 0.25, 0.5]
    notes = " ".join(found["notes"])
    assert "6 of 8 in narrow, 6 of 6 in wide" in notes
    assert "differ in sigma (0.25, 0.5)" in notes
    text = command(home, tmp_path / "wide").stdout
    assert "6 samples that all runs share" in text
    assert "differ in sigma" in text


def test_the_python_api_and_the_command_agree(home, tmp_path, raw_spec):
    make_run(load_spec(raw_spec, ["smoothing.seed=1"]), tmp_path / "other")
    found = ds.compare(home, f"other={tmp_path / 'other'}")
    assert isinstance(found, ds.Comparison)
    assert found.to_json() == json.loads(command(home, f"other={tmp_path / 'other'}", "--json").stdout)
    assert list(found.table.columns[:4]) == ["first", "second", "radius", "first_accuracy"]
    assert any("the same f on the same samples" in note for note in found.notes)
    written = tmp_path / "out.txt"
    assert command(home, f"other={tmp_path / 'other'}", "--output", written).stdout == ""
    assert "exact McNemar test" in written.read_text()


def test_another_image_of_the_same_sample_is_refused(home, tmp_path, raw_spec, images):
    table = pq.read_table(images)
    changed = table.to_pylist()
    changed[4]["image"]["bytes"] = png(np.full((4, 4), 90, np.uint8))
    pq.write_table(pa.Table.from_pylist(changed, schema=table.schema), tmp_path / "changed.parquet")
    make_run(load_spec(raw_spec, [f"data.path={tmp_path / 'changed.parquet'}"]), tmp_path / "changed")
    with pytest.raises(UserError, match="sample 4 is another image"):
        compare_sources([home, str(tmp_path / "changed")])


def test_post_hoc_orders_are_marked(home, tmp_path, raw_spec):
    make_run(load_spec(raw_spec, ["smoothing.seed=1"]), tmp_path / "other")
    sources = [f"A={home}", f"B={tmp_path / 'other'}"]
    for run in (home, str(tmp_path / "other")):
        analyze(run, Request(alpha=0.01), quiet=True)
    assert any(note.startswith("post hoc: A, B") for note in compare_sources(sources, order_name="002").notes)
    assert not any("post hoc" in note for note in compare_sources(sources).notes)


def test_a_sample_set_that_grew_is_marked(spec, tmp_path, raw_spec):
    """Order 001 has four samples and fixed the number of images; order 002 has all eight."""
    for name, seed in (("grown", 0), ("other", 1)):
        for samples in (4, 8):
            make_run(load_spec(raw_spec, [f"smoothing.seed={seed}"]), tmp_path / name, samples=samples)
    sources = [f"A={tmp_path / 'grown'}", f"B={tmp_path / 'other'}"]
    assert any(
        note.startswith("A, B: the sample set grew") for note in compare_sources(sources, order_name="002").notes
    )
    assert not any("the sample set grew" in note for note in compare_sources(sources, order_name="001").notes)
    run = ds.open_run(str(tmp_path / "grown"))
    assert not run.curve("001").grown
    assert run.curve("002").grown
    assert run.status().orders["002"].summary.grown
    table = pd.read_csv(tmp_path / "grown/orders/002/curve.csv")
    assert table["band"].str.contains("population intervals do not hold").all()
    assert not pd.read_csv(tmp_path / "grown/orders/001/curve.csv")["band"].str.contains("grew").any()
    assert "(grown)" in CliRunner().invoke(main, ["curve", sources[0], "--order", "002"]).stdout


def test_settings_that_differ_are_named(home, tmp_path, raw_spec):
    make_run(load_spec(raw_spec, ["smoothing.n=400", "smoothing.alpha=0.01"]), tmp_path / "other")
    notes = " ".join(compare_sources([home, str(tmp_path / "other")]).notes)
    assert "differ in n (" in notes
    assert "differ in alpha (" in notes


def test_cost_certificates_are_not_compared_with_others(home, tmp_path, raw_spec):
    make_run(load_spec(raw_spec, ["smoothing.seed=1"]), tmp_path / "other")
    costly = tmp_path / "costly.toml"
    costly.write_text("0 = [1]\n")
    for run in (home, str(tmp_path / "other")):
        analyze(run, Request(certificate="cost", costly=str(costly)), quiet=True)
    analyze(str(tmp_path / "other"), Request(certificate="multiclass"), quiet=True)
    found = compare_sources([home, str(tmp_path / "other")], order_name="002")
    assert found.samples == 4  # label 1 has no costly class
    log = tmp_path / "log"
    log.write_text(HEADER + "".join(f"{i}\t{i % 2}\t{i % 2}\t0.2\t1\t0\n" for i in range(8)))
    with pytest.raises(UserError, match="'cost' claims only that no costly class"):
        compare_sources([home, str(log)], order_name="002")


def test_logs_are_compared_and_predictions_refused(home, tmp_path):
    log = tmp_path / "log"
    log.write_text(HEADER + "".join(f"{i}\t{i % 2}\t{i % 2}\t0.2\t1\t0\n" for i in range(8)))
    found = compare_sources([home, f"{log}@0.25"])
    assert found.samples == 8
    assert any("log does not state n, n0, alpha" in note for note in found.notes)
    log.write_text("idx\tlabel\tpredict\tcorrect\ttime\n0\t0\t0\t1\t0\n")
    with pytest.raises(UserError, match="seems to be a log of PREDICT"):
        compare_sources([home, str(log)])
    log.write_text(HEADER + "0\t1\t1\t0.2\t1\t0\n")
    with pytest.raises(UserError, match="sample 0 has label 0 in half-space and 1 in log"):
        compare_sources([home, str(log)])


def test_radii_of_grid_mode_are_those_that_every_order_tested(home, tmp_path, raw_spec):
    grid = load_spec(raw_spec, ["sampling.mode=grid", "sampling.radii=[0.0, 0.1]"])
    make_run(grid, tmp_path / "grid")
    found = compare_sources([home, str(tmp_path / "grid")])
    assert [row.radius for row in found.pairs[0].radii] == [0.0, 0.1]
    assert found.pairs[0].acr_difference is None
    with pytest.raises(UserError, match=r"r = 0\.05 was not tested"):
        compare_sources([home, str(tmp_path / "grid")], grid="0:0.1:0.05")


def test_the_number_of_runs_is_limited(home):
    for runs in (["a"], ["a"] * 11):
        with pytest.raises(UserError, match=rf"{len(runs)} runs were given; compare needs between 2 and 10"):
            compare_sources(runs)
    failed = command(home)
    assert failed.exit_code == 2
    assert len(failed.stderr.splitlines()) == 1
