"""Attacks: gradients, exact radii, proofs, storage, resume, and mistakes."""

import importlib.metadata
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
from torch import nn

import diffsmooth as ds
from cluster.attacker import Attacker, block_of
from cluster.worker import Setup
from jobs.attack import Options, Request, attack_run
from jobs.cli import main
from pipeline.attacks import (
    Attack,
    AttackedSample,
    Rung,
    attacked,
    claim_attack,
    expected_margin,
    judging_order,
    prove,
    read_attacks,
    read_samples,
    rival,
    table_of,
)
from pipeline.data import open_dataset
from pipeline.errors import RunError, UserError
from pipeline.foreign import attack_code
from pipeline.gap import Attacks, gap_of, robustness
from pipeline.images import Sample
from pipeline.noise import Noise
from pipeline.search import ATTACKS, Problem, smoothed_gradient
from pipeline.smoothing import BaseClassifier, build_base_classifier
from pipeline.spec import load_spec
from pipeline.storage.store import open_store
from tests.models import make_run, to_toml

ROOT = Path(__file__).parent.parent
VALUES = torch.tensor([85.0, 95.0, 160.0, 165.0]) / 255
GREY = VALUES[:, None, None, None].expand(4, 1, 4, 4)
LABELS = torch.tensor([0, 0, 1, 1])
DISTANCE = 4 * np.abs(VALUES.numpy() - 0.5)  # the exact radius of the half-space
QUICK = {"steps": 2, "draws": 8, "n0": 200, "n": 400}


class HalfSpace(nn.Module):
    def forward(self, x_BCHW):
        margin_B = 1e3 * (x_BCHW.mean(dim=(1, 2, 3)) - 0.5)
        return torch.stack([-margin_B, margin_B], dim=1)


def network(channels: int = 1) -> nn.Module:
    """A small smooth network with three classes, float64."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(4 * 25, 3))
    return layers.double().requires_grad_(False)


def smooth_f(m: int = 2, denoiser=lambda x_BCHW, sigma: x_BCHW.sigmoid()) -> BaseClassifier:
    random = np.random.Generator(np.random.Philox(1))
    return BaseClassifier(
        denoiser=denoiser,
        classifier=network(),
        local_noise_MCHW=torch.from_numpy(random.normal(size=(m, 1, 5, 5))),
        sigma=0.5,
        num_classes=3,
    )


def inputs(draws: int = 6):
    random = np.random.Generator(np.random.Philox(2))
    return torch.from_numpy(random.random((1, 5, 5))), torch.from_numpy(random.normal(size=(draws, 1, 5, 5)) / 2)


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_the_gradient_of_the_smoothed_loss_equals_finite_differences(batch):
    """Through denoiser, local copies and classifier, in float64, however the draws are batched."""
    f, (x_CHW, noise_NCHW) = smooth_f(), inputs()
    found = smoothed_gradient(f, x_CHW, noise_NCHW, 1, batch)

    def loss(at_CHW):
        p_K = f.differentiable_log_scores(f.differentiable_denoise(at_CHW + noise_NCHW)).exp().mean(dim=0)
        return float(torch.log1p(-p_K[1]) - torch.log(p_K[1]))

    expected = torch.zeros_like(x_CHW).flatten()
    for pixel in range(25):
        step = torch.zeros(25, dtype=torch.float64)
        step[pixel] = 1e-5
        step = step.reshape(1, 5, 5)
        expected[pixel] = (loss(x_CHW + step) - loss(x_CHW - step)) / 2e-5
    assert found.loss == pytest.approx(loss(x_CHW), abs=1e-12)
    torch.testing.assert_close(found.direction_CHW.flatten(), expected, rtol=1e-6, atol=1e-9)


def test_the_direction_is_that_of_smoothadv():
    """The gradient of -log of the mean softmax, normalised."""
    f, (x_CHW, noise_NCHW) = smooth_f(), inputs()
    x = x_CHW.clone().requires_grad_()
    p_K = f.differentiable_log_scores(f.differentiable_denoise(x + noise_NCHW)).exp().mean(dim=0)
    (expected,) = torch.autograd.grad(-p_K[1].log(), x)
    found = smoothed_gradient(f, x_CHW, noise_NCHW, 1, 6).direction_CHW
    torch.testing.assert_close(found / found.norm(), expected / expected.norm())


def test_a_confident_f_keeps_its_gradient():
    """All float32 scores are 0 or 1, so the gradient of -log p_y is 0, but that of the log odds is not."""
    f = BaseClassifier(
        denoiser=None, classifier=HalfSpace(), local_noise_MCHW=torch.zeros(1, 1, 4, 4), sigma=0.1, num_classes=2
    )
    noise_NCHW = torch.zeros(2, 1, 4, 4)
    assert set(f(GREY[:1] + noise_NCHW).flatten().tolist()) == {0.0, 1.0}
    for values in (GREY[0], torch.zeros(1, 4, 4), torch.ones(1, 4, 4)):  # the last is wrong beyond any doubt
        assert float(smoothed_gradient(f, values, noise_NCHW, 0, 2).direction_CHW.min()) > 0


def test_the_exact_radius_lies_between_certificate_and_attack():
    """Half-space: lower <= exact < upper for every sample, and the upper bound within 3 %."""
    result = ds.certify(HalfSpace(), GREY, LABELS, sigma=0.25, n=20_000, batch_size=500)
    found = ds.attack(
        HalfSpace(), GREY, LABELS, sigma=0.25, certified=result, steps=2, draws=8, n0=8_000, n=32_000, refine=7,
        batch_size=500,
    )  # fmt: skip
    table = found.gap.table
    assert (table["lower"] <= DISTANCE).all()
    assert (table["upper"] > DISTANCE).all()
    assert (table["upper"] < 1.03 * DISTANCE).all()
    assert found.gap.contradictions == []
    for sample in range(4):
        moved = np.linalg.norm(found.image(sample).astype(float) - GREY[sample].numpy())
        assert moved == pytest.approx(found.uppers[sample], rel=1e-6)


def run_search(name, f, sample, **settings):
    """The images that an attack finds at one eps, without votes."""
    attack = Attack(attack=name, eps=[1.0], votes_id="0" * 32, **settings)
    problem = Problem(f, sample, 0, attack, Noise(0, f._sigma), 16)
    return ATTACKS[name](problem, problem.x_CHW, 1.0)


@pytest.mark.parametrize("name", ["pgd", "apgd", "diffhammer", "votes"])
def test_attacks_beat_a_random_direction_by_far(name):
    """By the smoothed loss at the same distance, over fresh draws; the network is that of the embedded model."""
    spec = load_spec(ROOT / "jobs" / "specs" / "mnist-dds-0.50.toml", ["compute.device=cpu"])
    data, f = open_dataset(spec.data), build_base_classifier(spec, "cpu")
    noise_NCHW = torch.from_numpy(np.random.Generator(np.random.Philox(9)).normal(size=(64, 1, 28, 28)) * 0.5).float()
    gains = {}
    for attack in (name, "random"):
        gains[attack] = []
        for index in (1, 2, 3):
            sample = data[index]
            x_CHW = run_search(attack, f, sample, steps=6, draws=64 if attack == "votes" else 16)
            assert float((x_CHW - torch.from_numpy(sample.image_CHW)).norm()) <= 1.0 + 1e-5
            loss = smoothed_gradient(f, x_CHW, noise_NCHW, sample.label, 64).loss
            clean = smoothed_gradient(f, torch.from_numpy(sample.image_CHW), noise_NCHW, sample.label, 64).loss
            gains[attack].append(loss - clean)
    assert np.mean(gains[name]) > (2.5 if name == "votes" else 5) * np.mean(np.abs(gains["random"]))


def test_an_image_is_at_its_distance_and_inside_the_box():
    f = smooth_f()
    random = np.random.Generator(np.random.Philox(5))
    sample = Sample(random.choice([0.0, 0.5, 1.0], size=(1, 5, 5)).astype(np.float32), 1, "s")
    problem = Problem(f, sample, 0, Attack(attack="pgd", eps=[1.0], votes_id="0" * 32), Noise(0, 0.5), 8)
    for eps in (0.01, 0.5, 1.5):
        image = problem.at_distance(torch.from_numpy(random.normal(size=(1, 5, 5))).float(), eps)
        assert 0 <= float(image.min()) <= float(image.max()) <= 1
        assert float((image - problem.x_CHW).norm()) == pytest.approx(eps, rel=1e-3)
    far = problem.at_distance(torch.ones(1, 5, 5), 100.0)
    assert float((far - problem.x_CHW).norm()) < 5  # the corner of the box


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


@pytest.fixture
def made(raw_spec, tmp_path):
    """A run of the half-space on 8 images, and its spec."""
    spec = load_spec(raw_spec)
    return spec, make_run(spec, tmp_path / "run")


def attack_alone(spec, store, samples=range(8), **settings):
    """Attack with one worker, without Ray."""
    from pipeline.run import read_run

    run = read_run(store)
    attack = Attack(votes_id=run.votes_id, **{"attack": "pgd", "eps": [2.0, 1.0, 0.5], **QUICK, **settings})
    claim_attack(store, attack)
    worker = Attacker.load(Setup(spec, store.uri, run.votes_id, 16, attack=attack))
    worker.run([block_of(sample, attack) for sample in samples], "0")
    return attack, read_samples(store, run, attack)


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
    from pipeline.run import read_run

    with pytest.raises(RunError, match=rf"samples/0.parquet {message}"):
        read_samples(store, read_run(store), attack)


def test_votes_that_do_not_add_up_are_refused(made):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.run import read_run

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
    request = Request(eps=(2.0, 1.0), samples="0:4", **QUICK)
    found = attack_run(store.uri, spec, request, Options(actors=2, batch_size=16, quiet=True))
    assert found.complete
    assert found.gap.contradictions == []
    assert len(found.gap.table) == 4
    files = {path: path.stat().st_mtime_ns for path in (Path(store.uri) / "attacks").rglob("samples/*.parquet")}
    more = attack_run(store.uri, spec, Request(eps=(1.0, 2.0), **QUICK), Options(quiet=True))
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
        attack_run(store.uri, spec, Request(samples="0:2", **QUICK), Options(quiet=True))


def test_killed_and_started_twice_equals_undisturbed(raw_spec, tmp_path, ray_session):
    """kill -9 of one driver, then two drivers at once."""
    raw_spec["classifier"] = {"arch": "tests.models:slow_half_space"}
    spec = load_spec(raw_spec, ["smoothing.n=100"])
    raw_spec["classifier"] = {"arch": "tests.models:half_space"}
    store = make_run(spec, tmp_path / "run")
    (tmp_path / "slow.toml").write_text(to_toml(spec))
    command = [sys.executable, "-m", "jobs.cli", "attack", store.uri, "--spec", str(tmp_path / "slow.toml"), "--json"]
    command += ["--eps", "1", "--steps", "1", "--draws", "4", "--n0", "50", "--n", "50", "--refine", "1"]
    command += ["--address", ray_session.address, "--actors", "1", "--batch-size", "16"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    limit = time.monotonic() + 300
    while len(list((tmp_path / "run").glob("attacks/*/samples/*"))) < 2:
        assert first.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    left = {path: path.read_bytes() for path in (tmp_path / "run").glob("attacks/*/samples/*")}
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
    from cluster.attacker import encode_sample

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
    from cluster.attacker import encode_sample
    from pipeline.run import read_run

    one = read_samples(store, read_run(store), attack, [2])[0]
    forged = [
        rung if rung.judging_K is None else rung._replace(judging_K=rung.judging_K[::-1].copy()) for rung in one.rungs
    ]
    other = [rung._replace(image_CHW=one.rungs[0].image_CHW, distance=rung.distance) for rung in one.rungs]
    for rungs, message in ((forged, "2.parquet holds other estimation votes"), (other, "but its image is 0 away")):
        encoded = encode_sample(2, one.label, rungs, one.metadata)
        (Path(store.uri) / attack.sample_key(2)).write_bytes(encoded)
        result = CliRunner().invoke(main, command)
        if rungs is forged and read_samples(store, read_run(store), attack, [2])[0].nearest(attack.alpha) is None:
            continue  # reversed, the votes prove nothing, and nothing is claimed
        assert result.exit_code == 1
        assert message in result.output


# attacks of others


def along_grey(model, x_CHW, label, eps):
    """An own attack: all pixels up or down, whichever the model likes less."""
    sign = 1.0 if label == 0 else -1.0
    assert model(x_CHW[None]).shape == (1, 2)
    return (x_CHW + sign * eps / x_CHW.numel() ** 0.5).clamp(0, 1)


def returns_text(model, x_CHW, label, eps):
    return "image"


def raises(model, x_CHW, label, eps):
    raise KeyError("oops")


@pytest.mark.parametrize("name", ["foolbox.attacks.L2PGD", "foolbox.attacks.L2DeepFoolAttack"])
def test_attacks_of_foolbox_are_proven_like_ours(made, name):
    spec, store = made
    code = {"foolbox": importlib.metadata.version("foolbox")}
    before = torch.random.get_rng_state()
    attack, samples = attack_alone(spec, store, range(2), attack=name, code=code, steps=4)
    assert torch.equal(before, torch.random.get_rng_state())  # its global randomness is a stream of its own
    exact = 4 * (0.5 - 100 / 255)
    assert all(exact < one.upper(attack.alpha) <= 2.0 for one in samples)


def test_hop_skip_jump_attacks_a_function_without_gradients(raw_spec, tmp_path):
    raw_spec["classifier"] = {"arch": "tests.models:rounded_half_space"}
    spec = load_spec(raw_spec)
    store = make_run(spec, tmp_path / "run", samples=1)
    name = "foolbox.attacks.HopSkipJumpAttack"
    code = {"foolbox": importlib.metadata.version("foolbox")}
    attack, (one,) = attack_alone(spec, store, range(1), attack=name, code=code, steps=3, draws=32)
    assert math.isfinite(one.upper(attack.alpha))


def test_an_own_attack(made):
    spec, store = made
    name = "tests.test_attack:along_grey"
    attack, samples = attack_alone(spec, store, range(2), attack=name, code=attack_code(name))
    assert attack.id.startswith("along_grey-")
    assert all(one.upper(attack.alpha) < 0.6 for one in samples)
    for name, message in (
        ("tests.test_attack:returns_text", "returned str; it must return an image"),
        ("tests.test_attack:raises", "raised KeyError: 'oops'; correct it"),
    ):
        with pytest.raises(UserError, match=message):
            attack_alone(spec, store, range(1), attack=name, code=attack_code(name))


def test_an_attack_with_other_code_is_refused(made):
    spec, store = made
    with pytest.raises(UserError, match="has other code here"):
        attack_alone(spec, store, range(1), attack="tests.test_attack:along_grey", code={"source": "0"})
