"""Mistakes on the command line: one clear line and the right exit status, before anything is started."""

import errno
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from diffsmooth.jobs.cli import COMMANDS, main
from diffsmooth.jobs.specs import SPECS, load_named
from diffsmooth.pipeline.show.tables import ENVELOPE
from diffsmooth.pipeline.spec import load_spec
from tests.models import make_run, to_toml


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """None of these commands may start a cluster."""
    import diffsmooth.jobs.watch

    def fail(*_, **__):
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(diffsmooth.jobs.watch, "Cluster", fail)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(status: int, *arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == status, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("diffsmooth: ")
    return lines[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_leaves_nothing_behind(raw_spec, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # another test of this process may have started one
    path, home = tmp_path / "spec.toml", tmp_path / "run"
    path.write_text(to_toml(load_spec(raw_spec)))
    for command in (("certify", path), ("train", "fashion-classifier-0.50", "--workers", "1")):
        line = refused(2, *command, "--out", home, "--set", "compute.device=cuda")
        assert "sees no GPU" in line
        assert "--set compute.device=cpu" in line
        assert not home.exists()


def test_every_shipped_spec_loads_by_its_name():
    assert len(SPECS.names()) >= 10
    for name in SPECS.names():
        assert load_named(name).name == name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("smoothing.sgima=1", ["smoothing.sgima", "nearest valid key is smoothing.sigma"]),
        ("smoothing.sigma='x'", ["smoothing.sigma = 'x'", "valid number"]),
        ("denoiser.unet.schedule=linear smoothing.sigma=99", ["sigma = 99", "1000 steps", "use at most 78.703"]),
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
    assert "mnist-cohen-0.50, " in refused(2, "certify", "nowhere")
    assert refused(2, "certify", "fashon").endswith("shipped name: fashion")
    assert refused(2, "certify", "folder/no.toml").endswith("or the name of a shipped spec")
    assert "is a training; use diffsmooth train" in refused(2, "certify", "fashion-denoiser")


def test_audit_does_not_ignore_options_that_need_the_spec(stored):
    for option in (("--blocks", "3"), ("--set", "data.path=a")):
        assert f"{' '.join(option)} needs the spec of the run" in refused(2, "audit", stored, *option)
    assert run("audit", stored, "--blocks", "0").exit_code == 0


def test_run_of_another_spec_is_refused_and_kept(tmp_path, monkeypatch):
    home = tmp_path / "run"
    with pytest.raises(AssertionError, match="a cluster was started"):
        CliRunner().invoke(main, ["certify", "mnist", "--out", str(home)], catch_exceptions=False)
    before = (home / "run.json").read_bytes()
    line = refused(2, "certify", "mnist", "--out", home, "--set", "smoothing.sigma=1.0")
    assert "smoothing.sigma is 0.5 there and 1.0 here" in line
    assert (home / "run.json").read_bytes() == before
    assert "orders/002" not in {path.name for path in (home / "orders").iterdir()}


def test_too_small_n_causes_a_warning(tmp_path, caplog):
    changes = ["--set", "smoothing.block.estimation=5", "--set", "smoothing.n=5"]
    with pytest.raises(AssertionError, match="a cluster was started"):
        CliRunner().invoke(main, ["certify", "mnist", "--out", str(tmp_path / "run"), *changes], catch_exceptions=False)
    assert "n = 5 is too small to certify even a unanimous vote at alpha = 0.001; use n >= 10" in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    line = refused(1, "certify", "mnist", "--out", tmp_path / "run")
    assert "cannot write" in line


def test_a_full_disk_is_reported_and_loses_nothing(stored, monkeypatch):
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
    assert "part of the path is a file" in refused(2, "certify", "mnist", "--out", tmp_path / "run")


@pytest.mark.parametrize("verb", ["status", "analyze", "curve"])
def test_a_folder_without_a_run_is_refused(tmp_path, verb):
    assert "no run here" in refused(2, verb, tmp_path)


def test_damaged_run_json(tmp_path):
    (tmp_path / "run.json").write_text("{")
    assert "run.json is damaged" in refused(1, "status", tmp_path)


@pytest.fixture
def stored(tmp_path) -> Path:
    """A small complete run, cast without a cluster."""
    changes = ["data.samples=0:3", "compute.device=cpu", "smoothing.block.estimation=100", "smoothing.n=200"]
    spec = load_named("mnist-cohen-0.50", changes)
    make_run(spec, tmp_path / "run", samples=3)
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
    assert "exceeds the 200 draws that every sample has" in line
    assert "use 100 or 200" in refused(2, "analyze", stored, "--n", "150")
    assert "above 0 and below 0.5" in refused(2, "analyze", stored, "--alpha", "2")


def test_status_and_curve(stored, tmp_path):
    facts = json.loads(run("status", stored, "--json").stdout)
    assert facts["draws"] == 3 * 300
    assert facts["orders"]["001"]["draws_missing"] == 0
    assert "3 of 3 samples" in run("status", stored).output
    picture = tmp_path / "a.svg"
    before = sorted(tmp_path.iterdir())
    assert run("curve", stored).exit_code == 0
    assert sorted(tmp_path.iterdir()) == before  # no picture unless it is asked for
    result = run("curve", stored, f"again={stored}", "--plot", picture)
    assert result.exit_code == 0, result.output
    assert "again" in result.stdout
    assert picture.exists()
    assert ".png, .pdf or .svg" in refused(2, "curve", stored, "--plot", tmp_path / "a.gif")
    assert "cannot write it: No such file" in refused(2, "curve", stored, "--plot", tmp_path / "nowhere" / "a.png")
    assert "no order '007'" in refused(2, "curve", stored, "--order", "007")


def test_a_truncated_block_is_named_and_the_others_are_kept(stored):
    victim = stored / "votes" / "estimation" / "1-100.parquet"
    victim.write_bytes(victim.read_bytes()[:100])
    others = len(list((stored / "votes").rglob("*.parquet")))
    line = refused(1, "analyze", stored)
    assert "1-100.parquet is damaged" in line
    assert "delete it" in line
    assert len(list((stored / "votes").rglob("*.parquet"))) == others


def test_status_reports_a_missing_block(stored):
    shutil.move(stored / "votes" / "estimation" / "1-100.parquet", stored.parent)
    facts = json.loads(run("status", stored, "--json").stdout)["orders"]["001"]
    assert (facts["draws_missing"], facts["incomplete"], facts["samples"]) == (100, 1, 2)
    assert "exceeds the 100 draws that every sample has; use at most that" in refused(2, "analyze", stored)


def test_runs_that_are_not_comparable_are_shown_with_a_line_that_says_so(stored, caplog):
    shutil.copytree(stored, stored.parent / "copy")
    assert run("analyze", stored.parent / "copy", "--n", "100").exit_code == 0
    assert run("curve", stored, f"again={stored.parent / 'copy'}", "--order", "001").exit_code == 0
    assert "certify the same f on the same samples" in caplog.text
    assert "differ in n" not in caplog.text
    (stored.parent / "copy" / "orders" / "001.json").unlink()
    assert run("curve", stored, f"again={stored.parent / 'copy'}").exit_code == 0
    assert "these curves also differ in n (100, 200)" in caplog.text


LOG = "idx\tlabel\tpredict\tradius\tcorrect\ttime\n0\t3\t3\t{}\t1\t17.5\n20\t7\t5\t0.413\t0\t17.5\n"


def log(path: Path, radius: str = "0.35") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(LOG.format(radius))
    return path


def table_of(*arguments: str) -> pd.DataFrame:
    result = run("curve", *arguments, "--format", "csv")
    assert result.exit_code == 0, result.output
    return pd.read_csv(io.StringIO(result.stdout), dtype={"radius": str}).astype({"radius": float})  # to the last bit


def test_a_run_and_logs_side_by_side(stored, tmp_path):
    logs = [log(tmp_path / f"noise_{sigma}" / "test" / "sigma_0.50", f"{sigma}") for sigma in (0.25, 0.5)]
    sources = [stored, f"{logs[0]}@0.25", f"{logs[1]}", f"Cohen={logs[1]}@0.5"]
    grid = ("--grid", "0:0.5:0.25", "--envelope")
    table = table_of(*sources, *grid)
    assert table["run"].unique().tolist() == [
        "mnist-cohen-0.50", "noise_0.25/test/sigma_0.50", "noise_0.5/test/sigma_0.50", "Cohen", ENVELOPE
    ]  # fmt: skip
    by_run = {name: rows["certified_accuracy"].tolist() for name, rows in table.groupby("run")}
    assert by_run["noise_0.25/test/sigma_0.50"] == [0.5, 0.5, 0]
    assert by_run["Cohen"] == [0.5, 0.5, 0.5]
    envelope = by_run.pop(ENVELOPE)
    assert envelope == [max(values) for values in zip(*by_run.values(), strict=True)]
    output, picture = tmp_path / "a.tex", tmp_path / "a.PNG"
    result = run("curve", *sources, *grid, "--format", "latex", "--output", output, "--plot", picture)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "mnist-cohen-0.50 & " in output.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_grids(tmp_path):
    """A radius of 0.35 reaches 70 steps of 0.005 in decimals, and not in the floats of published tables."""
    path = log(tmp_path / "a.tsv")
    exact, published = (table_of(path, "--grid", "0:0.4:0.005", *extra) for extra in ((), ("--float-grid",)))
    assert exact["radius"].tolist() == [float(f"{5 * index}e-3") for index in range(81)]
    assert published["radius"].tolist() == np.arange(0, 0.4 + 0.005, 0.005).tolist()
    assert (exact["certified_accuracy"][70], published["certified_accuracy"][70]) == (0.5, 0.0)
    assert table_of(path, "--grid", "0.1:0.35:0.1")["radius"].tolist() == [0.1, 0.2, 0.3]
    assert len(table_of(path, "--grid", "0:9.999:0.001")) == 10_000
    assert exact["run"].unique().tolist() == ["a"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--grid 0:1", ["0:1", "START:STOP:STEP"]),
        ("--grid 0:one:0.1", ["0:one:0.1", "decimal numbers"]),
        ("--grid 0:nan:0.1", ["decimal numbers"]),
        ("--grid 0:1:0", ["the step 0 must be above 0"]),
        ("--grid 0:1:-0.1", ["the step -0.1 must be above 0"]),
        ("--grid 0:1e-9:1e-999", ["must be above 0"]),
        ("--grid=-1:1:0.1", ["0 <= START <= STOP"]),
        ("--grid 2:1:0.1", ["0 <= START <= STOP"]),
        ("--grid 0:10:0.001", ["more than 10,000 radii"]),
        ("--grid 0:1e300:1e-300", ["more than 10,000 radii"]),
        ("--float-grid", ["--grid START:STOP:STEP"]),
        ("--plot a.gif", [".png, .pdf or .svg"]),
    ],
)
def test_curve_options_are_checked_before_anything_is_read(tmp_path, options, words):
    (tmp_path / "damaged").write_text("never read")
    line = refused(2, "curve", tmp_path / "damaged", *options.split())
    for word in words:
        assert word in line


def test_sources_that_cannot_be_read(stored, tmp_path):
    path = log(tmp_path / "a.tsv")
    for source, words in [
        (tmp_path / "none.tsv", "no such file or folder"),
        (f"{tmp_path}/none.tsv@0.5", "none.tsv@0.5: no such file or folder"),
        (f"{path}@x", "sigma = 'x' must be a number above 0"),
        (f"{path}@0", "sigma = '0' must be a number above 0"),
        (f"{stored}@0.5", "a run has its own sigma"),
        (f"={path}", "there is no name before the '='"),
        (stored / "run.json", "is not the header of a log"),
        (stored / "votes" / "estimation" / "1-100.parquet", "not a log"),
    ]:
        assert words in refused(2, "curve", source)
    assert "two curves have the name 'a'" in refused(2, "curve", path, path)
    assert "two curves have the name 'b'" in refused(2, "curve", f"b={path}", f"b={stored}")
    assert "the log has no samples" in refused(2, "curve", tmp_path / "a.tsv", log_header(tmp_path / "b.tsv"))
    assert "--output" in refused(2, "curve", path, "--output", tmp_path / "nowhere" / "a.txt")
    odd = log(tmp_path / "x=1@2.tsv")  # a file with the whole text as its name is taken as such
    assert table_of(odd)["run"].unique().tolist() == ["x=1@2"]


def log_header(path: Path) -> Path:
    path.write_text(LOG.splitlines(keepends=True)[0])
    return path


def test_exported_log_has_the_runs_curve(stored, tmp_path):
    path = tmp_path / "export.tsv"
    result = run("analyze", stored, "--export-tsv", path, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["order"] == "001"
    grid = ("--grid", "0:2:0.05")
    ours, exported = (table_of(source, *grid)["certified_accuracy"].tolist() for source in (stored, path))
    assert ours == exported
    assert ours[0] > 0
    assert "cannot write it: No such file" in refused(
        2, "analyze", stored, "--json", "--export-tsv", tmp_path / "no" / "a"
    )


def test_version_lists_all_versions():
    import torch

    said = run("--version").output
    for word in ("diffsmooth 0.1.0", f"torch {torch.__version__}", "Ray 2.", "CUDA"):
        assert word in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, monkeypatch):
    assert "_DIFFSMOOTH_COMPLETE" in run("completion", shell).output
    monkeypatch.setenv("_DIFFSMOOTH_COMPLETE", f"{shell}_complete")
    for words, answers in (("diffsmooth certify mnist-coh", "mnist-cohen-0.25"), ("diffsmooth cer", "certify")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", words.split()[-1] if shell == "fish" else str(len(words.split()) - 1))
        assert answers in CliRunner().invoke(main, [], prog_name="diffsmooth").output


def test_the_help_of_every_command_has_an_example():
    for name in COMMANDS:
        text = run(name, "--help").output
        assert f"  diffsmooth {name} " in text, name
        for option in main.get_command(click.Context(main), name).params:
            assert isinstance(option, click.Argument) or option.help, f"{name} {option.name}"


def test_expensive_orders_cause_a_warning():
    from diffsmooth.jobs.costs import warn_of_cost

    names = ("imagenet-diffsmooth-0.50", "cifar10-cohen-0.50")
    expensive, cheap = (load_named(name) for name in names)
    on_cpus = load_named("imagenet-diffsmooth-0.50", ["compute.device=cpu"])
    said = []
    for wanted in ([(expensive, None)], [(expensive, 1_000_000)], [(cheap, None)], [(on_cpus, None)], [(expensive, 0)]):
        warn_of_cost(wanted, said.append)
    (warning,) = said
    assert "this order needs at least 117 GPU-hours" in warning
    result = run("submit", "imagenet-diffsmooth-0.50", "--address", "http://127.0.0.1:1", "--out", "s3://bucket/run")
    assert "at least 117 GPU-hours" in result.stderr
    assert "--yes" in result.stderr
    result = run("submit", "imagenet-diffsmooth-0.50", "--yes", "--address", "http://127.0.0.1:1")
    assert "GPU-hours" not in result.stderr


def test_swapped_sigmas_cause_a_warning(tmp_path, caplog):
    refused(2, "certify", "mnist", "--out", tmp_path / "a", "--set=smoothing.sigma=0.1", "--set=smoothing.n0=7")
    with pytest.raises(AssertionError, match="a cluster was started"):
        raise run("certify", "mnist", "--out", tmp_path / "b", "--set=smoothing.sigma=0.1").exception
    assert "local_sigma = 0.25 is far above smoothing.sigma = 0.1; check that they are not swapped" in caplog.text


@pytest.mark.parametrize(
    "command",
    [["report", "--samples", "0", "--output"], ["curve", "--output"], ["curve", "--plot"], ["compare", "--output"]],
    ids=" ".join,
)
def test_a_full_disk_leaves_no_truncated_file(raw_spec, tmp_path, monkeypatch, command):
    """What was there before stays as it was."""
    for seed in (0, 1):
        make_run(load_spec(raw_spec).with_seed(seed), tmp_path / f"run{seed}")
    runs = [tmp_path / "run0"] if command[0] == "report" else [tmp_path / "run0", tmp_path / "run1"]
    target = tmp_path / "out" / "written.png"
    target.parent.mkdir()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("diffsmooth.jobs.places.os.replace", full)
        line = refused(2, command[0], *runs, *command[1:], target)
        assert "written.png: cannot write it: No space left on device" in line
        assert list(target.parent.iterdir()) == []
        target.write_text("before")
        refused(2, command[0], *runs, *command[1:], target)
        assert [path.read_text() for path in target.parent.iterdir()] == ["before"]
    assert run(command[0], *runs, *command[1:], target).exit_code == 0
    assert [path.name for path in target.parent.iterdir()] == ["written.png"]
    assert target.read_bytes() != b"before"


NAME = "q[b]\x1b[31m"


def test_markup_and_escape_sequences_in_names_are_shown_as_they_are(raw_spec, tmp_path, monkeypatch):
    """`[b]` is no markup, and no name can send an escape sequence to a terminal."""
    home, other = tmp_path / NAME, tmp_path / "other[/b]"
    for seed, folder in enumerate((home, other)):
        make_run(load_spec(raw_spec).with_seed(seed), folder)
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *_: False)  # as on a terminal
    shown = 0
    for arguments in (
        ["status", home], ["analyze", home, "--alpha", "0.01"], ["audit", home], ["seal", home],
        ["curve", f"{NAME}={home}", other], ["compare", f"{NAME}={home}", other],
        ["report", f"{NAME}={other}", "--samples", "0", "--output", tmp_path / f"{NAME}.html"],
        ["status", tmp_path / f"none{NAME}"], ["curve", home, "--output", tmp_path / NAME / "a" / "b"],
        ["plan", f"none{NAME}"], ["curve", home, "--plot", tmp_path / f"a.{NAME}"],
    ):  # fmt: skip
        result = run(*arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
        assert "\x1b" not in result.output, arguments
        shown += "q[b]\\x1b[31m" in result.output
    assert shown >= 8


def test_only_commands_with_a_spec_of_own_functions_look_for_modules(raw_spec, tmp_path, monkeypatch):
    """Whoever can write there could otherwise run code in every command."""
    make_run(load_spec(raw_spec), tmp_path / "run")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])
    for command in (["status"], ["analyze"], ["seal"], ["audit"], ["curve"], ["report", "--samples", "0"]):
        assert run(command[0], tmp_path / "run", *command[1:]).exit_code == 0
        assert str(tmp_path / "work") not in sys.path
    assert run("plan", "mnist").exit_code == 0
    assert str(tmp_path / "work") not in sys.path  # it names no own function
    (tmp_path / "spec").mkdir()
    (tmp_path / "spec" / "own.toml").write_text(to_toml(load_spec(raw_spec)))
    assert run("plan", tmp_path / "spec" / "own.toml").exit_code == 0
    assert sys.path[-2:] == [str(tmp_path / "work"), str(tmp_path / "spec")]  # after all packages
