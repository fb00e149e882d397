"""The import rules of docs/contributing.md: imports run one way, so that the code can be read from left to right."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

from diffsmooth.jobs.cli import COMMANDS

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipeline", "cluster", "jobs")

EVERYWHERE = {"pipeline.errors", "pipeline.block", "pipeline.locations"}  # anything may import these

# In reading order: a folder or loose module of pipeline/ -> the folders and loose modules that it may import.
MAY_IMPORT = {
    "records": "",
    "spec": "records",
    "noise": "spec",
    "storage": "records",
    "data": "records spec storage",
    "models": "noise records spec storage",
    "smoothing": "data models noise spec",
    "casting": "data noise smoothing",
    "votes": "records spec storage",
    "certify": "records spec storage votes",
    "attack": "casting certify data models noise records smoothing storage votes",
    "results": "attack certify data records spec storage votes",
    "audit": "attack casting certify data models noise records results smoothing spec storage votes",
    "training": "data models records spec storage",
    "cost": "attack casting certify data models noise smoothing spec storage training",
    "show": "attack casting certify data models noise records results smoothing spec votes",
}
TORCH = {
    "pipeline.smoothing",
    "pipeline.casting",
    "pipeline.models",
    "pipeline.attack.search",
    "pipeline.attack.foreign",
    "pipeline.attack.request",
    "pipeline.audit.redraw",
    "pipeline.training",
    "pipeline.cost",
    "pipeline.show.gallery",  # draws the images at each step of f
}
RAY = {f"cluster.{name}" for name in ("actor", "cast", "connect", "metrics", "ray_private", "trainer")}
RAY |= {"jobs.job_server"}
COMMAND_MODULES = {f"jobs.{entry.module}" for entry in COMMANDS.values()}
# where JSON is parsed without a model of ours: it is the user's, another library's, or becomes a model at once
PARSES_JSON = {"pipeline.votes.blocks", "pipeline.models.files", "pipeline.data.sources"}


def modules() -> dict[str, Path]:
    """All modules by name, without `diffsmooth.` before it."""
    found = {name: ROOT / "diffsmooth" / f"{name}.py" for name in ("__init__", "__main__", "api")}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(nodes) -> set[str]:
    """The names that imports mention, those of our own modules without `diffsmooth.`."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole.removeprefix("diffsmooth.") in MODULES else node.module)
    assert not {name.split(".")[0] for name in names} & set(FOLDERS), "import it as diffsmooth...."
    return {name.removeprefix("diffsmooth.") for name in names}


def imports_of(module: str) -> set[str]:
    return imported(ast.walk(ast.parse(MODULES[module].read_text())))


def ours(names: set[str]) -> set[str]:
    return {name for name in names if name in MODULES}


def third_party(names: set[str], package: str) -> bool:
    return package in {name.split(".")[0] for name in names}


def unit(module: str) -> str:
    """The folder or loose module of pipeline/ that a module belongs to."""
    return module.split(".")[1]


def belongs(module: str, listed: set[str]) -> bool:
    return any(module == one or module.startswith(f"{one}.") for one in listed)


@pytest.mark.parametrize("module", [name for name in MODULES if name.startswith("pipeline.")])
def test_a_module_of_pipeline_imports_only_what_the_table_allows(module):
    found = {unit(name) for name in ours(imports_of(module)) - EVERYWHERE}
    if module not in EVERYWHERE and unit(module) != "embedded":
        assert found <= {unit(module), *MAY_IMPORT[unit(module)].split()}
    else:
        assert not found - {unit(name) for name in EVERYWHERE}


def test_the_table_is_complete_and_in_reading_order():
    exist = {unit(name) for name in MODULES if name.startswith("pipeline.")}
    assert set(MAY_IMPORT) == exist - {unit(name) for name in EVERYWHERE} - {"embedded"}
    for index, name in enumerate(MAY_IMPORT):
        assert set(MAY_IMPORT[name].split()) <= set(list(MAY_IMPORT)[:index]), f"{name} imports what comes after it"


def test_the_table_allows_nothing_that_is_not_used():
    for name, allowed in MAY_IMPORT.items():
        of_unit = [module for module in MODULES if module.startswith("pipeline.") and unit(module) == name]
        assert set(allowed.split()) <= {unit(one) for module in of_unit for one in ours(imports_of(module))}, name


def test_no_two_modules_import_each_other():
    arrows = {module: ours(imports_of(module)) - {module} for module in MODULES}
    assert list(graphlib.TopologicalSorter(arrows).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_torch_ray_and_other_commands(module):
    names = imports_of(module)
    if module.startswith("pipeline") and not belongs(module, TORCH):
        assert not third_party(names, "torch")
    assert not third_party(names, "ray") or module in RAY
    if module in COMMAND_MODULES:
        assert not names & COMMAND_MODULES
    if module.startswith("pipeline"):
        assert not {name for name in ours(names) if name.startswith(("cluster", "jobs", "api"))}
    if module.startswith("jobs"):
        assert not any(third_party(names, package) for package in ("torch", "numpy", "scipy"))
    if module.startswith("cluster"):
        assert not {name for name in ours(names) if name.startswith(("jobs", "api"))}
    if module == "cluster.scheduler":
        assert ours(names) == {"pipeline.block"}


@pytest.mark.parametrize("module", MODULES)
def test_our_own_modules_are_imported_at_the_top(module):
    """Only the command line imports what casts votes when a command runs, and its entry point all of it."""
    tree = ast.parse(MODULES[module].read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = imported(node for function in functions for node in ast.walk(function))
    assert not ours(inside) or module in ("jobs.cli", "jobs.start")


@pytest.mark.parametrize("module", MODULES)
def test_json_is_parsed_by_a_model(module):
    calls = [node for node in ast.walk(ast.parse(MODULES[module].read_text())) if isinstance(node, ast.Call)]
    assert not any(ast.unparse(call.func) in ("json.load", "json.loads") for call in calls) or module in PARSES_JSON


def test_everything_from_votes_to_reports_works_without_torch_and_ray():
    names = [name for name in MODULES if name.startswith("pipeline.") and not belongs(name, TORCH)]
    wanted = ", ".join(f"diffsmooth.{name}" for name in [*names, "jobs.cli"])
    code = f"import sys, {wanted}; assert not {{'torch', 'ray'}} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_links_give_the_folders_their_one_import_name():
    for folder in FOLDERS:
        assert (ROOT / "diffsmooth" / folder).readlink() == Path("..", folder)


def test_the_tests_of_a_group_run_in_one_process(request, worker_id):
    """pytest-xdist adds the group to a test's name; without it, every process would start a Ray of its own."""
    assert worker_id == "master" or request.node.nodeid.endswith("@test_architecture")
