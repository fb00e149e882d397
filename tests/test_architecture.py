"""Imports run one way, so that a newcomer can read the code from the left to the right."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEAVES = {"pipeline.spec", "pipeline.store"}
NETWORKS = {"pipeline.denoisers", "pipeline.classifiers"}
MATERIAL = {"pipeline.noise", "pipeline.unet", "pipeline.weights", "pipeline.data", "pipeline.fetch"}
VOTES = {"pipeline.votes", "pipeline.certify"}

# module -> the modules of ours that it may import, besides spec and store
ALLOWED = {
    "pipeline.spec": set(),
    "pipeline.store": set(),
    "pipeline.noise": set(),
    "pipeline.unet": set(),
    "pipeline.fetch": set(),
    "pipeline.weights": {"pipeline.fetch"},
    "pipeline.data": {"pipeline.fetch"},
    "pipeline.denoisers": MATERIAL,
    "pipeline.classifiers": MATERIAL,
    "pipeline.smoothing": NETWORKS | MATERIAL,
    "pipeline.votes": set(),
    "pipeline.sequential": set(),
    "pipeline.certify": {"pipeline.votes", "pipeline.sequential"},
    "pipeline.sampling": VOTES | {"pipeline.sequential"},
    "pipeline.curve": VOTES,
    "pipeline.logs": VOTES,
    "pipeline.tables": VOTES | {"pipeline.curve"},
    "pipeline.report": VOTES | {"pipeline.curve", "pipeline.sampling", "pipeline.tables"},
    "cluster.worker": {"pipeline", "pipeline.smoothing", "pipeline.data", "pipeline.votes", "pipeline.noise"},
    "cluster.scheduler": set(),
    "cluster.simulate": {"cluster.scheduler"},
    "cluster.driver": {"cluster.worker", "cluster.scheduler", "pipeline.sampling", "pipeline.votes", "pipeline.data"},
}
MAY_IMPORT_RAY = {"cluster.driver", "jobs.submit"}


def modules():
    for folder in ("pipeline", "cluster", "jobs"):
        for path in sorted((ROOT / folder).glob("*.py")):
            if path.stem != "__init__":
                yield f"{folder}.{path.stem}", path


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module in ("pipeline", "cluster", "jobs"):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_imports_run_one_way(module, path):
    ours = {name for name in imported(path) if name.split(".")[0] in ("pipeline", "cluster", "jobs")}
    if not module.startswith("jobs."):
        assert module in ALLOWED, f"{module} has no line in the table"
        assert ours <= ALLOWED[module] | LEAVES
    if module not in MAY_IMPORT_RAY:
        assert "ray" not in {name.split(".")[0] for name in imported(path)}


def test_the_table_half_works_without_torch_and_ray():
    table = (
        "store",
        "votes",
        "sequential",
        "certify",
        "sampling",
        "curve",
        "logs",
        "tables",
        "report",
        "data",
        "fetch",
    )
    names = [f"pipeline.{name}" for name in table]
    imports = ", ".join([*names, "jobs.cli"])
    code = f"import sys, {imports}; assert not {{'torch', 'ray'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
