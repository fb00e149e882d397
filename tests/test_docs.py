"""The documentation is true: its commands and Python code run. A block that says `# needs ...` is only parsed."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
import matplotlib
import pytest
import tomli_w
from click.testing import CliRunner

from benchmarks.__main__ import main as laboratory
from diffsmooth.jobs.cli import main
from diffsmooth.jobs.specs import SPECS
from diffsmooth.pipeline.spec import load_spec
from diffsmooth.pipeline.training.settings import load_training

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 120
PACKAGES = ("diffsmooth", "pipeline", "cluster", "jobs", "benchmarks", "examples", "tests")
KINDS = {"bash", "python", "toml", "text"}


class CodeBlock(NamedTuple):
    page: str
    line: int
    kind: str
    text: str

    @property
    def runs(self) -> bool:
        return not self.text.startswith("# needs ")

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command line. Braces are not expanded; the shell does this later."""
        return [words for line in self.text.splitlines() if (words := shlex.split(line, comments=True))]

    def __str__(self) -> str:
        return f"{self.page}-{self.line}"


def code_blocks(page: Path) -> list[CodeBlock]:
    text = page.read_text()
    found = []
    for match in re.finditer(r"^( *)```(\w+)\n(.*?)^ *```$", text, re.M | re.S):
        indent, kind, body = match.groups()
        unindented = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        found.append(CodeBlock(page.stem, text[: match.start()].count("\n") + 2, kind, unindented))
    return found


BLOCKS = [block for page in PAGES for block in code_blocks(page)]


def blocks_of(kind: str) -> list[CodeBlock]:
    return [block for block in BLOCKS if block.kind == kind]


def test_every_code_block_has_a_known_kind():
    assert {block.kind for block in BLOCKS} <= KINDS
    assert len(blocks_of("bash")) >= 15
    for page in PAGES:
        assert page.read_text().count("```") == 2 * len(code_blocks(page)), page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_inside_code_blocks(page):
    outside = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
    assert not re.search(r"^ {2,}(diffsmooth|python|ray|kubectl) ", outside, re.M)


@pytest.mark.parametrize("block", blocks_of("bash"), ids=str)
def test_every_command_parses(block):
    for words in block.commands:
        if words[0] == "diffsmooth" and not words[1].startswith("-"):
            command = main.get_command(click.Context(main), words[1])
            command.make_context(f"diffsmooth {words[1]}", words[2:])  # raises for unknown options and invalid values
        elif words[:3] == ["python", "-m", "benchmarks"]:
            laboratory.commands[words[3]].make_context(words[3], words[4:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        elif block.runs:
            assert words[0] in ("diffsmooth", "printf", "pip"), words


@pytest.mark.parametrize("block", blocks_of("python"), ids=str)
def test_every_python_block_compiles(block):
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_has_a_target(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, target


def test_the_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= README_LINES
    for page in PAGES[1:]:
        assert f"(docs/{page.name})" in text


def test_the_readme_shows_make_demo_first():
    assert blocks_of("bash")[0].text == "make demo\n"


def modules_in_the_layout() -> set[str]:
    """The paths of the modules that the layout of contributing.md lists, each below the last folder named before it."""
    (layout, *_) = [block.text for block in code_blocks(ROOT / "docs" / "contributing.md") if block.kind == "text"]
    folder, found = "", set()
    for line in layout.splitlines():
        if match := re.match(r"(\S+/) ", line):
            folder = match[1]
        found |= {folder + name for name in re.findall(r"\w+\.py\b", line)}
    return found


def test_the_layout_in_contributing_lists_every_module_in_its_folder():
    folders = [ROOT / name for name in ("pipeline", "cluster", "jobs", "benchmarks", "examples")]
    paths = [*(path for folder in folders for path in folder.rglob("*.py")), *(ROOT / "diffsmooth").glob("*.py")]
    assert modules_in_the_layout() == {str(one.relative_to(ROOT)) for one in paths if one.stem != "__init__"}


@pytest.fixture(scope="module")
def demo(tmp_path_factory, ray_session) -> Path:
    """A folder that holds a run of MNIST with three samples."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("fashion", "mnist", "mnist-cohen-0.50", "mnist-dds-0.50", "mnist-diffsmooth-0.50"):
        shorter = re.sub(r'^samples = ".*"', 'samples = "0:3"', SPECS.text(name), flags=re.M)
        # a file has priority over the shipped spec of the same name
        (folder / name).write_text(shorter.replace('device = "auto"', 'device = "cpu"'))
    with pytest.MonkeyPatch.context() as patch, original_signal_handlers():
        patch.chdir(folder)
        run_command(["certify", "mnist"])
    return folder


@contextmanager
def original_signal_handlers() -> Iterator[None]:
    """Restore the signal handlers of pytest afterwards, because `certify` installs its own."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def run_command(words: list[str]) -> None:
    """Run `diffsmooth` in this process, on the Ray of the test session."""
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, f"{words}\n{result.output}\n{result.exception!r}"


def run_shell(text: str, folder: Path) -> str:
    """Run bash and return its standard output. `diffsmooth` is the installed command and starts its own Ray."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        ["bash", "-ec", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def run_line(line: str, folder: Path) -> None:
    """Run one line of a bash block.

    In a folder with the user's own models.py, the line runs in bash as a user types it. The actors of the test session
    could not import models.py.
    """
    if not line.startswith("diffsmooth ") or (folder / "models.py").exists():
        run_shell(line, folder)
    else:
        words = run_shell(f"for word in {line}\ndo printf '%s\\0' \"$word\"; done", folder)
        run_command(words.split("\0")[1:-1])


def runnable(page: Path) -> Iterator[CodeBlock]:
    return (block for block in code_blocks(page) if block.runs and block.kind != "text")


@pytest.mark.parametrize("page", [page for page in PAGES if any(runnable(page))], ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page, demo, tmp_path, monkeypatch):
    """The blocks run in the order of the page, in a folder that holds a run of MNIST."""
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    with original_signal_handlers():
        for block in runnable(page):
            run_block(block, tmp_path)


def smaller(raw: dict[str, Any]) -> dict[str, Any]:
    """A training that takes seconds: few steps, validation images and draws."""
    raw["training"] |= {"steps": 2, "batch": 4, "checkpoints": 1}
    raw["validation"]["samples"] = "::5"
    if "smoothing" in raw:
        raw["smoothing"] |= {"n0": 10, "n": 20, "block": {"selection": 10, "estimation": 20}}
    return raw


def run_block(block: CodeBlock, folder: Path) -> None:
    if block.kind == "bash":
        for line in block.text.splitlines():
            if not line.startswith(("make ", "pip ")):
                run_line(line, folder)
    elif name := re.match(r"# (\S+\.toml)\n", block.text):
        (folder / name[1]).write_text(tomli_w.dumps(smaller(tomllib.loads(block.text))))
        load_training(folder / name[1])
    elif block.kind == "toml":
        (folder / "mine.toml").write_text(block.text)
        assert load_spec(folder / "mine.toml").name == "mine"
    elif block.text.startswith("# models.py"):
        (folder / "models.py").write_text(block.text)
    else:
        (folder / "shown.py").write_text(block.text)
        runpy.run_path(str(folder / "shown.py"))
