"""The whole pipeline on Ray: exact radii, the same votes for every batch size and actor, kill -9 and resume."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import requests
from click.testing import CliRunner

import diffsmooth.cluster.cast
from benchmarks.driver import bench_driver
from diffsmooth.cluster.cast import Cluster
from diffsmooth.jobs.analyze import Request, analyze
from diffsmooth.jobs.casting import Options, certify_all
from diffsmooth.jobs.cli import main
from diffsmooth.jobs.specs import load_named
from diffsmooth.jobs.watch import Watch
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.results.stored import StoredRun, read_result
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.blocks import list_blocks, read_votes
from tests.models import png, to_toml
from tests.processes import worker_actors

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.usefixtures("ray_session")


def certify(spec, home, *, actors=2, batch_size=16, **options):
    """Certify in this process, on the actors of the test session; returns what `certify --json` prints."""
    how = Options(actors=actors, batch_size=batch_size, quiet=True, **options)
    (certified,) = certify_all([(spec, str(home))], how)
    return certified.to_json()


def status(home):
    return StoredRun.open(str(home)).status().to_json()


def table(home) -> pd.DataFrame:
    return pd.read_parquet(Path(home) / "votes.parquet")


def test_half_space_gets_its_exact_radius(raw_spec, tmp_path):
    """The certified radius is below the true distance to the boundary, and close to it at n = 20,000."""
    raw_spec["smoothing"] |= {"n": 20_000, "block": {"selection": 50, "estimation": 10_000}}
    result = certify(load_spec(raw_spec), tmp_path / "run", batch_size=500)
    rows = pd.read_parquet(tmp_path / "run" / "orders" / "001" / "certificates.parquet")
    assert (rows["status"] == "certified").all()
    assert rows["correct"].all()
    distance = 4 * np.abs(np.where(rows["label"] == 1, 155, 100) / 255 - 0.5)
    assert (rows["radius"] <= distance).all()
    assert (rows["radius"] > 0.9 * distance).all()
    expected = certified_radius(rows["n_A"].to_numpy(), 20_000, 0.001, 0.25)
    assert np.allclose(rows["radius"], expected, atol=1e-15)
    assert result["acr"] == pytest.approx(rows["radius"].mean())


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def test_no_file_of_a_run_and_no_output_shows_the_secrets_of_a_location(tmp_path, monkeypatch, caplog):
    """The weights come from a URI with a password and a signature."""
    caplog.set_level(logging.INFO)  # as --verbose
    monkeypatch.setenv("DIFFSMOOTH_CACHE", str(tmp_path / "cache"))
    run, toml, html = (str(tmp_path / name) for name in ("run", "spec.toml", "report.html"))
    handler = partial(QuietHandler, directory=str(resources.files("diffsmooth.pipeline.embedded")))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        place = f"user:PLANTED@127.0.0.1:{server.server_port}/mnist.safetensors?signature=PLANTED"
        weights = f"classifier.checkpoint='http://{place}#classifier-0.50'"
        Path(toml).write_text(to_toml(load_named("mnist-cohen-0.50", [weights, "smoothing.n=1000"])))
        assert Path(toml).read_text().count("PLANTED") == 2
        outputs = []
        for command in (
            ["certify", toml, "--out", run, "--verbose", "--batch-size", "16", "--set", "data.samples='0:2'"],
            ["report", run, "--spec", toml, "--output", html],
            ["audit", run, "--spec", toml],
            ["status", run],
        ):
            ended = CliRunner().invoke(main, command)
            assert ended.exit_code == 0, ended.output
            outputs.append(ended.output)
        server.shutdown()
    files = [path for path in Path(run).rglob("*") if path.is_file()]
    assert Path(run, "run.json") in files
    for path in (*files, Path(html)):
        assert b"PLANTED" not in path.read_bytes(), path
    assert "PLANTED" not in "".join(outputs) + caplog.text


def test_a_relative_folder_is_relative_to_the_driver(raw_spec, tmp_path, monkeypatch):
    """Ray and its actors were started in another folder."""
    monkeypatch.chdir(tmp_path)
    assert certify(load_spec(raw_spec), "here/run")["complete"]
    assert len(list((tmp_path / "here" / "run" / "votes" / "estimation").iterdir())) == 16


def test_votes_do_not_depend_on_actors_and_batches_and_a_second_call_casts_nothing(raw_spec, tmp_path):
    spec = load_spec(raw_spec)
    result = certify(spec, tmp_path / "a", actors=1, batch_size=7)
    assert result["draws_cast"] == 8 * 250
    again = certify(spec, tmp_path / "a")
    assert "draws_cast" not in again
    certify(spec, tmp_path / "b", actors=3, batch_size=256)
    pd.testing.assert_frame_equal(table(tmp_path / "a"), table(tmp_path / "b"))


def test_predict_and_certify_share_storage_and_votes(raw_spec, tmp_path):
    spec = load_spec(raw_spec)
    predicted = certify(spec, tmp_path / "run", certificate="predict")
    assert (predicted["accuracy"], predicted["abstention_rate"], predicted["draws_cast"]) == (1.0, 0.0, 8 * 200)
    assert not predicted["post_hoc"]
    assert "draws_cast" not in certify(spec, tmp_path / "run", certificate="predict")
    rows = pd.read_parquet(tmp_path / "run" / "orders" / "001" / "certificates.parquet")
    assert rows["status"].eq("predicted").all()
    certified = certify(spec, tmp_path / "run")
    assert (certified["draws_cast"], certified["post_hoc"]) == (8 * 50, True)
    driver = status(tmp_path / "run")["driver"]
    assert (driver["draws_cast"], driver["draws_wanted"], driver["eta_seconds"]) == (8 * 50, 8 * 50, 0)
    certify(spec, tmp_path / "alone")
    pd.testing.assert_frame_equal(table(tmp_path / "run"), table(tmp_path / "alone"))
    log = tmp_path / "predictions.tsv"
    analyze(str(tmp_path / "run"), Request(), export_tsv=str(log), quiet=True)
    assert log.read_text().splitlines()[:2] == ["idx\tlabel\tpredict\tcorrect\ttime", "0\t0\t0\t1\t0:00:00"]
    with pytest.raises(UserError, match="holds predictions, which have no radius"):
        read_result(str(tmp_path / "run"), "001")
    assert read_result(str(tmp_path / "run")).result.curve.acr > 0  # the first order that has radii


@pytest.mark.parametrize(("arch", "warned"), [("half_space", False), ("upside_down", True)])
def test_a_classifier_no_better_than_chance_causes_a_warning(raw_spec, images, tmp_path, caplog, arch, warned):
    rows = pq.read_table(images).to_pylist() * 5  # 40 samples: 8 could be luck
    pq.write_table(pa.Table.from_pylist(rows), images)
    raw_spec["classifier"] = {"arch": f"tests.models:{arch}"}
    certify(load_spec(raw_spec, ["smoothing.n=100"]), tmp_path / "run")
    assert ("gets 0 of 40 clean samples right, not clearly better than chance" in caplog.text) == warned
    assert ("classifier.normalize" in caplog.text) == warned


def test_prometheus_sees_the_draws(raw_spec, tmp_path, ray_session):
    certify(load_spec(raw_spec, ["name=counted"]), tmp_path / "run")
    limit = time.monotonic() + 400
    while True:
        text = requests.get(ray_session.metrics_url, timeout=10).text
        lines = [line for line in text.splitlines() if 'run="counted"' in line]
        draws = [line for line in lines if line.startswith("ray_diffsmooth_draws")]
        if draws and float(draws[0].rpartition(" ")[2]) == 8 * 250:
            break
        assert time.monotonic() < limit, lines
        time.sleep(0.5)
    assert 'device="cpu ' in draws[0]
    assert any(line.startswith("ray_diffsmooth_task_seconds_count") for line in lines)


def test_the_count_moves_while_a_task_runs_and_counts_no_draw_twice(raw_spec, tmp_path, monkeypatch):
    updates, show = [], Watch.updated
    monkeypatch.setattr(Watch, "updated", lambda watch, update: updates.append(update) or show(watch, update))
    for name in ("_TICK", "_PROGRESS_CHECK"):
        monkeypatch.setattr(diffsmooth.cluster.cast, name, 0.05)
    raw_spec["classifier"] = {"arch": "tests.models:slow_half_space"}
    result = certify(load_spec(raw_spec, ["data.samples=0:1", "smoothing.n=1500"]), tmp_path / "run", actors=1)
    draws = [update.draws for update in updates]
    assert {update.in_flight for update in updates} >= {0, 100}
    assert draws == sorted(draws)
    assert all(update.cast == update.draws <= update.draws_wanted == 1550 for update in updates)
    assert (draws[-1], updates[-1].in_flight, result["draws_cast"]) == (1550, 0, 1550)


def test_growing_a_run_casts_only_missing_draws(raw_spec, tmp_path):
    home = tmp_path / "run"
    certify(load_spec(raw_spec, ["data.samples=0:4"]), home)
    before = {path: path.stat().st_mtime_ns for path in (home / "votes").rglob("*.parquet")}
    more_samples = certify(load_spec(raw_spec, ["data.samples=0:6"]), home)
    assert (more_samples["draws_cast"], more_samples["post_hoc"], more_samples["order"]) == (2 * 250, False, "002")
    more_draws = certify(load_spec(raw_spec, ["data.samples=0:6", "smoothing.n=300"]), home)
    assert (more_draws["draws_cast"], more_draws["post_hoc"], more_draws["order"]) == (6 * 100, True, "003")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole = tmp_path / "whole"
    certify(load_spec(raw_spec, ["data.samples=0:6", "smoothing.n=300"]), whole)
    pd.testing.assert_frame_equal(table(home), table(whole))


def test_a_sealed_block_that_is_deleted_is_cast_and_sealed_again(raw_spec, tmp_path):
    roots = [certify(load_spec(raw_spec), tmp_path / "run")["root"]]
    (tmp_path / "run" / "votes" / "estimation" / "3-100.parquet").unlink()
    roots.append(certify(load_spec(raw_spec), tmp_path / "run")["root"])
    assert roots[0] != roots[1] == StoredRun.open(str(tmp_path / "run")).seal().root


def test_a_wrong_program_stops_with_the_first_cause(raw_spec, tmp_path):
    raw_spec["classifier"] = {"arch": "tests.models:not_a_number"}
    with pytest.raises(UserError, match="not finite"):
        certify(load_spec(raw_spec), tmp_path / "nan")
    raw_spec["classifier"] = {"arch": "tests.models:three_classes"}
    with pytest.raises(UserError, match="the classifier has 3 classes, but the data set has 2"):
        certify(load_spec(raw_spec), tmp_path / "three")
    assert not list((tmp_path / "nan" / "votes" / "estimation").glob("1-*"))


def test_a_sample_that_kills_its_worker_is_set_aside_and_the_others_are_certified(raw_spec, images, tmp_path):
    rows = pq.read_table(images).to_pylist()
    rows[3]["image"]["bytes"] = png(np.full((4, 4), 255, np.uint8))
    pq.write_table(pa.Table.from_pylist(rows), images)
    raw_spec["classifier"] = {"arch": "tests.models:deadly"}
    result = certify(load_spec(raw_spec, ["smoothing.sigma=0.05", "smoothing.n=100"]), tmp_path / "run")
    assert (result["complete"], result["samples"], result["incomplete"]) == (False, 7, 1)
    certificates = pd.read_parquet(tmp_path / "run" / "orders" / "001" / "certificates.parquet")
    assert certificates.set_index("sample").status.to_dict() == {
        i: "incomplete" if i == 3 else "certified" for i in range(8)
    }


def test_a_lost_device_costs_one_attempt_and_its_actor_is_restarted(raw_spec, tmp_path, caplog):
    whole = certify(load_spec(raw_spec), tmp_path / "whole")
    raw_spec["classifier"] = {"arch": "tests.models:loses_its_device"}
    result = certify(load_spec(raw_spec), tmp_path / "run", actors=1)
    assert {path.name for path in tmp_path.glob("failed-*")} == {"failed-build", "failed-check", "failed-task"}
    assert (result["complete"], result["draws_cast"]) == (True, whole["draws_cast"])
    lost = r"DeviceLost: cpu on \S+: CUDA error: an illegal memory access was encountered"
    assert len(re.findall(rf"task failed; requeued: {lost}", caplog.text)) == 1
    assert len(re.findall(rf"the clean accuracy is unknown .{lost}", caplog.text)) == 1
    pd.testing.assert_frame_equal(table(tmp_path / "run"), table(tmp_path / "whole"))


def test_actors_that_always_die_end_the_run(raw_spec, tmp_path, monkeypatch):
    monkeypatch.setattr("diffsmooth.cluster.cast._START_ATTEMPTS", 2)
    raw_spec["classifier"] = {"arch": "tests.models:dead_on_arrival"}
    with pytest.raises(RunError, match=r"actors died 2 times in a row .* enough memory"):
        certify(load_spec(raw_spec), tmp_path / "run", actors=1)


def test_a_missing_gpu_is_an_error_not_a_slow_run(raw_spec, tmp_path):
    with pytest.raises(UserError, match=r"sees no GPU .*--set compute.device=cpu"):
        certify(load_spec(raw_spec, ["compute.device=cuda"]), tmp_path / "run", actors=1)


def test_a_wrong_address_is_reported_at_once(raw_spec, tmp_path):
    (tmp_path / "spec.toml").write_text(to_toml(load_spec(raw_spec)))
    command = [
        sys.executable,
        "-m",
        "diffsmooth.jobs.cli",
        "certify",
        str(tmp_path / "spec.toml"),
        "--address",
        "127.0.0.1:9",
    ]
    command += ["--out", str(tmp_path / "run")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("diffsmooth: --address 127.0.0.1:9: no Ray cluster answers there")


@pytest.fixture
def slow(raw_spec, tmp_path, ray_session):
    """A spec that takes about 5 seconds on two actors, the folder of its run, and the command that certifies it."""
    raw_spec["classifier"] = {"arch": "tests.models:slow_half_space"}
    path = tmp_path / "slow.toml"
    spec = load_spec(raw_spec, ["smoothing.n=500"])
    path.write_text(to_toml(spec))
    home = tmp_path / "run"
    options = ["--actors", "2", "--batch-size", "16", "--out", str(home), "--address", ray_session.address]
    return spec, home, [sys.executable, "-m", "diffsmooth.jobs.cli", "certify", str(path), *options]


def undisturbed_votes(raw_spec, home) -> pd.DataFrame:
    """The votes of the same draws without the delay, cast in one go."""
    raw_spec["classifier"] = {"arch": "tests.models:half_space"}
    certify(load_spec(raw_spec, ["smoothing.n=500"]), home)
    return table(home)


def start(command) -> subprocess.Popen:
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_for_blocks(spec, home, number, process) -> None:
    limit = time.monotonic() + 400
    while time.monotonic() < limit:
        assert process.poll() is None, process.stderr.read()
        if home.exists() and len(list_blocks(open_store(str(home)), spec.smoothing.block)) >= number:
            return
        time.sleep(0.05)
    raise AssertionError(f"fewer than {number} blocks after 120 s")


def test_killed_driver_and_actor_then_resumed_equals_undisturbed(slow, raw_spec, tmp_path):
    spec, home, command = slow
    others = set(worker_actors())
    process = start(command)
    wait_for_blocks(spec, home, 8, process)
    (victim, *_) = set(worker_actors()) - others
    os.kill(victim, signal.SIGKILL)
    wait_for_blocks(spec, home, 24, process)
    process.kill()
    process.wait()
    left = list_blocks(open_store(str(home)), spec.smoothing.block)
    assert 24 <= len(left) < 8 * 6
    result = certify(spec, home)
    assert result["complete"]
    # at most, because the actors of the killed driver live a moment longer and may store more
    assert 0 < result["draws_cast"] <= 8 * 550 - sum(block.draws for block in left)
    pd.testing.assert_frame_equal(table(home), undisturbed_votes(raw_spec, tmp_path / "undisturbed"))
    pd.testing.assert_frame_equal(read_votes(str(home)), table(home), check_dtype=False)


def test_two_drivers_at_once_lose_no_votes_and_count_none_twice(slow, raw_spec, tmp_path):
    _, home, command = slow
    drivers = [subprocess.Popen([*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = [json.loads(driver.communicate(timeout=800)[0])[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0]
    assert all(result["complete"] and result["order"] == "001" for result in results)
    assert sum(result["draws_cast"] for result in results) == 8 * 550  # every block was stored by exactly one of them
    pd.testing.assert_frame_equal(table(home), undisturbed_votes(raw_spec, tmp_path / "undisturbed"))


@pytest.mark.parametrize(
    ("number", "status", "own_ray"), [(signal.SIGTERM, 143, False), (signal.SIGINT, 130, True)], ids=["TERM", "INT"]
)
def test_stop_signals_end_gracefully(slow, number, status, own_ray):
    """On a cluster, and on a Ray that the command itself starts and ends."""
    spec, home, command = slow
    process = start(command[:-2] if own_ray else command)
    wait_for_blocks(spec, home, 4, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=800)
    assert process.returncode == status, errors
    assert "stopping; finishing the work in progress" in errors
    assert "stopped; run the same command to resume" in errors
    assert "Traceback" not in errors
    blocks = list_blocks(open_store(str(home)), spec.smoothing.block)
    assert 4 <= len(blocks) < 8 * 6
    assert all(isinstance(block, Block) for block in blocks)
    assert read_votes(str(home)).votes.sum() == sum(block.draws for block in blocks)


def test_bench_counts_every_task():
    cost = bench_driver(20)
    assert cost.draws == 210  # one block of selection, twenty of estimation; a straggler's copy counts once
    assert cost.tasks >= 21
    assert 0 < cost.driver_ms_per_task < 1000 * cost.seconds


def test_actors_are_placed_on_the_named_accelerators_only(raw_spec, tmp_path, ray_session, caplog):
    """The node of the session says that it has four H100."""
    raw_spec["compute"]["device"] = "auto"
    spec = load_spec(raw_spec, ["data.samples=0:2"])
    on_h100 = certify(spec, tmp_path / "h100", actors=1, accelerators=("A100", "H100"), memory_gb=0.5)
    assert on_h100["complete"]
    with Cluster(address=ray_session.address, device="auto", actors=1, accelerators=["A100"]) as elsewhere:
        assert "--accelerator A100: no node has such a GPU yet (accelerators at" in caplog.text
        actor = elsewhere.add_actor()
        ready, _ = ray.wait([actor.handle.progress.remote()], timeout=5)
        assert not ready


@pytest.mark.parametrize(
    ("device", "needs", "message"),
    [
        ("cpu", {"accelerators": ["H100"]}, "--accelerator H100 needs a GPU, but compute.device = 'cpu'"),
        ("auto", {"accelerators": ["a b"]}, "--accelerator a b: not the name of a GPU type"),
        ("auto", {"accelerators": ["A100"]}, "A100: no node has such a GPU .this machine has H100.; omit the option"),
        (
            "auto",
            {"actors": 5},
            "--actors 5: each actor needs a GPU of its own, and this machine has 4; use",
        ),
        ("auto", {"memory_gb": 1e6}, r"--memory 1e\+06: a node has at most [0-9.]+ GB for actors"),
    ],
)
def test_needs_that_this_machine_cannot_meet_are_refused(device, needs, message):
    with pytest.raises(UserError, match=message):
        Cluster(address="local", device=device, **({"actors": 1} | needs))
