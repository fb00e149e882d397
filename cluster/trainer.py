"""Trains on Ray Train: one worker per GPU or CPU, which Ray starts again after a failure. The only import of ray.train.

The workers run the loop of `pipeline.training.loop` and add up their gradients with NCCL or Gloo. The checkpoints are
in the training's own storage, so that after a failure, with as many workers as Ray finds then, the loop resumes there.
"""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchTrainer, get_device

from diffsmooth.cluster.cast import Cluster
from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.storage.store import open_store
from diffsmooth.pipeline.training import checkpoint
from diffsmooth.pipeline.training.checkpoint import Row
from diffsmooth.pipeline.training.loop import Diverged, Report, run_training
from diffsmooth.pipeline.training.settings import TrainingSpec
from diffsmooth.pipeline.training.world import World

MOST_FAILURES = 8  # of workers, before the training is given up; lost spot nodes count separately


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many workers there are: from `least` to `most`, as nodes come and go."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "Workers":
        """Parse K or K:L. Raises: UserError."""
        low, _, high = text.partition(":")
        if not (low.isdigit() and (high or low).isdigit() and 1 <= int(low) <= int(high or low)):
            raise UserError(f"--workers {text!r} is not K or K:L with 1 <= K <= L; use, for example, 4 or 2:8")
        return cls(least=int(low), most=int(high or low))


def train_on_ray(spec: TrainingSpec, home: str, cluster: Cluster, workers: Workers) -> Row:
    """Train with Ray Train until the end; return the last metrics.

    Raises: UserError for more workers than shards; RunError for a training that diverges or fails too often.
    """
    if workers.most > spec.training.shards:
        raise UserError(
            f"--workers {workers.most} exceeds training.shards = {spec.training.shards}, the parts of a batch; use "
            f"fewer workers, or training.shards = {workers.most}"
        )
    store = open_store(home)
    count: Any = workers.least if workers.least == workers.most else (workers.least, workers.most)
    with tempfile.TemporaryDirectory(prefix="diffsmooth-train-") as state:
        trainer = TorchTrainer(
            _work,
            train_loop_config={
                "spec": spec.model_dump_json(exclude_unset=True), "home": store.location, "threads": cluster.threads
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=count, use_gpu=cluster.on_gpu, resources_per_worker={"CPU": cluster.threads}
                | ({"GPU": 1} if cluster.on_gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                storage_path=state, failure_config=ray.train.FailureConfig(max_failures=MOST_FAILURES)
            ),
        )  # fmt: skip
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise _cause(error) from error
    last = checkpoint.read(store, checkpoint.newest_step(store)).history
    if last.step < spec.training.steps:  # the only reason for which workers end early without an error
        raise RunError(
            f"the training diverged after the checkpoint of step {last.step}; use a lower training.learning_rate"
        )
    return last.rows[-1]


def _work(config: dict[str, Any]) -> None:
    """The loop in one worker."""
    context, device = ray.train.get_context(), get_device()
    torch.set_num_threads(config["threads"])
    world = World(rank=context.get_world_rank(), size=context.get_world_size())

    def on_step(report: Report) -> None:
        if report.row is not None:
            ray.train.report(report.row)

    spec = TrainingSpec.model_validate_json(config["spec"])
    with suppress(Diverged):  # in all workers at the same step: another try would end in the same way
        run_training(spec, open_store(config["home"]), device=device, world=world, on_step=on_step)


def _cause(error: Exception) -> Exception:
    """Return the user's mistake or the failure that a worker raised."""
    failures: Callable[[], Any] = getattr(error, "worker_failures", {}).values
    for one in failures():
        cause = getattr(one, "cause", None) or getattr(one, "__cause__", None) or one
        if isinstance(cause, UserError | RunError):
            return cause
    return RunError(f"the training failed on Ray ({first_line(error)}); run the same command again to resume")
