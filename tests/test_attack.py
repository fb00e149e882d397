"""Attacks on stored runs: storage, resume on Ray, mistakes, and where their results are shown."""

import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

import diffsmooth as ds
from diffsmooth.jobs.attacking import attack_run
from diffsmooth.jobs.cli import main
from diffsmooth.jobs.specs import load_named
from diffsmooth.jobs.watch import ClusterOptions
from diffsmooth.pipeline.attack.record import (
    attacked,
    read_attacks,
    read_samples,
    table_of,
)
from diffsmooth.pipeline.attack.request import AttackRequest
from diffsmooth.pipeline.certify.orders import order_of, place_order
from diffsmooth.pipeline.data.sets import open_dataset
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.smoothing import BaseClassifier
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import open_store
from tests.attacking import GREY, LABELS, QUICK, HalfSpace, attack_alone
from tests.models import make_run, to_toml

ROOT = Path(__file__).parent.parent


def test_a_stored_sample_is_read_back_as_it_was_found(made):
    spec, store = made
    attack, samples = attack_alone(spec, store, range(2))
    assert attacked(store, attack) == [0, 1]
    assert list(read_attacks(store)) == [attack.id]
    for one in samples:
        clean = open_dataset(spec.data)[one.sample]
        assert (one.label, one.metadata.sample_sha256) == (clean.label, clean.sha256)
        for rung in one.rungs:
            moved = np.linalg.norm((rung.image_CHW.astype(np.float64) - clean.image_CHW).ravel())
            assert rung.distance == pytest.approx(moved, abs=1e-12)
            assert rung.distance <= rung.eps + 1e-6
    table = table_of(samples, attack)
    assert table["proven"].any()
    assert (table.groupby("sample")["upper"].first() > 4 * (155 / 255 - 0.5)).all()


def test_batches_and_repetition_change_nothing(made, tmp_path, raw_spec):
    spec, store = made
    _, samples = attack_alone(spec, store, range(2))
    other = make_run(spec, tmp_path / "other", samples=2)
    _, again = attack_alone(spec, other, [1, 0])
    for one, two in zip(samples, again, strict=True):
        for first, second in zip(one.rungs, two.rungs, strict=True):
            assert np.array_equal(first.image_CHW, second.image_CHW)
            assert np.array_equal(first.selection_K, second.selection_K)
            assert first.judged == second.judged


def test_a_compiled_f_is_attacked_through_its_uncompiled_gradients(made, tmp_path, raw_spec, monkeypatch):
    spec, store = made
    _, (plain,) = attack_alone(spec, store, range(1))
    calls = []

    def compiled(function, **options):
        def call(x_BCHW):
            calls.append(torch.is_grad_enabled())
            return function(x_BCHW)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    raw_spec["compute"]["compile"] = True
    spec = load_spec(raw_spec)
    attack, (one,) = attack_alone(spec, make_run(spec, tmp_path / "compiled", samples=1), range(1))
    assert calls
    assert not any(calls)  # only votes are compiled
    assert one.metadata.compiled
    assert one.upper(attack.alpha) == plain.upper(attack.alpha) < math.inf


def test_networks_in_bf16_are_attacked(tmp_path):
    settings = ["precision=bf16", "m=2", "n0=50", "n=100", "block.selection=50", "block.estimation=100"]
    spec = load_named("mnist-diffsmooth-0.50", [f"smoothing.{one}" for one in settings])
    store, search = make_run(spec, tmp_path / "run", samples=1), {"eps": [4.0], "refine": 0, "steps": 4, "draws": 8}
    attack, (one,) = attack_alone(spec, store, range(3, 4), **search, n0=50, n=100)
    assert 0 < one.upper(attack.alpha) < 4.01


def test_a_sample_that_is_wrong_already_has_the_upper_bound_0(raw_spec, tmp_path):
    raw_spec["classifier"] = {"arch": "tests.models:upside_down"}
    spec = load_spec(raw_spec)
    attack, samples = attack_alone(spec, make_run(spec, tmp_path / "run", samples=2), range(2))
    assert [one.upper(attack.alpha) for one in samples] == [0.0, 0.0]
    assert all(len(one.rungs) == 1 for one in samples)


def test_images_stay_on_the_grid_of_the_noise(raw_spec, tmp_path):
    raw_spec["smoothing"]["noise_grid"] = 255
    spec = load_spec(raw_spec)
    attack, samples = attack_alone(spec, make_run(spec, tmp_path / "run", samples=2), range(2))
    for one in samples:
        assert math.isfinite(one.upper(attack.alpha))
        for rung in one.rungs:
            assert np.allclose(rung.image_CHW * 255, np.rint(rung.image_CHW * 255), atol=1e-4)


@pytest.mark.parametrize("name", ["pgd", "apgd", "diffhammer"])
def test_gradients_that_are_not_finite_are_reported_in_one_line(raw_spec, tmp_path, name):
    raw_spec["classifier"] = {"arch": "tests.models:nan_gradient"}
    spec = load_spec(raw_spec)
    store = make_run(spec, tmp_path / "run", samples=1)
    with pytest.raises(UserError, match="the gradient of f is not finite at sample 0") as error:
        attack_alone(spec, store, range(1), attack=name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arch", ["rounded_half_space", "detached_half_space"])
def test_hidden_gradients_are_reported_and_the_attack_by_votes_works(raw_spec, tmp_path, arch):
    raw_spec["classifier"] = {"arch": f"tests.models:{arch}"}
    spec = load_spec(raw_spec)
    store = make_run(spec, tmp_path / "run", samples=2)
    with pytest.raises(UserError, match=r"the gradient of f is 0 for all 8 draws at sample 0.* use --attack votes"):
        attack_alone(spec, store, range(2))
    attack, samples = attack_alone(spec, store, range(2), attack="votes", steps=8, draws=64)
    assert all(math.isfinite(one.upper(attack.alpha)) for one in samples)


def test_memory_that_runs_out_makes_batches_smaller(made, monkeypatch):
    spec, store = made
    inner, calls = BaseClassifier.differentiable_log_scores, []

    def limited(self, x0_BCHW):
        calls.append(len(x0_BCHW))
        if len(x0_BCHW) > 4:
            raise torch.OutOfMemoryError("full")
        return inner(self, x0_BCHW)

    monkeypatch.setattr(BaseClassifier, "differentiable_log_scores", limited)
    attack, samples = attack_alone(spec, store, range(1))
    assert set(calls) == {8, 4}
    assert math.isfinite(samples[0].upper(attack.alpha))
    monkeypatch.setattr(
        BaseClassifier, "differentiable_log_scores", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full"))
    )
    with pytest.raises(UserError, match="one draw does not fit in the memory of cpu"):
        attack_alone(spec, store, range(1), seed=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:100], "is damaged"),
        (lambda data: b"", "is damaged"),
    ],
)
def test_a_damaged_file_is_named(made, damage, message):
    spec, store = made
    attack, _ = attack_alone(spec, store, range(1))
    path = Path(store.uri) / attack.sample_key(0)
    path.write_bytes(damage(path.read_bytes()))
    from diffsmooth.pipeline.votes.run import read_run

    with pytest.raises(RunError, match=rf"samples/0.parquet {message}"):
        read_samples(store, read_run(store), attack)


def test_a_small_file_that_declares_a_huge_image_is_not_decoded(made):
    import pyarrow.parquet as pq

    from diffsmooth.pipeline.votes.run import read_run

    spec, store = made
    attack, _ = attack_alone(spec, store, range(1))
    path = Path(store.uri) / attack.sample_key(0)
    table = pq.read_table(path).slice(0, 1)
    huge = table.set_column(4, "image", [[bytes(200_000_000)]])
    pq.write_table(huge, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 100_000
    with pytest.raises(RunError, match=r"samples/0\.parquet is damaged: 1 rows of 200"):
        read_samples(store, read_run(store), attack)


def test_a_flipped_bit_of_an_attacked_sample_is_detected(made):
    from diffsmooth.pipeline.votes.run import read_run

    spec, store = made
    attack, _ = attack_alone(spec, store, range(1))
    path = Path(store.uri) / attack.sample_key(0)
    data = path.read_bytes()
    run = read_run(store)

    def content() -> str:
        (one,) = read_samples(store, run, attack)
        return repr([(rung.image_CHW.tolist(), rung.selection_K, rung.judging_K) for rung in one.rungs])

    whole, refused = content(), 0
    for place in range(0, len(data), 37):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        try:
            assert content() == whole  # a bit that no reader looks at
        except RunError:
            refused += 1
    assert refused > len(data) // 37 // 2


def test_votes_that_do_not_add_up_are_refused(made):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from diffsmooth.pipeline.votes.run import read_run

    spec, store = made
    attack, _ = attack_alone(spec, store, range(1))
    path = Path(store.uri) / attack.sample_key(0)
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[1]["selection"][0] += 1
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    with pytest.raises(RunError, match="holds 201 votes for 200 draws"):
        read_samples(store, read_run(store), attack)


# on Ray


@pytest.mark.usefixtures("ray_session")
def test_the_command_attacks_a_run_and_resumes(made, tmp_path):
    spec, store = made
    request = AttackRequest(eps=(2.0, 1.0), samples="0:4", **QUICK)
    found = attack_run(store.uri, spec, request, ClusterOptions(actors=2, batch_size=16, quiet=True))
    assert found.complete
    assert found.gap.contradictions == []
    assert len(found.gap.table) == 4
    files = {path: path.stat().st_mtime_ns for path in (Path(store.uri) / "attacks").rglob("samples/*.parquet")}
    more = attack_run(store.uri, spec, AttackRequest(eps=(1.0, 2.0), **QUICK), ClusterOptions(quiet=True))
    assert (len(more.samples), more.attack) == (8, found.attack)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    alone = make_run(spec, tmp_path / "alone")
    attack, samples = attack_alone(spec, alone, eps=[2.0, 1.0])
    pd.testing.assert_frame_equal(table_of(samples, attack), more.table)  # no matter where, and in which batches


@pytest.mark.usefixtures("ray_session")
def test_a_wrong_gradient_stops_the_cluster_with_the_first_cause(raw_spec, tmp_path):
    raw_spec["classifier"] = {"arch": "tests.models:nan_gradient"}
    spec = load_spec(raw_spec)
    store = make_run(spec, tmp_path / "run", samples=2)
    with pytest.raises(UserError, match="the gradient of f is not finite"):
        attack_run(store.uri, spec, AttackRequest(samples="0:2", **QUICK), ClusterOptions(quiet=True))


def test_killed_and_started_twice_equals_undisturbed(raw_spec, tmp_path, ray_session):
    """kill -9 of one driver, then two drivers at once."""
    raw_spec["classifier"] = {"arch": "tests.models:slow_half_space"}
    spec = load_spec(raw_spec, ["smoothing.n=100"])
    raw_spec["classifier"] = {"arch": "tests.models:half_space"}
    store = make_run(spec, tmp_path / "run")
    (tmp_path / "slow.toml").write_text(to_toml(spec))
    command = [
        sys.executable,
        "-m",
        "diffsmooth.jobs.cli",
        "attack",
        store.uri,
        "--spec",
        str(tmp_path / "slow.toml"),
        "--json",
    ]
    command += ["--eps", "1", "--steps", "1", "--draws", "4", "--n0", "50", "--n", "50", "--refine", "1"]
    command += ["--address", ray_session.address, "--actors", "1", "--batch-size", "16"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    limit = time.monotonic() + 300
    while len(list((tmp_path / "run").glob("attacks/*/samples/[!.]*"))) < 2:
        assert first.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    left = {path: path.read_bytes() for path in (tmp_path / "run").glob("attacks/*/samples/[!.]*")}
    assert 2 <= len(left) < 8
    drivers = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    answers = [json.loads(driver.communicate(timeout=600)[0]) for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    assert answers[0]["samples"] == answers[1]["samples"]
    assert {path: path.read_bytes() for path in left} == left
    plain = load_spec(raw_spec, ["smoothing.n=100"])
    attack, samples = attack_alone(
        plain, make_run(plain, tmp_path / "plain"), eps=[1.0], steps=1, draws=4, n0=50, n=50, refine=1
    )
    columns = ["sample", "distance", "n_y", "n_c", "proven"]
    # the delay gives f another votes_id, and so the attack another noise; what is proven is the same
    expected = table_of(samples, attack)[columns].groupby("sample")["proven"].any()
    found = pd.DataFrame(answers[0]["samples"])[columns].groupby("sample")["proven"].any()
    pd.testing.assert_series_equal(found, expected)


# mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eps", "-1"], "--eps -1 must be above 0 and at most 4, the distance"),
        (["--eps", "0"], "--eps 0 must be above 0"),
        (["--eps", "4.5"], "--eps 4.5 must be above 0 and at most 4"),
        (["--attack", "fgsm"], "--attack fgsm is unknown; choose one of pgd, apgd"),
        (["--attack", "foolbox.attacks.Nothing"], "foolbox has no such attack"),
        (["--attack", "tests.nowhere:attack"], "--attack = 'tests.nowhere:attack'"),
        (["--alpha", "0.7"], "--alpha = 0.7"),
        (["--steps", "0"], "--steps = 0"),
        (["--n", "0"], "--n = 0"),
        (["--samples", "0:99"], "is outside the data set"),
        (["--set", "smoothing.sigma=0.5"], "is not the spec of this run"),
    ],
)
def test_mistakes_are_refused_before_any_draw(raw_spec, tmp_path, options, message):
    (tmp_path / "spec.toml").write_text(to_toml(load_spec(raw_spec)))
    store = make_run(load_spec(raw_spec), tmp_path / "run", samples=2)
    result = CliRunner().invoke(main, ["attack", store.uri, "--spec", str(tmp_path / "spec.toml"), *options])
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "attacks").exists()


def test_a_run_of_no_shipped_spec_needs_one(made):
    result = CliRunner().invoke(main, ["attack", made[1].uri])
    assert result.exit_code == 2
    assert "name its spec with --spec SPEC" in result.output


def test_an_unlabelled_data_set_is_refused():
    with pytest.raises(UserError, match="sample 0 has no label"):
        ds.attack(HalfSpace(), GREY, sigma=0.25)
    with pytest.raises(UserError, match="sigma is missing"):
        ds.attack(HalfSpace(), GREY, LABELS)
    with pytest.raises(UserError, match="--samples = 'x' is not start:stop:step"):
        ds.attack(HalfSpace(), GREY, LABELS, sigma=0.25, samples="x")


def test_an_attack_in_process_uses_the_run_of_its_certificates(tmp_path):
    home = str(tmp_path / "run")
    ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=1000, out=home)
    found = ds.attack(HalfSpace(), GREY, LABELS, sigma=0.25, certified=home, **QUICK)
    assert found.complete
    assert len(read_attacks(open_store(home))) == 1
    assert "4 of 4 samples proven wrong, median upper radius" in repr(found)
    again = ds.attack(HalfSpace(), GREY, LABELS, sigma=0.25, certified=home, **QUICK)
    pd.testing.assert_frame_equal(found.table, again.table)
    with pytest.raises(UserError, match="holds another run"):
        ds.attack(HalfSpace(), GREY, LABELS, sigma=0.5, certified=home, **QUICK)
    with pytest.raises(UserError, match="image 0 or its label is not that of the run"):
        ds.attack(HalfSpace(), GREY.flip(0), LABELS.flip(0), sigma=0.25, certified=home, **QUICK)


def test_another_data_set_than_that_of_the_run_is_refused(made, tmp_path):
    spec, store = made
    place_order(store, order_of(spec, range(3), data_id="0" * 64))
    (tmp_path / "spec.toml").write_text(to_toml(spec))
    result = CliRunner().invoke(main, ["attack", store.uri, "--spec", str(tmp_path / "spec.toml")])
    assert result.exit_code == 2
    assert "the data set differs from that of the run" in result.output


# reading


@pytest.fixture
def shown(made):
    """A run of 8 samples of which the first 4 were attacked."""
    spec, store = made
    attack, _ = attack_alone(spec, store, range(4))
    return spec, store, attack


def test_curve_table_and_picture_show_both_bounds(shown, tmp_path):
    _, store, _ = shown
    runner = CliRunner()
    for form in ("text", "markdown", "latex", "html"):
        result = runner.invoke(main, ["curve", store.uri, "--grid", "0:2:0.4", "--format", form])
        assert result.exit_code == 0, result.output
        assert "not proven wrong by an attack" in result.output
    result = runner.invoke(main, ["curve", store.uri, "--grid", "0:2:0.4", "--format", "csv"])
    rows = pd.read_csv(io.StringIO(result.stdout))
    assert rows["resisted"].tolist()[:2] == [1.0, 1.0]
    assert rows["resisted"].tolist()[-1] == 0.5  # four of the eight were not attacked
    assert (rows["certified_accuracy"] <= rows["resisted"]).all()
    assert runner.invoke(main, ["curve", store.uri, "--plot", str(tmp_path / "a.png")]).exit_code == 0
    # an l2 upper bound is no upper bound in the l-infinity norm of the converted size
    result = runner.invoke(main, ["curve", store.uri, "--unit", "linf", "--pixels", "1,4,4"])
    assert "not proven wrong" not in result.output


def test_report_and_compare_show_the_gap(shown, tmp_path):
    spec, store, attack = shown
    output = tmp_path / "report.html"
    ds.open_run(store.uri).report(str(output), spec=spec)
    text = output.read_text()
    for part in ("attack: nearest", "difference, grey is 0", "upper radius", "4 samples were attacked", attack.id):
        assert part in text
    other = make_run(load_spec({**spec.model_dump(exclude_none=True), "name": "other"}), tmp_path / "other")
    result = CliRunner().invoke(main, ["compare", store.uri, other.uri])
    assert "upper bounds for 4 of 8 samples" in result.output, result.output


def test_a_contradiction_is_loud_and_ends_with_status_1(made, tmp_path, caplog):
    """A certificate that cannot be true: the votes of the run are those of a better classifier."""
    spec, store = made
    attack, samples = attack_alone(spec, store, range(2))
    from diffsmooth.cluster.attacker import encode_sample

    one = samples[0]
    near = [rung._replace(distance=rung.distance / 10) for rung in one.rungs]
    (Path(store.uri) / attack.sample_key(0)).write_bytes(encode_sample(0, one.label, near, one.metadata))
    result = CliRunner().invoke(main, ["curve", store.uri])
    assert "CONTRADICTION" in caplog.text
    assert "the probability that this is chance is at most 0.004" in caplog.text
    (tmp_path / "spec.toml").write_text(to_toml(spec))
    settings = ["--eps", "2", "--eps", "1", "--eps", "0.5", "--steps", "2", "--draws", "8", "--n0", "200", "--n", "400"]
    command = ["attack", store.uri, "--spec", str(tmp_path / "spec.toml"), "--samples", "0:2", *settings]
    result = CliRunner().invoke(main, command)  # nothing is left to do
    assert result.exit_code == 1, result.output
    audited = CliRunner().invoke(main, ["audit", store.uri, "--spec", str(tmp_path / "spec.toml"), "--blocks", "50"])
    assert "says distance" in audited.output


def test_audit_votes_again_at_stored_images(shown, tmp_path):
    spec, store, attack = shown
    (tmp_path / "spec.toml").write_text(to_toml(spec))
    command = ["audit", store.uri, "--spec", str(tmp_path / "spec.toml"), "--blocks", "50"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "4 adversarial images were voted on again, 4 of them with the same votes" in result.output
    from diffsmooth.cluster.attacker import encode_sample
    from diffsmooth.pipeline.votes.run import read_run

    one = read_samples(store, read_run(store), attack, [2])[0]
    forged = [
        rung if rung.judging_K is None else rung._replace(judging_K=rung.judging_K[::-1].copy()) for rung in one.rungs
    ]
    other = [rung._replace(image_CHW=one.rungs[0].image_CHW, distance=rung.distance) for rung in one.rungs]
    for rungs, message in ((forged, "2.parquet: f casts other estimation votes"), (other, "but its image is 0 away")):
        encoded = encode_sample(2, one.label, rungs, one.metadata)
        (Path(store.uri) / attack.sample_key(2)).write_bytes(encoded)
        result = CliRunner().invoke(main, command)
        if rungs is forged and read_samples(store, read_run(store), attack, [2])[0].nearest(attack.alpha) is None:
            continue  # reversed, the votes prove nothing, and nothing is claimed
        assert result.exit_code == 1
        assert message in result.output
