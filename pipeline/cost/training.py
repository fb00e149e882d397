"""The cost of a training: images, steps, FLOPs, GPU-hours and dollars before anything is started.

The FLOPs of a step are those of its loss and of the gradient, counted on the meta device as they are computed: denoised
images and the attacks of FT-CADIS are part of it, and frozen weights have no gradient. Optimizer and average are not
counted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.markup import escape
from torch.utils.flop_counter import FlopCounterMode

from diffsmooth.pipeline.cost.flops import Estimate, facts_of, gpu_cost, on_meta_or_none
from diffsmooth.pipeline.cost.probe import CpuRate, measure_on_one_core
from diffsmooth.pipeline.data.sets import sample_indices
from diffsmooth.pipeline.training.batches import HELD_OUT, Batch
from diffsmooth.pipeline.training.randomness import Randomness
from diffsmooth.pipeline.training.settings import TrainingSpec
from diffsmooth.pipeline.training.tasks import make_task

_COUNTED = 2  # images of the batch that is counted


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """FLOPs for one image: of a training step, and of measuring it after one."""

    step: float
    validation: float


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate(Estimate):
    """The cost of a training from its first step."""

    images: int  # of the data set, without the validation images
    validation_images: int
    image_shape: list[int]
    steps: int
    batch: int
    checkpoints: int
    gflop_per_image: TrainingFlops | None  # in 10^9

    @property
    def measured(self) -> int:
        return self.steps * self.batch

    def describe(self) -> list[str]:
        lines = [
            f"[bold]{escape(self.name)}[/]: {self.steps:,} steps x {self.batch:,} images = {self.measured:,} images, "
            f"{self.measured / self.images:,.3g} epochs of {self.images:,}; {self.checkpoints:,} checkpoints with "
            f"{self.validation_images:,} validation images"
        ]
        if self.gflop_per_image is None:
            lines.append("FLOPs unknown: the training does not run on torch's meta device")
        else:
            lines.append(
                f"GFLOP per step: {self.gflop_per_image.step * self.batch:,.3g}; {self.total_flop:.3g} FLOP in total, "
                f"in {self.precision}"
            )
        if self.cpu is not None:
            lines.append(
                f"measured on this CPU: {self.cpu.draws_per_second_and_core:,.3g} images/s per core, batches of "
                f"{self.cpu.batch_size}"
            )
        return lines


def plan_training(
    spec: TrainingSpec, *, prices: Mapping[str, float | None], utilization: float, probe: bool = False
) -> TrainingEstimate:
    """Estimate the cost of a training, as `plan` does that of a spec.

    Raises: UserError for networks that do not fit.
    """
    facts, training = facts_of(spec.data), spec.training
    images = len(sample_indices(spec.data.samples, facts.size))
    if spec.validation is None:
        held_out = math.ceil(images / HELD_OUT)
        images -= held_out
    else:
        held_out = len(sample_indices(spec.validation.samples, facts_of(spec.validation).size))
    flops = count_training(spec, facts.shape_CHW, facts.num_classes)
    total = None
    if flops is not None:
        total = training.steps * training.batch * flops.step + training.checkpoints * held_out * flops.validation
    return TrainingEstimate(
        name=spec.name,
        total_flop=total,
        precision=training.precision,
        utilization=utilization,
        costs=[gpu_cost(gpu, price, training.precision, total, utilization) for gpu, price in prices.items()],
        cpu=_probe(spec, facts.shape_CHW, facts.num_classes) if probe else None,
        images=images,
        validation_images=held_out,
        image_shape=list(facts.shape_CHW),
        steps=training.steps,
        batch=training.batch,
        checkpoints=training.checkpoints,
        gflop_per_image=None
        if flops is None
        else TrainingFlops(step=flops.step / 1e9, validation=flops.validation / 1e9),
    )


def _batch(spec: TrainingSpec, shape: Sequence[int], size: int) -> Batch:
    random = Randomness(spec.training.seed, range(size))
    return Batch(random.uniform("image", math.prod(shape)).view(size, *shape), torch.arange(size) % 2, random, 1.0)


def count_training(spec: TrainingSpec, shape: tuple[int, int, int], num_classes: int) -> TrainingFlops | None:
    """Count the FLOPs of a training; None if a network, such as an own function's, does not run on the meta device."""

    def count() -> TrainingFlops:
        task, batch = make_task(spec, torch.device("meta"), shape, num_classes), _batch(spec, shape, _COUNTED)
        with FlopCounterMode(display=False) as step:
            task.loss(batch).backward()
        with FlopCounterMode(display=False) as validation, torch.no_grad():
            task.measure(batch)
        return TrainingFlops(step=step.get_total_flops() / _COUNTED, validation=validation.get_total_flops() / _COUNTED)

    return on_meta_or_none(count)


def _probe(spec: TrainingSpec, shape: tuple[int, int, int], num_classes: int) -> CpuRate:
    """Measure loss and gradient on one core, with random images."""
    task = make_task(spec, torch.device("cpu"), shape, num_classes)

    def compute(size: int) -> None:
        task.loss(_batch(spec, shape, size)).backward()
        task.network.zero_grad()

    return measure_on_one_core(compute, smallest=2, random_weights=[])
