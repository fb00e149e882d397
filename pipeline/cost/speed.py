"""How fast a spec's f casts votes, in several batch sizes and precisions.

Sides take turns in one process, each at its fastest batch size:

- `bare`: f's networks alone, on data that are already on the device; if f is compiled, it is one program, and all of f;
- `pipeline`: `cast_votes`;
- rivals: other programs that compute the scores of f. `benchmarks/` has the published algorithm.

Ratios are medians, over the rounds, of two rates of the same round. With one CPU thread the clock is the CPU time of
the process. Other load on the machine does not affect it, and it includes the noise threads.

Shapes: B batch, C channels, H W image, K classes.
"""

import dataclasses
import math
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.casting import CastOptions, cast_votes, noisy_images
from diffsmooth.pipeline.cost.flops import FlopsPerDraw, flops_per_draw, in_gflop
from diffsmooth.pipeline.cost.probe import with_weights_at_hand
from diffsmooth.pipeline.data.images import UNLABELLED, Sample
from diffsmooth.pipeline.data.sets import DATASETS, known_facts, open_dataset, sample_indices
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.models.denoisers import DiffusionDenoiser
from diffsmooth.pipeline.models.device import device_of, torch_settings
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.smoothing import DTYPES, BaseClassifier, base_classifier, resolve_networks
from diffsmooth.pipeline.spec import RunSpec

_BATCH_SIZES = {"cpu": (8, 16, 32, 64, 128, 256), "cuda": (64, 128, 256, 512, 1024, 2048, 4096)}
_IMAGES = 20  # samples over which the draws of an agreement are spread


class Effort(NamedTuple):
    """How long the benchmark measures."""

    rounds: int = 5
    seconds: float = 1.0  # of each side in a round; at least one batch
    agreement_draws: int = 200


DEFAULT_EFFORT = Effort()


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How our votes and scores compare with those of another f, on the same noise."""

    draws: int
    equal: int  # draws with the same vote
    largest_difference: float  # of two scores, each normalised to sum 1


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The speed of one side at one batch size."""

    side: str
    precision: str
    batch_size: int
    draws_per_second: float


@dataclass(frozen=True, kw_only=True)
class SpeedFigures:
    """Everything that is measured; dictionaries have a key per side unless a comment says otherwise."""

    name: str
    device: str
    clock: str  # "cpu" or "wall"
    threads: int | None
    precision: str
    random_weights: list[str]  # networks that were measured with random weights
    random_images: bool
    batch_size: dict[str, int]
    draws_per_second: dict[str, float]
    rounds: list[dict[str, float]]
    pipeline_over: dict[str, float]  # the ratio of the pipeline's rate to that of each other side
    warm_up_seconds: dict[str, float]
    gflop_per_draw: FlopsPerDraw | None
    gflop_per_second: float | None
    peak_gflop_per_second: float
    share_of_peak: float | None
    peak_memory_bytes: dict[str, int]
    agreement: dict[str, Agreement]  # by what the pipeline is compared with: a rival or a precision
    sweep: list[Rate]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class Side:
    """One of the programs that are compared; `tune` fills in what it measures."""

    name: str
    precision: str
    run: Callable[[int, int], object]  # processes a number of batches, given batch size and number
    warm_up: dict[int, float] = field(default_factory=dict)  # batch size -> wall seconds of the first batch
    rates: dict[int, float] = field(default_factory=dict)  # batch size -> draws per second

    @property
    def best_size(self) -> int:
        return max(self.rates, key=lambda size: self.rates[size])

    def batches(self, seconds: float) -> int:
        """Return how many batches of the best size take so many seconds."""
        return math.ceil(seconds * self.rates[self.best_size] / self.best_size)

    def rate(self, batch_size: int, batches: int, clock: Callable[[], float]) -> float:
        """Measure draws per second."""
        with torch_settings(self.precision):
            start = clock()
            self.run(batch_size, batches)
            return batch_size * batches / (clock() - start)

    def tune(self, clock: Callable[[], float], batch_sizes: Sequence[int], seconds: float) -> None:
        """Measure ascending batch sizes until the rate falls or memory is exhausted."""
        for batch_size in sorted(batch_sizes):
            try:
                start = time.perf_counter()
                self.rate(batch_size, 1, clock)
                self.warm_up[batch_size] = time.perf_counter() - start
                first = self.rate(batch_size, 1, clock)
                batches = math.ceil(seconds / 2 * first / batch_size)
                # the better of two, because other load on the machine can only slow a side down
                self.rates[batch_size] = max(self.rate(batch_size, batches, clock) for _ in range(2))
            except torch.OutOfMemoryError:
                break
            if self.rates[batch_size] < 0.85 * max(self.rates.values()):
                break
        if not self.rates:
            raise UserError(
                f"a batch of {min(batch_sizes)} draws exceeds the device's memory; use a smaller --batch-size"
            )

    def sweep(self) -> list[Rate]:
        return [
            Rate(side=self.name, precision=self.precision, batch_size=size, draws_per_second=rate)
            for size, rate in self.rates.items()
        ]


class Rival(NamedTuple):
    """Another program that computes the scores of f, up to a factor."""

    side: Side
    scores: Callable[[Tensor], Tensor]


class Pipeline:
    """A spec's f as it certifies, and some samples. Weights and images that are not on this machine are random.

    `threads` are those of a CPU; without `cuda_graphs`, a compiled f has none. `f` is the spec's, if it is loaded.

    Raises: UserError for a spec that cannot be certified and for a missing device.
    """

    def __init__(
        self, spec: RunSpec, *, threads: int = 1, f: BaseClassifier | None = None, cuda_graphs: bool = True
    ) -> None:
        resolve_networks(spec)
        self.device, self.threads = device_of(spec), threads
        self.timed_by = "cpu" if self.device.type == "cpu" and threads == 1 else "wall"
        if self.device.type == "cpu":
            torch.set_num_threads(threads)
        self.spec, self.random_weights = with_weights_at_hand(spec)
        self.samples, self.num_classes, self.random_images = _samples(spec)
        self.noise = Noise(0, spec.smoothing.sigma, spec.smoothing.noise_grid)
        self.sample, (image_CHW, _, _) = next(iter(self.samples.items()))
        self.image_CHW = torch.from_numpy(image_CHW).to(self.device)
        f = f or base_classifier(self.spec, self.device, image_CHW.shape, self.num_classes)
        self.f = BaseClassifier(  # one of its own, because it may be compiled
            denoiser=f.denoiser,
            classifier=f.classifier,
            local_noise_MCHW=f.local_noise_MCHW,
            sigma=spec.smoothing.sigma,
            num_classes=self.num_classes,
        )
        if spec.compute.compile:
            self.f.compile(cuda_graphs=cuda_graphs)

    def clock(self) -> float:
        if self.timed_by == "cpu":
            return time.process_time()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def in_precision(self, precision: str) -> "Pipeline":
        smoothing = self.spec.smoothing.model_copy(update={"precision": precision})
        return Pipeline(self.spec.model_copy(update={"smoothing": smoothing}), threads=self.threads)

    def sides(self) -> list[Side]:
        precision = self.spec.smoothing.precision
        bare = self._run_f if self.spec.compute.compile else self._run_networks
        return [Side("bare", precision, bare), Side("pipeline", precision, self.cast)]

    def _run_f(self, batch_size: int, batches: int) -> None:
        x_BCHW = self._random_images(batch_size)
        for _ in range(batches):
            self.f(x_BCHW)

    @torch.inference_mode()
    def _run_networks(self, batch_size: int, batches: int) -> None:
        f = self.f
        x_BCHW = self._random_images(batch_size * len(f.local_noise_MCHW))
        for _ in range(batches):
            if isinstance(f.denoiser, DiffusionDenoiser):
                for t in f.denoiser.timesteps:
                    f.denoiser.predict_eps(x_BCHW[:batch_size], t)
            else:
                f.denoise(x_BCHW[:batch_size])
            f.classifier(x_BCHW)

    def _random_images(self, number: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.rand(number, *self.image_CHW.shape, generator=generator, device=self.device)

    def cast(self, batch_size: int, batches: int) -> None:
        block = Block(self.sample, "estimation", 0, batch_size * batches)
        for _ in cast_votes(self.f, [block], self.samples, self.noise, CastOptions(batch_size)):
            pass

    def scores(self, x_BCHW: Tensor) -> Tensor:
        with torch_settings(self.spec.smoothing.precision):
            return self.f(x_BCHW)

    def agreement(self, others: Callable[[Tensor], Tensor], batch_size: int, least_draws: int) -> Agreement:
        """Compare with the scores of another f on the same noise; the draws are spread over the samples."""
        draws, equal, largest = 0, 0, 0.0
        per_sample = max(1, math.ceil(least_draws / len(self.samples)))
        for sample, (image_CHW, _, _) in self.samples.items():
            for start in range(0, per_sample, batch_size):
                chosen = range(start, min(start + batch_size, per_sample))
                x_BCHW = noisy_images(image_CHW, self.noise, "estimation", sample, chosen).to(self.device)
                ours, theirs = (scores_of(x_BCHW).double() for scores_of in (self.scores, others))
                equal += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
                difference = ours - theirs / theirs.sum(dim=1, keepdim=True)
                draws, largest = draws + len(x_BCHW), max(largest, float(difference.abs().max()))
            if draws >= least_draws:
                break
        return Agreement(draws=draws, equal=equal, largest_difference=largest)


def measure(
    ours: Pipeline,
    rivals: Sequence[Rival] = (),
    *,
    batch_sizes: Sequence[int] = (),
    precisions: Sequence[str] = (),
    effort: Effort = DEFAULT_EFFORT,
) -> SpeedFigures:
    """Measure the pipeline, its bare networks and its rivals. By default the batch sizes depend on the device.

    `precisions` are measured in addition to the spec's own. Raises: UserError for a batch that does not fit the memory.
    """
    smoothing, sizes = ours.spec.smoothing, batch_sizes or _BATCH_SIZES[ours.device.type]
    sides = [*ours.sides(), *(rival.side for rival in rivals)]
    for side in sides:
        side.tune(ours.clock, sizes, effort.seconds)
    rounds, memory = _alternate(sides, ours.clock, effort)
    best = {side.name: side.best_size for side in sides}
    compare = partial(ours.agreement, batch_size=best["pipeline"], least_draws=effort.agreement_draws)
    agreement = {rival.side.name: compare(rival.scores) for rival in rivals}
    sweep = [rate for side in sides for rate in side.sweep()]
    for precision in dict.fromkeys(precisions):
        if precision != smoothing.precision:
            other = ours.in_precision(precision)
            for side in other.sides():
                side.tune(ours.clock, sizes, effort.seconds)
                sweep += side.sweep()
            agreement[precision] = compare(other.scores)
    rates = {name: statistics.median(one[name] for one in rounds) for name in best}
    flops = flops_per_draw(ours.spec, tuple(ours.image_CHW.shape), ours.num_classes)
    peak = _peak(ours)
    achieved = None if flops is None else rates["pipeline"] * flops.total
    return SpeedFigures(
        name=ours.spec.name,
        device=_name(ours.device),
        clock=ours.timed_by,
        threads=ours.threads if ours.device.type == "cpu" else None,
        precision=smoothing.precision,
        random_weights=ours.random_weights,
        random_images=ours.random_images,
        batch_size=best,
        draws_per_second=rates,
        rounds=rounds,
        pipeline_over={name: _over(rounds, name) for name in best if name != "pipeline"},
        warm_up_seconds={side.name: side.warm_up[side.best_size] for side in sides},
        gflop_per_draw=None if flops is None else in_gflop(flops),
        gflop_per_second=None if achieved is None else achieved / 1e9,
        peak_gflop_per_second=peak / 1e9,
        share_of_peak=None if achieved is None else achieved / peak,
        peak_memory_bytes=memory,
        agreement=agreement,
        sweep=sweep,
    )


def _over(rounds: Sequence[dict[str, float]], other: str) -> float:
    return statistics.median(one["pipeline"] / one[other] for one in rounds)


def _alternate(
    sides: Sequence[Side], clock: Callable[[], float], effort: Effort
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Return the rates of the sides in each round, in alternating order, and the peak memory of each side."""
    rounds: list[dict[str, float]] = []
    memory: dict[str, int] = {}
    for index in range(effort.rounds):
        rates = {}
        for side in sides if index % 2 == 0 else reversed(sides):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            rates[side.name] = side.rate(side.best_size, side.batches(effort.seconds), clock)
            memory[side.name] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()
        rounds.append(rates)
    return rounds, memory


def peak_memory() -> int:
    """The largest resident size of this process since its start, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _peak(ours: Pipeline) -> float:
    """Measure the FLOP per second of a large matrix product in the spec's precision, the best of up to 20."""
    precision, device = ours.spec.smoothing.precision, ours.device
    side = 1024 if device.type == "cpu" else 8192
    times: list[float] = []
    generator = torch.Generator(device).manual_seed(0)
    a = torch.rand(side, side, generator=generator, device=device).to(DTYPES[precision])
    with torch_settings(precision):
        while len(times) < 20 and sum(times) < 1.0:  # some CPUs need seconds for one in bf16
            start = ours.clock()
            a @ a
            times.append(ours.clock() - start)
    return 2 * side**3 / min(times)


def _samples(spec: RunSpec) -> tuple[dict[int, Sample], int, bool]:
    """Return some samples, the number of classes, and whether the samples are random because the data are missing."""
    facts, path, grid = known_facts(spec.data), spec.data.path, spec.smoothing.noise_grid
    missing = not DATASETS[spec.data.name].embedded if path is None else not os.path.exists(path)
    if facts is not None and missing:
        generator = np.random.Generator(np.random.Philox(0))
        images = generator.random((_IMAGES, *facts.shape_CHW), dtype=np.float32)
        if grid is not None:
            images = np.rint(images * np.float32(grid)) / np.float32(grid)
        return {index: Sample(image, UNLABELLED, "") for index, image in enumerate(images)}, facts.num_classes, True
    data = open_dataset(spec.data)
    indices = sample_indices(spec.data.samples, len(data))
    chosen = indices[:: max(1, len(indices) // _IMAGES)][:_IMAGES]
    return {index: data[index] for index in chosen}, data.num_classes, False
