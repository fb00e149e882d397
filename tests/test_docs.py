"""Every command and every line of Python in the documents runs, or says what it needs and is parsed."""

import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pytest
from click.testing import CliRunner

from jobs.cli import SPECS, main
from pipeline.spec import load_spec

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


class Block(NamedTuple):
    page: str
    line: int
    kind: str
    text: str

    @property
    def runs(self) -> bool:
        return not self.text.startswith("# needs ")

    @property
    def commands(self) -> list[list[str]]:
        """The command lines, one word list each; braces as the shell expands them stay one word."""
        return [words for line in self.text.splitlines() if (words := shlex.split(line, comments=True))]


def blocks(page: Path) -> list[Block]:
    found = []
    for match in re.finditer(r"^( *)```(\w+)\n(.*?)^ *```$", page.read_text(), re.M | re.S):
        indent, kind, body = match.groups()
        text = "".join(line.removeprefix(indent) for line in body.splitlines(keepends=True))
        found.append(Block(page.stem, page.read_text()[: match.start()].count("\n") + 2, kind, text))
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
BASH = [block for block in BLOCKS if block.kind == "bash"]


def test_blocks_are_of_known_kinds_and_commands_stand_in_blocks():
    assert {block.kind for block in BLOCKS} <= {"bash", "python", "toml", "text"}
    assert len(BASH) >= 15
    for page in PAGES:
        outside = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)
        assert not re.search(r"^ {2,}(diffsmooth|python|ray|kubectl) ", outside, re.M), page


@pytest.mark.parametrize("block", BASH, ids=lambda block: f"{block.page}-{block.line}")
def test_every_command_parses(block):
    for words in block.commands:
        if words[0] == "diffsmooth" and not words[1].startswith("-"):
            command = main.commands[words[1]]
            command.make_context(f"diffsmooth {words[1]}", words[2:])  # refuses unknown options and wrong values
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        elif words[0] == "pip" and "install" in words:
            assert (ROOT / "pyproject.toml").exists()
        elif block.runs:
            assert words[0] in ("diffsmooth", "printf"), words


def test_python_that_cannot_run_compiles():
    for block in BLOCKS:
        if block.kind == "python":
            compile(block.text, f"{block.page}, line {block.line}", "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), re.M)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{page.name}: {target}"


def test_the_readme_names_every_page():
    text = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in text


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder with the run that the quick start makes, by the command as a user types it, of three samples."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("mnist", "mnist-cohen-0.50", "mnist-dds-0.50", "mnist-diffsmooth-0.50"):
        shorter = re.sub(r'^samples = ".*"', 'samples = "0:3"', (SPECS / f"{name}.toml").read_text(), flags=re.M)
        # a file goes before a shipped spec of its name
        (folder / name).write_text(shorter.replace('device = "auto"', 'device = "cpu"'))
    shell("diffsmooth certify mnist", folder)
    return folder


def shell(text: str, folder: Path) -> str:
    """What bash prints; it must end with exit status 0."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        ["bash", "-ec", text], cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert "Traceback" not in done.stderr
    return done.stdout


def run(line: str, folder: Path) -> None:
    """A line of bash; our own command runs in this process, after bash has expanded its words.

    Not where it imports an own module: the actors of this session's Ray do not look into the folder.
    """
    if not line.startswith("diffsmooth ") or (folder / "models.py").exists():
        shell(line, folder)
        return
    words = shell(f"for word in {line}\ndo printf '%s\\0' \"$word\"; done", folder).split("\0")[1:-1]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"


@pytest.fixture
def own_signals():
    """certify installs handlers; afterwards pytest has its own again."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("own_signals", "ray_session")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_runs(page, demo, tmp_path, monkeypatch):
    """In the page's order, in a folder that holds the run of the quick start."""
    shown = [block for block in blocks(page) if block.kind in ("bash", "python", "toml") and block.runs]
    if not shown:
        pytest.skip("nothing to run on this page")
    shutil.copytree(demo, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    for block in shown:
        if block.kind == "bash":
            for line in block.text.splitlines():
                if not line.startswith(("make ", "pip ")):
                    run(line, tmp_path)
        elif block.kind == "toml":
            (tmp_path / "mine.toml").write_text(block.text)
            assert load_spec(tmp_path / "mine.toml").name == "mine"
        elif block.text.startswith("# models.py"):
            (tmp_path / "models.py").write_text(block.text)
        else:
            (tmp_path / "shown.py").write_text(block.text)
            runpy.run_path(str(tmp_path / "shown.py"))
