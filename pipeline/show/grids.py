"""The radii of a table, from the text START:STOP:STEP."""

import math
from decimal import Decimal, DecimalException

import numpy as np
from numpy.typing import NDArray

from diffsmooth.pipeline.errors import UserError

_MOST_RADII = 10_000


def parse_grid(grid: str, float_grid: bool = False) -> NDArray[np.float64]:
    """The radii of --grid: START, START + STEP, ... up to STOP: exact decimals, or floats as in published tables.

    70 steps of 0.005 are 0.35 in decimals but 0.35000000000000003 in floats, which a radius of 0.35 does not reach.
    """
    try:
        start, stop, step = map(Decimal, grid.split(":"))
        if not all(math.isfinite(float(value)) for value in (start, stop, step)):
            raise ValueError
    except (ValueError, DecimalException):
        raise UserError(f"--grid {grid} must be START:STOP:STEP in decimal numbers, for example 0:1.5:0.25") from None
    if float(step) <= 0:
        raise UserError(f"--grid {grid}: the step {step} must be above 0")
    if not 0 <= start <= stop:
        raise UserError(f"--grid {grid}: the radii must satisfy 0 <= START <= STOP")
    if (stop - start) / _MOST_RADII >= step:
        raise UserError(f"--grid {grid}: more than {_MOST_RADII:,} radii")
    if float_grid:
        return np.arange(float(start), float(stop) + float(step), float(step))
    return np.array([float(start + index * step) for index in range(int((stop - start) // step) + 1)])
