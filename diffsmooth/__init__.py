"""diffsmooth: certify image classifiers against l2 attacks with DiffSmooth and its relatives.

    import diffsmooth as ds

    result = ds.certify(model, images, labels, sigma=0.25)  # in this process
    bounds = ds.attack(model, images, labels, sigma=0.25, certified=result)
    result = ds.certify("mnist", out="runs/mnist")          # a spec, on Ray
    run = ds.open_run("runs/mnist")

Everything here is imported from the modules behind it when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jobs.api import AttackResult, OpenRun, Result, analyze, attack, cascade, certify, compare, load_spec, open_run
    from pipeline.certify import certified_radius, lower_confidence_bound
    from pipeline.compare import Comparison
    from pipeline.curve import Curve
    from pipeline.errors import RunError, Stopped, UserError
    from pipeline.spec import RunSpec

_HOMES = {
    "AttackResult": "jobs.api",
    "OpenRun": "jobs.api",
    "Result": "jobs.api",
    "analyze": "jobs.api",
    "attack": "jobs.api",
    "cascade": "jobs.api",
    "certify": "jobs.api",
    "compare": "jobs.api",
    "load_spec": "jobs.api",
    "open_run": "jobs.api",
    "certified_radius": "pipeline.certify",
    "lower_confidence_bound": "pipeline.certify",
    "Comparison": "pipeline.compare",
    "Curve": "pipeline.curve",
    "RunError": "pipeline.errors",
    "Stopped": "pipeline.errors",
    "UserError": "pipeline.errors",
    "RunSpec": "pipeline.spec",
}

__all__ = [
    "AttackResult",
    "Comparison",
    "Curve",
    "OpenRun",
    "Result",
    "RunError",
    "RunSpec",
    "Stopped",
    "UserError",
    "analyze",
    "attack",
    "cascade",
    "certified_radius",
    "certify",
    "compare",
    "load_spec",
    "lower_confidence_bound",
    "open_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'diffsmooth' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
