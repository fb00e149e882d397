"""Commands start fast, and Ctrl-C ends each with status 130 and without a traceback: while importing or waiting."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffsmooth.jobs import options
from diffsmooth.jobs.cli import COMMANDS, main
from diffsmooth.pipeline.certify.kinds import KINDS, OF_ORDERS
from diffsmooth.pipeline.errors import RunError
from diffsmooth.pipeline.results.stored import StoredRun
from diffsmooth.pipeline.spec import load_spec
from tests.models import make_run, to_toml

ROOT = Path(__file__).parent.parent

# Sends itself Ctrl-C when a module is imported.
INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupt:
    @staticmethod
    def find_spec(name, *_):
        if name == "{module}":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt)
from diffsmooth.jobs.start import main
main()
"""
MAIN = "from diffsmooth.jobs.start import main; main()"

# Prints the heavy packages that were imported when the command ends.
IMPORTED = """
import atexit, sys
heavy = ("torch", "ray", "pandas", "scipy", "pyarrow")
sys.argv[0] = "diffsmooth"
atexit.register(lambda: print("imported:", *(name for name in heavy if name in sys.modules)))
from diffsmooth.jobs.start import main
main()
"""


def start(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended_quietly(process):
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stderr.strip().splitlines()[-1] == "diffsmooth: stopped"
    assert "Traceback" not in stderr


@pytest.mark.parametrize("module", ["diffsmooth.jobs.cli", "diffsmooth.pipeline.results.stored"])
def test_ctrl_c_during_imports(module):
    ended_quietly(start(INTERRUPTED_IMPORT.format(module=module), "status", "x"))


def heavy_imports(*arguments, status=0, **environment):
    """What a command prints on stderr, and the heavy packages that it imports."""
    process = start(IMPORTED, *arguments, **environment)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == status, stderr
    return stderr, set(stdout.splitlines()[-1].removeprefix("imported:").split())


def test_help_and_completion_import_nothing_heavy():
    assert heavy_imports("--help") == ("", set())
    assert heavy_imports("certify", "--help") == ("", set())
    completing = {"_DIFFSMOOTH_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
    assert heavy_imports(COMP_WORDS="diffsmooth certify mnist-coh", **completing) == ("", set())


@pytest.mark.parametrize(
    "command",
    [
        ("certify",),
        ("predict",),
        ("plan",),
        ("submit", "--address", "http://127.0.0.1:1"),
        ("attack", "run", "--spec"),
        ("audit", "run", "--spec"),
        ("report", "run", "--spec"),
    ],
    ids=lambda command: command[0],
)
def test_a_mistake_in_a_spec_is_reported_before_torch_and_ray_are_imported(raw_spec, tmp_path, command):
    (tmp_path / "half.toml").write_text(to_toml(load_spec(raw_spec)) + "\n[smoothign]\nm = 1\n")
    stderr, heavy = heavy_imports(*command, tmp_path / "half.toml", status=2)
    assert "smoothign" in stderr
    assert not heavy & {"torch", "ray"}


def test_the_help_shows_a_whole_sentence_for_each_command():
    shown = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    for name, entry in COMMANDS.items():
        assert f"  {name:<10}  {entry.sentence}\n" in shown
        assert entry.sentence.endswith(".")


def test_the_certificates_that_certify_offers_are_those_of_the_table():
    assert list(options.CERTIFICATES) == [name for name in OF_ORDERS if KINDS[name].has_radius]


def test_ctrl_c_while_a_server_never_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(120)
        process = start(
            MAIN, "status", "s3://bucket/run", AWS_ENDPOINT_URL=f"http://127.0.0.1:{server.getsockname()[1]}",
            AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_DEFAULT_REGION="us-east-1",
        )  # fmt: skip
        connection, _ = server.accept()
        with connection:
            process.send_signal(signal.SIGINT)
            ended_quietly(process)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_ctrl_c_while_ray_starts(raw_spec, tmp_path):
    (tmp_path / "half.toml").write_text(to_toml(load_spec(raw_spec)))
    process = start(MAIN, "certify", tmp_path / "half.toml", "--out", tmp_path / "run", RAY_ADDRESS="")
    limit = time.monotonic() + 120
    while not any("gcs_server" in one for one in children(process.pid)):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    ended_quietly(process)


def children(pid: int) -> list[str]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            try:
                found.append(Path(f"/proc/{child}/cmdline").read_text())
            except OSError:
                continue
    return found


def test_orders_that_are_deleted_while_votes_are_cast_give_one_line(raw_spec, tmp_path):
    store = make_run(load_spec(raw_spec), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "orders")
    with pytest.raises(RunError, match=r"orders/001\.json was deleted after it was placed; run the same command again"):
        StoredRun(store).finish("001")
