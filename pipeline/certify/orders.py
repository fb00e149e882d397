"""Orders: what is asked of a run, and which of them may be claimed.

    RUN/orders/<order>.json                  numbered in the sequence of placing, put before the first draw
    RUN/orders/<order>/certificates.parquet  and the other files that follow from it

A confidence bound holds for one look. The first order over a sample is its claim; a later order over the same sample
with other settings is marked post hoc. New samples are no second look.

Each order holds the hash of the one before it, the first that of run.json. So the hash of the first order, published
before the first draw, commits to everything in both (the run's commitment), and no order can be changed or removed
without breaking the chain after it.
"""

import hashlib
import re
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import AfterValidator, Field, ValidationError, model_validator

from diffsmooth.pipeline.block import STAGES, Block, Stage
from diffsmooth.pipeline.certify.kinds import KINDS, OF_ORDERS, TOP, CertificateKind, kind_of
from diffsmooth.pipeline.certify.sequential import Grid, looks_of
from diffsmooth.pipeline.errors import RunError, UserError, first_line
from diffsmooth.pipeline.records import LARGEST, Record, first_problem
from diffsmooth.pipeline.spec import (
    MOST_CLASSES,
    Alpha,
    BlockLengths,
    IntegerKeys,
    RunSpec,
    SamplingMode,
    check_alpha,
    check_radii,
    looks_at,
)
from diffsmooth.pipeline.storage.store import Store, read_record
from diffsmooth.pipeline.votes.run import RUN_KEY

_MOST_BLOCKS = 100_000_000  # of one order; more would not fit in the driver's memory
_NAME = re.compile(r"orders/(\d{3,9})\.json")
_HASH = "^[0-9a-f]{64}$"


def _known(certificate: str) -> str:
    if certificate not in OF_ORDERS:
        raise ValueError(f"{certificate!r} must be one of {', '.join(OF_ORDERS)}")
    return certificate


Certificate = Annotated[str, AfterValidator(_known)]
Class = Annotated[int, Field(ge=0, lt=MOST_CLASSES)]
Draws = Annotated[int, Field(ge=0, le=LARGEST)]


class Order(Record):
    """One request on a run. Two orders with equal `claim` assert the same, on the samples of both."""

    samples: list[Annotated[int, Field(ge=0, le=LARGEST)]] = Field(min_length=1)
    n0: Draws  # 0 for PREDICT, which selects nothing
    n: Annotated[int, Field(ge=1, le=LARGEST)]  # of each sample; in planned and grid mode, the maximum of a sample
    alpha: Alpha
    mode: SamplingMode = "fixed"
    certificate: Certificate = TOP
    skip_wrong: bool = False
    max_acr_loss: float | None = Field(default=None, gt=0, lt=1)
    radii: list[Annotated[float, Field(ge=0)]] | None = Field(default=None, min_length=1)
    costly: Annotated[dict[int, list[Class]] | None, IntegerKeys] = None  # label -> the classes that are costly for it
    data_id: str | None = Field(default=None, pattern=_HASH)  # of the data set; None: not recorded
    previous: str | None = Field(default=None, pattern=_HASH)  # sha256 of what was stored before; None: not recorded

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.samples)) < len(self.samples):
            raise ValueError("samples: a sample is listed twice")
        check_alpha("alpha", self.alpha, self.n)
        check_radii(self.radii)
        kind = self.kind
        if self.mode not in kind.modes:
            raise ValueError(
                f"certificate {kind.name!r} is not available in sampling.mode = {self.mode!r}; use "
                f"mode = {' or '.join(map(repr, kind.modes))}, or another certificate"
            )
        if self.skip_wrong and not kind.skips_wrong:
            raise ValueError(
                f"sampling.skip_wrong = true cannot be combined with the certificate {self.certificate!r}, which does "
                "not depend on the selected class being right"
            )
        for key, needed, owner in (
            ("max_acr_loss", self.mode == "planned", f"mode = {self.mode!r}"),
            ("radii", self.mode == "grid", f"mode = {self.mode!r}"),
            ("costly", kind.needs_costs, f"certificate = {self.certificate!r}"),
        ):
            if (getattr(self, key) is not None) != needed:
                raise ValueError(f"{owner} {'needs' if needed else 'takes no'} {key}")
        if self.mode != "fixed" and not isinstance(self.alpha, float):
            raise ValueError(f"alpha is split over several n, which mode = {self.mode!r} does not allow; use one alpha")
        return self

    @property
    def kind(self) -> CertificateKind:
        return KINDS[self.certificate]

    @property
    def claim(self) -> Mapping[str, Any]:
        """The settings that decide what the order asserts.

        `skip_wrong` only saves draws, so it counts in planned mode alone, where the plan depends on it. If alpha is
        split over several n, all of them belong to one claim, so n does not count.
        """
        unclaimed = {"samples", "data_id", "previous"}
        unclaimed |= {"n"} if isinstance(self.alpha, dict) else set()
        unclaimed |= {"skip_wrong"} if self.mode != "planned" else set()
        return self.model_dump(exclude=unclaimed)

    @property
    def looks(self) -> dict[int, float]:
        """The looks up to n and their shares of alpha; one look at n, unless alpha is split."""
        return looks_at(self.alpha, self.n)

    @property
    def total_alpha(self) -> float:
        """The error probability of all its looks together."""
        return sum(self.alpha.values()) if isinstance(self.alpha, dict) else self.alpha

    def grid(self, sigma: float, lengths: BlockLengths) -> Grid | None:
        """The looks of grid mode; None in the other modes."""
        if self.radii is None or isinstance(self.alpha, dict):
            return None
        return Grid(tuple(self.radii), sigma, self.alpha, looks_of(self.n, lengths.estimation))

    def blocks(self, lengths: BlockLengths) -> Iterator[Block]:
        """All blocks that the order can need: sample by sample, selection first."""
        for sample in self.samples:
            for stage in STAGES:
                yield from blocks_up_to(sample, stage, self.n0 if stage == "selection" else self.n, lengths)

    def changed(self, **values: Any) -> "Order":
        """The order with other values. Raises: UserError for a combination that is not valid."""
        return make_order(**{**self.model_dump(), **values})

    def __str__(self) -> str:
        alpha = self.alpha if isinstance(self.alpha, float) else "+".join(f"{one:g}" for one in self.alpha.values())
        mode = "" if self.mode == "fixed" else f"{self.mode}, "
        return f"{self.certificate}, {mode}n0 = {self.n0}, n = {self.n}, alpha = {alpha}"


class OrderKeys:
    """Where the files of an order are, as keys below the run."""

    def __init__(self, name: str) -> None:
        self.order = f"orders/{name}.json"
        self.plan = f"orders/{name}/plan.json"
        self.certificates = f"orders/{name}/certificates.parquet"
        self.curve_table = f"orders/{name}/curve.csv"
        self.curve_picture = f"orders/{name}/curve.png"


def blocks_up_to(sample: int, stage: Stage, draws: int, lengths: BlockLengths) -> Iterator[Block]:
    """The blocks of a sample and stage that hold its first `draws` draws."""
    length = lengths.of(stage)
    for start in range(0, draws, length):
        yield Block(sample, stage, start, start + length)


def make_order(**values: Any) -> Order:
    """An order from values that a user gave. Raises: UserError for a combination that is not valid."""
    try:
        return Order(**values)
    except ValidationError as error:
        raise UserError(first_problem(error)) from None


def order_of(
    spec: RunSpec,
    samples: Iterable[int],
    certificate: str = TOP,
    costly: Mapping[int, Sequence[int]] | None = None,
    data_id: str | None = None,
) -> Order:
    """The order that a spec places.

    Raises: UserError for a certificate that the spec's sampling cannot give, and for too many blocks.
    """
    smoothing, sampling = spec.smoothing, spec.sampling
    order = make_order(
        samples=list(samples),
        n0=smoothing.n0 if kind_of(certificate).selects else 0,
        n=smoothing.n,
        alpha=smoothing.alpha,
        mode=sampling.mode,
        certificate=certificate,
        skip_wrong=sampling.skip_wrong,
        max_acr_loss=sampling.max_acr_loss,
        radii=sampling.radii,
        costly=None if costly is None else {y: list(classes) for y, classes in costly.items()},
        data_id=data_id,
    )
    check_size(order, smoothing.block)
    return order


def check_size(order: Order, lengths: BlockLengths) -> None:
    """Raises: UserError for an order of more blocks than a driver can hold."""
    each = sum(-(-draws // lengths.of(stage)) for stage, draws in zip(STAGES, (order.n0, order.n), strict=True))
    blocks = each * len(order.samples)
    if blocks > _MOST_BLOCKS:
        raise UserError(
            f"the order needs {blocks:,} blocks, the limit is {_MOST_BLOCKS:,}; use longer blocks (smoothing.block), a "
            "smaller n, or fewer samples"
        )


def place_order(store: Store, order: Order) -> str:
    """Store an order and return its name; an equal one that is stored already is the same order.

    Raises: UserError if an earlier order was placed over another data set.
    """
    order = order.model_copy(update={"previous": None})
    while True:
        placed = read_orders(store)
        for name, earlier in placed.items():
            if order.data_id and earlier.data_id and order.data_id != earlier.data_id:
                raise UserError(
                    f"{store.uri}: the data set differs from that of order {name} (its size or some of its samples); "
                    "use the same data set, or another folder with --out"
                )
        for name, earlier in placed.items():
            if earlier.model_copy(update={"previous": None, "data_id": order.data_id}) == order:
                return name
        last = max(placed, key=int, default=None)
        name = f"{int(last or 0) + 1:03d}"
        chained = order.model_copy(update={"previous": stored_hash(store, last)})
        if store.put_if_absent(OrderKeys(name).order, chained.model_dump_json(indent=2).encode()):
            return name


def stored_hash(store: Store, name: str | None) -> str:
    """The sha256 of an order as stored, or of run.json for None. Raises: FileNotFoundError."""
    return hashlib.sha256(store.read(RUN_KEY if name is None else OrderKeys(name).order)).hexdigest()


def broken_links(store: Store, orders: Mapping[str, Order]) -> Iterator[str]:
    """A line for each order that is missing, or was changed after the next one was placed."""
    before: str | None = None
    chained = False
    for number, (name, order) in enumerate(orders.items(), start=1):
        if name != f"{number:03d}":
            yield f"order {number:03d} is missing, but order {name} exists"
            return
        if order.previous is None:
            if chained:
                yield f"order {name} does not continue the chain of hashes"
        elif order.previous != stored_hash(store, before):
            yield f"{RUN_KEY if before is None else f'order {before}'} was changed after order {name} was placed"
        before, chained = name, chained or order.previous is not None


def read_orders(store: Store, on_damage: Callable[[RunError], None] | None = None) -> dict[str, Order]:
    """The orders of a run by name, in the sequence in which they were placed.

    Raises: RunError for an order that is damaged. With `on_damage`, which gets the error, it is left out instead.
    """
    names = [match[1] for key in store.keys("orders") if (match := _NAME.fullmatch(key))]
    orders = {}
    for name in sorted(names, key=int):
        try:
            orders[name] = read_record(store, OrderKeys(name).order, Order)
        except FileNotFoundError:
            continue  # deleted since the listing
        except RunError as error:
            if on_damage is None:
                raise
            on_damage(error)
    return orders


def post_hoc_samples(orders: Mapping[str, Order], name: str, plans: Mapping[str, Mapping[int, int]]) -> set[int]:
    """The samples of an order that an order placed earlier covers with another claim, or with another planned n.

    The sequence of placing decides, not that of completion: an order that was interrupted before its first draw still
    comes first. `plans` are those of the orders in planned mode: order -> sample -> its estimation draws.
    """
    later: set[int] = set()
    claims: dict[int, Any] = {}  # sample -> the claim of the first order that covers it
    planned: dict[int, int] = {}  # sample -> the n of the first plan that covers it
    for earlier, other in orders.items():
        claim, plan = other.claim, plans.get(earlier, {})
        if earlier == name:
            for sample in other.samples:
                if claims.get(sample, claim) != claim or planned.get(sample, plan.get(sample)) != plan.get(sample):
                    later.add(sample)
            return later
        for sample in other.samples:
            claims.setdefault(sample, claim)
        planned = {**plan, **planned}
    raise KeyError(name)


def read_costly(certificate: str, path: str | None, num_classes: int) -> dict[int, list[int]] | None:
    """Label -> the classes that are costly for it, from the file of --costly; None for the other certificates.

    CSV: a cost matrix without headings, a row per label and a column per class; entries above 0 are costly.
    TOML: a line per label with its costly classes in brackets (3 = [5, 7]).

    Raises: UserError, naming what is wrong.
    """
    if kind_of(certificate).needs_costs != (path is not None):
        raise UserError("--certificate cost and --costly FILE belong together; give both or none")
    if path is None:
        return None
    try:
        costly = _parse_costly(path, num_classes)
    except OSError as error:
        reason = error.strerror or first_line(error)  # NumPy's own error has no strerror
        raise UserError(f"--costly {path}: cannot read it: {reason}; give a .csv or .toml file") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"--costly {path}: {first_line(error)}; a .csv file must hold a cost matrix with a row per label, "
            "a .toml file lines such as 3 = [5, 7]"
        ) from error
    for y, classes in costly.items():
        for k in (y, *classes):
            if not 0 <= k < num_classes:
                raise UserError(f"--costly {path}: class {k} must be between 0 and {num_classes - 1}")
        if y in classes or len(set(classes)) < len(classes):
            raise UserError(f"--costly {path}: the costly classes {classes} of label {y} repeat a class or contain {y}")
    costly = {y: classes for y, classes in costly.items() if classes}
    if not costly:
        raise UserError(f"--costly {path}: names no costly class; add one, or use another certificate")
    return costly


def _parse_costly(path: str, num_classes: int) -> dict[int, list[int]]:
    if path.endswith(".csv"):
        matrix = np.loadtxt(path, delimiter=",", ndmin=2)
        if matrix.shape != (num_classes, num_classes):
            raise ValueError(f"{matrix.shape[0]} rows and {matrix.shape[1]} columns for {num_classes} classes")
        return {y: np.flatnonzero(row > 0).tolist() for y, row in enumerate(matrix)}
    raw = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    return {int(y): [int(k) for k in classes] for y, classes in raw.items()}
