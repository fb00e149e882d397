"""`diffsmooth submit`: a job is followed, stopped and resumed on a real head; what is sent; what is refused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from click.testing import CliRunner, Result
from ray.job_submission import JobStatus

from diffsmooth.jobs import job_server, ship
from diffsmooth.jobs.cli import main
from diffsmooth.jobs.job_server import JobServer, _exit_status, wait
from diffsmooth.jobs.ship import _ship_module
from diffsmooth.jobs.specs import SPECS
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.votes.blocks import list_blocks, read_votes
from tests.models import make_run, to_toml
from tests.processes import starting_ray
from tests.s3_servers import free_ports

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {
    **os.environ,
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "RAY_ADDRESS": "",
}


def processes_with(word: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if word in (folder / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


@pytest.fixture(scope="module")
def head():
    """A head with its dashboard on the loopback address; its processes are ended by their ids."""
    gcs, dashboard, client, listen, grpc, runtime_env, metrics = free_ports(7)
    temp = tempfile.mkdtemp(prefix="ds", dir="/tmp")  # short: socket paths have at most 107 bytes
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block"]
    command += [f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    command += [f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={listen}"]
    command += [f"--dashboard-agent-grpc-port={grpc}", f"--runtime-env-agent-port={runtime_env}"]
    command += [f"--metrics-export-port={metrics}", f"--temp-dir={temp}", "--include-dashboard=true"]
    command += ["--num-cpus=2", "--num-gpus=0", "--object-store-memory=83886080", "--disable-usage-stats"]
    log = Path(temp) / "head.log"
    with log.open("w") as stream, starting_ray():
        process = subprocess.Popen(
            command, env=ENVIRONMENT, cwd="/tmp", stdout=stream, stderr=stream, start_new_session=True
        )
        limit = time.monotonic() + 400
        while "--block" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.2)
    yield SimpleNamespace(address=f"http://127.0.0.1:{dashboard}", temp=temp)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(15)
    for pid in processes_with(temp):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(15)
    shutil.rmtree(temp, ignore_errors=True)


@pytest.fixture
def spec_file(raw_spec, tmp_path) -> Path:
    """The half-space spec in the folder of its data, with a relative path; the model is in this repository."""
    path = tmp_path / "half.toml"
    path.write_text(to_toml(load_spec(raw_spec)).replace(raw_spec["data"]["path"], "images.parquet"))
    return path


def submit(*arguments) -> Result:
    return CliRunner().invoke(main, ["submit", *map(str, arguments)])


def test_job_is_stopped_then_resumed_and_followed(head, spec_file, tmp_path, monkeypatch):
    """The stopped job ends gracefully; the resumed one keeps its blocks and has the votes of an undisturbed run."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")  # --address outranks it, as every other flag does
    home, changes = tmp_path / "run", ["smoothing.n=300", "classifier.arch=tests.models:slow_half_space"]
    request = [spec_file, "--address", head.address, "--actors", 1, "--batch-size", 16, "--out", home, "--json"]
    request += [word for change in changes for word in ("--set", change)]
    submitted = submit(*request)
    assert submitted.exit_code == 0, submitted.output
    first = json.loads(submitted.stdout)
    assert set(first) == {"submission_id", "status"}
    assert f"ray job stop --address {head.address} {first['submission_id']}" in submitted.stderr
    spec = load_spec(spec_file, changes)
    limit = time.monotonic() + 400
    while not home.exists() or len(list_blocks(open_store(str(home)), spec.smoothing.block)) < 4:
        assert time.monotonic() < limit
        time.sleep(0.1)

    server = JobServer(head.address)
    server.client.stop_job(first["submission_id"])
    ended, status = wait(server, first["submission_id"])
    assert (ended.status, status) == ("STOPPED", 143)
    assert "stopped" in server.client.get_job_logs(first["submission_id"])
    stored = {path: path.stat().st_mtime_ns for path in (home / "votes").rglob("*.parquet")}
    assert 4 <= len(stored) < 8 * 4

    resumed = submit(*request, "--follow")
    assert resumed.exit_code == 0, resumed.output
    second = json.loads(resumed.stdout)
    assert second["status"] == "SUCCEEDED"
    assert second["submission_id"] != first["submission_id"]
    assert "order 001: top, n0 = 50, n = 300" in resumed.stderr  # from the driver's log
    rows = pd.read_parquet(home / "orders" / "001" / "certificates.parquet")
    assert rows["status"].eq("certified").tolist() == 8 * [True]
    assert {path: path.stat().st_mtime_ns for path in stored} == stored
    undisturbed = make_run(spec, tmp_path / "undisturbed")
    pd.testing.assert_frame_equal(read_votes(str(home)), read_votes(undisturbed.uri))


def test_mistake_that_only_the_cluster_finds_has_status_2(head, spec_file, tmp_path, caplog):
    arguments = [spec_file, "--address", head.address, "--out", tmp_path / "run", "--set", "data.samples=0:9", "--wait"]
    ended = submit(*arguments)
    assert ended.exit_code == 2, ended.output
    assert "the job ended with exit status 2: data.samples" in caplog.text


# Without a cluster


def refused(*arguments) -> str:
    result = submit(*arguments)
    assert result.exit_code == 2, result.output
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("out", ["hf://datasets/org/run", "https://host/run"])
def test_a_place_that_cannot_be_written_is_refused(out):
    with pytest.raises(UserError, match=f"--out {out}: a run is written to an object store; give s3://BUCKET/PREFIX"):
        ship._reachable_out(SimpleNamespace(out=out, shared=False), ["mnist"], "http://HEAD:8265", here=False)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9", "127.0.0.1:9", "http://user:secret@127.0.0.1:9"])
def test_missing_server_is_named(address):
    assert "http://127.0.0.1:9: no Ray job server answers" in refused("mnist", "--address", address)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--address is missing"),
        (("--address", "ray://head:10001"), "not the address of a dashboard"),
        (("--address", "http://[::1"), "not the address of a dashboard"),
        (("--address", "http://head:port"), "not the address of a dashboard"),
        (("--address", "http://h:1", "--env", "NOT_SET_ANYWHERE"), "NOT_SET_ANYWHERE: the variable is not set here"),
        (("--address", "http://h:1", "--set", "smoothing.sgima=1"), "nearest valid key is smoothing.sigma"),
    ],
)
def test_mistakes_are_found_before_anything_is_sent(arguments, words, monkeypatch):
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert words in refused("mnist", *arguments)


@pytest.fixture
def remote(monkeypatch):
    """A cluster behind a tunnel; the submitted job is kept, with the files that are sent."""
    sent: dict = {"answers": {}, "status": 200}
    answers = sent["answers"]
    answers["/api/v0/cluster_metadata"] = {
        "data": {"rayVersion": job_server.ray.__version__, "pythonVersion": ".".join(map(str, sys.version_info[:3]))}
    }
    answers["/nodes?view=summary"] = {"data": {"summary": [{"hostname": "ip-10-0-0-1"}]}}

    class Client:
        def __init__(self, address):
            pass

        def submit_job(self, **job):
            folder = Path(job["runtime_env"].get("working_dir", "/nonexistent"))
            sent["job"] = job
            sent["files"] = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")}

    def get(url, **_):
        content = json.dumps(answers[url.removeprefix("http://127.0.0.1:8265")]).encode()
        return SimpleNamespace(status_code=sent["status"], content=content)

    monkeypatch.setattr(job_server, "JobSubmissionClient", Client)
    monkeypatch.setattr(job_server.requests, "get", get)
    return sent


REMOTE = ("--address", "http://127.0.0.1:8265")


def test_run_must_be_where_all_nodes_can_write(remote):
    assert "give s3://BUCKET/PREFIX" in refused("mnist", *REMOTE)
    for out in ("runs/a", "/mnt/runs/a"):
        assert "folder of its own" in refused("mnist", *REMOTE, "--out", out)
    assert "folder of its own" in refused("mnist", *REMOTE, "--out", "runs/a", "--shared")
    assert submit("mnist", *REMOTE, "--out", "/mnt/a", "--shared").exit_code == 0


def test_only_specs_and_own_modules_are_sent(remote, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_REGION", "eu-west-1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    (tmp_path / "mine").mkdir()
    for name, text in {
        "mine/__init__.py": "", "mine/net.py": "from . import blocks\nimport helper", "mine/blocks.py": "import torch",
        "mine/unused.py": "", "helper.py": "", "weights.pt": "w" * 1000, "pipeline.py": "",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    (tmp_path / "my spec.toml").write_text(
        'name = "mine"\n[data]\nname = "parquet"\npath = "x.parquet"\n[classifier]\narch = "mine.net:build"\n'
        'checkpoint = "${DIFFSMOOTH_MODELS}/a.pt"\n[smoothing]\nsigma = 0.5\n'
    )
    options = ["--actors", "3", "--env", "AWS_REGION", "--env", "A=b c", "--set", "smoothing.n=2000"]
    options += ["--accelerator", "H100", "--accelerator", "A100", "--memory", "40"]
    done = submit("my spec.toml", "mnist", *REMOTE, "--out", "s3://b/runs", *options)
    assert done.exit_code == 0, done.output
    assert set(remote["files"]) == {"mine.toml", "mine/__init__.py", "mine/net.py", "mine/blocks.py", "helper.py"}
    assert "${DIFFSMOOTH_MODELS}/a.pt" in remote["files"]["mine.toml"]  # the cluster's own value is used
    assert f"data.path = {tmp_path}/x.parquet is not sent" in caplog.text
    command = "diffsmooth certify mine.toml mnist --out s3://b/runs --actors=3"
    command += " --accelerator=H100 --accelerator=A100 --memory=40 --set"
    assert remote["job"]["entrypoint"] == f"{command} smoothing.n=2000"
    assert remote["job"]["runtime_env"]["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": "60", "PYTHONUNBUFFERED": "1", "AWS_REGION": "eu-west-1", "A": "b c"
    }  # fmt: skip


SECRET = "https://user:SECRET@host/a.pt?signature=SECRET"


def test_locations_with_secrets_are_not_sent(remote, tmp_path):
    """Ray shows the command and the files of a job to everyone who may read its dashboard."""
    spec = tmp_path / "secret.toml"
    spec.write_text(SPECS.text("mnist").replace("embedded:mnist.safetensors#denoiser", SECRET))
    assert SECRET in spec.read_text()
    for arguments in (
        ["mnist", "--out", "s3://b/a", "--set", f"classifier.checkpoint={SECRET}"],
        ["mnist", "--out", "s3://id:SECRET@b/a"],
        [spec, "--out", "s3://b/a"],
    ):
        line = refused(*arguments, *REMOTE)
        assert "SECRET" not in line
        assert "set it in the environment of the nodes, and write the location with ${NAME}" in line
    assert "job" not in remote
    options = ["--set", "classifier.checkpoint='${WEIGHTS_NOT_SET_HERE}'"]
    assert submit("mnist", *REMOTE, "--out", "s3://b/a", *options).exit_code == 0
    assert "${WEIGHTS_NOT_SET_HERE}" in remote["job"]["entrypoint"]


@pytest.mark.parametrize(
    "env", ["AWS_SECRET_ACCESS_KEY=x", "HF_TOKEN=x", "DB_PASSWD=x", "MY_API_KEY=x", f"URL={SECRET}"]
)
def test_secrets_in_variables_are_warned_of(remote, caplog, env):
    assert submit("mnist", *REMOTE, "--out", "s3://b/a", "--env", env).exit_code == 0
    assert f"{env.partition('=')[0]} will be visible to all users" in caplog.text
    assert "SECRET@" not in caplog.text


def test_too_many_bytes_are_refused_with_the_largest_files(remote, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffsmooth.jobs.ship._LIMIT", 5000)
    (tmp_path / "big.py").write_text("#" * 6000)
    line = refused(ROOT / "jobs/specs/mnist.toml", *REMOTE, "--out", "s3://b/a", "--set", "classifier.arch=big:f")
    assert "the limit is 5.0 kB" in line
    assert "the largest are big.py (6.0 kB)" in line


@pytest.mark.parametrize(("name", "version"), [("rayVersion", "2.9.0"), ("pythonVersion", "3.9.1")])
def test_other_versions_are_refused(remote, name, version):
    remote["answers"]["/api/v0/cluster_metadata"]["data"][name] = version
    line = refused("mnist", *REMOTE, "--out", "s3://b/a")
    assert version in line
    assert "submit from an environment with the cluster's versions" in line


@pytest.mark.parametrize(
    "answer", [None, [], {}, {"data": None}, {"data": {"rayVersion": 7}}, {"data": {"summary": 1}}]
)
@pytest.mark.parametrize("path", ["/api/v0/cluster_metadata", "/nodes?view=summary"])
def test_strange_answers_are_refused(remote, path, answer):
    remote["answers"][path] = answer
    assert any(
        words in refused("mnist", *REMOTE) for words in ("not a Ray dashboard", "not Ray's job", "--out is missing")
    )


def test_required_token_is_named(remote, monkeypatch, tmp_path):
    remote["status"] = 401
    assert "set RAY_AUTH_MODE=token" in refused("mnist", *REMOTE, "--out", "s3://b/a")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert "cannot be read" in refused("mnist", *REMOTE, "--out", "s3://b/a")


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("STOPPED", None, 143), ("FAILED", 2, 2), ("FAILED", 143, 143), ("FAILED", -9, 137)],
)
def test_exit_status_is_that_of_the_driver(status, code, expected):
    details = SimpleNamespace(status=JobStatus(status), driver_exit_code=code, message="first\nlast")
    assert _exit_status(details) == expected


def test_job_that_did_not_run_is_an_error():
    with pytest.raises(RunError, match="no such package"):
        _exit_status(SimpleNamespace(status=JobStatus.FAILED, driver_exit_code=None, message="no such package"))


def test_modules_with_mistakes_are_named(tmp_path):
    (tmp_path / "bad.py").write_text("def f(:")
    with pytest.raises(UserError, match=r"bad.py: not valid Python"):
        _ship_module("bad", tmp_path, tmp_path / "out")
