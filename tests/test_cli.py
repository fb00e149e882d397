"""The command line's mistakes: one clear line, the right exit status, before anything is launched."""

import errno
import json
import os
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import SPECS, main
from pipeline.spec import load_spec


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """None of these may get as far as a cluster."""
    import cluster.driver

    def fail(*_, **__):
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(cluster.driver, "Cluster", fail)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(status: int, *arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("diffsmooth: ")
    return lines[0]


def test_every_shipped_spec_loads_and_has_its_file_name():
    paths = sorted(SPECS.glob("*.toml"))
    assert len(paths) >= 10
    for path in paths:
        assert load_spec(path).name == path.stem
        assert tomllib.loads(path.read_text())["name"] == path.stem


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("smoothing.sgima=1", ["smoothing.sgima", "nearest valid key is smoothing.sigma"]),
        ("smoothing.sigma='x'", ["smoothing.sigma = 'x'", "valid number"]),
        ("denoiser.unet.schedule=linear smoothing.sigma=99", ["sigma = 99", "1000 steps", "at most"]),
        ("denoiser.checkpoint='none.pt'", ["none.pt", "no such file"]),
        ("classifier.arch='resnet'", ["classifier.arch = 'resnet'", "mnist_cnn", "package.module:function"]),
        ("classifier.arch='nowhere:f'", ["nowhere:f", "import"]),
        ("data.name='mnits'", ["data.name = 'mnits'", "mnist"]),
        ("data.samples='0:2000'", ["0:2000", "0 to 999"]),
        ("data.path='none.parquet'", ["none.parquet", "no such file"]),
        ("smoothing.n=1500", ["n = 1500", "1000 or 2000"]),
    ],
)
def test_bad_specs_end_with_status_2(tmp_path, change, words):
    line = refused(2, "certify", "mnist", "--out", tmp_path / "run", *(f"--set={one}" for one in change.split()))
    for word in words:
        assert word in line
    assert not (tmp_path / "run").exists()


def test_unknown_spec_names_the_shipped_ones():
    assert "mnist-cohen-0.50" in refused(2, "certify", "mnsit")


def test_run_of_another_spec_is_refused_and_kept(tmp_path, monkeypatch):
    home = tmp_path / "run"
    with pytest.raises(AssertionError, match="a cluster was started"):
        CliRunner().invoke(main, ["certify", "mnist", "--out", str(home)], catch_exceptions=False)
    before = (home / "run.json").read_bytes()
    line = refused(2, "certify", "mnist", "--out", home, "--set", "smoothing.sigma=1.0")
    assert "smoothing.sigma is 0.5 there, 1.0 here" in line
    assert (home / "run.json").read_bytes() == before
    assert "orders/002" not in {path.name for path in (home / "orders").iterdir()}


def test_too_small_n_is_warned_of(tmp_path, caplog):
    changes = ["--set", "smoothing.block.estimation=5", "--set", "smoothing.n=5"]
    with pytest.raises(AssertionError, match="a cluster was started"):
        CliRunner().invoke(main, ["certify", "mnist", "--out", str(tmp_path / "run"), *changes], catch_exceptions=False)
    assert "n = 5 can certify nothing at alpha = 0.001" in caplog.text
    assert "at least 10" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    line = refused(1, "certify", "mnist", "--out", tmp_path / "run")
    assert "cannot write" in line


def test_full_disk_is_said_and_loses_nothing(stored, monkeypatch):
    before = {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()}

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = refused(1, "analyze", stored, "--alpha", "0.01")
    assert "No space left on device" in line
    assert "free some space" in line
    assert {path: path.read_bytes() for path in stored.rglob("*") if path.is_file()} == before


def test_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    assert "cannot write" in refused(1, "certify", "mnist", "--out", tmp_path / "run")


@pytest.mark.parametrize("verb", ["status", "analyze", "curve"])
def test_no_run_there(tmp_path, verb):
    assert "no run there" in refused(2, verb, tmp_path)


def test_damaged_run_json(tmp_path):
    (tmp_path / "run.json").write_text("{")
    assert "run.json is damaged" in refused(1, "status", tmp_path)


@pytest.fixture
def stored(tmp_path) -> Path:
    """A small complete run, cast without a cluster."""
    from cluster.worker import Setup, Worker
    from pipeline.data import open_dataset
    from pipeline.sampling import blocks_of, order_of, place_order
    from pipeline.smoothing import weights_ids
    from pipeline.store import open_store
    from pipeline.votes import claim_run, run_of

    changes = ["data.samples=0:3", "compute.device=cpu", "smoothing.block.estimation=100", "smoothing.n=200"]
    spec = load_spec(SPECS / "mnist-cohen-0.50.toml", changes)
    store = open_store(str(tmp_path / "run"))
    described = run_of(spec, weights_ids(spec), 10)
    claim_run(store, described)
    order = order_of(spec, range(3))
    place_order(store, order)
    Worker(Setup(spec, store.uri, described["votes_id"])).run(list(blocks_of(order, spec.smoothing.block)), "attempt")
    assert len(open_dataset(spec.data)) == 1000
    return tmp_path / "run"


def test_a_complete_run_needs_no_cluster(stored):
    arguments = ["certify", "mnist-cohen-0.50", "--cpu", "--json", "--out", str(stored), "--set", "data.samples=0:3",
                 "--set", "smoothing.block.estimation=100", "--set", "smoothing.n=200"]  # fmt: skip
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    (answer,) = json.loads(result.stdout)
    assert (answer["complete"], answer["samples"], answer["order"], answer["post_hoc"]) == (True, 3, "001", False)
    folder = stored / "orders" / "001"
    assert {path.name for path in folder.iterdir()} == {"certificates.parquet", "curve.csv", "curve.png"}
    assert (stored / "votes.parquet").exists()


def test_analyze_and_its_mistakes(stored):
    result = run("analyze", stored, "--n", "100", "--alpha", "0.01", "--json")
    answer = json.loads(result.stdout)
    assert (answer["order"], answer["post_hoc"], answer["n"], answer["alpha"]) == ("002", True, 100, 0.01)
    assert run("analyze", stored, "--n", "100", "--alpha", "0.01", "--json").stdout == result.stdout
    assert "n 300" in (line := refused(2, "analyze", stored, "--n", "300"))
    assert "is 200" in line
    assert "take 100 or 200" in refused(2, "analyze", stored, "--n", "150")
    assert "between 0 and 0.5" in refused(2, "analyze", stored, "--alpha", "2")


def test_status_and_curve(stored, tmp_path):
    facts = json.loads(run("status", stored, "--json").stdout)
    assert facts["draws"] == 3 * 300
    assert facts["orders"]["001"]["draws_missing"] == 0
    assert "3 of 3 samples" in run("status", stored).output
    picture = tmp_path / "a.svg"
    result = run("curve", stored, stored, "--plot", picture)
    assert result.exit_code == 0, result.output
    assert picture.exists()
    assert ".png, .pdf or .svg" in refused(2, "curve", stored, "--plot", tmp_path / "a.gif")
    assert "choose another place" in refused(2, "curve", stored, "--plot", tmp_path / "nowhere" / "a.png")
    assert "no order '007'" in refused(2, "curve", stored, "--order", "007")


def test_truncated_block_is_named_and_the_rest_is_kept(stored):
    victim = stored / "votes" / "estimation" / "1-100.parquet"
    victim.write_bytes(victim.read_bytes()[:100])
    others = len(list((stored / "votes").rglob("*.parquet")))
    line = refused(1, "analyze", stored)
    assert "1-100.parquet is damaged" in line
    assert "delete it" in line
    assert len(list((stored / "votes").rglob("*.parquet"))) == others


def test_missing_block_is_said_by_status(stored):
    shutil.move(stored / "votes" / "estimation" / "1-100.parquet", stored.parent)
    facts = json.loads(run("status", stored, "--json").stdout)["orders"]["001"]
    assert (facts["draws_missing"], facts["incomplete"], facts["samples"]) == (100, 1, 2)
    assert "the most that stands for every sample is 100" in refused(2, "analyze", stored)
