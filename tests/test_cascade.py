"""The cascade: its level at the worst cases, exact radii for known laws, and runs that do not fit together."""

import io
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from scipy.special import ndtr, ndtri

import diffsmooth as ds
from diffsmooth.jobs.cli import main
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.certify.cascade import CASCADE_COLUMNS, ScaleVotes, certify_cascade
from diffsmooth.pipeline.certify.certificates import certify
from diffsmooth.pipeline.certify.orders import Order
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.results.cascades import read_record
from diffsmooth.pipeline.spec import BlockLengths
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.blocks import encode_block, read_blocks
from tests.models import make_run


def scale_of(selection_NK, estimation_NK, sigma) -> ScaleVotes:
    """Votes of N samples with label 0, one block for each stage."""
    tables = []
    for stage, counts_NK in (("selection", selection_NK), ("estimation", estimation_NK)):
        counts_NK = np.asarray(counts_NK)
        sample, k = np.nonzero(counts_NK)
        stop = counts_NK.sum(axis=1)[sample]
        columns = {"sample": sample, "label": 0, "stage": stage, "draw_start": 0, "draw_stop": stop, "class": k}
        tables.append(pd.DataFrame({**columns, "votes": counts_NK[sample, k]}))
    n0, n = (int(np.sum(counts_NK[0])) for counts_NK in (selection_NK, estimation_NK))
    return ScaleVotes(votes=pd.concat(tables), sigma=sigma, n0=n0, n=n)


def cascade_of(scales, *, alpha=0.001, num_classes=4, samples=None):
    found = range(int(scales[0].votes["sample"].max()) + 1) if samples is None else samples
    return certify_cascade(scales, found, alpha=alpha, num_classes=num_classes)


def true_radius(laws, sigma, top_class):
    """r of each certificate: the radius of its scale k and class A from the probabilities; `laws` is sigma -> p_K."""
    reach = []
    for k, chosen in zip(sigma, top_class, strict=True):
        rivals = {s: max(p for c, p in enumerate(p_K) if c != chosen) for s, p_K in laws.items() if s > k}
        reach.append(min([k * ndtri(laws[k][chosen]), *(-s * ndtri(p) for s, p in rivals.items())]))
    return np.array(reach)


def simulated(laws, *, trials, n0, n, shared, seed=1):
    """Multinomial votes of many samples under `laws`; with `shared`, all scales use the same noise."""
    generator = np.random.default_rng(seed)
    noise = [generator.random((trials, draws)) for draws in (n0, n)]
    scales = []
    for sigma, p_K in laws.items():
        counts = []
        for stage, draws in enumerate((n0, n)):
            uniform = noise[stage] if shared else generator.random((trials, draws))
            k = np.searchsorted(np.cumsum(p_K)[:-1], uniform, side="right")
            counts.append(np.stack([(k == c).sum(axis=1) for c in range(len(p_K))], axis=1))
        scales.append(scale_of(*counts, sigma))
    return scales


TIED = float(ndtr(0.25))  # t = 0.25 sigma, for every scale whose sigma makes t equal

# sigma -> probabilities of the classes, at which a claim is hardest to make: r is 0, or all t are equal
WORST = {
    "the answering scale is at one half": {0.5: [0.2, 0.3, 0.3, 0.2], 1.0: [0.5, 0.5, 0, 0]},
    "the smaller scale is at one half": {0.5: [0.5, 0.5, 0, 0], 1.0: [0.3, 0.3, 0.2, 0.2]},
    "a rival above is at one half": {0.5: [0.97, 0.01, 0.01, 0.01], 1.0: [0.3, 0.5, 0.1, 0.1]},
    "two rivals above are at one half": {0.5: [1.0, 0, 0, 0], 1.0: [0, 0.5, 0.5, 0]},
    "two scales are tied": {0.5: [ndtr(0.5), 1 - ndtr(0.5), 0, 0], 1.0: [2 * TIED - 1, 1 - TIED, 1 - TIED, 0]},
    "three scales are tied": {
        0.25: [ndtr(1.0), 1 - ndtr(1.0), 0, 0],
        0.5: [2 * ndtr(0.5) - 1, 1 - ndtr(0.5), 1 - ndtr(0.5), 0],
        1.0: [2 * TIED - 1, 1 - TIED, 1 - TIED, 0],
    },
}


@pytest.mark.parametrize("shared", [False, True], ids=["own noise", "shared noise"])
@pytest.mark.parametrize("case", WORST)
def test_a_radius_is_too_large_with_probability_at_most_alpha(case, shared):
    alpha, trials = 0.05, 20_000
    rows = cascade_of(simulated(WORST[case], trials=trials, n0=20, n=100, shared=shared), alpha=alpha)
    too_large = rows["radius"] > np.maximum(true_radius(WORST[case], rows["sigma"], rows["top_class"]), 0) + 1e-9
    assert too_large.mean() <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / trials)


def test_the_level_is_used_up_where_one_bound_decides():
    """Without this, a certificate that never claims anything would pass the test of the level."""
    laws = {0.5: [1.0, 0, 0, 0], 1.0: [0.2, 0.5, 0.3, 0]}
    rows = cascade_of(simulated(laws, trials=20_000, n0=400, n=1000, shared=False), alpha=0.05)
    assert 0.03 < (rows["radius"] > 0).mean() < 0.05


@pytest.mark.parametrize("margin", [0.1, 0.4, 1.0])
def test_half_spaces_have_their_distance_as_radius(margin):
    """A half-space at distance m has p_A = Phi(m / sigma) at every scale, so every t is m."""
    laws = {sigma: [ndtr(margin / sigma), 1 - ndtr(margin / sigma)] for sigma in (0.25, 0.5, 1.0)}
    counts = {sigma: np.round(np.outer([10**7], p_K)).astype(int) for sigma, p_K in laws.items()}
    rows = cascade_of([scale_of(one, one, sigma) for sigma, one in counts.items()], num_classes=2)
    assert rows["radius"][0] == pytest.approx(margin, abs=5e-3)
    assert rows["radius"][0] < margin


def test_the_radius_ends_where_a_larger_scale_starts_to_answer():
    """In one dimension: f_1 answers 0 up to 0.6, and f_2 answers 1 from 0.4 on and else 2 or 3 by another coordinate.

    At distance d, p_21 = Phi(d - 0.4) exceeds 1/2 for d > 0.4, so the exact radius of G is 0.4.
    """
    p_21 = ndtr(-0.4)
    laws = {0.5: [ndtr(0.6 / 0.5), 1 - ndtr(0.6 / 0.5), 0, 0], 1.0: [0, p_21, (1 - p_21) / 2, (1 - p_21) / 2]}
    counts = {sigma: np.round(np.outer([10**7], p_K)).astype(int) for sigma, p_K in laws.items()}
    rows = cascade_of([scale_of(one, one, sigma) for sigma, one in counts.items()])
    assert (rows["prediction"][0], rows["sigma"][0], rows["limiting_sigma"][0]) == (0, 0.5, 1.0)
    assert rows["radius"][0] == pytest.approx(0.4, abs=2e-3)
    assert rows["radius"][0] < 0.4


def test_one_scale_gives_the_certificate_of_the_run():
    laws = {0.5: [0.6, 0.25, 0.1, 0.05]}
    (scale,) = simulated(laws, trials=300, n0=10, n=100, shared=False)
    order = Order(samples=list(range(300)), n0=10, n=100, alpha=0.05)
    block = BlockLengths(selection=10, estimation=100)
    plain = certify(scale.votes, order, sigma=0.5, num_classes=4, block=block)
    rows = cascade_of([scale], alpha=0.05)
    assert set(plain["status"]) == {"certified", "abstained"}
    kept = [name for name in plain.columns if name not in ("certificate", "post_hoc")]
    pd.testing.assert_frame_equal(rows[kept], plain[kept], check_exact=True, check_dtype=False)


def one_radius(low, high, *, alpha=0.001):
    """The radius of two scales that select class 0 at sigma 0.5, with these estimation votes."""
    scales = [scale_of([[100, 0, 0, 0]], [low], 0.5), scale_of([[20, 40, 20, 20]], [high], 1.0)]
    (row,) = cascade_of(scales, alpha=alpha).itertuples()
    return row.radius


def test_the_radius_is_monotone_in_the_votes_and_in_alpha():
    by_own_votes = [one_radius([own, 1000 - own, 0, 0], [400, 200, 200, 200]) for own in range(500, 1001, 50)]
    by_rivals = [one_radius([999, 1, 0, 0], [1000 - rival, rival, 0, 0]) for rival in range(0, 600, 50)]
    by_alpha = [one_radius([900, 100, 0, 0], [400, 200, 200, 200], alpha=alpha) for alpha in (1e-9, 1e-3, 0.1)]
    assert by_own_votes == sorted(by_own_votes)
    assert by_rivals == sorted(by_rivals, reverse=True)
    assert by_alpha == sorted(by_alpha)
    assert by_own_votes[0] == by_rivals[-1] == 0
    assert len(set(by_own_votes)) > 3
    assert len(set(by_rivals)) > 3


def test_estimation_votes_do_not_choose_the_class_or_the_scale():
    selection = [
        scale_of([[100, 0, 0, 0]], [[1000, 0, 0, 0]], 0.5),
        scale_of([[20, 40, 20, 20]], [[0, 0, 0, 1000]], 1.0),
    ]
    (row,) = cascade_of(selection).itertuples()
    assert (row.top_class, row.sigma, row.status, row.prediction) == (0, 0.5, "abstained", -1)


def test_samples_without_all_draws_are_incomplete_at_any_scale():
    low = scale_of([[10, 0], [10, 0]], [[100, 0], [100, 0]], 0.5)
    high = scale_of([[10, 0], [10, 0]], [[100, 0], [100, 0]], 1.0)
    missing = (high.votes["sample"] == 1) & (high.votes["stage"] == "estimation")
    high = ScaleVotes(votes=high.votes[~missing], sigma=high.sigma, n0=high.n0, n=high.n)
    rows = cascade_of([low, high], num_classes=2, samples=[0, 1, 7])
    assert rows.columns.tolist() == list(CASCADE_COLUMNS)
    assert rows["status"].tolist() == ["certified", "incomplete", "incomplete"]
    assert rows["prediction"].tolist() == [0, -2, -2]
    assert rows["radius"].tolist()[1:] == [0, 0]
    assert rows["label"].tolist() == [0, 0, -1]
    assert rows["post_hoc"].all()


def test_scales_that_do_not_fit_together_are_refused():
    one = scale_of([[10, 0]], [[100, 0]], 0.5)
    with pytest.raises(ValueError, match="different sigma"):
        cascade_of([one, one])
    with pytest.raises(ValueError, match="different sigma"):
        certify_cascade([], [0], alpha=0.1, num_classes=2)
    other = ScaleVotes(votes=one.votes.assign(label=1), sigma=1.0, n0=10, n=100)
    with pytest.raises(ValueError, match="label of a sample differs"):
        cascade_of([one, other])
    with pytest.raises(ValueError, match="at least 2"):
        cascade_of([one], num_classes=1)


# ---- stored runs ----


def make(home: Path, sigma: str, *changes: str, samples: int = 4) -> Path:
    draws = ["smoothing.block.estimation=100", "smoothing.n=200"]
    spec = load_named(f"mnist-cohen-{sigma}", [f"data.samples=0:{samples}", "compute.device=cpu", *draws, *changes])
    make_run(spec, home, samples=samples)
    return home


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> list[Path]:
    """Runs at three sigmas."""
    folder = tmp_path_factory.mktemp("cascade")
    return [make(folder / sigma, sigma) for sigma in ("0.25", "0.50", "1.00")]


@pytest.fixture
def runs(made, tmp_path) -> list[str]:
    """Copies of them, which a test may change."""
    return [str(shutil.copytree(one, tmp_path / one.name)) for one in made]


def call(*arguments):
    return CliRunner().invoke(main, [str(one) for one in arguments])


def refusal(*arguments, status=2) -> str:
    result = call(*arguments)
    assert result.exit_code == status, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("diffsmooth: ")
    return line


def test_analyze_writes_and_prints_the_cascade(runs, tmp_path):
    home = tmp_path / "out"
    result = call("analyze", *reversed(runs), "--certificate", "cascade", "--out", home)
    assert result.exit_code == 0, result.output
    assert "POST HOC" in result.stdout
    assert "cascade*" in result.stdout
    assert {path.name for path in home.iterdir()} == {"cascade.json", "certificates.parquet", "curve.csv", "curve.png"}
    rows = pd.read_parquet(home / "certificates.parquet")
    assert rows["post_hoc"].all()
    assert set(rows["certificate"]) == {"cascade"}
    assert pd.read_csv(home / "curve.csv")["post_hoc"].all()
    record = read_record(open_store(str(home)))
    assert [(one.run, one.sigma, one.n0, one.n) for one in record.scales] == [
        (run, sigma, 100, 200) for run, sigma in zip(runs, (0.25, 0.5, 1.0), strict=True)
    ]
    assert (record.samples, record.alpha) == ([0, 1, 2, 3], 0.001)
    exported = tmp_path / "log.tsv"
    answer = call(
        "analyze",
        *runs,
        "--certificate",
        "cascade",
        "--out",
        home,
        "--json",
        "--alpha",
        "0.01",
        "--export-tsv",
        exported,
    )
    assert json.loads(answer.stdout)["alpha"] == 0.01
    assert exported.read_text().splitlines()[0].endswith("post_hoc")
    assert (pd.read_parquet(home / "certificates.parquet")["radius"] >= rows["radius"]).all()


def test_the_api_gives_the_same_certificates(runs, tmp_path):
    found = ds.cascade(runs, out=str(tmp_path / "out"))
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "certificates.parquet"), found.certificates)
    assert found.complete
    assert found.curve.acr == pytest.approx((found.certificates["radius"] * found.certificates["correct"]).mean())
    assert found.accuracy_at(0.0) == found.certificates["correct"].mean()
    assert found.curve.post_hoc


def test_curve_shows_the_cascade_beside_the_runs_and_the_envelope(runs, tmp_path, caplog):
    picture = tmp_path / "a.svg"
    result = call("curve", *runs, "--cascade", "--grid", "0:0.5:0.25", "--format", "csv", "--plot", picture)
    table = pd.read_csv(io.StringIO(result.stdout))
    names = table["run"].unique().tolist()
    assert names[-2:] == ["cascade", "envelope (not a classifier)"]
    assert len(names) == 5
    assert table.loc[table["run"] == "cascade", "post_hoc"].all()
    assert "cascade" not in table["best_run"].tolist()
    text = picture.read_text()
    assert text.count("not a classifier") == text.count(">cascade (ACR") == 3  # a panel for each sigma
    assert "post hoc" in text
    assert "one classifier over sigma 0.25, 0.5, 1" in call("curve", *runs, "--cascade").stdout


def test_more_runs_than_one_are_for_the_cascade_only(runs, tmp_path):
    assert "only with --certificate cascade" in refusal("analyze", *runs)
    assert "only with --certificate cascade" in refusal("analyze", runs[0], "--out", tmp_path / "out")
    assert "--costly belongs to" in refusal("analyze", *runs, "--certificate", "cascade", "--costly", "a.toml")
    assert "a cascade needs at least two" in refusal("analyze", runs[0], "--certificate", "cascade")


def test_runs_that_differ_in_draws_and_samples_are_reported(runs, tmp_path, caplog):
    changed = make(tmp_path / "more", "1.00", "smoothing.n=300", "smoothing.block.estimation=150", samples=2)
    with caplog.at_level(logging.WARNING):
        found = ds.cascade([runs[0], str(changed)])
    assert "n differs between the runs (200, 300)" in caplog.text
    assert "2 of 4 samples" in caplog.text
    assert found.certificates["sample"].tolist() == [0, 1]
    assert found.complete
    assert set(found.certificates.set_index("sigma")["n"].items()) <= {(0.25, 200), (1.0, 300)}
    with pytest.raises(UserError, match="n = 200 is not a multiple of the estimation block length 150"):
        ds.cascade([runs[0], str(changed)], n=200)


def test_missing_blocks_make_a_sample_incomplete(runs, tmp_path, caplog):
    (Path(runs[1]) / "votes" / "estimation" / "3-100.parquet").unlink()
    result = call("analyze", *runs, "--certificate", "cascade", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "(1 incomplete)" in result.stdout
    assert "1 of 4 samples are incomplete: 3" in caplog.text
    assert ds.cascade(runs, n=100).complete
    with pytest.raises(UserError, match="no sample is complete with"):
        ds.cascade(runs, n=1000)


def test_runs_that_do_not_fit_together_are_refused(runs, tmp_path):
    def refused(others, words, **settings):
        with pytest.raises(UserError, match=words):
            ds.cascade(others, **settings)

    refused([runs[0], runs[0]], "both have sigma = 0.25; give one run for each sigma")
    refused(runs, "--alpha = 0.7 must be above 0 and below 0.5", alpha=0.7)
    refused(runs, "--n 0 must be at least 1", n=0)
    refused([runs[0], str(tmp_path / "nowhere")], "no run here")
    other_alpha = make(tmp_path / "alpha", "1.00", "smoothing.alpha=0.01", samples=2)
    refused([runs[0], str(other_alpha)], r"alpha differs between the runs \(0.001, 0.01\); give --alpha")
    assert ds.cascade([runs[0], str(other_alpha)], alpha=0.01).complete
    skipping = make(tmp_path / "skipping", "1.00", "sampling.skip_wrong=true", samples=2)
    refused([runs[0], str(skipping)], "no order that draws equally often from every sample")
    path = Path(runs[2]) / "run.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"num_classes": 11}))
    refused(runs, "num_classes is 10 in .* and 11 in")


def test_runs_without_a_common_sample_are_refused(runs):
    for home, samples in zip(runs[:2], ([0, 1], [2, 3]), strict=True):
        path = Path(home) / "orders" / "001.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"samples": samples}))
    with pytest.raises(UserError, match="no sample in common"):
        ds.cascade(runs[:2])


def test_another_image_is_refused(runs):
    store = open_store(runs[1])
    stored = ds.open_run(runs[1])._stored
    for block, label, classes, counts, metadata, _ in read_blocks(store, stored.run):
        if block.sample == 2:
            counts_K = np.zeros(10, dtype=np.int64)
            counts_K[classes] = counts
            changed = metadata.model_copy(update={"sample_sha256": "0" * 64})
            name = f"votes/{block.stage}/{block.sample}-{block.draw_start}.parquet"
            store.replace(name, encode_block(block, label, counts_K, changed))
    with pytest.raises(UserError, match="sample 2 has another image or label in"):
        ds.cascade(runs)


def test_a_folder_that_holds_something_else_is_kept(runs, tmp_path):
    with pytest.raises(UserError, match="holds a run; choose another folder"):
        ds.cascade(runs, out=runs[0])
    home = tmp_path / "out"
    ds.cascade(runs, out=str(home))
    before = (home / "certificates.parquet").read_bytes()
    with pytest.raises(UserError, match="holds the cascade of other runs"):
        ds.cascade(runs[:2], out=str(home))
    assert (home / "certificates.parquet").read_bytes() == before
    for damaged in ("{", "[]", '{"certificate": "cascade"}', "nan", "[" * 100_000):
        (home / "cascade.json").write_text(damaged)
        with pytest.raises(RunError, match=r"cascade\.json is damaged: .*; delete it"):
            ds.cascade(runs, out=str(home))
