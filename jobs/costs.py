"""The warning about expensive orders."""

from collections.abc import Callable, Sequence
from contextlib import suppress

from diffsmooth.pipeline.cost.flops import gpu_hours
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import RunSpec

MANY_HOURS = 100  # of a GPU: an order above it needs confirmation
_FEW_DRAWS = 100_000  # never need so many hours, whatever the networks; their FLOPs are not counted


def warn_of_cost(wanted: Sequence[tuple[RunSpec, int | None]], confirm: Callable[[str], None]) -> None:
    """Pass `confirm` a warning if specs, each with its draws (None: all), need many GPU-hours together."""
    total = 0.0
    for spec, draws in wanted:
        if spec.compute.device != "cpu" and (draws is None or draws > _FEW_DRAWS):
            with suppress(UserError):  # weights that only the cluster can load cannot be counted here
                total += gpu_hours(spec, draws) or 0.0
    if total > MANY_HOURS:
        confirm(
            f"this order needs at least {total:,.0f} GPU-hours on H100s at 40 % of their peak; use diffsmooth plan for "
            "other GPUs"
        )
