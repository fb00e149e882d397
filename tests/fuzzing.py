"""How the fuzz tests run: 200 deterministic examples of each reader, or DIFFSMOOTH_FUZZ random ones (`make soak`)."""

import os

from hypothesis import HealthCheck, settings

_EXAMPLES = os.environ.get("DIFFSMOOTH_FUZZ")

FUZZ = settings(
    max_examples=int(_EXAMPLES or 200),
    derandomize=_EXAMPLES is None,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
