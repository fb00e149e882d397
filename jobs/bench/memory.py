"""The memory of this process, for all benchmarks."""

import resource
import sys


def peak_memory() -> int:
    """The largest resident size of this process since its start, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
