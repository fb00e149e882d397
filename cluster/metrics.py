"""What Prometheus sees of a run: ray_diffsmooth_* on each node's metrics port."""

from ray.util.metrics import Counter, Histogram

from diffsmooth.cluster.connect import line_of
from diffsmooth.cluster.listener import Listener
from diffsmooth.cluster.worker import Receipt


class Metrics(Listener):
    """What Prometheus sees of a run: ray_diffsmooth_* on each node's metrics port."""

    def __init__(self, run: str) -> None:
        tags = ("run", "device")
        self._run = run
        self._draws = Counter("diffsmooth_draws", "Draws whose votes are stored.", tags)
        self._duplicates = Counter("diffsmooth_duplicate_blocks", "Blocks computed although already stored.", tags)
        self._failures = Counter(
            "diffsmooth_store_failures", "Writes to the store that lost their answer or met another one.", tags
        )
        bounds = [0.1, 1, 10, 30, 60, 120, 300, 600, 1800]
        self._seconds = Histogram("diffsmooth_task_seconds", "Seconds per task.", bounds, tags)
        self._lost = Counter("diffsmooth_lost_tasks", "Attempts that ended in an error.", ("run", "error"))

    def finished(self, receipt: Receipt) -> None:
        tags = {"run": self._run, "device": receipt.device}
        self._seconds.observe(receipt.seconds, tags)
        for counter, value in (
            (self._draws, receipt.stored),
            (self._duplicates, len(receipt.duplicates)),
            (self._failures, receipt.store_failures),
        ):
            if value:  # a counter accepts only values above 0
                counter.inc(value, tags)

    def lost(self, error: Exception) -> None:
        self._lost.inc(1, {"run": self._run, "error": line_of(error).partition(":")[0]})
