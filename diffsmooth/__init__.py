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
    from diffsmooth.api import (
        AttackResult,
        OpenRun,
        Result,
        analyze,
        attack,
        cascade,
        certify,
        compare,
        load_spec,
        open_run,
    )
    from diffsmooth.pipeline.certify.bounds import certified_radius, lower_confidence_bound
    from diffsmooth.pipeline.certify.compare import Comparison
    from diffsmooth.pipeline.certify.curve import Curve
    from diffsmooth.pipeline.errors import RunError, Stopped, UserError
    from diffsmooth.pipeline.spec import RunSpec

_HOMES = {
    "AttackResult": "diffsmooth.api",
    "OpenRun": "diffsmooth.api",
    "Result": "diffsmooth.api",
    "analyze": "diffsmooth.api",
    "attack": "diffsmooth.api",
    "cascade": "diffsmooth.api",
    "certify": "diffsmooth.api",
    "compare": "diffsmooth.api",
    "load_spec": "diffsmooth.api",
    "open_run": "diffsmooth.api",
    "certified_radius": "diffsmooth.pipeline.certify.bounds",
    "lower_confidence_bound": "diffsmooth.pipeline.certify.bounds",
    "Comparison": "diffsmooth.pipeline.certify.compare",
    "Curve": "diffsmooth.pipeline.certify.curve",
    "RunError": "diffsmooth.pipeline.errors",
    "Stopped": "diffsmooth.pipeline.errors",
    "UserError": "diffsmooth.pipeline.errors",
    "RunSpec": "diffsmooth.pipeline.spec",
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
