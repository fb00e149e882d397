"""`diffsmooth bench SPEC`: how much of the networks' own speed the pipeline keeps, and how far it is ahead of the
published algorithm.

Three sides take turns in one process, each at the batch size that it likes best: `bare`, f's networks alone on data
that lie on the device, never compiled; `pipeline`, `cast_votes`; `literal`, the published algorithm,
in float32. Ratios are medians over the rounds of two rates of the same round. On one CPU thread the clock is the
process's CPU time, which no other load on the machine stretches and which the noise threads are part of.

Shapes: B batch, C channels, H W image, K classes, M local copies.
"""

import logging
import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cluster.worker import device_of
from jobs.bench.literal import Literal
from jobs.plan import flops_per_draw
from pipeline import noise
from pipeline.block import Block
from pipeline.data import known_facts, open_dataset, sample_indices
from pipeline.errors import UserError
from pipeline.images import UNLABELLED, Sample
from pipeline.models.denoisers import PRESETS, DiffusionDenoiser
from pipeline.models.weights import RANDOM
from pipeline.smoothing import DTYPES, base_classifier, cast_votes, check_base_classifier
from pipeline.spec import RunSpec
from pipeline.storage.fetch import at_hand

logger = logging.getLogger(__name__)

_BATCH_SIZES = {"cpu": (8, 16, 32, 64, 128, 256), "cuda": (64, 128, 256, 512, 1024, 2048, 4096)}
_IMAGES = 20  # samples that the draws of an agreement are spread over

Clock = Callable[[], float]


class Effort(NamedTuple):
    """How long the bench may take."""

    rounds: int = 5
    seconds: float = 1.0  # that each side works for in a round, at least one batch
    agreement_draws: int = 200


_EFFORT = Effort()


class _Side(NamedTuple):
    name: str
    precision: str
    run: Callable[[int, int], object]  # works through that many batches of that many draws
    warm_up: dict[int, float]  # seconds on the wall of the first batch of each size, compiling where that is asked for

    def rate(self, batch_size: int, batches: int, clock: Clock) -> float:
        """Draws per second."""
        # torch keeps these for the whole process, and each side wants its own
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.precision == "tf32"
        start = clock()
        self.run(batch_size, batches)
        return batch_size * batches / (clock() - start)

    def tune(self, batch_sizes: Sequence[int], clock: Clock, seconds: float) -> dict[int, float]:
        """Draws per second at ascending batch sizes, up to where they fall or memory ends."""
        rates: dict[int, float] = {}
        for batch_size in sorted(batch_sizes):
            try:
                start = time.perf_counter()
                self.rate(batch_size, 1, clock)
                self.warm_up[batch_size] = time.perf_counter() - start
                first = self.rate(batch_size, 1, clock)
                batches = math.ceil(seconds / 2 * first / batch_size)
                # the better of two: what else runs on the machine only ever slows a side down
                rates[batch_size] = max(self.rate(batch_size, batches, clock) for _ in range(2))
            except torch.OutOfMemoryError:
                break
            if rates[batch_size] < 0.85 * max(rates.values()):
                break
        if not rates:
            raise UserError(f"a batch of {min(batch_sizes)} draws does not fit the device: give a smaller --batch-size")
        return rates


class _Pipeline:
    """A spec's f as it certifies, and the samples that it does so for."""

    def __init__(self, spec: RunSpec, device: torch.device, samples: Mapping[int, Sample], num_classes: int) -> None:
        self.spec, self.device, self.samples = spec, device, samples
        self.sample, (image_CHW, _, _) = next(iter(samples.items()))
        self.image_CHW = torch.from_numpy(image_CHW).to(device)
        self.f = base_classifier(spec, device, image_CHW.shape, num_classes)
        if spec.compute.compile:
            self.f.compile()

    def sides(self) -> list[_Side]:
        precision = self.spec.smoothing.precision
        return [_Side("bare", precision, self._networks, {}), _Side("pipeline", precision, self._cast_votes, {})]

    @torch.inference_mode()
    def _networks(self, batch_size: int, batches: int) -> None:
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
        smoothing, block = self.spec.smoothing, Block(self.sample, "estimation", 0, batch_size * batches)
        for _ in cast_votes(self.f, [block], self.samples, sigma=smoothing.sigma, seed=0, batch_size=batch_size):
            pass

    def noise(self, sample: int, draws: range) -> Tensor:
        smoothing = self.spec.smoothing
        noise_BCHW = torch.empty(len(draws), *self.image_CHW.shape, pin_memory=self.device.type == "cuda")
        noise.draw_noise(
            noise_BCHW.numpy(),
            seed=0,
            stage="estimation",
            sample=sample,
            draws=draws,
            sigma=smoothing.sigma,
        )
        return noise_BCHW

    @torch.inference_mode()
    def shares(self, batch_size: int, batches: int, clock: Clock) -> dict[str, float]:
        """Of the time of all parts of a draw, measured apart, each part's; on a GPU noise is made beside the rest."""
        f, M, seconds = self.f, len(self.f.local_noise_MCHW), dict.fromkeys(PARTS, 0.0)
        counts_K = torch.zeros(f.num_classes, dtype=torch.int64, device=self.device)
        for batch in range(batches):
            times = [clock()]
            noise_BCHW = self.noise(self.sample, range(batch * batch_size, (batch + 1) * batch_size))
            times.append(clock())
            x_BCHW = self.image_CHW + noise_BCHW.to(self.device, non_blocking=True)
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


PARTS = ("noise", "transfer", "denoiser", "classifier", "counting")


def bench_speed(
    spec: RunSpec,
    *,
    batch_sizes: Sequence[int] = (),
    precisions: Sequence[str] = (),
    threads: int = 1,
    effort: Effort = _EFFORT,
) -> dict[str, Any]:
    """Measure a spec. Weights that are not on this machine are random, and so are images: nothing is downloaded.

    Empty `batch_sizes` are some that suit the device; `precisions` are swept besides the spec's own; `threads` are a
    CPU's. Raises: UserError for a spec that cannot be certified, and for a device that is not there.
    """
    check_base_classifier(spec)
    device = device_of(spec)
    if device.type == "cpu":
        torch.set_num_threads(threads)
    clock, kind = _clock(device, threads)
    spec, random_weights = _with_weights(spec)
    samples, num_classes, random_images = _samples(spec)
    ours = _Pipeline(spec, device, samples, num_classes)
    literal = _literal(ours, num_classes)
    sides = ours.sides() + ([] if literal is None else [_literal_side(literal, ours)])
    sizes = batch_sizes or _BATCH_SIZES[device.type]
    tuned = {side.name: side.tune(sizes, clock, effort.seconds) for side in sides}
    best = {name: max(rates, key=lambda size: rates[size]) for name, rates in tuned.items()}
    rounds, memory = _alternate(sides, tuned, best, clock, effort)
    precision = spec.smoothing.precision
    shares = ours.shares(best["pipeline"], _batches(tuned["pipeline"], best["pipeline"], effort.seconds), clock)
    sweep = [_row(side, size, rate) for side in sides for size, rate in tuned[side.name].items()]
    agreements = {} if literal is None else {"literal": _agreement(ours, literal.scores, best["pipeline"], effort)}
    for other in dict.fromkeys(precisions):
        if other != precision:
            changed = spec.model_copy(update={"smoothing": spec.smoothing.model_copy(update={"precision": other})})
            theirs = _Pipeline(changed, device, samples, num_classes)
            for side in theirs.sides():
                sweep += [_row(side, *one) for one in side.tune(sizes, clock, effort.seconds).items()]
            agreements[other] = _agreement(ours, theirs.f, best["pipeline"], effort)
    rates = {side.name: statistics.median(one[side.name] for one in rounds) for side in sides}
    flops = flops_per_draw(spec, tuple(ours.image_CHW.shape), num_classes)
    peak, done = _peak(device, precision, clock), None if flops is None else rates["pipeline"] * sum(flops.values())

    def ratio(above: str, below: str) -> float | None:
        return statistics.median(one[above] / one[below] for one in rounds) if below in rates else None

    return {
        "name": spec.name,
        "device": _name(device),
        "clock": kind,
        "threads": threads if device.type == "cpu" else None,
        "precision": precision,
        "random_weights": random_weights,
        "random_images": random_images,
        "batch_size": best,
        "draws_per_second": rates,
        "rounds": rounds,
        "pipeline_over_bare": ratio("pipeline", "bare"),
        "pipeline_over_literal": ratio("pipeline", "literal"),
        "warm_up_seconds": {side.name: side.warm_up[best[side.name]] for side in sides},
        "share_of_time": shares,
        "gflop_per_draw": None if flops is None else {name: value / 1e9 for name, value in flops.items()},
        "gflop_per_second": None if done is None else done / 1e9,
        "peak_gflop_per_second": peak / 1e9,
        "share_of_peak": None if done is None else done / peak,
        "peak_memory_bytes": memory,
        "agreement": agreements,
        "sweep": sweep,
    }


def _row(side: _Side, batch_size: int, rate: float) -> dict[str, Any]:
    return {"side": side.name, "precision": side.precision, "batch_size": batch_size, "draws_per_second": rate}


def _batches(rates: Mapping[int, float], batch_size: int, seconds: float) -> int:
    return math.ceil(seconds * rates[batch_size] / batch_size)


def _alternate(
    sides: Sequence[_Side],
    tuned: Mapping[str, Mapping[int, float]],
    best: Mapping[str, int],
    clock: Clock,
    effort: Effort,
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """The sides' rates, round by round, in turns; the most memory that each took."""
    rounds: list[dict[str, float]] = []
    memory: dict[str, int] = {}
    for index in range(effort.rounds):
        rates = {}
        for side in sides if index % 2 == 0 else reversed(sides):
            batch_size = best[side.name]
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            rates[side.name] = side.rate(batch_size, _batches(tuned[side.name], batch_size, effort.seconds), clock)
            memory[side.name] = _memory()
        rounds.append(rates)
    return rounds, memory


def _memory() -> int:
    """Bytes at most: of the GPU since the last reset, else of the process in all its life."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
    """FLOP per second of a large matrix product in the precision: the best of several."""
    side, times = 1024 if device.type == "cpu" else 8192, []
    generator = torch.Generator(device).manual_seed(0)
    a = torch.rand(side, side, generator=generator, device=device).to(DTYPES[precision])
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    for _ in range(20):
        start = clock()
        a @ a
        times.append(clock() - start)
    return 2 * side**3 / min(times)


def _with_weights(spec: RunSpec) -> tuple[RunSpec, list[str]]:
    """The spec with random weights for the networks whose own are not on this machine, and these networks' names."""
    changed: dict[str, Any] = {}
    for name, section in (("denoiser", spec.denoiser), ("classifier", spec.classifier)):
        family, colon, _ = section.arch.partition(":")
        own = colon and family not in ("timm", "torchvision")
        if own or section.arch in ("none", "diffusers", "transformers"):
            continue
        location = (section.checkpoint or "").partition("#")[0]
        if not location.startswith("embedded:") and ("${" in location or not at_hand(location)):
            changed[name] = section.model_copy(update={"checkpoint": f"{RANDOM}0"})
    return spec.model_copy(update=changed), list(changed)


def _samples(spec: RunSpec) -> tuple[dict[int, Sample], int, bool]:
    """Some of the spec's samples, or random ones where its data are not on this machine; the number of classes."""
    facts, path = known_facts(spec.data), spec.data.path
    if facts is not None and spec.data.name != "mnist" and (path is None or not Path(path).exists()):
        generator = np.random.Generator(np.random.Philox(0))
        images = generator.random((_IMAGES, *facts.shape_CHW), dtype=np.float32)
        return {index: Sample(image, UNLABELLED, "") for index, image in enumerate(images)}, facts.num_classes, True
    data = open_dataset(spec.data)
    indices = sample_indices(spec.data.samples, len(data))
    chosen = indices[:: max(1, len(indices) // _IMAGES)][:_IMAGES]
    return {index: data[index] for index in chosen}, data.num_classes, False


def _literal(ours: _Pipeline, num_classes: int) -> Literal | None:
    """None where the published algorithm has no place for the spec's denoiser."""
    denoiser = ours.spec.denoiser
    if denoiser.arch not in ("none", "unet", *PRESETS) or denoiser.steps > 1:
        logger.warning("the published algorithm knows OpenAI's UNets in one step only: it is left out")
        return None
    channels, height, width = ours.image_CHW.shape
    return Literal(ours.spec, ours.device, (channels, height, width), num_classes)


def _literal_side(literal: Literal, ours: _Pipeline) -> _Side:
    def run(batch_size: int, batches: int) -> object:
        return literal.count(ours.image_CHW, batch_size * batches, batch_size)

    return _Side("literal", "fp32", run, {})


def _agreement(
    ours: _Pipeline, theirs: Callable[[Tensor], Tensor], batch_size: int, effort: Effort
) -> dict[str, float]:
    """Our votes and another's on the same noise, draws spread over the samples; scores as shares of one."""
    draws, equal, largest = 0, 0, 0.0
    per_sample = max(1, math.ceil(effort.agreement_draws / len(ours.samples)))
    for sample, (image_CHW, _, _) in ours.samples.items():
        for start in range(0, per_sample, batch_size):
            noise_BCHW = ours.noise(sample, range(start, min(start + batch_size, per_sample)))
            x_BCHW = (torch.from_numpy(image_CHW) + noise_BCHW).to(ours.device)
            scores, others = (scores_of(x_BCHW).double() for scores_of in (ours.f, theirs))
            equal += int((scores.argmax(dim=1) == others.argmax(dim=1)).sum())
            difference = scores - others / others.sum(dim=1, keepdim=True)
            draws, largest = draws + len(x_BCHW), max(largest, float(difference.abs().max()))
        if draws >= effort.agreement_draws:
            break
    return {"draws": draws, "equal": equal, "largest_difference": largest}


def print_speed(figures: Mapping[str, Any], console: Console) -> None:
    """The figures in words and tables."""
    seconds = "CPU second" if figures["clock"] == "cpu" else "second"
    console.width = max(console.width, 110)
    random = [*figures["random_weights"], *(["images"] if figures["random_images"] else [])]
    console.print(
        f"{figures['name']} on {figures['device']}, {figures['precision']}"
        + (f"; random: {', '.join(random)}" if random else ""),
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("side", "batch", f"draws per {seconds}", "memory"):
        table.add_column(heading, justify="left" if heading == "side" else "right", no_wrap=True)
    for name, rate in figures["draws_per_second"].items():
        memory = f"{figures['peak_memory_bytes'][name] / 1e9:.2f} GB"
        table.add_row(name, str(figures["batch_size"][name]), f"{rate:,.4g}", memory)
    console.print(table)
    lines = [f"pipeline over bare networks: {figures['pipeline_over_bare']:.3f}"]
    if figures["pipeline_over_literal"] is not None:
        lines.append(f"pipeline over the published algorithm: {figures['pipeline_over_literal']:.3f}")
    lines.append(f"warm-up of the pipeline: {figures['warm_up_seconds']['pipeline']:.1f} s on the wall")
    lines.append("time: " + ", ".join(f"{part} {share:.1%}" for part, share in figures["share_of_time"].items()))
    if figures["share_of_peak"] is not None:
        lines.append(
            f"{figures['gflop_per_second']:,.1f} GFLOP/s, {figures['share_of_peak']:.0%} of a matrix product's "
            f"{figures['peak_gflop_per_second']:,.1f}"
        )
    for name, one in figures["agreement"].items():
        lines.append(
            f"votes equal to {name}'s: {one['equal']:,} of {one['draws']:,}, scores within "
            f"{one['largest_difference']:.1e}"
        )
    console.print("\n".join(lines), highlight=False)
    table = Table(box=box.SIMPLE_HEAD, title=f"draws per {seconds} by batch size", title_justify="left")
    sizes = sorted({one["batch_size"] for one in figures["sweep"]})
    for heading in ("side", "precision", *map(str, sizes)):
        table.add_column(heading, justify="right" if heading.isdigit() else "left", no_wrap=True)
    rows: dict[tuple[str, str], dict[int, float]] = {}
    for one in figures["sweep"]:
        rows.setdefault((one["side"], one["precision"]), {})[one["batch_size"]] = one["draws_per_second"]
    for (side, precision), rates in rows.items():
        table.add_row(side, precision, *(f"{rates[size]:,.4g}" if size in rates else "-" for size in sizes))
    console.print(table)
