"""The loop of a training: gradients of all shards, one step of AdamW, moving average, metrics, checkpoints.

A step's batch is cut into `shards`, which the workers share. Each shard's batch norms use its own statistics, and the
running statistics move to the mean over all shards. A step is therefore the same for every number of workers up to
the order of sums, and a resumed training is the same as an uninterrupted one.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diffsmooth.pipeline.errors import RunError, Stopped
from diffsmooth.pipeline.models.device import torch_settings
from diffsmooth.pipeline.storage.store import Store
from diffsmooth.pipeline.training import checkpoint
from diffsmooth.pipeline.training.batches import Batch, Split, TrainingBatches, open_images, validation_batches
from diffsmooth.pipeline.training.checkpoint import Checkpoint, History, Row, claim, newest_step
from diffsmooth.pipeline.training.outcome import identity_of, write_metrics, write_outcome
from diffsmooth.pipeline.training.settings import Training, TrainingSpec
from diffsmooth.pipeline.training.tasks import Task, make_task
from diffsmooth.pipeline.training.world import World

State = dict[str, Tensor]


def learning_rate(settings: Training, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then half a cosine down to zero."""
    rise = min(1.0, (step + 1) / max(settings.warmup, 1))
    return settings.learning_rate * min(rise, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))


def decay(settings: Training, step: int) -> float:
    """Return the weight of the old moving average, which is small in the first steps."""
    return min(settings.ema, (1 + step) / (10 + step))


class Diverged(RunError):
    """The loss or the gradient of a step is not finite, in all workers alike."""


class Trainer:
    """The state of a training, and the steps that change it."""

    def __init__(self, spec: TrainingSpec, task: Task, device: torch.device, world: World) -> None:
        self.spec, self.task, self.step = spec, task, 0
        self.rows: list[Row] = []
        self._settings, self._device, self._world = spec.training, device, world
        self._parameters = [one for one in task.network.parameters() if one.requires_grad]
        self._is_partial = any(not one.requires_grad for one in task.network.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=self._settings.learning_rate, weight_decay=self._settings.weight_decay
        )
        self.average: State = {name: one.clone() for name, one in self._state().items()}
        self._norms = [one for one in task.network.modules() if isinstance(one, _BatchNorm) and not self._is_partial]
        self._loss_sum, self._loss_count, self._seconds = 0.0, 0, 0.0

    def _state(self) -> State:
        """Return the tensors that a training changes: all, or the parameters that are not frozen if others are."""
        if self._is_partial:
            return {name: one.detach() for name, one in self.task.network.named_parameters() if one.requires_grad}
        return self.task.network.state_dict()

    def _load(self, state: State) -> None:
        """Copy tensors into the network. Raises: RuntimeError unless they are all that a training changes."""
        if state.keys() != self._state().keys():
            raise RuntimeError("other tensors")
        self.task.network.load_state_dict(state, strict=False)

    def take_step(self, batches: Sequence[Batch]) -> float:
        """Train on this worker's shards of one batch; return the loss over all shards.

        Raises: Diverged if the loss or the gradient is not finite. The state is then that of the step before.
        """
        started = time.monotonic()
        settings, network = self._settings, self.task.network
        # frozen parts keep the statistics of their batch norms, and have no dropout
        network.train(not self._is_partial)
        self._optimizer.zero_grad(set_to_none=False)
        statistics = self._statistics()
        before = [one.clone() for one in statistics]
        moved = [torch.zeros_like(one) for one in statistics]
        total = torch.zeros(1, device=self._device)
        for batch in batches:
            _set(statistics, before)
            with self._own_randomness(batch), self._autocast():
                loss = self.task.loss(batch)
            share = len(batch.x_BCHW) / settings.batch
            (loss * share).backward()
            total += loss.detach().float() * share
            for sum_, one in zip(moved, statistics, strict=True):
                sum_ += one * share
        gradients = [self._gradient(one) for one in self._parameters]
        self._world.add_up([*gradients, *moved, total])
        norm = nn.utils.clip_grad_norm_(self._parameters, settings.clip)
        if not (math.isfinite(float(total)) and math.isfinite(float(norm))):
            _set(statistics, before)
            raise Diverged(self._diverged(float(total)))
        _set(statistics, moved)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        self._optimizer.step()
        self._move_average()
        self.step += 1
        self._loss_sum, self._loss_count = self._loss_sum + float(total), self._loss_count + 1
        self._seconds += time.monotonic() - started
        return float(total)

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> Tensor:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _statistics(self) -> list[Tensor]:
        """Return the running statistics of all batch norms that track them."""
        found = chain.from_iterable((one.running_mean, one.running_var) for one in self._norms)
        return [one for one in found if one is not None]

    def _diverged(self, loss: float) -> str:
        return (
            f"the training diverged: the loss of step {self.step + 1} is {loss:g} or its gradient is not finite, and "
            "earlier checkpoints are kept; use a lower training.learning_rate"
        )

    @contextlib.contextmanager
    def _own_randomness(self, batch: Batch) -> Iterator[None]:
        """Let layers with inner randomness, such as dropout, draw from a generator of this shard."""
        cuda = [self._device] if self._device.type == "cuda" else []
        number = int(batch.randomness.uniform("layers")[0, 0] * 2**24)
        with torch.random.fork_rng(devices=cuda):
            torch.default_generator.manual_seed(number)
            if cuda:
                torch.cuda.manual_seed(number)
            yield

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.precision == "bf16")

    @torch.no_grad()
    def _move_average(self) -> None:
        weight = 1 - decay(self._settings, self.step)
        for name, value in self._state().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, weight)
            else:
                self.average[name].copy_(value)

    @torch.no_grad()
    def measure(self, split: Split) -> Row:
        """Measure the averaged network on the validation images; append and return the row of metrics."""
        started, network = time.monotonic(), self.task.network
        trained = {name: one.clone() for name, one in self._state().items()}
        self._load(self.average)
        network.eval()
        sums: dict[str, float] = {}
        world = self._world
        for batch in validation_batches(split.validation, self._settings.seed, world.rank, world.size):
            for name, value in self.task.measure(batch).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        self._load(trained)
        names = world.from_first(sorted(sums))  # the first worker has a batch, others may have none
        values = torch.tensor([sums.get(name, 0.0) for name in names], device=self._device)
        world.add_up([values])
        self._seconds += time.monotonic() - started
        row: Row = {
            "step": self.step,
            "loss": self._loss_sum / max(self._loss_count, 1),
            "learning_rate": learning_rate(self._settings, max(self.step - 1, 0)),
            **{name: value / len(split.validation) for name, value in zip(names, values.tolist(), strict=True)},
            "seconds": round(self._seconds, 3),
        }
        self._loss_sum, self._loss_count = 0.0, 0
        self.rows.append(row)
        return row

    def state(self, training: str) -> Checkpoint:
        """Return everything that a resumed training needs; `training` says to which one it belongs."""
        tensors = {f"network.{name}": one for name, one in self._state().items()}
        tensors |= {f"average.{name}": one for name, one in self.average.items()}
        for index, slots in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": one for name, one in slots.items()}
        history = History(step=self.step, rows=self.rows, loss_sum=self._loss_sum, loss_count=self._loss_count,
                          seconds=self._seconds, training=training)  # fmt: skip
        return Checkpoint(history, tensors)

    def restore(self, found: Checkpoint) -> None:
        """Continue from a checkpoint. Raises: RunError for one of another network."""

        def part(prefix: str) -> State:
            return {k.removeprefix(prefix): one for k, one in found.tensors.items() if k.startswith(prefix)}

        try:
            self._load(part("network."))
            self.average = {name: one.to(self._device) for name, one in part("average.").items()}
            slots: dict[int, State] = {}
            for key, one in part("optimizer.").items():
                index, _, name = key.partition(".")
                slots.setdefault(int(index), {})[name] = one
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": slots, "param_groups": groups})
        except (RuntimeError, ValueError, KeyError) as error:
            raise RunError(
                f"the checkpoint of step {found.history.step} does not fit the network ({type(error).__name__}); use "
                "another --out"
            ) from error
        history = found.history
        self.step, self.rows, self._seconds = history.step, list(history.rows), history.seconds
        self._loss_sum, self._loss_count = history.loss_sum, history.loss_count


def _set(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for one, value in zip(tensors, values, strict=True):
        one.copy_(value)


class Report(NamedTuple):
    """What the loop says after a step."""

    step: int
    loss: float
    row: Row | None  # metrics, if they were measured


def run_training(
    spec: TrainingSpec,
    store: Store,
    *,
    device: torch.device,
    world: World,
    on_step: Callable[[Report], None] = lambda report: None,
    stopped_by: Callable[[], int | None] = lambda: None,
) -> list[Row]:
    """Train from the newest checkpoint to the end, and write the results; return the metrics.

    Raises: UserError, RunError; Stopped if `stopped_by` returns a signal, after a last checkpoint.
    """
    split = open_images(spec)
    task = make_task(spec, device, split.train.shape, split.train.num_classes)
    trainer = Trainer(spec, task, device, world)
    identity, claimed = None, ""
    if world.rank == 0:
        store.prepare()
        identity = identity_of(spec, split)
        claimed = claim(store, identity)
    claimed = world.from_first(claimed)
    if newest := world.from_first(newest_step(store) if world.rank == 0 else 0):
        trainer.restore(checkpoint.read(store, newest, claimed))
    with torch_settings(spec.training.precision, deterministic=True):
        batches = TrainingBatches(spec, split.train, world.rank, world.size)
        for mine in batches.steps(trainer.step):
            loss, row = trainer.take_step(mine), None
            if spec.training.is_checkpoint(trainer.step):
                row = trainer.measure(split)
                _save(store, trainer, world, claimed)
            on_step(Report(trainer.step, loss, row))
            if (signal := stopped_by()) is not None and trainer.step < spec.training.steps:
                _save(store, trainer, world, claimed)
                raise Stopped(signal)
    if identity is not None:
        write_outcome(store, spec, split, identity, trainer.average, trainer.rows)
    return trainer.rows


def check_training(spec: TrainingSpec, store: Store) -> None:
    """Open the images, build the networks and claim the storage, so that no worker starts for a mistake.

    Raises: UserError, RunError.
    """
    split = open_images(spec)
    make_task(spec, torch.device("cpu"), split.train.shape, split.train.num_classes)
    store.prepare()
    claim(store, identity_of(spec, split))


def _save(store: Store, trainer: Trainer, world: World, training: str) -> None:
    if world.rank == 0:
        checkpoint.write(store, trainer.state(training))
        write_metrics(store, trainer.rows)
