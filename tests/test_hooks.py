"""Hooks of other packages: they are told what happens, and cannot disturb it."""

import json
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from diffsmooth.jobs import hooks
from diffsmooth.jobs.cli import main
from diffsmooth.pipeline.results.stored import Progress
from tests.models import to_toml

PACKAGE = """
heard = []

def on_progress(run, progress):
    heard.append(("progress", run, progress.draws_cast))

def on_result(run, summary):
    heard.append(("result", run, summary.to_json()))
    raise OSError("no connection")
"""
PROGRESS = Progress(
    draws_cast=3, draws_wanted=4, draws_per_second=1.0, eta_seconds=1.0, actors_ready=1, updated=0.0, note=""
)


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Two packages with entry points, found as installed packages are; one cannot be imported."""
    folder = tmp_path / "site-packages"
    for name, module in (("heard_of", "heard_of"), ("broken", "no_such_module")):
        metadata = folder / f"{name}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[diffsmooth.hooks]\n{name} = {module}\n")
    (folder / "heard_of.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(folder))
    hooks._hooks.cache_clear()
    yield lambda: sys.modules["heard_of"].heard
    hooks._hooks.cache_clear()
    sys.modules.pop("heard_of", None)


def test_a_hook_is_told_until_it_fails(installed, caplog):
    hooks.tell_progress("s3://bucket/a?token=SECRET", PROGRESS)
    assert installed() == [("progress", "s3://bucket/a?...", 3)]
    assert "the hook 'broken' of diffsmooth.hooks cannot be loaded (ModuleNotFoundError" in caplog.text
    result = SimpleNamespace(run_uri="runs/a", summary=lambda: SimpleNamespace(to_json=dict))
    hooks.tell_result(result)
    assert "'heard_of' of diffsmooth.hooks failed in on_result and is not called again (OSError: no con" in caplog.text
    hooks.tell_progress("runs/a", PROGRESS)
    hooks.tell_result(result)
    assert len(installed()) == 2


@pytest.mark.usefixtures("ray_session")
def test_certify_tells_its_hooks_what_it_prints(installed, spec, tmp_path):
    (tmp_path / "spec.toml").write_text(to_toml(spec))
    run = str(tmp_path / "run")
    ended = CliRunner().invoke(main, ["certify", str(tmp_path / "spec.toml"), "--out", run, "--json"])
    assert ended.exit_code == 0, ended.output
    *progress, (kind, of, summary) = installed()
    assert progress[-1] == ("progress", run, 8 * 250)
    (printed,) = json.loads(ended.stdout)
    assert (kind, of) == ("result", run)
    assert summary == {key: printed[key] for key in summary}
