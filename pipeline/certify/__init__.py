"""From votes to bounds, radii and curves; and which draws an order needs."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffsmooth.pipeline.certify.bounds import certified_radius, lower_confidence_bound
    from diffsmooth.pipeline.certify.certificates import certify

_HOMES = {"certified_radius": "bounds", "certify": "certificates", "lower_confidence_bound": "bounds"}

__all__ = ["certified_radius", "certify", "lower_confidence_bound"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is used: its module imports pandas."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
