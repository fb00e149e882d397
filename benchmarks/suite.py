"""`python -m benchmarks suite`: the published networks on a GPU, or the embedded ones on a CPU, in all precisions.

Each row is a spec in one precision and one mode: eager, compiled, or compiled with CUDA graphs. An eager row finds the
best batch size, which the compiled rows of its network use, because each size would be compiled separately. The rows
that matter most come first. A row that does not start in time has no figures. A row that fails, for example because its
network does not fit in memory, shows the reason instead.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.speed import LabFigures, bench_speed
from diffsmooth.jobs.specs import load_named
from diffsmooth.pipeline.cost.speed import Effort, Pipeline
from diffsmooth.pipeline.errors import UserError, first_line
from diffsmooth.pipeline.models.device import device_facts, device_of
from diffsmooth.pipeline.smoothing import BaseClassifier
from diffsmooth.pipeline.spec import RunSpec

SUITE_SECONDS = 420.0

Mode = Literal["eager", "compiled", "CUDA graphs"]

_EFFORT = Effort(rounds=3, seconds=1.0, agreement_draws=1000)
_BATCH_SIZES = {"cpu": (16, 64, 256), "cuda": (64, 256, 1024)}
_RESNET50 = ("name=imagenet-diffsmooth-0.50-resnet50", "classifier.arch=resnet50", "classifier.normalize=imagenet")


class Setting(NamedTuple):
    """What a row measures."""

    spec: RunSpec
    mode: Mode


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What is measured, the most important first."""

    device: str
    specs: tuple[tuple[str, tuple[str, ...]], ...]  # name and overrides
    modes: tuple[tuple[str, tuple[Mode, ...]], ...]  # precision, and the modes in which each network is measured

    def settings(self, overrides: Sequence[str] = ()) -> list[Setting]:
        """What each row measures. Raises: UserError."""
        return [
            Setting(
                load_named(
                    name,
                    [f"compute.device={self.device}", f"smoothing.precision={precision}",
                     f"compute.compile={str(mode != 'eager').lower()}", *own, *overrides],
                ),
                mode,
            )
            for precision, modes in self.modes
            for name, own in self.specs
            for mode in modes
        ]  # fmt: skip


SUITES = {
    "gpu": Suite(
        device="cuda",
        specs=(
            ("cifar10-diffsmooth-0.50", ()),
            ("imagenet-diffsmooth-0.50", ()),
            ("imagenet-diffsmooth-0.50", _RESNET50),
        ),
        modes=(
            ("bf16", ("eager", "CUDA graphs")),
            ("fp32", ("eager",)),
            ("bf16", ("compiled",)),
            ("tf32", ("eager", "CUDA graphs")),
            ("fp16", ("eager", "CUDA graphs")),
            ("fp32", ("CUDA graphs", "compiled")),
            ("tf32", ("compiled",)),
            ("fp16", ("compiled",)),
        ),
    ),
    "cpu": Suite(
        device="cpu",
        specs=(("fashion-diffsmooth-0.50", ()), ("fashion-dds-0.50", ()), ("fashion-cohen-0.50", ())),
        modes=(("fp32", ("eager", "compiled")), ("bf16", ("eager", "compiled"))),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """The figures of one spec, or the reason why there are none."""

    name: str
    precision: str
    mode: Mode
    figures: LabFigures | None = None
    reason: str | None = None

    @property
    def title(self) -> str:
        return f"{self.name}, {self.precision}, {self.mode}"


@dataclass(frozen=True, kw_only=True)
class SuiteFigures:
    """What a suite measured, and where."""

    device: str
    versions: dict[str, str]
    seconds: float
    rows: list[Row]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def run_suite(
    settings: Sequence[Setting],
    *,
    seconds: float = SUITE_SECONDS,
    effort: Effort = _EFFORT,
    on_row: Callable[[Row], None] = lambda row: None,
) -> SuiteFigures:
    """Measure one row after another; none is started after `seconds`. Raises: UserError for a missing device."""
    started, device = time.monotonic(), device_of(settings[0].spec)
    rows: list[Row] = []
    best: dict[str, int] = {}  # network -> its best batch size in the latest eager row
    loaded = _Loaded()
    for setting in settings:
        row = Row(name=setting.spec.name, precision=setting.spec.smoothing.precision, mode=setting.mode)
        if time.monotonic() - started > seconds:
            row = dataclasses.replace(row, reason=f"not started within {seconds:g} s")
        else:
            sizes = (best[row.name],) if row.mode != "eager" and row.name in best else _BATCH_SIZES[device.type]
            row = _measure(row, setting.spec, loaded, sizes, effort)
        if row.mode == "eager" and row.figures is not None:
            best[row.name] = row.figures.speed.batch_size["pipeline"]
        rows.append(row)
        on_row(row)
    facts = device_facts(device)
    return SuiteFigures(
        device=facts.device, versions=facts.versions, seconds=round(time.monotonic() - started, 1), rows=rows
    )


class _Loaded:
    """The f of the latest row. Rows of one network in one precision share it, because random weights take long."""

    def __init__(self) -> None:
        self._key: tuple[str, str] | None = None
        self._f: BaseClassifier | None = None

    def f(self, spec: RunSpec) -> BaseClassifier:
        key = (spec.name, spec.smoothing.precision)
        if self._f is None or self._key != key:
            self._f = None  # frees its memory first
            eager = spec.model_copy(update={"compute": spec.compute.model_copy(update={"compile": False})})
            self._key, self._f = key, Pipeline(eager).f
        return self._f


def _measure(row: Row, spec: RunSpec, loaded: _Loaded, sizes: Sequence[int], effort: Effort) -> Row:
    """Fill in a row. The published algorithm, which has one precision, is measured once for each network."""
    try:
        figures = bench_speed(
            Pipeline(spec, f=loaded.f(spec), cuda_graphs=row.mode == "CUDA graphs"),
            batch_sizes=sizes,
            effort=effort,
            with_literal=(row.precision, row.mode) == ("fp32", "eager"),
            with_profile=True,
        )
        return dataclasses.replace(row, figures=figures)
    except UserError as error:
        return dataclasses.replace(row, reason=str(error))
    except Exception as error:  # whatever a compiler or a driver raises: the other rows are still of use
        return dataclasses.replace(row, reason=f"{type(error).__name__}: {first_line(error)}")
    finally:
        torch.compiler.reset()  # frees the graphs of the row and their memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def print_suite(suite: SuiteFigures, console: Console) -> None:
    """Print the figures as a table, and below it the reasons of rows without figures."""
    console.width = max(console.width, 170)
    versions = ", ".join(f"{name} {version}" for name, version in suite.versions.items())
    table = Table(box=box.SIMPLE_HEAD, title=f"{suite.device}; {versions}; {suite.seconds:g} s", title_justify="left")
    for heading in ("spec", "precision", "mode", "batch", "draws/s", "over bare", "over published", "TFLOP/s",
                    "of peak", "memory, GB", "J/draw", "warm-up, s"):  # fmt: skip
        left = heading in ("spec", "precision", "mode")
        table.add_column(heading, justify="left" if left else "right", no_wrap=True)
    for row in suite.rows:
        if row.figures is not None:
            table.add_row(escape(row.name), row.precision, row.mode, *_cells(row.figures))
    console.print(table)
    for row in suite.rows:
        if row.reason is not None:
            console.print(f"{row.title}: {row.reason}", markup=False, highlight=False)


def _cells(figures: LabFigures) -> list[str]:
    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    one = figures.speed
    rate = one.draws_per_second["pipeline"]
    return [
        str(one.batch_size["pipeline"]),
        f"{rate:,.4g}",
        f"{one.pipeline_over['bare']:.3f}",
        shown(one.pipeline_over.get("literal"), ".2f"),
        shown(None if one.gflop_per_second is None else one.gflop_per_second / 1000, ".3g"),
        shown(one.share_of_peak, ".0%"),
        f"{one.peak_memory_bytes['pipeline'] / 1e9:.2f}",
        shown(None if figures.watts is None else figures.watts / rate, ".3g"),
        f"{one.warm_up_seconds['pipeline']:.1f}",
    ]
