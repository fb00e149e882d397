"""`diffsmooth analyze`: another order from the committed votes, without draws and without a GPU."""

from dataclasses import dataclass
from pathlib import Path

from diffsmooth.jobs.console import print_order
from diffsmooth.jobs.places import writing
from diffsmooth.pipeline.block import STAGES, Block, Stage
from diffsmooth.pipeline.certify.kinds import kind_of
from diffsmooth.pipeline.certify.orders import Order, check_size, read_costly
from diffsmooth.pipeline.certify.planning import planned_before, store_plan
from diffsmooth.pipeline.data.images import UNLABELLED
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.results.stored import OrderResult, StoredRun
from diffsmooth.pipeline.show.logs import write_log
from diffsmooth.pipeline.spec import check_alpha, check_multiple


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
        log = write_log(result.certificates)
        with writing("--export-tsv", export_tsv) as path:
            Path(path).write_text(log)
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
