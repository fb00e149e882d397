"""The release is complete: the wheel contains the code, the source archive every tracked file, and the wheel works."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = {"pipeline", "cluster", "jobs"}  # in diffsmooth/, to the folders beside it


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The source archive, and the wheel that is built from the archive."""
    out = tmp_path_factory.mktemp("dist")
    words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return archive, wheel


def tracked(*folders):
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git clone, so the tracked files are unknown")
    return {Path(line) for line in listed.stdout.splitlines()}


def test_the_wheel_contains_all_code(built):
    contained = {Path(name) for name in zipfile.ZipFile(built[1]).namelist()}
    of_folders = {path for path in tracked(*LINKS) if path.parts[0] != "cluster" or path.parent == Path("cluster")}
    of_package = tracked("diffsmooth") - {Path("diffsmooth", name) for name in LINKS}
    assert of_package | {Path("diffsmooth", path) for path in of_folders} <= contained
    assert {path.parts[0] for path in contained if "dist-info" not in str(path)} == {"diffsmooth"}


def test_the_source_archive_contains_every_tracked_file(built):
    with tarfile.open(built[0]) as archive:
        contained = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    links = {Path("diffsmooth", name) for name in LINKS}
    assert tracked() - contained <= {Path(".gitignore"), Path("MANIFEST.in"), *links}


def test_the_wheel_works_without_the_clone(built, tmp_path):
    zipfile.ZipFile(built[1]).extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    code = (
        "import sys, diffsmooth.jobs; assert [*diffsmooth.__path__, *diffsmooth.jobs.__path__] == sys.argv[1:]; "
        "from diffsmooth.jobs.cli import main; main(['plan', 'mnist', '--gpu', 'T4'])"
    )
    folders = [str(tmp_path / "site" / name) for name in ("diffsmooth", "diffsmooth/jobs")]
    done = subprocess.run(
        [sys.executable, "-c", code, *folders], cwd=tmp_path, env=environment, capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    assert "55,000 draws" in done.stdout
