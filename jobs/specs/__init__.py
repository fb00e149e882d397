"""The shipped specs, and how the argument SPEC of a command is found and loaded.

A shipped file is one spec, or a family of specs that differ in sigma: `sigmas = ["0.25", "0.50", "1.00"]` before its
first table makes three specs, and `{sigma}` is replaced in the whole file, in `name` too. Alone in quotes, as in
`sigma = "{sigma}"`, it becomes a number.
"""

import re
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.spec import RunSpec, load_spec
from diffsmooth.pipeline.training.settings import TrainingSpec, load_training


@dataclass(frozen=True)
class Shipped:
    """The specs, or the trainings, that ship with the package."""

    folder: Path
    kind: str  # "spec" or "training"

    def __contains__(self, name: str) -> bool:
        return name in _texts(self.folder)

    def names(self) -> list[str]:
        return sorted(_texts(self.folder))

    def text(self, name: str) -> str:
        """The TOML text of one spec; that of a family with its sigma in place."""
        return _texts(self.folder)[name]

    def tables(self, name: str) -> dict[str, Any]:
        return tomllib.loads(self.text(name))


SPECS = Shipped(Path(__file__).parent, "spec")
TRAININGS = Shipped(Path(__file__).parent / "training", "training")


@cache
def _texts(folder: Path) -> dict[str, str]:
    """The TOML text of each spec in a folder, by the spec's name."""
    texts: dict[str, str] = {}
    for path in folder.glob("*.toml"):
        text = path.read_text(encoding="utf-8")
        sigmas = _head(text).get("sigmas")
        members = [text] if sigmas is None else [_with_sigma(text, sigma) for sigma in sigmas]
        texts |= {_head(member)["name"]: member for member in members}
    return texts


def _head(text: str) -> dict[str, Any]:
    """The keys before the first table, which are read faster than the whole text."""
    return tomllib.loads(text.partition("\n[")[0])


def _with_sigma(family: str, sigma: str) -> str:
    text = re.sub(r"^sigmas = .*\n", "", family, count=1, flags=re.MULTILINE)
    return text.replace('"{sigma}"', sigma).replace("{sigma}", sigma)


def find_spec(name: str, shipped: Shipped = SPECS) -> Path | None:
    """The file of a spec, or None for a shipped spec of that name. A file has priority.

    Raises: UserError if there is neither, and for the file of a family.
    """
    path = Path(name)
    if not path.is_file() and name in shipped:
        return None
    if not path.exists():
        if path.suffix == ".toml" or len(path.parts) > 1:
            raise UserError(
                f"{name}: no such file; give the path of a TOML file, or the name of a shipped {shipped.kind}"
            )
        names = shipped.names()
        listed = ", ".join(get_close_matches(name, names) or names)
        raise UserError(f"{name}: no such {shipped.kind}; give the path of a TOML file or a shipped name: {listed}")
    if "sigmas" in _tables(path):
        raise UserError(
            f"{name}: only shipped {shipped.kind}s come in families with `sigmas`; give the name of one of them, or "
            "remove `sigmas` from a copy and write a number for each {sigma}"
        )
    return path


def load_specs(names: Sequence[str], overrides: Sequence[str]) -> list[RunSpec]:
    """The specs of one command. Raises: UserError, also if two have the same name and would share a run."""
    loaded = [load_named(name, overrides) for name in names]
    seen: set[str] = set()
    for spec in loaded:
        if spec.name in seen:
            raise UserError(f"two specs have the name {spec.name!r} and would share a run; rename one of them")
        seen.add(spec.name)
    return loaded


def load_named(name: str, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec that a command line names.

    If it names own functions, Python finds their modules in the working folder and in the spec's, after all packages.
    Only commands that were given a spec look there.
    """
    if is_training(name):
        raise UserError(f"{name} is a training; use diffsmooth train, then certify the certify.toml that it writes")
    spec = read_named(name, overrides)
    _find_own_modules(name, (spec.denoiser.arch, spec.classifier.arch))
    return spec


def read_named(name: str, overrides: Sequence[str] = ()) -> RunSpec:
    """The spec of a file or the shipped one of that name. Raises: UserError."""
    path = find_spec(name)
    return load_spec(path, overrides) if path else load_spec(SPECS.tables(name), overrides, where=name)


def load_named_training(name: str, overrides: Sequence[str] = ()) -> TrainingSpec:
    """The training that a command line names, as `load_named` finds a spec. Raises: UserError."""
    path = find_spec(name, TRAININGS)
    spec = load_training(path, overrides) if path else load_training(TRAININGS.tables(name), overrides, where=name)
    _find_own_modules(name, (spec.denoiser.arch, "" if spec.classifier is None else spec.classifier.arch))
    return spec


def is_training(name: str) -> bool:
    """Whether a name that may be a spec's or a training's is a training's: by the table [training] of a file."""
    path = Path(name)
    return "training" in _tables(path) if path.is_file() else name not in SPECS and name in TRAININGS


def _tables(path: Path) -> dict[str, Any]:
    """The tables of a file; none if it is not valid, because `load_spec` says what is wrong."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}


def _find_own_modules(name: str, archs: Sequence[str]) -> None:
    if any(is_own(arch) for arch in archs):
        for folder in (Path.cwd(), Path(name).absolute().parent):
            if str(folder) not in sys.path:
                sys.path.append(str(folder))


def load_shipped(name: str, overrides: Sequence[str] = ()) -> RunSpec | None:
    """The shipped spec of this name, if there is one."""
    return load_spec(SPECS.tables(name), overrides, where=name) if name in SPECS else None


def home_of(spec: RunSpec, out: str | None, *, several: bool) -> str:
    """Where the run of a spec is stored: below --out if there are several specs, at --out if there is one."""
    if out is None:
        return f"runs/{spec.name}"
    return f"{out.rstrip('/')}/{spec.name}" if several else out
