"""The import rules of docs/contributing.md: imports run one way, so that the code can be read from left to right."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipeline", "cluster", "jobs", "diffsmooth")

EVERYWHERE = {"pipeline.errors", "pipeline.block", "pipeline.locations"}
MAY_IMPORT_RAY = {"cluster.driver", "cluster.ray_private", "jobs.submit"}


def modules() -> dict[str, Path]:
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(nodes) -> set[str]:
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module)
    return names


def imports_of(module: str) -> set[str]:
    return imported(ast.walk(ast.parse(MODULES[module].read_text())))


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] in FOLDERS}


def third_party(names: set[str], package: str) -> bool:
    return package in {name.split(".")[0] for name in names}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_driver_and_the_job_client_import_ray(module):
    if module not in MAY_IMPORT_RAY:
        assert not third_party(imports_of(module), "ray")


def test_the_table_half_works_without_torch_and_ray():
    table = ("storage.store", "storage.fetch", "votes", "sequential", "certify", "sampling", "curve", "logs", "tables")
    names = [*(f"pipeline.{name}" for name in table), "pipeline.report", "pipeline.data", "jobs.cli"]
    code = f"import sys, {', '.join(names)}; assert not {{'torch', 'ray'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
