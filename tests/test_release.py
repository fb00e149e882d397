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


def test_modules_of_the_user_may_have_the_names_of_our_folders(built, tmp_path):
    """In the working folder and beside a script: the command runs, and the user's modules stay importable."""
    zipfile.ZipFile(built[1]).extractall(tmp_path / "site")
    work = tmp_path / "work"
    for folder in ("jobs", "cluster"):
        (work / folder).mkdir(parents=True)
        (work / folder / "__init__.py").write_text(f"mine = {folder!r}\n")
    (work / "pipeline.py").write_text("mine = 'pipeline'\n")
    (work / "script.py").write_text(
        "import diffsmooth as ds, torch, pipeline, jobs, cluster\n"
        "assert [module.mine for module in (pipeline, jobs, cluster)] == ['pipeline', 'jobs', 'cluster']\n"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2)).eval()\n"
        "print(ds.certify(model, torch.full((1, 1, 2, 2), 0.5), [0], sigma=0.5, n=100, n0=10))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    small = (
        "mnist-cohen-0.50 --cpu --actors 1 --set data.samples=0:1 --set smoothing.n=100 --set smoothing.n0=10 --set "
    )
    small += "smoothing.block={selection=10,estimation=100} --out run --json"
    for words in (["script.py"], ["-m", "diffsmooth", "certify", *small.split()]):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
    assert (work / "run" / "votes" / "estimation" / "0-0.parquet").exists()
