"""The recipes of cluster/slurm/ on a real SLURM of one machine, with stand-ins for `diffsmooth` and `ray`."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm import missing, output, running_slurm, wait_until

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "cluster" / "slurm"

# Writes where it would start and its arguments. In its first life it then waits for SIGTERM, unless it is task 0.
DIFFSMOOTH = """
import os, signal, sys, time
from pathlib import Path
from diffsmooth.cluster.allocation import address_of_symmetric_run, part_of
log = Path(os.environ["LOGS"]) / os.environ.get("SLURM_ARRAY_TASK_ID", "ray")
life = len(log.read_text().splitlines()) if log.exists() else 0
with log.open("a") as file:
    file.write(f"{part_of(None, os.environ)} {address_of_symmetric_run()} {sys.argv[1:]}\\n")
if life == 0 and log.name in ("1", "ray"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    time.sleep(100)
"""
# What `ray symmetric-run` does on the head node, without starting a Ray.
RAY = """
import subprocess, sys
assert sys.argv[1] == "symmetric-run"
split = sys.argv.index("--")
sys.exit(subprocess.run(sys.argv[split + 1 :]).returncode)
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """A SLURM, and the folder in which the stand-ins write their logs."""
    if reason := missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("slurm")
    for name, code in (("diffsmooth", DIFFSMOOTH), ("ray", RAY)):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!{sys.executable}{code}")
        path.chmod(0o755)
    with running_slurm(folder) as environment:
        path = f"{folder / 'bin'}:{os.environ['PATH']}"
        yield {**environment, "PATH": path, "PYTHONPATH": str(ROOT), "LOGS": str(folder)}


def submit(environment: dict[str, str], recipe: str, *options: str) -> int:
    """Submit a recipe with a GPU-less machine's options; returns the number of the job."""
    small = ["--gres=none", "--mem=0", "--cpus-per-task=1", f"--output={environment['LOGS']}/{recipe}.%a.txt"]
    job = [str(RECIPES / recipe), "my.toml", "--out", "runs/my run"]
    command = ["sbatch", "--parsable", *small, *options, *job]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def lives(environment: dict[str, str], name: str) -> list[str]:
    """What the stand-in wrote, a line for each of its starts."""
    log = Path(environment["LOGS"]) / name
    return log.read_text().splitlines() if log.exists() else []


def finished(environment: dict[str, str]) -> bool:
    return not output(["squeue", "--noheader"], environment).strip()


def test_tasks_of_an_array_start_with_their_parts_and_are_requeued_after_sigterm(slurm):
    job = submit(slurm, "array.sbatch", "--array=0-1")
    wait_until(lambda: len(lives(slurm, "1")) == 1, "the second task did not start")
    subprocess.run(["scancel", "--batch", "--signal=TERM", f"{job}_1"], env=slurm, check=True)
    wait_until(lambda: finished(slurm), "the array did not end", 120)
    arguments = "None ['certify', 'my.toml', '--out', 'runs/my run', '--yes']"
    assert lives(slurm, "0") == [f"Part(place=0.0, drivers=2) {arguments}"]
    assert lives(slurm, "1") == 2 * [f"Part(place=0.5, drivers=2) {arguments}"]
    assert "ExitCode=0:0" in output(["scontrol", "show", "job", f"{job}_1"], slurm)


def test_the_driver_uses_the_ray_of_the_allocation_and_is_requeued_after_sigterm(slurm):
    job = submit({**slurm, "RAY_PORT": "6399"}, "ray.sbatch", "--nodes=1")
    wait_until(lambda: len(lives(slurm, "ray")) == 1, "the job did not start")
    subprocess.run(["scancel", "--batch", "--signal=TERM", str(job)], env=slurm, check=True)
    wait_until(lambda: finished(slurm), "the job did not end", 120)
    for line in lives(slurm, "ray"):
        _, _, address, arguments = line.split(" ", 3)
        assert address.endswith(":6399")
        assert arguments == f"['certify', 'my.toml', '--out', 'runs/my run', '--address', '{address}', '--yes']"
    assert len(lives(slurm, "ray")) == 2
    assert "ExitCode=0:0" in output(["scontrol", "show", "job", str(job)], slurm)


def test_the_installed_ray_knows_the_options_of_the_recipe():
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    (line,) = re.findall(r"ray symmetric-run (.*) \\\n", (RECIPES / "ray.sbatch").read_text())
    assert curate_and_validate_ray_start_args(shlex.split(line)) == []  # what is left would go to `ray start`


@pytest.mark.parametrize("recipe", ["array.sbatch", "ray.sbatch"])
def test_the_recipes_are_valid_scripts(recipe):
    assert shutil.which("bash")
    subprocess.run(["bash", "-n", str(RECIPES / recipe)], check=True)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("option", [["--address", "10.0.0.1:6379"], ["--address=10.0.0.1:6379"]])
def test_the_address_of_symmetric_run_is_found_behind_a_shell(option):
    code = "from diffsmooth.cluster.allocation import address_of_symmetric_run as f; print(f())"
    child = f"{sys.executable} -c '{code}'; true"
    parent = f"import subprocess; subprocess.run(['bash', '-c', {child!r}], check=True)"
    command = [sys.executable, "-c", parent, "symmetric-run", *option, "--min-nodes", "2", "--", "diffsmooth"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == "10.0.0.1:6379\n"
