"""Which code an `arch` of a spec names. Imports nothing, so that specs are checked before torch is imported."""

TORCHVISION, TIMM = "torchvision", "timm"
LIBRARIES = (TORCHVISION, TIMM)  # prefixes of arch that name a library's models, not an own module


def is_own(arch: str) -> bool:
    """Return whether an architecture is an own function, not one of ours or of a library."""
    return ":" in arch and arch.partition(":")[0] not in LIBRARIES
