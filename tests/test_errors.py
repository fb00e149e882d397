"""All error messages: each names the value that is wrong, and none ends with advice that says nothing."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import known_keys, load_spec

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipeline", "cluster", "jobs", "benchmarks", "diffsmooth")
TREES = {
    path: ast.parse(path.read_text())
    for folder in FOLDERS
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not any(parent.is_symlink() for parent in path.parents)  # diffsmooth/ contains links to the other folders
}

# "; correct it" is the mere opposite of the mistake, and "; restore it from a copy" is known to everyone who has one
STOCK_ENDING = re.compile(
    r"; (?:please )?(?:correct|fix|change|set|remove|omit|replace|restore|get|delete)"
    r" (?:it|them|the (?:file|files|path|location|value|key|option|module|function|name))"
    r"(?: again| from a copy| or get it again)?[.!]?$"
)


def template(node: ast.expr) -> str:
    """The text of a message, with {expression} in place of each value."""
    match node:
        case ast.Constant():
            return str(node.value)
        case ast.JoinedStr():
            return "".join(map(template, node.values))
        case ast.BinOp():
            return template(node.left) + template(node.right)
    return f"{{{ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node)}}}"


def name_of(node: ast.AST | None) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def nodes(kind):
    return [(path, node) for path, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, kind)]


def with_subclasses(*names: str) -> set[str]:
    found = set(names)
    while True:
        more = {one.name for _, one in nodes(ast.ClassDef) if found & set(map(name_of, one.bases))} - found
        if not more:
            return found
        found |= more


OURS = with_subclasses("UserError", "RunError")
# functions that return one of our errors: texts among their arguments become parts of the message
HELPERS = {
    one.name for _, one in nodes(ast.FunctionDef) if OURS & set(map(name_of, ast.walk(one.returns or ast.Pass())))
}


def calls(names):
    return [(path, node) for path, node in nodes(ast.Call) if name_of(node.func) in names and node.args]


def is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def parametrised(messages):
    return [pytest.param(text, id=f"{path.stem}-{line}") for path, line, text in messages]


MESSAGES = [(path, node.lineno, template(node.args[0])) for path, node in calls(OURS)]
# parts of messages: what helpers are given, what validators raise, and what other errors pass on
PARTS = [
    (path, one.lineno, template(one))
    for path, node in calls(HELPERS | with_subclasses("ValueError", "RuntimeError", "OSError", "Exception") - OURS)
    for one in node.args
    if is_text(one)
]
FINDINGS = [(path, node.lineno, template(node.args[0])) for path, node in calls({"append"}) if is_text(node.args[0])]

# these pass on other messages of the catalogue, or findings of pydantic, which are tested below
PASSED_ON = ("{first_problem(error)}", "checkpoint {error}", "{where}: {_one_line(error, model)}")


def test_the_catalogue_is_complete():
    assert {"OwnFunctionError", "WrongHash", "Refused", "Absent", "Diverged"} <= OURS
    assert {"unreadable", "translated", "refuse", "_damaged", "_refusal", "not_a_store"} <= HELPERS
    sites = sum(len(re.findall(r"\b(?:UserError|RunError)\(\s*f?\"", path.read_text())) for path in TREES)
    assert len(MESSAGES) >= sites >= 400
    assert len(PARTS) > 100


@pytest.mark.parametrize("message", parametrised(MESSAGES))
def test_every_error_names_the_value(message):
    if message not in PASSED_ON:
        assert re.search(r"\{.+\}|--[a-z]|[a-z]+\.[a-z_]+|images is empty", message), message


@pytest.mark.parametrize("message", parametrised(MESSAGES + PARTS + FINDINGS))
def test_no_message_ends_with_a_stock_phrase(message):
    assert not STOCK_ENDING.search(message), message


@pytest.mark.parametrize(
    "advice", ["correct it", "set it", "remove it", "get the file again", "get it again", "restore it from a copy"]
)
def test_stock_phrases_are_recognised(advice):
    assert STOCK_ENDING.search(f"sigma must be above 0, got -1; {advice}")
    assert not STOCK_ENDING.search(f"sigma must be above 0, got -1; {advice}, or use --cpu")


RAW: dict[str, Any] = {
    "name": "a",
    "data": {"name": "mnist"},
    "denoiser": {"arch": "unet", "unet": {"model_channels": 32, "channel_mult": [1], "num_res_blocks": 1}},
    "classifier": {
        "arch": "mnist_cnn",
        "normalize": {"mean": [0.5], "std": [0.5]},
        "adapter": {"kind": "lora", "rank": 4},
    },
    "smoothing": {"sigma": 0.5},
}


@pytest.mark.parametrize("key", known_keys())
def test_a_wrong_value_of_every_key_is_named(key):
    *sections, last = key.split(".")
    wrong: Any = {last: ["such thing"]}
    for section in reversed(sections):
        wrong = {section: wrong}

    def merged(into: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
        joined = {**into}
        for name, value in changed.items():
            old = joined.get(name)
            joined[name] = merged(old, value) if isinstance(old, dict) and name in sections else value
        return joined

    raw = merged(RAW, wrong)
    with pytest.raises(UserError) as caught:
        load_spec(raw)
    line = str(caught.value)
    assert "\n" not in line
    assert last in line, line
    assert "such thing" in line, line
