"""`diffsmooth analyze`: another order from the committed votes, or a cascade of several runs; no draws, no GPU."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import click
import pandas as pd
from rich.console import Console

from diffsmooth.jobs.console import conclude
from diffsmooth.jobs.options import COSTLY, JSON, CertificateName
from diffsmooth.jobs.orders import print_order
from diffsmooth.jobs.places import writing
from diffsmooth.pipeline.block import STAGES, Block, Stage
from diffsmooth.pipeline.certify.kinds import CASCADE, kind_of
from diffsmooth.pipeline.certify.orders import Order, check_size, read_costly
from diffsmooth.pipeline.certify.planning import planned_before, store_plan
from diffsmooth.pipeline.data.images import UNLABELLED
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.cascades import CASCADE_KEY, Cascade, cascade, write_cascade
from diffsmooth.pipeline.results.stored import OrderResult, StoredRun
from diffsmooth.pipeline.show.logs import write_log
from diffsmooth.pipeline.show.tables import render
from diffsmooth.pipeline.spec import check_alpha, check_multiple

logger = logging.getLogger(__name__)


@click.command("analyze")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--alpha", type=float, help="Error probability of a certificate. [default: the first order's]")
@click.option("--n0", type=int, help="Number of selection draws. [default: the first order's]")
@click.option("--n", type=int, help="Number of estimation draws. [default: the first order's]")
@click.option(
    "--certificate",
    type=CertificateName(),
    help="What to claim; cascade is one certificate over several RUNs. [default: the first order's]",
)
@COSTLY
@click.option(
    "--out", metavar="FOLDER", help="With --certificate cascade: folder or s3://BUCKET/PREFIX. [default: runs/cascade]"
)
@click.option(
    "--export-tsv",
    metavar="FILE",
    help="Also write the certificates as a log in Cohen's layout, radii rounded down to 6 decimals.",
)
@JSON
def analyze_command(
    runs: tuple[str, ...], out: str | None, export_tsv: str | None, as_json: bool, **request: Any
) -> None:
    """Certify RUN's votes with other settings: no draws, no GPU. A second look is marked post hoc.

    \b
    diffsmooth analyze runs/mnist --alpha 0.01
    diffsmooth analyze runs/mnist-cohen-* --certificate cascade --out runs/cohen-cascade
    """
    if request["certificate"] == CASCADE:
        _analyze_cascade(runs, out or "runs/cascade", export_tsv, as_json, **request)
    if len(runs) > 1 or out:
        reason = "several runs are analyzed together" if len(runs) > 1 else "--out is available"
        raise UserError(f"{reason} only with --certificate cascade; give one RUN without --out")
    result = analyze(runs[0], Request(**request), export_tsv=export_tsv, quiet=as_json)
    conclude(result.summary(), as_json=as_json, show=None, complete=not result.curve.incomplete)


def _analyze_cascade(
    runs: tuple[str, ...], out: str, export_tsv: str | None, as_json: bool, *, costly: str | None, **request: Any
) -> NoReturn:
    if costly:
        raise UserError("--costly belongs to --certificate cost")
    found = cascade(runs, alpha=request["alpha"], n0=request["n0"], n=request["n"])
    home = write_cascade(found, out)
    if export_tsv:
        _export(export_tsv, found.certificates)
    conclude(found, as_json=as_json, show=lambda one: print_cascade(one, home), complete=found.complete)


def _export(file: str, certificates: pd.DataFrame) -> None:
    log = write_log(certificates)
    with writing("--export-tsv", file) as path:
        Path(path).write_text(log)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What differs from the first order of the run; None: nothing."""

    alpha: float | None = None
    n0: int | None = None
    n: int | None = None
    certificate: str | None = None
    costly: str | None = None


def analyze(run_uri: str, request: Request, *, export_tsv: str | None = None, quiet: bool = False) -> OrderResult:
    """Place another order over all samples of the run's orders, and certify it from the committed votes.

    `export_tsv` is the file of a log in Cohen's layout. Raises: UserError for draws that were not cast, naming how many
    were.
    """
    stored = StoredRun.open(run_uri)
    if not stored.orders:
        raise UserError(f"{run_uri} has no order yet; certify it first")
    first = next(iter(stored.orders.values()))
    order = _order(stored, first, request)
    if export_tsv and not order.kind.claims_label:
        raise UserError(
            f"--export-tsv: readers of Cohen's layout would take the certificate {order.certificate!r} for one of "
            "robustness; export another certificate"
        )
    _check_drawn(stored, order)
    if order.kind.needs_costs:
        (block,) = stored.read_blocks([next(order.blocks(stored.run.block))])
        if block.label == UNLABELLED:
            raise UserError(
                f"--certificate {order.certificate} needs labels, but the data set has none; use another certificate"
            )
    planned = _planned(stored, first, order) if order.mode == "planned" else {}
    name = stored.place(order)
    if order.mode == "planned":
        store_plan(stored.store, name, planned)
    result = stored.finish(name, rebuild=True)
    print_order(result, quiet=quiet)
    if export_tsv:
        _export(export_tsv, result.certificates)
    return result


def _order(stored: StoredRun, first: Order, request: Request) -> Order:
    """The first order with what the request changes, over the samples of all orders."""
    kind = kind_of(request.certificate or first.certificate)
    n0 = 0 if not kind.selects else first.n0 if request.n0 is None else request.n0
    n = first.n if request.n is None else request.n
    for name, value, least in (("n0", n0, int(kind.selects)), ("n", n, 1)):
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")
    alpha = first.alpha if request.alpha is None else request.alpha
    check_alpha("--alpha", alpha, n)
    changes_costs = request.certificate is not None or request.costly is not None
    costly = read_costly(kind.name, request.costly, stored.run.num_classes) if changes_costs else first.costly
    to_fixed = request.n is not None and first.mode != "fixed"
    if first.mode not in kind.modes and not to_fixed:
        raise UserError(f"--certificate {kind.name} is not available in {first.mode} mode; use --n for fixed mode")
    order = first.changed(
        samples=sorted({sample for order in stored.orders.values() for sample in order.samples}),
        n0=n0,
        n=n,
        alpha=alpha,
        certificate=kind.name,
        costly=costly,
        skip_wrong=first.skip_wrong and kind.skips_wrong,
        **({"mode": "fixed", "max_acr_loss": None, "radii": None} if to_fixed else {}),
    )
    check_size(order, stored.run.block)
    return order


def _check_drawn(stored: StoredRun, order: Order) -> None:
    """Refuse draws that were not cast; those that an adaptive order found unnecessary are not missing."""
    lengths, committed = stored.run.block, stored.committed()
    for (name, value), stage in zip((("n0", order.n0), ("n", order.n)), STAGES, strict=True):
        check_multiple(f"--{name}", value, lengths.of(stage), stage)
        if stage == "estimation" and order.mode != "fixed":
            continue
        needed = set(order.samples)
        if stage == "estimation" and order.skip_wrong:
            needed = {block.sample for block in stored.sampler(order, committed).start()}
        drawn = min((_drawn(committed, sample, stage, lengths.of(stage)) for sample in needed), default=value)
        if value > drawn:
            raise UserError(
                f"--{name} {value} exceeds the {drawn} draws that every sample has; use at most that, or cast more "
                "draws with certify"
            )


def _planned(stored: StoredRun, first: Order, order: Order) -> dict[int, int]:
    """The draws that were planned for each sample of the order. Raises: UserError for a sample without a plan."""
    planned = planned_before(stored.store, first)
    if missing := [sample for sample in order.samples if sample not in planned]:
        raise UserError(
            f"{stored.store.uri}: {len(missing)} samples, the first {missing[0]}, have no plan yet; run certify again, "
            "or use --n for fixed mode"
        )
    return {sample: planned[sample] for sample in order.samples}


def _drawn(committed: set[Block], sample: int, stage: Stage, length: int) -> int:
    """How many draws of a sample are committed without a gap from the first."""
    drawn = 0
    while Block(sample, stage, drawn, drawn + length) in committed:
        drawn += length
    return drawn


def print_cascade(found: Cascade, home: str) -> None:
    """Print the table of a cascade and where its files are, and report incomplete samples."""
    record, curve = found.record, found.curve
    draws = "; ".join(f"sigma {one.sigma:g}: n0 = {one.n0}, n = {one.n}" for one in record.scales)
    Console().out(
        f"{render([curve])}cascade of {len(record.scales)} runs, alpha = {record.alpha:g} in all ({draws}), "
        f"{curve.num_samples} samples; POST HOC: each run has a claim of its own on these votes\n"
        f"{home}: {CASCADE_KEY}, certificates.parquet, curve.csv, curve.png",
        highlight=False,
    )
    if curve.incomplete:
        missing = found.certificates.query("status == 'incomplete'")["sample"].tolist()
        shown = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        logger.error("%d of %d samples are incomplete: %s", len(missing), len(found.certificates), shown)
