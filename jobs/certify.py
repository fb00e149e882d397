"""The main job: specs in, votes cast on the cluster, certificates and curves out; and what else reads a run."""

import io
import json
import logging
import secrets
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.special import bdtrc

from pipeline import curve as curves
from pipeline.block import STAGES, Block
from pipeline.certify import (
    Certificate,
    certified_radius,
    certify,
    least_certifying_n,
    looks_at,
    lower_confidence_bound,
    top_class,
)
from pipeline.curve import Curve, curve_of
from pipeline.data import open_dataset, sample_indices
from pipeline.errors import UserError
from pipeline.images import UNLABELLED
from pipeline.logs import write_log
from pipeline.sampling import (
    Order,
    Sampler,
    blocks_of,
    grid_of,
    order_of,
    place_order,
    planned_draws,
    post_hoc_samples,
    read_orders,
    read_plans,
    store_plan,
)
from pipeline.spec import RunSpec, check_alpha, check_multiple
from pipeline.storage.store import Store, open_store
from pipeline.tables import render
from pipeline.votes import (
    RUN_KEY,
    StoredBlock,
    block_lengths,
    block_votes,
    claim_run,
    glance,
    list_blocks,
    read_blocks,
    read_run,
    run_of,
    run_sha256,
    to_table,
    write_table,
)

logger = logging.getLogger(__name__)

MANY_HOURS = 100  # of a GPU: more than anybody spends by mistake and forgets
_FEW_DRAWS = 100_000  # take no such time, whatever the networks: their FLOPs are not counted
_CHANCE = 1e-3  # how improbable a clean accuracy must be by chance to be taken for better
_LOG_SECONDS = 10.0  # between plain progress lines, and between writes of progress.json


class _Run(NamedTuple):
    """A spec that passed all checks, its storage, and what its order still needs."""

    spec: RunSpec
    store: Store
    votes_id: str
    order_name: str
    order: Order
    sampler: Sampler
    missing: list[Block]  # that are wanted now; more may be, once these stand
    draws_left: int  # at most


def certify_all(
    wanted: Sequence[tuple[RunSpec, str]],
    *,
    certificate: Certificate = "top",
    costly: str | None = None,
    address: str | None = None,
    actors: int | None = None,
    batch_size: int | None = None,
    quiet: bool = False,
    verbose: bool = False,
    on_stop: Callable[[Callable[[int], None]], None] = lambda stop: None,
    confirm: Callable[[str], None] = logger.warning,
) -> tuple[list[dict[str, Any]], int | None]:
    """Certify specs one after another on the same actors, each in its storage; or predict, by the certificate.

    All specs are checked before the cluster is touched. `wanted` are specs and the homes of their runs; `costly` is the
    file that `read_costly` reads. `confirm` is told of an order of many GPU-hours, and raises where it is not meant.
    `on_stop` is given the function that a signal handler is to call with its signal's number. Returns a result a run,
    and the signal that stopped the work, if one did.

    Raises: UserError, RunError.
    """
    devices = {spec.compute.device for spec, _ in wanted}
    if len(devices) > 1:
        raise UserError(f"compute.device differs between the specs ({', '.join(sorted(devices))}): certify them apart")
    runs = [_prepare(spec, home, certificate, costly, quiet) for spec, home in wanted]
    results: list[dict[str, Any]] = []
    if not any(run.missing for run in runs):
        return [_conclude(run.store, run.order_name, quiet=quiet) for run in runs], None

    warn_of_cost([(run.spec, run.draws_left) for run in runs], confirm)

    from cluster.driver import Cluster
    from cluster.worker import Setup

    stopped_by: list[int] = []
    last = max(index for index, run in enumerate(runs) if run.missing)
    with Cluster(address=address, device=devices.pop(), actors=actors, verbose=verbose) as cluster:

        def stop(number: int) -> None:
            stopped_by.append(number)
            cluster.stop()

        on_stop(stop)  # after ray.init, which puts handlers of its own in place
        for index, run in enumerate(runs):
            work: dict[str, Any] = {}
            if run.missing:
                with _Watch(run, quiet) as watch:
                    outcome = cluster.cast(
                        Setup(run.spec, run.store.location, run.votes_id, batch_size),
                        run.missing,
                        sampler=run.sampler,
                        on_progress=watch,
                        last=index == last,
                    )
                if outcome.stopped:
                    return results, stopped_by[0]
                for aside in outcome.set_aside:
                    logger.error(
                        "given up after %d attempts: %s; %s", aside.task.attempts, aside.task.blocks[0], aside.error
                    )
                work = {
                    "draws_cast": outcome.draws,
                    "seconds": round(outcome.seconds, 2),
                    "tasks": outcome.tasks,
                    "tasks_lost": outcome.lost,
                    "blocks_computed_twice": outcome.duplicates,
                    "driver_ms_per_task": round(1000 * outcome.driver_seconds / max(outcome.tasks, 1), 3),
                }
            results.append(_conclude(run.store, run.order_name, quiet=quiet) | work)
    return results, None


def _prepare(spec: RunSpec, home: str, certificate: Certificate, costly: str | None, quiet: bool) -> _Run:
    """Check a spec against its data, weights and storage, and place its order."""
    from pipeline.smoothing import check_base_classifier, weights_ids

    smoothing = spec.smoothing
    data = open_dataset(spec.data)
    samples = sample_indices(spec.data.samples, len(data))
    order = order_of(spec, samples, certificate, _costly(certificate, costly, data.num_classes))
    wants_labels = "sampling.skip_wrong = true" if order.skip_wrong else "--certificate cost" if order.costly else None
    if wants_labels and data[samples[0]].label == UNLABELLED:
        raise UserError(f"{wants_labels} needs labels, and the data set has none: take another")
    check_base_classifier(spec)
    n, share = max(looks_at(smoothing.alpha, smoothing.n).items())
    least = least_certifying_n(share, certificate)
    if n < least:
        logger.warning(
            "n = %d can %s nothing at alpha = %g, even where all votes agree: n must be at least %d",
            n, "predict" if certificate == "predict" else "certify", share, least,
        )  # fmt: skip
    if smoothing.m > 1 and smoothing.local_sigma >= 2 * smoothing.sigma:
        logger.warning(
            "smoothing.local_sigma = %g is far above smoothing.sigma = %g: are the two swapped? sigma is the noise of "
            "the draws, local_sigma that of the m copies",
            smoothing.local_sigma, smoothing.sigma,
        )  # fmt: skip
    weights = weights_ids(spec)
    store = open_store(home)
    store.prepare()
    secret = smoothing.seed == "random"
    spec, run = _claim(spec, store, weights, data.num_classes)
    if secret and not quiet:
        said = f"sha256 of {store.uri}/{RUN_KEY}: {run_sha256(store)} (publish it)"
        Console(stderr=True).print(said, soft_wrap=True)
    order_name = place_order(store, order)
    standing = list_blocks(store, smoothing.block)
    sampler = sampler_of(store, run, order_name, order, standing, plans=True)
    left = sum(block.draws for block in blocks_of(order, smoothing.block) if block not in standing)
    return _Run(spec, store, run["votes_id"], order_name, order, sampler, sampler.start(), left)


def warn_of_cost(wanted: Sequence[tuple[RunSpec, int | None]], confirm: Callable[[str], None]) -> None:
    """Tell `confirm` where specs, each with its draws (None: all of them), take many GPU-hours together."""
    from jobs.plan import gpu_hours

    total = 0.0
    for spec, draws in wanted:
        if spec.compute.device != "cpu" and (draws is None or draws > _FEW_DRAWS):
            with suppress(UserError):  # what only the cluster can load cannot be counted here
                total += gpu_hours(spec, draws) or 0.0
    if total > MANY_HOURS:
        confirm(
            f"this order takes {total:,.0f} GPU-hours and more, were all H100s at 40 % of their peak (diffsmooth plan "
            "tells of others)"
        )


def _claim(spec: RunSpec, store: Store, weights: Mapping[str, str], num_classes: int) -> tuple[RunSpec, dict[str, Any]]:
    """Make the storage the spec's home; returns the spec with a number for its seed, and what run.json holds.

    A random seed is drawn once in a run's life, and then read from run.json.
    """
    while True:
        seeded, drawn = spec, False
        if spec.smoothing.seed == "random":
            drawn = RUN_KEY not in store.existing([RUN_KEY])
            seeded = _seeded(spec, secrets.randbits(128)) if drawn else with_seed_of(read_run(store), spec)
        described = run_of(seeded, weights, num_classes)
        try:
            claim_run(store, described)
        except UserError:
            if drawn:
                continue  # another driver was first, with a seed of its own
            raise
        return seeded, described


def with_seed_of(run: Mapping[str, Any], spec: RunSpec) -> RunSpec:
    """The spec, a random seed in it replaced by the number that the run drew."""
    return spec if spec.smoothing.seed != "random" else _seeded(spec, int(run["spec"]["smoothing"]["seed"]))


def _seeded(spec: RunSpec, seed: int) -> RunSpec:
    return spec.model_copy(update={"smoothing": spec.smoothing.model_copy(update={"seed": seed})})


def sampler_of(
    store: Store, run: Mapping[str, Any], order_name: str, order: Order, standing: set[Block], *, plans: bool = False
) -> Sampler:
    """What an order of a run still wants; without `plans` it writes nothing."""

    def read(blocks: list[Block]) -> list[Any]:
        return [block_votes(stored) for stored in read_blocks(store, blocks)]

    sigma = run["spec"]["smoothing"]["sigma"]
    return Sampler(store, order_name, order, block_lengths(run), sigma, standing, read, plans=plans)


def _costly(certificate: Certificate, path: str | None, num_classes: int) -> dict[int, list[int]] | None:
    if (certificate == "cost") != (path is not None):
        raise UserError(
            "--certificate cost and --costly FILE, which says what is costly, go together: give both or none"
        )
    return None if path is None else read_costly(path, num_classes)


def read_costly(path: str, num_classes: int) -> dict[int, list[int]]:
    """Label -> the classes that are costly for it, from a file of one of two kinds.

    CSV: a cost matrix, a row a label and a column a class, without headings; what is above 0 is costly. TOML: a line a
    label, its costly classes in brackets (3 = [5, 7]).

    Raises: UserError, naming what does not fit.
    """
    try:
        if path.endswith(".csv"):
            matrix = np.loadtxt(path, delimiter=",", ndmin=2)
            if matrix.shape != (num_classes, num_classes):
                raise ValueError(f"{matrix.shape[0]} rows and {matrix.shape[1]} columns for {num_classes} classes")
            costly = {y: np.flatnonzero(row > 0).tolist() for y, row in enumerate(matrix)}
        else:
            raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            costly = {int(y): [int(k) for k in classes] for y, classes in raw.items()}
    except OSError as error:
        raise UserError(f"--costly {path}: cannot read it: {error.strerror}; give a .csv or .toml file") from error
    except (ValueError, TypeError) as error:
        raise UserError(
            f"--costly {path}: {error}; a .csv must hold a cost matrix, a row a label; a .toml lines 3 = [5, 7]"
        ) from error
    for y, classes in costly.items():
        for k in (y, *classes):
            if not 0 <= k < num_classes:
                raise UserError(f"--costly {path}: class {k} must lie in 0 to {num_classes - 1}")
        if y in classes or len(set(classes)) < len(classes):
            raise UserError(
                f"--costly {path}: label {y} cannot be costly for itself, nor a class twice: {classes}; mend it"
            )
    costly = {y: classes for y, classes in costly.items() if classes}
    if not costly:
        raise UserError(f"--costly {path}: nothing is costly there; name classes, or take another certificate")
    return costly


def _conclude(store: Store, order_name: str, *, quiet: bool) -> dict[str, Any]:
    """Votes table, certificates, curve.csv and curve.png of an order, from the stored blocks; print its table."""
    votes = write_table(store, read_blocks(store))
    run, orders = read_run(store), read_orders(store)
    certificates = certificates_of(votes, run, orders, read_plans(store), order_name)
    curve = _curve(run, orders[order_name], certificates)
    folder = f"orders/{order_name}"
    buffer = io.BytesIO()
    certificates.to_parquet(buffer, index=False)
    store.replace(f"{folder}/certificates.parquet", buffer.getvalue())
    incomplete = certificates.loc[certificates["status"] == "incomplete", "sample"].tolist()
    order, predicts = orders[order_name], orders[order_name].certificate == "predict"
    if curve.num_samples and not predicts:
        fine = curve.table(curves.grid(0.01, curve.max_radius) if curve.tested is None else curve.tested)
        store.replace(f"{folder}/curve.csv", fine.to_csv(index=False).encode())
        picture = io.BytesIO()
        title = f"{len(incomplete)} of {len(certificates)} samples are incomplete and left out" if incomplete else None
        curves.plot([curve], picture, title)
        store.replace(f"{folder}/curve.png", picture.getvalue())
    if not quiet:
        console = Console()
        if predicts:
            accuracy, abstained = 100 * curve.at([0.0])[0], 100 * curve.abstention_rate
            console.print(f"predictions: {accuracy:.1f} % right, {abstained:.1f} % abstained", highlight=False)
        else:
            console.out(render([curve]), end="", highlight=False)
        console.print(
            f"order {order_name}: {_describe(order)}, {curve.num_samples} samples"
            f"{f', {curve.skipped} of them skipped' if curve.skipped else ''}"
            f"{'; POST HOC: an earlier order has looked at these samples' if curve.post_hoc else ''}\n"
            f"{store.uri}/{folder}: certificates.parquet{'' if predicts else ', curve.csv, curve.png'}",
            highlight=False,
            soft_wrap=True,
        )
    if incomplete:
        shown = ", ".join(map(str, incomplete[:10])) + (", ..." if len(incomplete) > 10 else "")
        logger.error("%d of %d samples are incomplete: %s", len(incomplete), len(certificates), shown)
    return _result(store, run, order_name, orders[order_name], curve, certificates)


def _describe(order: Order) -> str:
    alpha = order.alpha if isinstance(order.alpha, float) else "+".join(f"{share:g}" for share in order.alpha.values())
    mode = "" if order.mode == "fixed" else f"{order.mode}, "
    return f"{order.certificate}, {mode}n0 = {order.n0}, n = {order.n}, alpha = {alpha}"


def certificates_of(
    votes: pd.DataFrame,
    run: Mapping[str, Any],
    orders: dict[str, Order],
    plans: Mapping[str, Mapping[int, int]],
    order_name: str,
) -> pd.DataFrame:
    """The certificates of one of a run's orders; `plans` is what `read_plans` gives."""
    order, sigma = orders[order_name], run["spec"]["smoothing"]["sigma"]
    return certify(
        votes,
        sigma=sigma,
        alpha=order.alpha,
        n0=order.n0,
        n=plans.get(order_name, {}) if order.mode == "planned" else order.n,
        samples=order.samples,
        certificate=order.certificate,
        num_classes=run["num_classes"],
        costly=order.costly,
        skip_wrong=order.skip_wrong,
        grid=grid_of(order, block_lengths(run), sigma),
        order=order_name,
        mode=order.mode,
        post_hoc=post_hoc_samples(orders, order_name, plans).__contains__,
    )


def _curve(run: dict[str, Any], order: Order, certificates: pd.DataFrame) -> Curve:
    sigma, looks = run["spec"]["smoothing"]["sigma"], looks_at(order.alpha, order.n)
    largest = max(float(certified_radius(n, n, share, sigma)) for n, share in looks.items())
    if order.radii is not None:
        largest = order.radii[-1]
    return curve_of(run["name"], certificates, sigma, largest, sum(looks.values()), order.radii)


def _result(
    store: Store, run: dict[str, Any], order_name: str, order: Order, curve: Curve, certificates: pd.DataFrame
) -> dict[str, Any]:
    if order.certificate == "predict":
        reached: dict[str, Any] = {"accuracy": float(curve.at([0.0])[0])}
    else:
        radii = curves.table_radii([curve])
        accuracy = zip(radii, curve.at(radii).tolist(), strict=True)
        reached = {
            "acr": None if curve.tested is not None else curve.acr,
            "certified_accuracy": {f"{radius:g}": value for radius, value in accuracy},
        }
    complete = certificates[~certificates["status"].isin(["incomplete", "exempt"])]
    return {
        "name": curve.name,
        "run": store.uri,
        "order": order_name,
        "votes_id": run["votes_id"],
        "complete": curve.incomplete == 0,
        "samples": curve.num_samples,
        "skipped": curve.skipped,
        "incomplete": curve.incomplete,
        "sigma": run["spec"]["smoothing"]["sigma"],
        "n0": order.n0,
        "n": order.n,
        "alpha": order.total_alpha,
        "mode": order.mode,
        "certificate": order.certificate,
        "draws_used": int(complete["n0"].sum() + complete.loc[complete["status"] != "skipped", "n"].sum()),
        "draws_at_n": len(complete) * (order.n0 + order.n),  # what n of every sample would have taken
        "post_hoc": curve.post_hoc,
        "abstention_rate": curve.abstention_rate if curve.num_samples > curve.skipped else None,
        **reached,
    }


class _Watch:
    """Shows a run under way: a bar on a terminal or in a notebook, else plain lines; progress.json beside the votes."""

    def __init__(self, run: _Run, quiet: bool) -> None:
        self._run = run
        self._counts: dict[tuple[int, str], Counter[int]] = defaultdict(Counter)
        self._certified = {0.0: 0, run.spec.smoothing.sigma: 0}  # radius -> samples, of those completed by this call
        self._samples = 0
        self._clean: Any = None
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._quiet = quiet
        self._spoken = time.monotonic()
        if (self._console.is_terminal or self._console.is_jupyter) and not quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("draws  {task.fields[rate]:,.0f}/s  ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(run.spec.name, total=None, rate=0.0, note="")

    def __enter__(self) -> "_Watch":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, progress: Any) -> None:
        """Take in a `cluster.driver.Progress`."""
        if progress.clean is not None and self._clean is None:
            self._clean = progress.clean
            self._judge(progress.clean)
        for block, label, votes in progress.new:
            self._add(block, label, votes)
        rate = progress.cast / progress.seconds if progress.seconds else 0.0
        note = self._note(progress)
        if self._bar:
            self._bar.update(self._task, completed=progress.draws, total=progress.draws_wanted, rate=rate, note=note)
        finished = progress.draws == progress.draws_wanted
        if time.monotonic() - self._spoken < _LOG_SECONDS and not finished:
            return
        self._spoken = time.monotonic()
        eta = (progress.draws_wanted - progress.draws) / rate if rate else None
        word = {
            "draws_cast": progress.draws,
            "draws_wanted": progress.draws_wanted,
            "draws_per_second": round(rate, 1),
            "eta_seconds": None if eta is None else round(eta),
            "actors_ready": progress.actors,
            "updated": time.time(),
            "note": note,
        }
        self._run.store.replace("progress.json", json.dumps(word, indent=2).encode())
        if not self._bar and not self._quiet:
            left = "" if eta is None else f", ETA {eta:.0f} s"
            drawn = f"{progress.draws:,} of {progress.draws_wanted:,} draws"
            line = f"{self._run.spec.name}: {drawn}, {rate:,.0f}/s{left}; {note}"
            self._console.print(line, highlight=False, soft_wrap=True)

    def _judge(self, clean: Any) -> None:
        """Say the bare classifier's accuracy; warn where chance would do as well, if so few samples can tell."""
        chance = 1 / clean.num_classes
        if float(bdtrc(clean.samples - 1, clean.samples, chance)) > _CHANCE:
            return
        right = f"{clean.right} of {clean.samples} clean samples"
        if float(bdtrc(clean.right - 1, clean.samples, chance)) > _CHANCE:
            logger.warning(
                "WARNING: the classifier alone gets %s right, no better than chance (%g of %d). Most often "
                "classifier.normalize is wrong, or the order of the classes; a certificate of this f is of little use",
                right, round(clean.samples * chance, 1), clean.samples,
            )  # fmt: skip
        elif not self._quiet:
            self._console.print(f"the classifier alone gets {right} right", highlight=False)

    def _note(self, progress: Any) -> str:
        if not progress.actors:
            return f"waiting for devices: 0 of {progress.actors_wanted} ready"
        if not self._samples or self._run.order.certificate == "predict":
            return f"{progress.actors} actors"
        at = [f"{100 * count / self._samples:.0f}% at r={radius:g}" for radius, count in self._certified.items()]
        return f"certified {', '.join(at)} ({self._samples} samples)"

    def _add(self, block: Block, label: int, votes: dict[int, int]) -> None:
        """Count a block, and in fixed mode certify its sample once all its draws were cast by this call."""
        order, sample = self._run.order, block.sample
        if order.mode != "fixed" or order.certificate == "cost":
            return
        self._counts[sample, block.stage].update(votes)
        selection, estimation = (self._counts[sample, stage] for stage in STAGES)
        if selection.total() < order.n0:
            return
        top = top_class(selection)  # PREDICT selects nothing
        if estimation.total() == order.n:
            self._samples += 1
            count = (estimation[top], order.n, looks_at(order.alpha, order.n)[order.n])
            if top == label and lower_confidence_bound(*count) >= 0.5:
                reached = certified_radius(*count, self._run.spec.smoothing.sigma)
                for radius in self._certified:
                    self._certified[radius] += bool(reached >= radius)
        elif order.skip_wrong and top != label:
            self._samples += 1
        else:
            return
        del self._counts[sample, "selection"], self._counts[sample, "estimation"]


def analyze(
    run_uri: str,
    *,
    alpha: float | None,
    n0: int | None,
    n: int | None,
    certificate: Certificate | None = None,
    costly: str | None = None,
    export_tsv: str | None = None,
    quiet: bool,
) -> dict[str, Any]:
    """Another order over all samples of the run's orders, from the votes that stand; its log, where that is asked for.

    Raises: UserError for draws that were not cast, naming the most that were.
    """
    store = open_store(run_uri)
    run, orders = read_run(store), read_orders(store)
    if not orders:
        raise UserError(f"{run_uri} holds no order yet: certify it first")
    first = next(iter(orders.values()))
    kept = first.certificate if certificate is None else certificate
    asked = {"n0": first.n0 if n0 is None else n0, "n": first.n if n is None else n}
    if kept == "predict":
        asked["n0"] = 0
    level = first.alpha if alpha is None else alpha
    check_alpha("--alpha", level, asked["n"])
    order = Order(
        **{
            **first.model_dump(),
            **asked,
            "samples": sorted({sample for order in orders.values() for sample in order.samples}),
            "alpha": level,
            "certificate": kept,
            "costly": _costly(kept, costly, run["num_classes"]) if certificate or costly else first.costly,
        }
    )
    if n is not None and first.mode != "fixed":
        order = order.model_copy(update={"mode": "fixed", "max_acr_loss": None, "radii": None})
    if order.mode == "grid" and kept != "top":
        raise UserError(
            f"--certificate {kept}: a grid's looks give the certificate 'top' alone; give --n for fixed mode"
        )
    if kept in ("predict", "cost"):
        if order.mode != "fixed":
            raise UserError(f"--certificate {kept} needs equally many draws of each sample: name them with --n")
        order = order.model_copy(update={"skip_wrong": False})
    _check_drawn(store, run, order, asked)
    order_name = place_order(store, order)
    if order.mode == "planned":  # the draws that were cast
        planned = planned_draws(store, first)
        store_plan(store, order_name, {sample: n for sample, n in planned.items() if sample in set(order.samples)})
    result = _conclude(store, order_name, quiet=quiet)
    if export_tsv:
        certificates = pd.read_parquet(io.BytesIO(store.read(f"orders/{order_name}/certificates.parquet")))
        with writing("--export-tsv", export_tsv):
            Path(export_tsv).write_text(write_log(certificates))
    return result


def _check_drawn(store: Store, run: Mapping[str, Any], order: Order, asked: Mapping[str, int]) -> None:
    """Refuse draws that were not cast; those that an adaptive order found needless do not count as lacking."""
    lengths = block_lengths(run)
    standing = list_blocks(store, lengths)
    for (name, value), stage in zip(asked.items(), STAGES, strict=True):
        if value < 1 and (name == "n" or order.certificate != "predict"):
            raise UserError(f"--{name} {value} must be at least 1")
        check_multiple(f"--{name}", value, lengths.of(stage), stage)
        if stage == "estimation" and order.mode != "fixed":
            continue
        needed = set(order.samples)
        if stage == "estimation" and order.skip_wrong:
            needed = {block.sample for block in sampler_of(store, run, "", order, standing).start()}
        drawn = min((_prefix(standing, sample, stage, lengths.of(stage)) for sample in needed), default=value)
        if value > drawn:
            most = f"the most that stands for every sample is {drawn}" if drawn else "not every sample has draws yet"
            raise UserError(f"--{name} {value}: {most}; take that, or cast more draws with certify")


@contextmanager
def writing(option: str, path: str) -> Iterator[None]:
    """Turn a failure to write what an option asks for into the user's mistake."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {path}: cannot write it: {error.strerror}; choose another place") from error


def _prefix(standing: set[Block], sample: int, stage: Any, length: int) -> int:
    """How many draws of a sample stand without a gap from the first."""
    drawn = 0
    while Block(sample, stage, drawn, drawn + length) in standing:
        drawn += length
    return drawn


class StoredOrder(NamedTuple):
    """One of a run's orders, with everything that follows from the votes that stand."""

    store: Store
    run: dict[str, Any]
    name: str
    order: Order
    stored: list[StoredBlock]
    votes: pd.DataFrame  # of these blocks
    certificates: pd.DataFrame
    curve: Curve

    def result(self) -> dict[str, Any]:
        """What `certify --json` says of it."""
        return _result(self.store, self.run, self.name, self.order, self.curve, self.certificates)


def read_order(run_uri: str, order_name: str | None) -> StoredOrder:
    """One of a run's orders, the first that has radii unless one is named.

    Raises: UserError where there is none.
    """
    store = open_store(run_uri)
    run, orders = read_run(store), read_orders(store)
    with_radii = [name for name, order in orders.items() if order.certificate != "predict"]
    name = order_name or next(iter(with_radii or orders), "")
    if name not in orders:
        raise UserError(f"{run_uri} holds no order {name!r}; name one of: {', '.join(orders) or 'none'}")
    if name not in with_radii:
        raise UserError(f"{run_uri}: order {name} holds predictions, which have no radius; certify it, or take another")
    stored = read_blocks(store)
    votes = to_table(stored)
    certificates = certificates_of(votes, run, orders, read_plans(store), name)
    curve = _curve(run, orders[name], certificates)
    if not curve.num_samples:
        raise UserError(f"{run_uri}: no sample of order {name} is complete yet; run certify again")
    return StoredOrder(store, run, name, orders[name], stored, votes, certificates, curve)


def run_status(run_uri: str) -> dict[str, Any]:
    """What stands and what is missing, from the run's files alone."""
    store = open_store(run_uri)
    run, orders = read_run(store), read_orders(store)
    lengths = block_lengths(run)
    entries = list(store.list("votes"))
    standing = list_blocks(store, lengths, entries)
    votes, devices = glance(store, standing)
    facts: dict[str, Any] = {
        "run": run_uri,
        "name": run["name"],
        "votes_id": run["votes_id"],
        "blocks": len(standing),
        "draws": sum(block.draws for block in standing),
        "bytes": sum(entry.size for entry in entries),
        "last_write": max((entry.modified for entry in entries), default=None),
        "devices": devices,
        "orders": {},
    }
    with suppress(FileNotFoundError, ValueError):
        facts["driver"] = json.loads(store.read("progress.json"))
    plans = read_plans(store)
    for name, order in orders.items():
        certificates = certificates_of(votes, run, orders, plans, name)
        sampler = sampler_of(store, run, name, order, standing)
        facts["orders"][name] = _result(store, run, name, order, _curve(run, order, certificates), certificates) | {
            "draws_done": sum(block.draws for block in blocks_of(order, lengths) if block in standing),
            "draws_missing": sum(block.draws for block in sampler.start()),
        }
    return facts


def print_status(facts: dict[str, Any]) -> None:
    console = Console()
    last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(facts["last_write"])) if facts["last_write"] else "never"
    devices = ", ".join(f"{name} ({count} blocks)" for name, count in facts["devices"].items()) or "none yet"
    lines = [
        f"{facts['name']}  votes_id {facts['votes_id']}",
        f"blocks {facts['blocks']:,}  draws {facts['draws']:,}  bytes {facts['bytes']:,}  last write {last}",
        f"devices: {devices}",
    ]
    if (word := facts.get("driver")) and not all(order["complete"] for order in facts["orders"].values()):
        left = "" if word["eta_seconds"] is None else f", {word['eta_seconds']:,} s to go"
        ago = max(0, time.time() - word["updated"])
        lines.append(
            f"the driver's last word, {ago:,.0f} s ago: {word['draws_cast']:,} of {word['draws_wanted']:,} draws, "
            f"{word['draws_per_second']:,.0f}/s{left}; {word['note']}"
        )
    for name, order in facts["orders"].items():
        more = "" if order["mode"] == "fixed" else " or more"
        state = (
            "complete" if order["complete"] else f"{order['draws_missing']:,}{more} draws missing: run certify again"
        )
        mode = "" if order["mode"] == "fixed" else f"{order['mode']}, "
        lines.append(
            f"order {name}: {order['certificate']}, {mode}n0 = {order['n0']}, n = {order['n']}, "
            f"alpha = {order['alpha']:g}"
            f"{', post hoc' if order['post_hoc'] else ''}: {order['samples']} of "
            f"{order['samples'] + order['incomplete']} samples, {order['draws_done']:,} draws done, {state}"
        )
        if order["samples"] and order["certificate"] == "predict":
            abstained = 100 * order["abstention_rate"]
            lines.append(f"  predictions so far  {100 * order['accuracy']:.1f}% right, {abstained:.1f}% abstained")
        elif order["samples"]:
            accuracy = "  ".join(
                f"r={radius}: {100 * value:.1f}%" for radius, value in order["certified_accuracy"].items()
            )
            acr = "" if order["acr"] is None else f"  ACR {order['acr']:.3f}"
            lines.append(f"  certified accuracy so far  {accuracy}{acr}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
