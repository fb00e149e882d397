"""A request for an attack, as its options or arguments are given, and the attack that it describes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from diffsmooth.pipeline.attack.foreign import attack_code
from diffsmooth.pipeline.attack.record import Attack
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.records import first_problem
from diffsmooth.pipeline.votes.run import Run

_LADDER = 8.0  # the largest default eps, in sigma
_HALVINGS = 5  # default eps


@dataclass(frozen=True, kw_only=True)
class AttackRequest:
    """What to attack with; the fields are the options of the command, None for its default."""

    attack: str = "pgd"
    eps: Sequence[float] = ()
    samples: str | None = None
    refine: int | None = None
    steps: int | None = None
    draws: int | None = None
    restarts: int | None = None
    n0: int | None = None
    n: int | None = None
    alpha: float | None = None
    seed: int = 0


def attack_of(request: AttackRequest, run: Run, *, alpha: float, pixels: int) -> Attack:
    """The attack that a request describes, for images of so many values. Raises: UserError for impossible values."""
    reach = math.sqrt(pixels)
    for eps in request.eps:
        if not 0 < eps <= reach:
            raise UserError(
                f"--eps {eps:g} must be above 0 and at most {math.floor(1000 * reach) / 1000:g}, the distance of "
                "opposite corners of the image space"
            )
    largest = min(_LADDER * run.sigma, reach)
    ladder = sorted(set(request.eps), reverse=True) or [largest / 2**step for step in range(_HALVINGS)]
    given = {
        name: value
        for name in ("refine", "steps", "draws", "restarts", "n0", "n", "seed")
        if (value := getattr(request, name)) is not None
    }
    code = attack_code(request.attack)
    level = alpha if request.alpha is None else request.alpha
    try:
        return Attack(attack=request.attack, eps=ladder, alpha=level, votes_id=run.votes_id, code=code, **given)
    except ValidationError as error:
        raise UserError(f"--{first_problem(error)}") from None
