"""Units of a radius: other pixel scales, and the l-infinity norm.

Radii are computed as l2 norms of pixels in [0, 1]. A perturbation is harmless if its l2 norm is below the radius r, so
with d = C H W values per image:

    l2-255          255 r             pixels from 0 to 255
    l2-normalized   r / max std       pixels divided by std per channel: |x| <= max(std) |x / std|
    linf            r / sqrt(d)       |x|_2 <= sqrt(d) |x|_inf
    linf-255        255 r / sqrt(d)

The l2-normalized and linf radii are guaranteed, but are not the largest: the ball around the image is replaced by the
largest ball of the other shape inside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from diffsmooth.pipeline.certify.curve import Curve
from diffsmooth.pipeline.errors import UserError

UNITS = {
    "l2": Curve.unit,
    "l2-255": "l2 radius, pixels 0 to 255",
    "l2-normalized": "l2 radius, pixels divided by std",
    "linf": "l-infinity radius",
    "linf-255": "l-infinity radius, pixels 0 to 255",
}


@dataclass(frozen=True, kw_only=True)
class Images:
    """What a conversion needs to know about the images; None: not known."""

    shape_CHW: tuple[int, ...] | None = None
    std: Sequence[float] | None = None  # per channel, of the normalisation


def factor(unit: str, images: Images) -> float:
    """What a radius is multiplied by. Raises: UserError if the images' shape or std is needed and not known."""
    scale = 255.0 if unit.endswith("-255") else 1.0
    if unit.startswith("linf"):
        if images.shape_CHW is None:
            raise UserError(f"--unit {unit} needs the shape of the images; add --pixels C,H,W, for example 3,32,32")
        scale /= math.sqrt(math.prod(images.shape_CHW))
    if unit == "l2-normalized":
        if images.std is None:
            raise UserError(f"--unit {unit} needs the std of the normalisation; add --std, for example 0.25,0.24,0.26")
        scale /= max(images.std)
    return scale


def converted(curve: Curve, unit: str, images: Images) -> Curve:
    """The curve with its radii in one of UNITS. Raises: UserError as `factor`."""
    if unit == "l2":
        return curve
    scale = factor(unit, images)
    return replace(
        curve,
        radii=curve.radii * scale,
        max_radius=curve.max_radius * scale,
        tested=None if curve.tested is None else curve.tested * scale,
        unit=UNITS[unit],
        # the other conversions hold for lower bounds only
        uppers=curve.uppers * scale if curve.uppers is not None and unit == "l2-255" else None,
    )
