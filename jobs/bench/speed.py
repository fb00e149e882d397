"""`diffsmooth bench SPEC`: compare the pipeline's speed with its networks' own and with the published algorithm's.

Three sides take turns in one process, each at its fastest batch size:

- `bare`: f's networks alone, on data that are already on the device; if f is compiled, it is one program, and all of f;
- `pipeline`: `cast_votes`;
- `literal`: the published algorithm, in float32.

Ratios are medians, over the rounds, of two rates of the same round. With one CPU thread the clock is the CPU time of
the process. Other load on the machine does not affect it, and it includes the noise threads.

Shapes: B batch, C channels, H W image, K classes, M local copies.
"""

import dataclasses
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from diffsmooth.jobs.bench.literal import Literal
from diffsmooth.jobs.bench.memory import peak_memory
from diffsmooth.jobs.bench.profile import Profile, profile
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.cost.flops import FlopsPerDraw, flops_per_draw, in_gflop
from diffsmooth.pipeline.cost.probe import with_weights_at_hand
from diffsmooth.pipeline.data.images import UNLABELLED, Sample
from diffsmooth.pipeline.data.sets import EMBEDDED, known_facts, open_dataset, sample_indices
from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.models.denoisers import PRESETS, DiffusionDenoiser
from diffsmooth.pipeline.models.device import device_of
from diffsmooth.pipeline.noise import Noise
from diffsmooth.pipeline.smoothing import (
    DTYPES,
    BaseClassifier,
    CastOptions,
    base_classifier,
    cast_votes,
    check_base_classifier,
    in_pixels,
    in_units,
    noisy_images,
)
from diffsmooth.pipeline.spec import RunSpec

logger = logging.getLogger(__name__)

_BATCH_SIZES = {"cpu": (8, 16, 32, 64, 128, 256), "cuda": (64, 128, 256, 512, 1024, 2048, 4096)}
_IMAGES = 20  # samples over which the draws of an agreement are spread
_PROFILED = 4  # batches
PARTS = ("noise", "transfer", "denoiser", "classifier", "counting")

Clock = Callable[[], float]


class Effort(NamedTuple):
    """How long the benchmark measures."""

    rounds: int = 5
    seconds: float = 1.0  # of each side in a round; at least one batch
    agreement_draws: int = 200


_EFFORT = Effort()


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
    """Everything that the benchmark measured; dictionaries have a key per side unless a comment says otherwise."""

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
    pipeline_over_bare: float
    pipeline_over_literal: float | None
    warm_up_seconds: dict[str, float]
    share_of_time: dict[str, float]  # by part of a draw
    gflop_per_draw: FlopsPerDraw | None
    gflop_per_second: float | None
    peak_gflop_per_second: float
    share_of_peak: float | None
    peak_memory_bytes: dict[str, int]
    watts: float | None  # of the GPU while the pipeline runs; None if NVML does not tell it
    profile: Profile | None  # of the pipeline
    agreement: dict[str, Agreement]  # by what the pipeline is compared with: "literal" or a precision
    sweep: list[Rate]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class _Meter(NamedTuple):
    """How every side is measured."""

    clock: Clock
    batch_sizes: Sequence[int]
    effort: Effort


@dataclass
class _Side:
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

    def rate(self, batch_size: int, batches: int, clock: Clock) -> float:
        """Measure draws per second."""
        _allow_tf32(self.precision)
        start = clock()
        self.run(batch_size, batches)
        return batch_size * batches / (clock() - start)

    def tune(self, meter: "_Meter") -> None:
        """Measure ascending batch sizes until the rate falls or memory is exhausted."""
        clock, seconds = meter.clock, meter.effort.seconds
        for batch_size in sorted(meter.batch_sizes):
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
                f"a batch of {min(meter.batch_sizes)} draws exceeds the device's memory; use a smaller --batch-size"
            )

    def sweep(self) -> list[Rate]:
        return [
            Rate(side=self.name, precision=self.precision, batch_size=size, draws_per_second=rate)
            for size, rate in self.rates.items()
        ]


def _allow_tf32(precision: str) -> None:
    """Set what torch knows once per process, although what is compared needs different settings."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"


def load_f(spec: RunSpec) -> BaseClassifier:
    """Return f of a spec as it is measured, to measure it several times. Raises: UserError, as `bench_speed` does."""
    spec, _ = with_weights_at_hand(spec)
    samples, num_classes, _ = _samples(spec)
    return base_classifier(spec, device_of(spec), next(iter(samples.values())).image_CHW.shape, num_classes)


class _Pipeline:
    """A spec's f as it certifies, and some samples. Loaded networks are those of `f`, if it is given."""

    def __init__(
        self,
        spec: RunSpec,
        device: torch.device,
        samples: Mapping[int, Sample],
        num_classes: int,
        *,
        f: BaseClassifier | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        self.spec, self.device, self.samples = spec, device, samples
        self.noise = Noise(0, spec.smoothing.sigma, spec.smoothing.noise_grid)
        self.sample, (image_CHW, _, _) = next(iter(samples.items()))
        self.image_CHW = torch.from_numpy(image_CHW).to(device)
        f = f or base_classifier(spec, device, image_CHW.shape, num_classes)
        self.f = BaseClassifier(
            denoiser=f.denoiser,
            classifier=f.classifier,
            local_noise_MCHW=f.local_noise_MCHW,
            sigma=spec.smoothing.sigma,
            num_classes=num_classes,
        )
        if spec.compute.compile:
            self.f.compile(cuda_graphs=cuda_graphs)

    def sides(self) -> list[_Side]:
        precision = self.spec.smoothing.precision
        bare = self._run_f if self.spec.compute.compile else self._run_networks
        return [_Side("bare", precision, bare), _Side("pipeline", precision, self._cast_votes)]

    def _run_f(self, batch_size: int, batches: int) -> None:
        generator = torch.Generator(self.device).manual_seed(0)
        x_BCHW = torch.rand(batch_size, *self.image_CHW.shape, generator=generator, device=self.device)
        for _ in range(batches):
            self.f(x_BCHW)

    @torch.inference_mode()
    def _run_networks(self, batch_size: int, batches: int) -> None:
        f, generator = self.f, torch.Generator(self.device).manual_seed(0)
        copies, shape = batch_size * len(f.local_noise_MCHW), self.image_CHW.shape
        x_BCHW = torch.rand(copies, *shape, generator=generator, device=self.device)
        for _ in range(batches):
            if isinstance(f.denoiser, DiffusionDenoiser):
                for t in f.denoiser.timesteps:
                    f.denoiser.predict_eps(x_BCHW[:batch_size], t)
            else:
                f.denoise(x_BCHW[:batch_size])
            f.classifier(x_BCHW)

    def _cast_votes(self, batch_size: int, batches: int) -> None:
        block = Block(self.sample, "estimation", 0, batch_size * batches)
        for _ in cast_votes(self.f, [block], self.samples, self.noise, CastOptions(batch_size)):
            pass

    @torch.inference_mode()
    def shares(self, batch_size: int, batches: int, clock: Clock) -> dict[str, float]:
        """Return the fraction of time that each part of a draw takes, the parts being measured separately.

        On a GPU, the pipeline itself generates noise in parallel with the rest.
        """
        _allow_tf32(self.spec.smoothing.precision)
        f, M, seconds = self.f, len(self.f.local_noise_MCHW), dict.fromkeys(PARTS, 0.0)
        counts_K = torch.zeros(f.num_classes, dtype=torch.int64, device=self.device)
        image_1CHW = in_units(self.image_CHW[None], self.noise, [self.sample])
        for batch in range(batches):
            draws = range(batch * batch_size, (batch + 1) * batch_size)
            times = [clock()]
            noise_BCHW = torch.empty(batch_size, *self.image_CHW.shape, pin_memory=self.device.type == "cuda")
            self.noise.fill(noise_BCHW.numpy(), "estimation", self.sample, draws)
            times.append(clock())
            x_BCHW = in_pixels(image_1CHW + noise_BCHW.to(self.device, non_blocking=True), self.noise)
            times.append(clock())
            x0_BCHW = f.denoise(x_BCHW)
            times.append(clock())
            logits = f.classify((x0_BCHW[:, None] + f.local_noise_MCHW).flatten(0, 1))
            times.append(clock())
            votes_B = logits.softmax(dim=1).reshape(batch_size, M, -1).mean(dim=1).argmax(dim=1)
            counts_K.scatter_add_(0, votes_B, torch.ones_like(votes_B))
            times.append(clock())
            for part, start, stop in zip(PARTS, times, times[1:], strict=False):
                seconds[part] += stop - start
        return {part: value / sum(seconds.values()) for part, value in seconds.items()}

    def profile(self, batch_size: int, clock: Clock) -> Profile | None:
        """Return what the device does during some batches, or None if it cannot be recorded."""
        _allow_tf32(self.spec.smoothing.precision)
        f, x_BCHW = self.f, self.image_CHW[None].repeat(batch_size, 1, 1, 1)

        def scores(x_BCHW: Tensor) -> Tensor:
            return f.classify((f.denoise(x_BCHW)[:, None] + f.local_noise_MCHW).flatten(0, 1)).softmax(dim=1)

        try:
            return profile(self._cast_votes, batch_size, batches=_PROFILED, scores=scores, x_BCHW=x_BCHW, clock=clock)
        except RuntimeError as error:
            logger.warning("there is no profile: %s", first_line(error))
            return None

    def scores(self, x_BCHW: Tensor) -> Tensor:
        _allow_tf32(self.spec.smoothing.precision)
        return self.f(x_BCHW)

    def agreement(self, others: Callable[[Tensor], Tensor], batch_size: int, least_draws: int) -> Agreement:
        """Compare with another f on the same noise; the draws are spread over the samples."""
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


def bench_speed(
    spec: RunSpec,
    *,
    batch_sizes: Sequence[int] = (),
    precisions: Sequence[str] = (),
    threads: int = 1,
    effort: Effort = _EFFORT,
    with_literal: bool = True,
    with_profile: bool = False,
    f: BaseClassifier | None = None,
    cuda_graphs: bool = True,
) -> SpeedFigures:
    """Measure a spec. Weights and images that are not on this machine are random; nothing is downloaded.

    By default the batch sizes depend on the device. `precisions` are measured in addition to the spec's own; `threads`
    are those of a CPU. Without `with_literal`, the published algorithm is left out; without `cuda_graphs`, a compiled f
    has none. `f` is that of the spec, if it is loaded. Raises: UserError for a spec that cannot be certified and for a
    missing device.
    """
    check_base_classifier(spec)
    device = device_of(spec)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    clock, kind = _clock(device, threads)
    meter = _Meter(clock, batch_sizes or _BATCH_SIZES[device.type], effort)
    spec, random_weights = with_weights_at_hand(spec)
    samples, num_classes, random_images = _samples(spec)
    ours = _Pipeline(spec, device, samples, num_classes, f=f, cuda_graphs=cuda_graphs)
    literal = _literal(ours, num_classes) if with_literal else None
    sides = ours.sides() + ([] if literal is None else [_literal_side(literal, ours)])
    for side in sides:
        side.tune(meter)
    rounds, memory, watts = _alternate(sides, meter)
    best = {side.name: side.best_size for side in sides}
    shares = ours.shares(best["pipeline"], sides[1].batches(effort.seconds), clock)
    sweep = [rate for side in sides for rate in side.sweep()]
    agreements = {}
    if literal is not None:
        agreements["literal"] = ours.agreement(partial(_scores, literal), best["pipeline"], effort.agreement_draws)
    for other in dict.fromkeys(precisions):
        if other != spec.smoothing.precision:
            agreements[other], measured = _other_precision(ours, other, best["pipeline"], meter)
            sweep += measured
    rates = {side.name: statistics.median(one[side.name] for one in rounds) for side in sides}
    flops = flops_per_draw(spec, tuple(ours.image_CHW.shape), num_classes)
    peak = _peak(device, spec.smoothing.precision, clock)
    achieved = None if flops is None else rates["pipeline"] * flops.total
    return SpeedFigures(
        name=spec.name,
        device=_name(device),
        clock=kind,
        threads=threads if device.type == "cpu" else None,
        precision=spec.smoothing.precision,
        random_weights=random_weights,
        random_images=random_images,
        batch_size=best,
        draws_per_second=rates,
        rounds=rounds,
        pipeline_over_bare=_ratio(rounds, "bare"),
        pipeline_over_literal=None if literal is None else _ratio(rounds, "literal"),
        warm_up_seconds={side.name: side.warm_up[side.best_size] for side in sides},
        share_of_time=shares,
        gflop_per_draw=None if flops is None else in_gflop(flops),
        gflop_per_second=None if achieved is None else achieved / 1e9,
        peak_gflop_per_second=peak / 1e9,
        share_of_peak=None if achieved is None else achieved / peak,
        peak_memory_bytes=memory,
        watts=watts,
        profile=ours.profile(best["pipeline"], clock) if with_profile else None,
        agreement=agreements,
        sweep=sweep,
    )


def _other_precision(ours: _Pipeline, precision: str, batch_size: int, meter: _Meter) -> tuple[Agreement, list[Rate]]:
    """Compare the pipeline with itself in another precision, and measure that one's speed."""
    smoothing = ours.spec.smoothing.model_copy(update={"precision": precision})
    other = _Pipeline(
        ours.spec.model_copy(update={"smoothing": smoothing}), ours.device, ours.samples, ours.f.num_classes
    )
    sides = other.sides()
    for side in sides:
        side.tune(meter)
    agreement = ours.agreement(other.scores, batch_size, meter.effort.agreement_draws)
    return agreement, [rate for side in sides for rate in side.sweep()]


def _ratio(rounds: Sequence[Mapping[str, float]], other: str) -> float:
    return statistics.median(one["pipeline"] / one[other] for one in rounds)


def _alternate(sides: Sequence[_Side], meter: _Meter) -> tuple[list[dict[str, float]], dict[str, int], float | None]:
    """Return the rates of the sides in each round, measured in alternating order, the peak memory of each side, and the
    power that the pipeline took in the last round."""
    rounds: list[dict[str, float]] = []
    memory: dict[str, int] = {}
    watts = None
    for index in range(meter.effort.rounds):
        rates = {}
        for side in sides if index % 2 == 0 else reversed(sides):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            rates[side.name] = side.rate(side.best_size, side.batches(meter.effort.seconds), meter.clock)
            memory[side.name] = _peak_memory()
            if side.name == "pipeline":
                watts = _watts()
        rounds.append(rates)
    return rounds, memory, watts


def _watts() -> float | None:
    """Return the GPU's mean power over the last second, as NVML tells it."""
    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.power_draw() / 1000
    except Exception as error:  # the package of NVML is missing, or the GPU does not tell
        logger.info("the power is unknown (%s)", first_line(error))
        return None


def _peak_memory() -> int:
    """Return the peak memory in bytes: the GPU's since the last reset, or the process's since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def _clock(device: torch.device, threads: int) -> tuple[Clock, str]:
    if device.type == "cpu":
        return (time.process_time, "cpu") if threads == 1 else (time.perf_counter, "wall")

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock, "wall"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _peak(device: torch.device, precision: str, clock: Clock) -> float:
    """Measure the FLOP per second of a large matrix product in a precision, the best of up to 20."""
    side = 1024 if device.type == "cpu" else 8192
    times: list[float] = []
    generator = torch.Generator(device).manual_seed(0)
    a = torch.rand(side, side, generator=generator, device=device).to(DTYPES[precision])
    _allow_tf32(precision)
    while len(times) < 20 and sum(times) < 1.0:  # some CPUs need seconds for one in bf16
        start = clock()
        a @ a
        times.append(clock() - start)
    return 2 * side**3 / min(times)


def _samples(spec: RunSpec) -> tuple[dict[int, Sample], int, bool]:
    """Return some samples, the number of classes, and whether the samples are random because the data are missing."""
    facts, path, grid = known_facts(spec.data), spec.data.path, spec.smoothing.noise_grid
    missing = spec.data.name not in EMBEDDED if path is None else not os.path.exists(path)
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


def _literal(ours: _Pipeline, num_classes: int) -> Literal | None:
    """Return the published algorithm, or None if it does not support the spec's denoiser."""
    denoiser = ours.spec.denoiser
    if denoiser.arch not in ("none", "unet", *PRESETS) or denoiser.steps > 1:
        logger.warning("the published algorithm supports only OpenAI's UNets with one step; it is not measured")
        return None
    channels, height, width = ours.image_CHW.shape
    return Literal(ours.spec, ours.device, (channels, height, width), num_classes)


def _scores(literal: Literal, x_BCHW: Tensor) -> Tensor:
    _allow_tf32("fp32")
    return literal.scores(x_BCHW)


def _literal_side(literal: Literal, ours: _Pipeline) -> _Side:
    def run(batch_size: int, batches: int) -> object:
        return literal.count(ours.image_CHW, batch_size * batches, batch_size)

    return _Side("literal", "fp32", run)


def print_speed(figures: SpeedFigures, console: Console) -> None:
    """Print the figures in words and tables."""
    unit = "draws per CPU second" if figures.clock == "cpu" else "draws per second"
    console.width = max(console.width, 110)
    random = [*figures.random_weights, *(["images"] if figures.random_images else [])]
    console.print(
        f"{escape(figures.name)} on {escape(figures.device)}, {figures.precision}"
        + (f"; random: {', '.join(random)}" if random else ""),
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("side", "batch", unit, "memory"):
        table.add_column(heading, justify="left" if heading == "side" else "right", no_wrap=True)
    for name, rate in figures.draws_per_second.items():
        memory = f"{figures.peak_memory_bytes[name] / 1e9:.2f} GB"
        table.add_row(name, str(figures.batch_size[name]), f"{rate:,.4g}", memory)
    console.print(table)
    console.print("\n".join(_sentences(figures)), highlight=False)
    if figures.profile is not None:
        console.print(_profile_table(figures.profile))
    console.print(_sweep_table(figures.sweep, f"{unit} by batch size"))


def _sentences(figures: SpeedFigures) -> list[str]:
    lines = [f"pipeline over bare networks: {figures.pipeline_over_bare:.3f}"]
    if figures.pipeline_over_literal is not None:
        lines.append(f"pipeline over the published algorithm: {figures.pipeline_over_literal:.3f}")
    lines.append(f"warm-up of the pipeline: {figures.warm_up_seconds['pipeline']:.1f} s of wall time")
    lines.append("time: " + ", ".join(f"{part} {share:.1%}" for part, share in figures.share_of_time.items()))
    if figures.share_of_peak is not None:
        lines.append(
            f"{figures.gflop_per_second:,.1f} GFLOP/s, {figures.share_of_peak:.0%} of the "
            f"{figures.peak_gflop_per_second:,.1f} of a matrix product"
        )
    for name, one in figures.agreement.items():
        lines.append(
            f"votes equal to those of {name}: {one.equal:,} of {one.draws:,}; scores differ by at most "
            f"{one.largest_difference:.1e}"
        )
    return lines


def _profile_table(profile: Profile) -> Table:
    title = f"profile of {profile.batches} batches of {profile.batch_size} draws"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("of the time", "kind", "calls per batch", "MB per draw, unfused"):
        table.add_column(heading, justify="left" if heading == "kind" else "right", no_wrap=True)
    for one in profile.kinds:
        table.add_row(f"{one.share:.1%}", one.name, f"{one.calls:,.0f}", f"{one.bytes_per_draw / 1e6:,.2f}")
    table.add_row(f"{profile.idle:.1%}", "no kernel runs" if profile.on_gpu else "no operator runs", end_section=True)
    for name, share in list(profile.slowest.items())[:5]:
        table.add_row(f"{share:.1%}", escape(name[:70]))
    return table


def _sweep_table(sweep: Sequence[Rate], title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    sizes = sorted({one.batch_size for one in sweep})
    for heading in ("side", "precision", *map(str, sizes)):
        table.add_column(heading, justify="right" if heading.isdigit() else "left", no_wrap=True)
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for one in sweep:
        rows.setdefault((one.side, one.precision), {})[one.batch_size] = one.draws_per_second
    for (side, precision), rates in rows.items():
        table.add_row(side, precision, *(f"{rates[size]:,.4g}" if size in rates else "-" for size in sizes))
    return table
