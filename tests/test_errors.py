"""All error messages: each names the value that is wrong, and then the remedy in a clause of its own."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import known_keys, load_spec

ROOT = Path(__file__).parent.parent
FOLDERS = ("pipeline", "cluster", "jobs", "benchmarks")

# "what is wrong; what to do", or a limit: "value must be ..."
REMEDY = re.compile(r"; \S|\bmust\b", re.S)


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


def errors():
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("UserError", "RunError"):
                    yield pytest.param(template(node.args[0]), id=f"{path.stem}-{node.lineno}")


CATALOGUE = list(errors())
# these pass on other messages of the catalogue, or findings of pydantic, which are tested below
PASSED_ON = ("{first_problem(error)}", "checkpoint {error}", "{where}: {_one_line(error, model)}")


def test_the_catalogue_is_complete():
    texts = sum(len(re.findall(r"\b(?:UserError|RunError)\(\s*f?\"", path.read_text()))
                for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))  # fmt: skip
    assert len(CATALOGUE) >= texts >= 140


@pytest.mark.parametrize("message", CATALOGUE)
def test_every_error_names_a_remedy(message):
    if message in PASSED_ON:
        return
    assert REMEDY.search(message), message


@pytest.mark.parametrize("message", CATALOGUE)
def test_every_error_names_the_value(message):
    assert re.search(r"\{.+\}|--[a-z]|[a-z]+\.[a-z_]+|images is empty|scores are not finite", message), message


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
