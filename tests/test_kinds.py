"""Certificate kinds: every command works for every kind, also for one that was just added, and knows none by name."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffsmooth.jobs.analyze import Request, analyze
from diffsmooth.jobs.casting import Options, certify_all
from diffsmooth.jobs.cli import main
from diffsmooth.pipeline.certify.kinds import CASCADE, KINDS, OF_ORDERS, TOP
from diffsmooth.pipeline.spec import load_spec
from tests.models import make_run

ROOT = Path(__file__).parent.parent
ADDED = "added"  # a kind that no module knows


@pytest.fixture(params=[*OF_ORDERS, ADDED])
def kind(request, monkeypatch):
    if request.param == ADDED:
        added = replace(KINDS[TOP], name=ADDED, summary="as top", sample_claim="the added kind's sentence")
        monkeypatch.setitem(KINDS, ADDED, added)
        monkeypatch.setattr("diffsmooth.pipeline.certify.orders.OF_ORDERS", (*OF_ORDERS, ADDED))
    return KINDS[request.param]


def run(*arguments) -> str:
    """Run a command that must succeed, and return what it printed."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, f"{arguments}\n{done.output}\n{done.exception!r}"
    return done.output


def costly_file(kind, folder) -> str | None:
    if not kind.needs_costs:
        return None
    (folder / "costly.toml").write_text("0 = [1]\n1 = [0]\n")
    return str(folder / "costly.toml")


@pytest.fixture
def orders(kind, raw_spec, tmp_path) -> list[str]:
    """Two runs with other seeds; the second order of both, if not the first, has the kind of certificate."""
    homes = []
    for seed in (0, 1):
        make_run(load_spec(raw_spec, [f"smoothing.seed={seed}"]), tmp_path / f"run-{seed}")
        homes.append(str(tmp_path / f"run-{seed}"))
        wanted = Request(certificate=kind.name, costly=costly_file(kind, tmp_path), n=200)
        analyze(homes[-1], wanted, quiet=True)
    return homes


def test_every_command_works_for_every_kind(kind, orders, tmp_path):
    home, other = orders
    status = json.loads(run("status", home, "--json"))
    name = max(status["orders"])
    assert status["orders"][name]["certificate"] == kind.name
    assert f"order {name}: {kind.name}" in run("status", home)
    assert "no problem found" in run("audit", home)
    if not kind.has_radius:
        done = CliRunner().invoke(main, ["curve", home, "--order", name])
        assert done.exit_code == 2
        assert "no radius" in done.output
        return
    for form in ("text", "markdown", "latex", "html", "csv"):
        assert kind.mark.strip() in run("curve", home, "--order", name, "--format", form).replace("\\", "")
    report = tmp_path / "report.html"
    run("report", home, "--order", name, "--output", report)
    assert kind.sample_claim in report.read_text().replace("&#39;", "'")
    run("compare", f"a={home}", f"b={other}", "--order", name)
    run("publish", home, "hf://datasets/me/run", "--dry-run", tmp_path / "published")


def test_certify_finishes_an_order_of_every_kind(kind, raw_spec, home, tmp_path):
    """All draws are committed, so no cluster is needed."""
    options = Options(certificate=kind.name, costly=costly_file(kind, tmp_path), quiet=True)
    (done,) = certify_all([(load_spec(raw_spec), home)], options)
    assert done.complete
    assert set(done.result.certificates["certificate"]) == {kind.name}
    assert set(done.result.certificates["status"]) <= {kind.status, "abstained", "exempt"}


def test_two_orders_are_compared_only_if_they_claim_the_same(kind):
    for other in KINDS.values():
        same = kind is other or (kind.claims_label and kind.has_radius and other.claims_label and other.has_radius)
        assert kind.comparable_with(other) == other.comparable_with(kind) == same


def test_a_cascade_is_no_certificate_of_one_order(raw_spec, home):
    assert CASCADE not in OF_ORDERS
    done = CliRunner().invoke(main, ["certify", "mnist", "--certificate", CASCADE])
    assert done.exit_code == 2


def names_compared(tree: ast.AST) -> list[int]:
    """The lines that compare something with the name of a certificate, or look it up in a table of their own."""
    lines = []
    for node in ast.walk(tree):
        parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        parts += [key for key in node.keys if key] if isinstance(node, ast.Dict) else []
        for part in parts:
            values = part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]
            lines += [one.lineno for one in values if isinstance(one, ast.Constant) and one.value in KINDS]
    return lines


@pytest.mark.parametrize(
    "path",
    [path for folder in ("pipeline", "cluster", "jobs") for path in sorted((ROOT / folder).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_other_module_compares_the_name_of_a_certificate(path):
    if path.name != "kinds.py":
        assert names_compared(ast.parse(path.read_text())) == []
