"""What `diffsmooth bench` measures, and more: the published algorithm, the parts of a draw, power and a profile.

Shapes: B batch, C channels, H W image, K classes, M local copies.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from benchmarks.literal import Literal
from benchmarks.profile import Profile, profile
from diffsmooth.jobs.bench import print_speed
from diffsmooth.pipeline.casting import in_pixels, in_units
from diffsmooth.pipeline.cost.speed import DEFAULT_EFFORT, Effort, Pipeline, Rival, Side, SpeedFigures, measure
from diffsmooth.pipeline.errors import first_line
from diffsmooth.pipeline.models.denoisers import PRESETS
from diffsmooth.pipeline.models.device import torch_settings

logger = logging.getLogger(__name__)

PARTS = ("noise", "transfer", "denoiser", "classifier", "counting")
_PROFILED = 4  # batches


@dataclass(frozen=True, kw_only=True)
class LabFigures:
    """The speed of a spec, and where its time goes."""

    speed: SpeedFigures
    share_of_time: dict[str, float]  # by part of a draw
    watts: float | None  # of the GPU while the pipeline runs; None without NVML
    profile: Profile | None  # of the pipeline

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def bench_speed(
    ours: Pipeline,
    *,
    batch_sizes: Sequence[int] = (),
    precisions: Sequence[str] = (),
    effort: Effort = DEFAULT_EFFORT,
    with_literal: bool = True,
    with_profile: bool = False,
) -> LabFigures:
    """Measure the pipeline against its bare networks and, `with_literal`, against the published algorithm.

    Raises: UserError, as `measure` does.
    """
    literal = literal_rival(ours) if with_literal else None
    figures = measure(ours, [literal] if literal else [], batch_sizes=batch_sizes, precisions=precisions, effort=effort)
    size = figures.batch_size["pipeline"]
    batches = max(1, round(effort.seconds * figures.draws_per_second["pipeline"] / size))
    with torch_settings(figures.precision):
        return LabFigures(
            speed=figures,
            share_of_time=shares_of_time(ours, size, batches),
            watts=watts(ours, size, batches),
            profile=profile_of(ours, size) if with_profile else None,
        )


def literal_rival(ours: Pipeline) -> Rival | None:
    """Return the published algorithm, or None if it does not support the spec's denoiser."""
    denoiser = ours.spec.denoiser
    if denoiser.arch not in ("none", "unet", *PRESETS) or denoiser.steps > 1:
        logger.warning("the published algorithm supports only OpenAI's UNets with one step; it is not measured")
        return None
    channels, height, width = ours.image_CHW.shape
    literal = Literal(ours.spec, ours.device, (channels, height, width), ours.num_classes)

    def run(batch_size: int, batches: int) -> object:
        return literal.count(ours.image_CHW, batch_size * batches, batch_size)

    def scores(x_BCHW: Tensor) -> Tensor:
        with torch_settings("fp32"):
            return literal.scores(x_BCHW)

    return Rival(Side("literal", "fp32", run), scores)


@torch.inference_mode()
def shares_of_time(ours: Pipeline, batch_size: int, batches: int) -> dict[str, float]:
    """Return the fraction of time that each part of a draw takes, the parts being measured separately.

    On a GPU, the pipeline itself generates noise in parallel with the rest.
    """
    f, M, seconds = ours.f, len(ours.f.local_noise_MCHW), dict.fromkeys(PARTS, 0.0)
    counts_K = torch.zeros(f.num_classes, dtype=torch.int64, device=ours.device)
    image_1CHW = in_units(ours.image_CHW[None], ours.noise, [ours.sample])
    for batch in range(batches):
        draws = range(batch * batch_size, (batch + 1) * batch_size)
        times = [ours.clock()]
        noise_BCHW = torch.empty(batch_size, *ours.image_CHW.shape, pin_memory=ours.device.type == "cuda")
        ours.noise.fill(noise_BCHW.numpy(), "estimation", ours.sample, draws)
        times.append(ours.clock())
        x_BCHW = in_pixels(image_1CHW + noise_BCHW.to(ours.device, non_blocking=True), ours.noise)
        times.append(ours.clock())
        x0_BCHW = f.denoise(x_BCHW)
        times.append(ours.clock())
        logits = f.classify((x0_BCHW[:, None] + f.local_noise_MCHW).flatten(0, 1))
        times.append(ours.clock())
        votes_B = logits.softmax(dim=1).reshape(batch_size, M, -1).mean(dim=1).argmax(dim=1)
        counts_K.scatter_add_(0, votes_B, torch.ones_like(votes_B))
        times.append(ours.clock())
        for part, start, stop in zip(PARTS, times, times[1:], strict=False):
            seconds[part] += stop - start
    return {part: value / sum(seconds.values()) for part, value in seconds.items()}


def watts(ours: Pipeline, batch_size: int, batches: int) -> float | None:
    """Return the GPU's mean power over the last second of some batches, as NVML reports it."""
    if ours.device.type != "cuda":
        return None
    ours.cast(batch_size, batches)
    try:
        return torch.cuda.power_draw() / 1000
    except Exception as error:  # the package of NVML is missing, or the GPU does not report it
        logger.info("the power is unknown (%s)", first_line(error))
        return None


def profile_of(ours: Pipeline, batch_size: int) -> Profile | None:
    """Return what the device does during some batches, or None if it cannot be recorded."""
    f, x_BCHW = ours.f, ours.image_CHW[None].repeat(batch_size, 1, 1, 1)

    def scores(x_BCHW: Tensor) -> Tensor:
        return f.classify((f.denoise(x_BCHW)[:, None] + f.local_noise_MCHW).flatten(0, 1)).softmax(dim=1)

    try:
        return profile(ours.cast, batch_size, batches=_PROFILED, scores=scores, x_BCHW=x_BCHW, clock=ours.clock)
    except RuntimeError as error:
        logger.warning("there is no profile: %s", first_line(error))
        return None


def print_figures(figures: LabFigures, console: Console) -> None:
    """Print the figures in words and tables."""
    print_speed(figures.speed, console)
    shares = ", ".join(f"{part} {share:.1%}" for part, share in figures.share_of_time.items())
    console.print(f"time: {shares}", highlight=False)
    if figures.profile is not None:
        console.print(_profile_table(figures.profile))


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
