"""Results: a stored run, and the certificates, the curve and the status of its orders."""

import io
import itertools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from diffsmooth.pipeline.attack.gap import Attacks, Gap, gap_of
from diffsmooth.pipeline.attack.record import read_attacks, read_samples
from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.certify.certificates import certify
from diffsmooth.pipeline.certify.curve import Curve, curve_of, grid, plot, table_radii
from diffsmooth.pipeline.certify.orders import Order, OrderKeys, place_order, post_hoc_samples, read_orders
from diffsmooth.pipeline.certify.planning import Plan, read_plan, settle_plan
from diffsmooth.pipeline.certify.sampling import Sampler
from diffsmooth.pipeline.errors import RunError, UserError
from diffsmooth.pipeline.records import MOST_BYTES, parse_record
from diffsmooth.pipeline.storage.store import Store, open_store
from diffsmooth.pipeline.votes.blocks import (
    OnDamage,
    StoredBlock,
    Votes,
    block_key,
    glance,
    list_blocks,
    read_blocks,
    read_derived,
    to_table,
    write_tables,
)
from diffsmooth.pipeline.votes.run import Run, read_run
from diffsmooth.pipeline.votes.seal import Seal, add_seal, unchanged_since_seal

logger = logging.getLogger(__name__)

PROGRESS_KEY = "progress.json"


class Progress(BaseModel):
    """progress.json: the last status that a driver wrote. For people, never for decisions."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    draws_cast: int = Field(ge=0)
    draws_wanted: int = Field(ge=0)
    draws_per_second: float = Field(ge=0)
    eta_seconds: float | None = Field(ge=0)
    actors_ready: int = Field(ge=0)
    updated: float = Field(ge=0, le=1e11)  # seconds since the epoch
    note: str = Field(max_length=1000)


class Summary(BaseModel):
    """What `--json` prints about an order. Fields that do not apply to its certificate are not set."""

    model_config = ConfigDict(frozen=True)

    name: str
    run: str
    order: str
    votes_id: str
    complete: bool
    samples: int
    skipped: int
    incomplete: int
    sigma: float
    n0: int
    n: int
    alpha: float
    mode: str
    certificate: str
    draws_used: int
    draws_at_n: int  # what n draws of every sample would have taken
    post_hoc: bool
    abstention_rate: float | None
    accuracy: float = 0.0  # of PREDICT
    acr: float | None = None  # None in grid mode
    acr_lower: float | None = None  # 95 % interval over the images; None without one
    acr_upper: float | None = None
    grown: bool = False  # the sample set grew after looking: intervals over the images do not hold
    certified_accuracy: dict[str, float] = {}
    root: str = ""  # of the seal

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True)


@dataclass(frozen=True, kw_only=True)
class OrderResult:
    """What follows from an order and the committed votes."""

    run_uri: str
    run: Run
    name: str
    order: Order
    certificates: pd.DataFrame
    curve: Curve
    root: str | None = None  # of the seal, once the run is sealed

    @property
    def predicts(self) -> bool:
        return not self.order.kind.has_radius

    @property
    def incomplete(self) -> list[int]:
        """The samples that lack draws."""
        rows = self.certificates
        return rows.loc[rows["status"] == "incomplete", "sample"].tolist()

    def summary(self) -> Summary:
        order, curve, rows = self.order, self.curve, self.certificates
        complete = rows[~rows["status"].isin(["incomplete", "exempt"])]
        reached: dict[str, Any]
        if self.predicts:
            reached = {"accuracy": float(curve.at([0.0])[0])}
        else:
            radii = table_radii([curve])
            accuracy = zip(radii, curve.at(radii).tolist(), strict=True)
            interval = [None if math.isnan(end) else end for end in curve.acr_interval]
            reached = {
                "acr": None if curve.tested is not None else curve.acr,
                "acr_lower": interval[0],
                "acr_upper": interval[1],
                "certified_accuracy": {f"{radius:g}": value for radius, value in accuracy},
            }
        if self.root is not None:
            reached["root"] = self.root
        return Summary(
            name=self.run.name,
            run=self.run_uri,
            order=self.name,
            votes_id=self.run.votes_id,
            complete=curve.incomplete == 0,
            samples=curve.num_samples,
            skipped=curve.skipped,
            incomplete=curve.incomplete,
            sigma=self.run.sigma,
            n0=order.n0,
            n=order.n,
            alpha=order.total_alpha,
            mode=order.mode,
            certificate=order.certificate,
            draws_used=int(complete["n0"].sum() + complete.loc[complete["status"] != "skipped", "n"].sum()),
            draws_at_n=len(complete) * (order.n0 + order.n),
            post_hoc=curve.post_hoc,
            grown=curve.grown,
            abstention_rate=curve.abstention_rate if curve.num_samples > curve.skipped else None,
            **reached,
        )


@dataclass(frozen=True, kw_only=True)
class OrderStatus:
    """How far an order has come."""

    summary: Summary
    draws_done: int
    draws_missing: int  # at least, in the adaptive modes

    def to_json(self) -> dict[str, Any]:
        return self.summary.to_json() | {"draws_done": self.draws_done, "draws_missing": self.draws_missing}


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What is committed and what is missing, from the files of a run alone."""

    run: str
    name: str
    votes_id: str
    blocks: int
    draws: int
    bytes: int
    last_write: float | None  # seconds since the epoch
    devices: Mapping[str, int]  # device -> blocks that it cast
    orders: Mapping[str, OrderStatus]
    driver: Progress | None

    def to_json(self) -> dict[str, Any]:
        facts = {key: getattr(self, key) for key in self.__dataclass_fields__ if key != "driver"}
        facts["orders"] = {name: order.to_json() for name, order in self.orders.items()}
        return facts if self.driver is None else facts | {"driver": self.driver.model_dump()}


class StoredRun:
    """A run in storage. run.json, orders and plans are read when it is opened, orders and plans again by `finish`."""

    def __init__(self, store: Store, *, on_damage: OnDamage | None = None) -> None:
        """Raises: UserError if there is no run, RunError for files that are damaged.

        With `on_damage`, which gets the error, a damaged order or plan is left out instead.
        """
        self.store, self.run = store, read_run(store)
        self._read_orders(on_damage)

    def _read_orders(self, on_damage: OnDamage | None = None) -> None:
        self.orders: dict[str, Order] = read_orders(self.store, on_damage)
        self.plans: dict[str, Plan] = {}
        for name, order in self.orders.items():
            try:
                plan = read_plan(self.store, name) if order.mode == "planned" else None
            except RunError as error:
                if on_damage is None:
                    raise
                on_damage(error)
                continue
            if plan is not None:
                self.plans[name] = plan

    @classmethod
    def open(cls, uri: str) -> "StoredRun":
        return cls(open_store(uri))

    def place(self, order: Order) -> str:
        """Store an order and return its name."""
        name = place_order(self.store, order)
        self.orders[name] = order
        return name

    def committed(self) -> set[Block]:
        return list_blocks(self.store, self.run.block)

    def read_blocks(self, blocks: Iterable[Block] | None = None) -> list[StoredBlock]:
        """The blocks, all committed ones by default. Raises: RunError, as `votes.read_blocks`."""
        return read_blocks(self.store, self.run, blocks)

    def votes(self, blocks: Iterable[Block] | None = None) -> pd.DataFrame:
        """The votes of the blocks, of all committed ones by default, as one table."""
        return to_table(self.read_blocks(blocks))

    def attacks(self) -> Attacks | None:
        """The finished samples of all attacks on this run; None if there is none.

        Raises: RunError for a damaged file.
        """
        settings = read_attacks(self.store)
        samples = {attack_id: read_samples(self.store, self.run, one) for attack_id, one in settings.items()}
        found = {attack_id: one for attack_id, one in settings.items() if samples[attack_id]}
        return Attacks(settings=found, samples={key: samples[key] for key in found}) if found else None

    def sampler(self, order: Order, committed: set[Block], *, name: str = "", plans: bool = False) -> Sampler:
        """What an order still needs; with `plans`, the sampler may store the plan of the order `name`."""
        run, store = self.run, self.store

        def read(blocks: list[Block]) -> list[Votes]:
            return [stored.votes() for stored in read_blocks(store, run, blocks)]

        return Sampler(
            order,
            run.block,
            run.sigma,
            committed=committed,
            read=read,
            plan=self.plans.get(name),
            settle_plan=(lambda pilots: settle_plan(store, name, order, run.block, run.sigma, pilots))
            if plans
            else None,
        )

    def certificates(self, votes: pd.DataFrame, name: str) -> pd.DataFrame:
        """The certificates of one of the orders, marked with its name and post hoc samples."""
        order = self.orders[name]
        rows = certify(
            votes,
            order,
            sigma=self.run.sigma,
            num_classes=self.run.num_classes,
            block=self.run.block,
            plan=self.plans.get(name, {}) if order.mode == "planned" else None,
        )
        return rows.assign(order=name, post_hoc=self._marks(name))

    def _marks(self, name: str) -> NDArray[np.bool_]:
        """Which samples of an order are a second look."""
        later = post_hoc_samples(self.orders, name, self.plans)
        return np.array([sample in later for sample in self.orders[name].samples], dtype=bool)

    def result(self, votes: pd.DataFrame, name: str) -> OrderResult:
        """What follows from an order and a table of votes."""
        rows = self.certificates(votes, name)
        curve = curve_of_order(self.run.name, self.orders[name], rows, self.run.sigma)
        return OrderResult(
            run_uri=self.store.uri,
            run=self.run,
            name=name,
            order=self.orders[name],
            certificates=rows,
            curve=replace(curve, grown=sample_set_grew(self.orders, name)),
        )

    def finish(self, name: str, *, rebuild: bool = False) -> OrderResult:
        """Bring the derived tables up to date, and write the certificates and the curve of an order.

        Blocks of the last seal that the tables hold already are not read again, unless `rebuild` says so or they were
        cast again since. The certificates of the other orders are written again if their post hoc marks have changed.
        The run is sealed if no sample of the order is incomplete.
        """
        self._read_orders()  # another driver may have placed some
        if name not in self.orders:
            raise RunError(
                f"{self.store.uri}/{OrderKeys(name).order} was deleted after it was placed; run the same command again"
            )
        entries = list(self.store.list("votes"))
        unchanged = {} if rebuild else unchanged_since_seal(self.store, entries)
        tables = write_tables(self.store, self.run, unchanged, entries)
        votes = tables.votes
        result = self.result(votes, name)
        self._write(result)
        for other in self.orders:
            written = None if other == name else self._written_marks(other)
            if written is not None and written.tolist() != self._marks(other).tolist():
                self._write(self.result(votes, other))
        return result if result.incomplete else replace(result, root=add_seal(self.store, tables.sha256()).root)

    def seal(self) -> Seal:
        """Seal the run with all its blocks, which are read and checked."""
        return add_seal(self.store, {block_key(one.block): one.sha256 for one in self.read_blocks()})

    def _written_marks(self, name: str) -> pd.Series | None:
        """The post hoc marks of an order as written, None if they are not written or damaged."""
        key, rows = OrderKeys(name).certificates, len(self.orders[name].samples)
        try:
            return read_derived(self.store, key, ["post_hoc"], rows)["post_hoc"]
        except (UserError, RunError):
            return None

    def _write(self, result: OrderResult) -> None:
        """Write the certificates and the curve of an order."""
        keys, curve, buffer = OrderKeys(result.name), result.curve, io.BytesIO()
        result.certificates.to_parquet(buffer, index=False)
        self.store.replace(keys.certificates, buffer.getvalue())
        if curve.num_samples and not result.predicts:
            fine = curve.table(grid(0.01, curve.max_radius) if curve.tested is None else curve.tested)
            marks: dict[str, Any] = {
                "certificate": result.order.certificate,
                "post_hoc": curve.post_hoc,
                "incomplete": curve.incomplete,
            }
            self.store.replace(keys.curve_table, fine.assign(**marks).to_csv(index=False).encode())
            picture, rows, missing = io.BytesIO(), len(result.certificates), len(result.incomplete)
            plot([curve], picture, f"{missing} of {rows} samples are incomplete and left out" if missing else None)
            self.store.replace(keys.curve_picture, picture.getvalue())

    def choose(self, name: str | None) -> str:
        """The name of an order that has radii: the named one, or the first. Raises: UserError if there is none."""
        with_radii = [one for one, order in self.orders.items() if order.kind.has_radius]
        chosen = name or next(iter(with_radii or self.orders), "")
        if chosen not in self.orders:
            names = ", ".join(self.orders) or "none"
            raise UserError(f"{self.store.uri} has no order {chosen!r}; choose one of: {names}")
        if chosen not in with_radii:
            raise UserError(
                f"{self.store.uri}: order {chosen} holds predictions, which have no radius; certify the run, or choose "
                "another order"
            )
        return chosen

    def status(self) -> RunStatus:
        """What is committed and what is missing, from the files alone."""
        entries = list(self.store.list("votes"))
        committed = list_blocks(self.store, self.run.block, entries)
        votes, devices = glance(self.store, self.run, committed)
        orders = {}
        for name, order in self.orders.items():
            missing = self.sampler(order, committed, name=name).start()
            orders[name] = OrderStatus(
                summary=self.result(votes, name).summary(),
                draws_done=sum(block.draws for block in order.blocks(self.run.block) if block in committed),
                draws_missing=sum(block.draws for block in missing),
            )
        return RunStatus(
            run=self.store.uri,
            name=self.run.name,
            votes_id=self.run.votes_id,
            blocks=len(committed),
            draws=sum(block.draws for block in committed),
            bytes=sum(entry.size for entry in entries),
            last_write=max((entry.modified for entry in entries), default=None),
            devices=devices,
            orders=orders,
            driver=self._progress(),
        )

    def _progress(self) -> Progress | None:
        try:
            return parse_record(Progress, self.store.read(PROGRESS_KEY, limit=MOST_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            logger.warning("%s/%s is damaged and ignored: %s", self.store.uri, PROGRESS_KEY, error)
            return None


def curve_of_order(name: str, order: Order, certificates: pd.DataFrame, sigma: float) -> Curve:
    """The curve of an order's certificates; its name says which certificate, unless it is the usual one."""
    looks = order.looks
    largest = max(float(certified_radius(n, n, share, sigma)) for n, share in looks.items())
    if order.radii is not None:
        largest = order.radii[-1]
    level, kind = sum(looks.values()), order.kind
    return curve_of(name + kind.mark, certificates, sigma, largest, level, order.radii, kind.name)


def sample_set_grew(orders: Mapping[str, Order], name: str) -> bool:
    """Whether an order has other samples than one that was placed earlier.

    An interval over the images needs a number of images that was fixed before the first look, which is that of the
    first order. The choice of a later order can depend on what the earlier ones showed.
    """
    samples = set(orders[name].samples)
    earlier = itertools.takewhile(lambda other: other != name, orders)
    return any(set(orders[other].samples) != samples for other in earlier)


def comparison_notes(results: Sequence[OrderResult]) -> list[str]:
    """What must be said when orders are shown side by side: settings in which they differ, and second looks."""
    notes = []
    for key in ("n", "n0", "alpha", "certificate", "mode", "samples"):
        values = {repr(getattr(result.order, key)) for result in results}
        if len(values) > 1:
            shown = "" if key == "samples" else f" ({', '.join(sorted(values))})"
            notes.append(f"these curves also differ in {key}{shown}: a gap between them does not come from f alone")
    for index, one in enumerate(results):
        for other in results[index + 1 :]:
            if _same_f(one.run, other.run) and set(one.order.samples) & set(other.order.samples):
                notes.append(
                    f"{one.run_uri} (order {one.name}) and {other.run_uri} (order {other.name}) certify the same f on "
                    "the same samples; choosing between them after looking is a second look"
                )
    return notes


def _same_f(one: Run, other: Run) -> bool:
    """Whether two runs smooth the same f with the same sigma: they may differ in seed and block lengths."""
    block = {"seed": 0, "block": one.block}
    specs = [
        run.spec.model_copy(update={"smoothing": run.spec.smoothing.model_copy(update=block)}) for run in (one, other)
    ]
    return specs[0] == specs[1]


@dataclass(frozen=True, kw_only=True)
class StoredResult:
    """An order of a stored run with all the blocks that it was derived from."""

    stored: StoredRun
    blocks: list[StoredBlock]
    votes: pd.DataFrame  # of these blocks
    result: OrderResult
    attacks: Attacks | None = None  # None if the run was not attacked
    gap: Gap | None = None  # of the order and the attacks


def read_result(run_uri: str, order_name: str | None = None) -> StoredResult:
    """One of a run's orders, the first that has radii unless one is named, and the attacks on the run.

    Every block and every attacked sample is read and checked. Contradictions between the two are logged as errors.

    Raises: UserError if there is no such order, or none of its samples is complete.
    """
    stored = StoredRun.open(run_uri)
    name = stored.choose(order_name)
    blocks = stored.read_blocks()
    votes = to_table(blocks)
    result = stored.result(votes, name)
    if not result.curve.num_samples:
        raise UserError(f"{run_uri}: no sample of order {name} is complete yet; run certify again")
    attacks = stored.attacks()
    if attacks is None or not result.order.kind.claims_label:
        return StoredResult(stored=stored, blocks=blocks, votes=votes, result=result)
    gap = gap_of(result.certificates, attacks, result.order.total_alpha)
    if warning := gap.warning():
        logger.error("%s: %s", run_uri, warning)
    result = replace(result, curve=replace(result.curve, uppers=gap.table["upper"].to_numpy(dtype=float)))
    return StoredResult(stored=stored, blocks=blocks, votes=votes, result=result, attacks=attacks, gap=gap)
