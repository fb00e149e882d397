"""The Python API behind `import diffsmooth`: certify a model or a spec, open a stored run."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from torch import Tensor

from diffsmooth.cluster.in_process import Model, Settings, attack_in_process, certify_in_process
from diffsmooth.jobs.analyze import Request
from diffsmooth.jobs.analyze import analyze as analyze_run
from diffsmooth.jobs.attacking import attack_run
from diffsmooth.jobs.casting import Options, certify_all
from diffsmooth.jobs.compare import compare_sources
from diffsmooth.jobs.reporting import report
from diffsmooth.jobs.specs import home_of, load_shipped, read_named
from diffsmooth.jobs.watch import ClusterOptions, bar_in_process
from diffsmooth.pipeline.attack.gap import Gap, Robustness
from diffsmooth.pipeline.attack.request import AttackRequest
from diffsmooth.pipeline.certify.compare import Comparison
from diffsmooth.pipeline.certify.curve import Curve
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.models.denoisers import Denoiser
from diffsmooth.pipeline.results.attacked import Attacked
from diffsmooth.pipeline.results.cascades import Cascade, write_cascade
from diffsmooth.pipeline.results.cascades import cascade as cascade_of
from diffsmooth.pipeline.results.stored import OrderResult, RunStatus, StoredRun
from diffsmooth.pipeline.spec import RunSpec
from diffsmooth.pipeline.votes.blocks import to_table


class Result:
    """The certificates of one order, and what follows from them."""

    def __init__(self, stored: StoredRun, order: str) -> None:
        self._stored = stored
        self._name = order

    @property
    def stored(self) -> StoredRun:
        """The run, in memory or in a folder."""
        return self._stored

    @cached_property
    def votes(self) -> pd.DataFrame:
        """All votes of the run, one row per block and class; columns as in `pipeline.votes.blocks.SCHEMA`."""
        return to_table(self._stored.read_blocks())

    @cached_property
    def _result(self) -> OrderResult:
        return self._stored.result(self.votes, self._name)

    @property
    def certificates(self) -> pd.DataFrame:
        """One row per sample; columns as in `diffsmooth.pipeline.certify.certificates.COLUMNS`."""
        return self._result.certificates

    @property
    def curve(self) -> Curve:
        """Certified accuracy over the radius: `.acr`, `.at(radii)`, `.table(radii)`, `.plot()`."""
        return self._result.curve

    @property
    def complete(self) -> bool:
        """Whether no sample lacks draws."""
        return not self._result.incomplete

    def accuracy_at(self, radius: float) -> float:
        """Certified accuracy at an l2 radius in [0, 1] pixel units."""
        return float(self.curve.at([radius])[0])

    def __repr__(self) -> str:
        curve = self.curve
        return (
            f"<Result: {curve.num_samples} samples at sigma = {self._stored.run.sigma:g}, ACR {curve.acr:.3f}, "
            f"certified accuracy {curve.at([0.0])[0]:.1%} at r = 0{', incomplete' if not self.complete else ''}>"
        )


def certify(
    model: Callable[[Tensor], Tensor] | str | RunSpec,
    images: Any = None,
    labels: Any = None,
    *,
    sigma: float | None = None,
    n0: int = 100,
    n: int = 1000,
    alpha: float = 0.001,
    denoiser: Denoiser | None = None,
    m: int = 1,
    local_sigma: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | None = None,
    progress: bool = False,
    out: str | None = None,
    identity: str | None = None,
    address: str | None = None,
    actors: int | None = None,
    overrides: Sequence[str] = (),
) -> Result:
    """Certify a model in this process, or a spec on Ray.

    A model is any torch.nn.Module or callable, x_BCHW float32 in [0, 1] -> logits_BK. `images` are N x C x H x W, or a
    data set with __len__ and __getitem__ that gives an image, or an image and its label; values are floats in [0, 1] or
    uint8. f(x) is the mean softmax of the model over m copies of the (denoised) image with fixed noise of std
    `local_sigma`; a vote is argmax f(x + N(0, sigma^2)). `denoiser` maps (x_BCHW, sigma) to x0_BCHW. With `out`, a
    folder or s3://BUCKET/PREFIX, the run is stored and resumed; `identity` then names the model, by default the sha256
    of its weights and code.

    A spec is a RunSpec, the path of a TOML file, or the name of a shipped spec; only `out`, `address`, `actors`,
    `batch_size`, `progress` and `overrides` apply, and the result is the same as that of `diffsmooth certify`.

    Raises: UserError, RunError; Stopped if a signal stops a run on Ray.
    """
    if isinstance(model, str | RunSpec):
        if images is not None or labels is not None or sigma is not None or denoiser is not None:
            raise UserError('a spec has its own data and settings; change them with overrides=["section.key=value"]')
        spec = load_spec(model, overrides) if isinstance(model, str) else model
        home = home_of(spec, out, several=False)
        options = Options(address=address, actors=actors, batch_size=batch_size, quiet=not progress)
        (certified,) = certify_all([(spec, home)], options)
        return Result(StoredRun.open(home), certified.result.name)
    sigma = _checked_sigma("certify", model, images, sigma)
    in_memory = Model(classifier=model, denoiser=denoiser, m=m, local_sigma=local_sigma, identity=identity)
    with bar_in_process("certify", show=progress) as bar:
        settings = Settings(
            sigma=sigma, n0=n0, n=n, alpha=alpha, seed=seed, batch_size=batch_size, device=device, on_progress=bar
        )
        stored, order = certify_in_process(in_memory, images, labels, settings, out)
    if out is not None:
        stored.finish(order)
    return Result(stored, order)


def _checked_sigma(function: str, model: object, images: object, sigma: float | None) -> float:
    """Return sigma if everything that a model in memory needs is given. Raises: UserError."""
    if images is None or sigma is None:
        missing = "images" if images is None else "sigma"
        raise UserError(f"{missing} is missing; call {function}(model, images, labels, sigma=0.25)")
    if not callable(model):
        raise UserError(f"the model is a {type(model).__name__}; give a torch.nn.Module, a callable, or a spec")
    return sigma


class AttackResult:
    """The upper bounds that an attack has proven, and what follows from them."""

    def __init__(self, found: Attacked) -> None:
        self._found = found

    @property
    def table(self) -> pd.DataFrame:
        """One row per judged image; columns as in `diffsmooth.pipeline.attack.record.TABLE_COLUMNS`."""
        return self._found.table

    @property
    def uppers(self) -> pd.Series:
        """The proven upper bound of each sample's radius, infinite if there is none."""
        samples = self._found.samples
        alpha = self._found.attack.alpha
        return pd.Series({one.sample: one.upper(alpha) for one in samples}, name="upper", dtype=float)

    @property
    def gap(self) -> Gap | None:
        """Lower and upper radius of each sample, and contradictions; None if there are no certificates."""
        return self._found.gap

    @property
    def robustness(self) -> list[Robustness]:
        """Robust accuracy (empirical), average and worst-of-N robustness at each eps."""
        return self._found.robustness

    @property
    def complete(self) -> bool:
        """Whether all samples are attacked."""
        return self._found.complete

    def image(self, sample: int) -> NDArray[np.float32] | None:
        """The nearest image C x H x W at which g is proven wrong; None if there is none."""
        one = next(one for one in self._found.samples if one.sample == sample)
        nearest = one.nearest(self._found.attack.alpha)
        return None if nearest is None else nearest.image_CHW

    def __repr__(self) -> str:
        uppers = self.uppers
        proven = uppers[np.isfinite(uppers)]
        median = f", median upper radius {uppers.median():.3f}" if len(proven) > len(uppers) / 2 else ""
        return f"<AttackResult: {self._found.attack.id}, {len(proven)} of {len(uppers)} samples proven wrong{median}>"


def attack(
    model: Callable[[Tensor], Tensor] | str | RunSpec,
    images: Any = None,
    labels: Any = None,
    *,
    sigma: float | None = None,
    certified: Result | str | None = None,
    attack: str = "pgd",
    eps: Sequence[float] = (),
    samples: str | None = None,
    refine: int | None = None,
    steps: int | None = None,
    draws: int | None = None,
    restarts: int | None = None,
    n0: int | None = None,
    n: int | None = None,
    alpha: float | None = None,
    attack_seed: int = 0,
    denoiser: Denoiser | None = None,
    m: int = 1,
    local_sigma: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    device: str | None = None,
    progress: bool = False,
    identity: str | None = None,
    address: str | None = None,
    actors: int | None = None,
    overrides: Sequence[str] = (),
) -> AttackResult:
    """Bound the radius of each image from above: attack a model in this process, or the run of a spec on Ray.

    `model`, `images`, `labels`, `sigma`, `denoiser`, `m`, `local_sigma`, `seed` and `identity` are those of `certify`.
    `certified` is its result for the same model and images, or the folder of its run; then `.gap` holds lower and upper
    radii. A spec needs `certified`, the folder of its run. The other arguments are the options of `diffsmooth attack`.

    Raises: UserError, RunError; Stopped if a signal stops an attack on Ray.
    """
    request = AttackRequest(
        attack=attack, eps=eps, samples=samples, refine=refine, steps=steps, draws=draws, restarts=restarts, n0=n0, n=n,
        alpha=alpha, seed=attack_seed,
    )  # fmt: skip
    if isinstance(model, str | RunSpec):
        if not isinstance(certified, str) or images is not None:
            raise UserError(
                f"certified = {certified!r:.60} must be the folder of the spec's run, without images; a spec has them"
            )
        spec = load_spec(model, overrides) if isinstance(model, str) else model
        options = ClusterOptions(address=address, actors=actors, batch_size=batch_size, quiet=not progress)
        return AttackResult(attack_run(certified, spec, request, options))
    sigma = _checked_sigma("attack", model, images, sigma)
    in_memory = Model(classifier=model, denoiser=denoiser, m=m, local_sigma=local_sigma, identity=identity)
    if isinstance(certified, str):
        stored: StoredRun | None = StoredRun.open(certified)
    else:
        stored = None if certified is None else certified.stored
    with bar_in_process("attack", show=progress) as bar:
        settings = Settings(sigma=sigma, seed=seed, batch_size=batch_size, device=device, on_progress=bar)
        return AttackResult(attack_in_process(in_memory, images, labels, settings, request, stored))


def load_spec(path_or_name: str, overrides: Sequence[str] = ()) -> RunSpec:
    """A spec from a TOML file or by the name of a shipped one, with `section.key=value` overrides.

    Raises: UserError.
    """
    return read_named(path_or_name, overrides)


class OpenRun:
    """A stored run, read-only."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._stored = StoredRun.open(uri)

    @property
    def orders(self) -> list[str]:
        """The names of the orders, in the sequence in which they were placed."""
        return list(self._stored.orders)

    @cached_property
    def _votes(self) -> pd.DataFrame:
        return to_table(self._stored.read_blocks())

    def votes(self) -> pd.DataFrame:
        """All votes, read from the blocks and checked. Raises: RunError for a damaged block."""
        return self._votes

    def certificates(self, order: str | None = None) -> pd.DataFrame:
        """The certificates of an order, by default the first that has radii. Raises: UserError if there is none."""
        return self._stored.result(self._votes, self._stored.choose(order)).certificates

    def curve(self, order: str | None = None) -> Curve:
        """The curve of an order, by default the first that has radii. Raises: UserError if there is none."""
        return self._stored.result(self._votes, self._stored.choose(order)).curve

    def status(self) -> RunStatus:
        """What is committed and what is missing."""
        return StoredRun.open(self.uri).status()

    def report(self, path: str, *, spec: RunSpec | None = None) -> None:
        """Write the report to an HTML file; with `spec`, or a shipped spec of the run's name, with pictures."""
        report([self.uri], specs=[] if spec is None else [spec], shipped=load_shipped, output=path)

    def __repr__(self) -> str:
        return f"<OpenRun {self.uri}: {self._stored.run.name}, orders {', '.join(self.orders) or 'none'}>"


def open_run(uri: str) -> OpenRun:
    """Open a folder or s3://BUCKET/PREFIX that certify wrote, or a published run. Raises: UserError."""
    return OpenRun(uri)


def analyze(
    uri: str,
    *,
    alpha: float | None = None,
    n0: int | None = None,
    n: int | None = None,
    certificate: str | None = None,
    costly: str | None = None,
) -> Result:
    """Certify the votes of a run with other settings, without draws; a second look is marked post hoc.

    Raises: UserError for draws that were not cast.
    """
    request = Request(alpha=alpha, n0=n0, n=n, certificate=certificate, costly=costly)
    placed = analyze_run(uri, request, quiet=True)
    return Result(StoredRun.open(uri), placed.name)


def cascade(
    runs: Sequence[str],
    *,
    alpha: float | None = None,
    n0: int | None = None,
    n: int | None = None,
    out: str | None = None,
) -> Cascade:
    """One certificate over stored runs with different sigma, without draws; with `out`, written to that location.

    `.certificates`, `.curve`, `.accuracy_at(radius)` and `.complete` are those of a result. All rows are post hoc.
    Raises: UserError for runs that do not fit together.
    """
    found = cascade_of(runs, alpha=alpha, n0=n0, n=n)
    if out is not None:
        write_cascade(found, out)
    return found


def compare(*sources: str, order: str | None = None, grid: str | None = None) -> Comparison:
    """Compare runs and logs on the samples that they share: `.pairs`, `.table`, `.notes`, `.to_json()`.

    `sources` are folders, s3://BUCKET/PREFIX or logs, also as NAME=PLACE; `grid` is "START:STOP:STEP".

    Raises: UserError for runs that cannot be compared.
    """
    return compare_sources(sources, order_name=order, grid=grid)


__all__ = [
    "AttackResult",
    "OpenRun",
    "Result",
    "RunError",
    "UserError",
    "analyze",
    "attack",
    "cascade",
    "certify",
    "compare",
    "load_spec",
    "open_run",
]
