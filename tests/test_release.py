"""What is published: the wheel holds all that runs, the source archive all that is read, and the wheel works alone."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive, and the wheel that is made from it alone."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--outdir", out, ROOT], check=True, capture_output=True, timeout=280)
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return archive, wheel


def tracked(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git clone, which would tell what belongs in them")
    return {Path(line) for line in listed.stdout.splitlines()}


def test_the_wheel_holds_all_that_runs(built):
    held = {Path(name) for name in zipfile.ZipFile(built[1]).namelist()}
    wanted = tracked("pipeline", "jobs") | {path for path in tracked("cluster") if path.parent == Path("cluster")}
    assert wanted <= held
    assert {path.parts[0] for path in held if "dist-info" not in str(path)} == {"pipeline", "jobs", "cluster"}


def test_the_source_archive_holds_all_that_is_kept(built):
    with tarfile.open(built[0]) as archive:
        held = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    assert tracked() - held <= {Path(".gitignore"), Path("MANIFEST.in")}


def test_the_wheel_works_without_the_clone(built, tmp_path):
    zipfile.ZipFile(built[1]).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = (
        "import pathlib, jobs, sys; assert pathlib.Path(jobs.__file__).is_relative_to(sys.argv[1]); "
        "from jobs.cli import main; main(['plan', 'mnist', '--gpu', 'T4'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "site"], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert "55,000 draws" in done.stdout
