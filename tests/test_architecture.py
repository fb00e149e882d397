"""The import rules of docs/contributing.md: imports run one way, so that the code can be read from left to right."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipeline", "cluster", "jobs", "diffsmooth")

EVERYWHERE = {"pipeline.errors", "pipeline.block", "pipeline.locations"}  # anything may import these

# In reading order: module -> the modules of ours that it imports, exactly; those of pipeline/ without the prefix.
ARROWS = {
    "pipeline.records": "",
    "pipeline.spec": "records",
    "pipeline.noise": "spec",
    "pipeline.storage.local": "",
    "pipeline.storage.remote": "storage.local",
    "pipeline.storage.hub": "storage.local storage.remote",
    "pipeline.storage.fetch": "storage.hub storage.local storage.remote",
    "pipeline.storage.published": "storage.fetch storage.hub storage.local storage.remote",
    "pipeline.storage.store": "storage.hub storage.local storage.published storage.remote",
    "pipeline.models.files": "storage.fetch",
    "pipeline.models.own": "models.files spec storage.fetch",
    "pipeline.models.weights": "models.files",
    "pipeline.models.unet": "spec",
    "pipeline.models.fused": "models.unet",
    "pipeline.models.restoration": "models.files models.weights",
    "pipeline.models.edm": "models.fused models.weights",
    "pipeline.models.denoisers": (
        "models.edm models.files models.fused models.own models.restoration models.unet models.weights spec"
    ),
    "pipeline.models.options": "records spec",
    "pipeline.models.rrcm": "models.files models.options models.weights spec",
    "pipeline.models.diffusion_classifier": "models.edm models.files models.options noise spec",
    "pipeline.models.adapters": "models.files models.weights spec",
    "pipeline.models.classifiers": (
        "models.adapters models.diffusion_classifier models.files models.own models.rrcm models.weights spec"
    ),
    "pipeline.models.device": "spec",
    "pipeline.sources": "storage.remote",
    "pipeline.images": "sources",
    "pipeline.data": "images sources spec storage.fetch storage.hub storage.remote",
    "pipeline.smoothing": "data images models.classifiers models.denoisers models.own noise spec",
    "pipeline.run": "records spec storage.store",
    "pipeline.attacks": "records run storage.store",
    "pipeline.search": "attacks images noise smoothing",
    "pipeline.foreign": "attacks models.own search",
    "pipeline.votes": "records run spec storage.remote storage.store",
    "pipeline.sequential": "",
    "pipeline.orders": "records run sequential spec storage.store",
    "pipeline.certify": "orders sequential spec",
    "pipeline.cascade": "certify records",
    "pipeline.planning": "certify orders records spec storage.store",
    "pipeline.sampling": "certify orders planning spec votes",
    "pipeline.seal": "records run storage.remote storage.store votes",
    "pipeline.curve": "",
    "pipeline.gap": "attacks curve",
    "pipeline.logs": "certify records",
    "pipeline.tables": "curve",
    "pipeline.units": "curve",
    "pipeline.compare": "certify curve",
    "pipeline.results": "attacks certify curve gap orders planning records run sampling seal storage.store votes",
    "pipeline.report": "curve gap orders results run tables votes",
    "pipeline.card": "results tables",
    "pipeline.training.settings": "models.own records spec",
    "pipeline.training.randomness": "",
    "pipeline.training.world": "",
    "pipeline.training.losses": "models.edm",
    "pipeline.training.batches": ("data images spec training.randomness training.settings"),
    "pipeline.training.checkpoint": "records storage.store training.settings",
    "pipeline.training.tasks": (
        "models.classifiers models.denoisers models.edm models.fused models.own models.weights training.batches "
        "training.losses training.randomness training.settings"
    ),
    "pipeline.training.outcome": (
        "models.classifiers models.denoisers models.device models.own storage.store training.batches "
        "training.checkpoint training.settings training.tasks"
    ),
    "pipeline.training.loop": (
        "storage.store training.batches training.checkpoint training.outcome training.settings training.tasks "
        "training.world"
    ),
    "cluster.scheduler": "",
    "cluster.allocation": "cluster.scheduler",
    "cluster.compiled": "storage.fetch storage.local",
    "cluster.worker": (
        "cluster.compiled attacks data images models.device noise run smoothing spec storage.hub storage.store votes"
    ),
    "cluster.attacker": "cluster.worker attacks foreign images run search smoothing votes",
    "cluster.ray_private": "",
    "cluster.driver": (
        "cluster.allocation cluster.attacker cluster.compiled cluster.ray_private cluster.scheduler cluster.worker "
        "models.device sampling votes"
    ),
    "cluster.trainer": (
        "cluster.driver storage.store training.checkpoint training.loop training.settings training.world"
    ),
}
TORCH = {"pipeline.smoothing", "pipeline.search", "pipeline.foreign", "pipeline.models", "pipeline.training"}
RAY = {"cluster.driver", "cluster.ray_private", "cluster.trainer", "jobs.submit"}
COMMANDS = {
    f"jobs.{name}"
    for name in (
        "analyze",
        "attack",
        "audit",
        "certify",
        "compare",
        "curve",
        "plan",
        "publish",
        "report",
        "seal",
        "submit",
        "train",
    )
}
# where JSON is parsed without a model of ours: it is the user's, another library's, or becomes a model at once
PARSES_JSON = {"pipeline.votes", "pipeline.models.files", "pipeline.sources"}


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


@pytest.mark.parametrize("module", ARROWS)
def test_a_module_imports_exactly_what_the_table_says(module):
    allowed = {name if name.startswith("cluster.") else f"pipeline.{name}" for name in ARROWS[module].split()}
    assert ours(imports_of(module)) - EVERYWHERE == allowed


def test_the_table_is_complete_and_in_reading_order():
    listed = list(ARROWS)
    assert (
        set(listed)
        == {name for name in MODULES if name.startswith(("pipeline.", "cluster.")) and MODULES[name].stem != "__init__"}
        - EVERYWHERE
    )
    for index, module in enumerate(listed):
        earlier = {name.removeprefix("pipeline.") for name in listed[:index]}
        assert set(ARROWS[module].split()) <= earlier, f"{module} imports a module that comes after it"


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_torch_ray_and_other_commands(module):
    names = imports_of(module)
    if module.startswith("pipeline") and not any(module == one or module.startswith(f"{one}.") for one in TORCH):
        assert not third_party(names, "torch")
    assert not third_party(names, "ray") or module in RAY
    if module in COMMANDS:
        assert names & COMMANDS <= {"jobs.plan"}
    if module.startswith("pipeline"):
        assert not names & {name for name in MODULES if name.startswith(("cluster", "jobs", "diffsmooth"))}


@pytest.mark.parametrize("module", MODULES)
def test_our_own_modules_are_imported_at_the_top(module):
    """Only the command line imports the module of a command when the command runs, and its entry point all of it."""
    tree = ast.parse(MODULES[module].read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = imported(node for function in functions for node in ast.walk(function))
    assert not ours(inside) or module in ("jobs.cli", "jobs.start")


@pytest.mark.parametrize("module", MODULES)
def test_json_is_parsed_by_a_model(module):
    calls = [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Call)]
    assert not any(ast.unparse(call.func) in ("json.load", "json.loads") for call in calls) or module in PARSES_JSON


def test_the_table_half_works_without_torch_and_ray():
    names = [name for name in MODULES if name.startswith("pipeline.") and not name.startswith(tuple(TORCH))]
    code = f"import sys, {', '.join([*names, 'jobs.cli'])}; assert not {{'torch', 'ray'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_tests_of_a_group_run_in_one_process(request, worker_id):
    """pytest-xdist adds the group to a test's name; without it, every process would start a Ray of its own."""
    assert worker_id == "master" or request.node.nodeid.endswith("@test_architecture")
