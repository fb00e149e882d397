"""The shipped specs, and how the argument SPEC of a command is found and loaded."""

import sys
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.arch import is_own
from diffsmooth.pipeline.spec import RunSpec, load_spec
from diffsmooth.pipeline.training.settings import TrainingSpec, load_training

SPECS = Path(__file__).parent
TRAININGS = SPECS / "training"


def find_spec(name: str, folder: Path = SPECS, kind: str = "spec") -> Path:
    """The path of a spec: a file, or the name of one that ships with the package in `folder`.

    Raises: UserError, which says that there is no such `kind`.
    """
    shipped, path = folder / f"{name}.toml", Path(name)
    if path.is_file() or not shipped.is_file():
        if not path.exists():
            if path.suffix == ".toml" or len(path.parts) > 1:
                raise UserError(f"{name}: no such file; give the path of a TOML file, or the name of a shipped {kind}")
            names = sorted(path.stem for path in folder.glob("*.toml"))
            listed = ", ".join(get_close_matches(name, names) or names)
            raise UserError(f"{name}: no such {kind}; give the path of a TOML file or a shipped name: {listed}")
        return path
    return shipped


def load_specs(names: Sequence[str], overrides: Sequence[str]) -> list[RunSpec]:
    """The specs of one command. Raises: UserError, also if two have the same name and would share a run."""
    loaded = [load_named(name, overrides) for name in names]
    seen: set[str] = set()
    for spec in loaded:
        if spec.name in seen:
            raise UserError(f"two specs have the name {spec.name!r} and would share a run; rename one of them")
        seen.add(spec.name)
    return loaded


def load_named(name: str, overrides: Sequence[str]) -> RunSpec:
    """The spec that a command line names.

    If it names own functions, Python finds their modules in the working folder and in the spec's, after all packages.
    Only commands that were given a spec look there.
    """
    if is_training(name):
        raise UserError(f"{name} is a training; use diffsmooth train, then certify the certify.toml that it writes")
    path = find_spec(name)
    spec = load_spec(path, overrides)
    _find_own_modules(path, (spec.denoiser.arch, spec.classifier.arch))
    return spec


def load_named_training(name: str, overrides: Sequence[str]) -> TrainingSpec:
    """The training that a command line names, as `load_named` finds a spec. Raises: UserError."""
    path = find_spec(name, TRAININGS, "training")
    spec = load_training(path, overrides)
    _find_own_modules(path, (spec.denoiser.arch, "" if spec.classifier is None else spec.classifier.arch))
    return spec


def is_training(name: str) -> bool:
    """Whether a name that may be a spec's or a training's is a training's: by the table [training] of a file."""
    path = Path(name)
    if not path.is_file():
        return not (SPECS / f"{name}.toml").is_file() and (TRAININGS / f"{name}.toml").is_file()
    try:
        return "training" in tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # `load_spec` says what is wrong


def _find_own_modules(path: Path, archs: Sequence[str]) -> None:
    if any(is_own(arch) for arch in archs):
        for folder in (Path.cwd(), path.absolute().parent):
            if str(folder) not in sys.path:
                sys.path.append(str(folder))


def load_shipped(name: str, overrides: Sequence[str] = ()) -> RunSpec | None:
    """The spec of this name that ships with the package, if there is one."""
    names = {path.stem: path for path in SPECS.glob("*.toml")}
    return load_spec(names[name], overrides) if name in names else None


def home_of(spec: RunSpec, out: str | None, *, several: bool) -> str:
    """Where the run of a spec is stored: below --out if there are several specs, at --out if there is one."""
    if out is None:
        return f"runs/{spec.name}"
    return f"{out.rstrip('/')}/{spec.name}" if several else out
