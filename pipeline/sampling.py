"""Orders: what is asked of a run, which blocks it needs next, and what may be claimed from it.

    RUN/orders/<order>.json       each order, numbered in the sequence in which they were placed, before its first draw
    RUN/orders/<order>/plan.json  in planned mode, the draws of each sample, once all its pilots stand

A confidence bound holds for one look. The first order over a sample is its claim; a later order with other settings
over the same sample is marked post hoc. New samples are no second look.

Which blocks are wanted is a function of committed votes alone, so that a resumed run decides the same:
- fixed: n0 selection and n estimation draws of each sample; with skip_wrong, no estimation where the selected class is
  not the label: such a sample counts nothing at any radius, whatever its votes;
- planned: the selection is a pilot, which also plans each sample's n: as few draws as lose at most `max_acr_loss` of
  the average certified radius that n draws of every sample are expected to give. The plan depends on pilots only, which
  never enter the bound, so that the bound of n_i fresh draws holds at full alpha;
- grid: as many draws as the looks of pipeline/sequential.py take.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.special import betaincinv

from pipeline.block import STAGES, Block
from pipeline.certify import Certificate, certified_radius, prefix_counts, top_class
from pipeline.errors import RunError, UserError
from pipeline.sequential import Grid, looks_of
from pipeline.spec import Alpha, BlockLengths, RunSpec, Section, WholeKeys
from pipeline.storage.store import Store
from pipeline.votes import Votes

_QUANTILES = 15  # of a pilot's posterior
_CANDIDATES = 24  # numbers of draws that a plan chooses from, besides none


class Order(Section):
    """What is asked of a run. Two orders with equal `settings` make one claim, on the samples of both."""

    samples: list[int]
    n0: int = Field(ge=0)  # 0 for PREDICT, which selects nothing
    n: int = Field(ge=1)  # of each sample; the most of a sample, in planned and grid mode
    alpha: Alpha
    mode: Literal["fixed", "planned", "grid"] = "fixed"
    certificate: Certificate = "top"
    skip_wrong: bool = False
    max_acr_loss: float | None = None
    radii: list[float] | None = None
    costly: Annotated[dict[int, list[int]] | None, WholeKeys] = None  # label -> the classes that are costly for it

    @property
    def settings(self) -> dict[str, Any]:
        """What makes another claim of it.

        Skipping spares draws and claims nothing; the looks over which alpha was split in advance are one claim.
        """
        unclaimed = {"samples", "skip_wrong"} | ({"n"} if isinstance(self.alpha, dict) else set())
        return self.model_dump(exclude=unclaimed)

    @property
    def total_alpha(self) -> float:
        """The error probability of all its looks together."""
        return sum(self.alpha.values()) if isinstance(self.alpha, dict) else self.alpha


def order_of(
    spec: RunSpec,
    samples: Iterable[int],
    certificate: Certificate = "top",
    costly: Mapping[int, Sequence[int]] | None = None,
) -> Order:
    """The order that a spec places.

    Raises: UserError for a certificate that does not go with the spec's sampling.
    """
    smoothing, sampling = spec.smoothing, spec.sampling
    refused = {"grid": ("multiclass", "cost", "predict"), "planned": ("cost", "predict"), "fixed": ()}[sampling.mode]
    if certificate in refused:
        raise UserError(
            f"--certificate {certificate} does not go with sampling.mode = {sampling.mode!r}: take mode = 'fixed', or "
            "the certificate 'top'"
        )
    if sampling.skip_wrong and certificate in ("predict", "cost"):
        raise UserError(
            f"sampling.skip_wrong = true does not go with {certificate!r}, of which a wrong selection decides nothing: "
            "set it to false"
        )
    return Order(
        samples=list(samples),
        n0=0 if certificate == "predict" else smoothing.n0,
        n=smoothing.n,
        alpha=smoothing.alpha,
        mode=sampling.mode,
        certificate=certificate,
        skip_wrong=sampling.skip_wrong,
        max_acr_loss=sampling.max_acr_loss,
        radii=sampling.radii,
        costly=None if costly is None else {y: list(classes) for y, classes in costly.items()},
    )


def place_order(store: Store, order: Order) -> str:
    """Record an order and return its name; an equal one that stands already is the same order."""
    while True:
        placed = read_orders(store)
        for name, earlier in placed.items():
            if earlier == order:
                return name
        name = f"{len(placed) + 1:03d}"
        if store.put_if_absent(f"orders/{name}.json", order.model_dump_json(indent=2).encode()):
            return name


def read_orders(store: Store) -> dict[str, Order]:
    """The orders of a run by name, in the sequence in which they were placed.

    Raises: RunError for an order that is damaged.
    """
    keys = [entry.key for entry in store.list("orders") if entry.key.count("/") == 1 and entry.key.endswith(".json")]
    keys.sort(key=lambda key: (len(key), key))  # 999 before 1000
    orders = {}
    for key in keys:
        try:
            orders[key.removeprefix("orders/").removesuffix(".json")] = Order(**json.loads(store.read(key)))
        except ValueError as error:
            raise RunError(f"{store.uri}/{key} is damaged; restore it from a copy") from error
    return orders


def post_hoc_samples(orders: dict[str, Order], name: str, plans: Mapping[str, Mapping[int, int]]) -> set[int]:
    """The samples of an order that an earlier order with other settings, or another planned n, holds already."""
    later: set[int] = set()
    seen: dict[int, Any] = {}
    for earlier, other in orders.items():
        settings, plan = other.settings, plans.get(earlier, {})
        for sample in other.samples:
            claim = (settings, plan.get(sample))
            if earlier == name:
                if seen.get(sample, claim) != claim:
                    later.add(sample)
            elif other.mode != "planned" or sample in plan:  # without a plan nothing has been looked at
                seen.setdefault(sample, claim)
        if earlier == name:
            break
    return later


def grid_of(order: Order, lengths: BlockLengths, sigma: float) -> Grid | None:
    """The looks of an order in grid mode."""
    if order.radii is None or isinstance(order.alpha, dict):
        return None
    return Grid(tuple(order.radii), sigma, order.alpha, looks_of(order.n, lengths.estimation))


def blocks_of(order: Order, lengths: BlockLengths) -> Iterator[Block]:
    """All blocks that an order can want: sample by sample, selection first."""
    for sample in order.samples:
        for stage in STAGES:
            yield from _blocks(sample, stage, order.n0 if stage == "selection" else order.n, lengths)


def _blocks(sample: int, stage: Any, draws: int, lengths: BlockLengths) -> Iterator[Block]:
    length = lengths.of(stage)
    for start in range(0, draws, length):
        yield Block(sample, stage, start, start + length)


@dataclass
class _Tally:
    """The committed votes of a sample, as far as they are known."""

    label: int = -1
    selection: Counter[int] = field(default_factory=Counter)
    estimation: dict[int, tuple[int, Mapping[int, int]]] = field(default_factory=dict)  # draw_stop -> draw_start, votes

    def add(self, block: Block, label: int, votes: Mapping[int, int]) -> None:
        self.label = label
        if block.stage == "selection":
            self.selection.update(votes)
        else:
            self.estimation[block.draw_stop] = (block.draw_start, votes)


class Sampler:
    """The blocks that an order wants of one run, given out once each as committed votes make them wanted."""

    def __init__(
        self,
        store: Store,
        name: str,
        order: Order,
        lengths: BlockLengths,
        sigma: float,
        standing: set[Block],
        read: Callable[[list[Block]], Iterable[Votes]],
        *,
        plans: bool = True,
    ) -> None:
        """`standing` are the committed blocks; `read` reads some of them; without `plans` none is made.

        In fixed mode nothing is read unless samples are skipped: a resumed run begins after one listing.
        """
        self._plans = plans
        self._store, self._name, self._order, self._lengths = store, name, order, lengths
        self._grid = grid_of(order, lengths, sigma)
        self._sigma = sigma
        self._plan = read_plans(store).get(name) if order.mode == "planned" else None
        self._tallies = {sample: _Tally() for sample in order.samples}
        self._given = set(standing)
        self._waiting: set[int] = set()  # samples whose votes may make more blocks wanted
        adaptive = order.skip_wrong or order.mode != "fixed"
        if adaptive and self._plan is None:
            self._waiting = {
                sample
                for sample in order.samples
                if any(block not in standing for block in _blocks(sample, "estimation", order.n, lengths))
            }
            stages = STAGES if order.mode == "grid" else ("selection",)
            known = [block for block in sorted(standing) if block.sample in self._tallies and block.stage in stages]
            if order.mode != "planned":  # a plan is made from all pilots
                known = [block for block in known if block.sample in self._waiting]
            for votes in read(known):
                self._tallies[votes[0].sample].add(*votes)

    @property
    def open(self) -> bool:
        """Whether blocks may be wanted that have not been given out."""
        return bool(self._waiting)

    def start(self) -> list[Block]:
        """The blocks that are wanted now and do not stand."""
        return self._next(self._order.samples)

    def take(self, new: Iterable[Votes]) -> list[Block]:
        """Take in blocks that were committed since; returns those that are wanted now."""
        samples: dict[int, None] = {}
        for block, label, votes in new:
            if block.sample in self._waiting:
                self._tallies[block.sample].add(block, label, votes)
                samples[block.sample] = None
        return self._next(samples)

    def _next(self, samples: Iterable[int]) -> list[Block]:
        found: list[Block] = []
        for sample in samples:
            draws, final = self._wanted(sample)
            for stage, count in zip(STAGES, draws, strict=True):
                found += [block for block in _blocks(sample, stage, count, self._lengths) if block not in self._given]
            if final:
                self._waiting.discard(sample)
                self._tallies[sample] = _Tally()
        self._given.update(found)
        if self._plans and self._order.mode == "planned" and self._plan is None and self._pilots_stand():
            self._plan = _make_plan(self._store, self._name, self._order, self._lengths, self._sigma, self._pilots())
            self._waiting.clear()
            return found + self._next(self._order.samples)
        return found

    def _wanted(self, sample: int) -> tuple[tuple[int, int], bool]:
        """Selection and estimation draws that are wanted of a sample now, and whether that is all."""
        order, tally = self._order, self._tallies[sample]
        if self._plan is not None:
            return (order.n0, self._plan.get(sample, 0)), True
        if order.mode == "fixed" and (not order.skip_wrong or sample not in self._waiting):
            return (order.n0, order.n), True
        if tally.selection.total() < order.n0 or order.mode == "planned":
            return (order.n0, 0), False
        if order.skip_wrong and top_class(tally.selection) != tally.label:
            return (order.n0, 0), True
        if self._grid is None:
            return (order.n0, order.n), True
        top = top_class(tally.selection)
        blocks = ((stop, start, votes.get(top, 0)) for stop, (start, votes) in sorted(tally.estimation.items()))
        decision = self._grid.decide(prefix_counts(self._grid, blocks))
        return (order.n0, decision.n), decision.final

    def _pilots_stand(self) -> bool:
        return all(self._tallies[sample].selection.total() == self._order.n0 for sample in self._order.samples)

    def _pilots(self) -> dict[int, tuple[int, Mapping[int, int]]]:
        return {sample: (tally.label, tally.selection) for sample, tally in self._tallies.items()}


def read_plans(store: Store) -> dict[str, dict[int, int]]:
    """The plans that stand, by order: sample -> its estimation draws.

    Raises: RunError for one that is damaged.
    """
    plans = {}
    for entry in store.list("orders"):
        if entry.key.endswith("/plan.json"):
            try:
                raw = json.loads(store.read(entry.key))
                plans[entry.key.split("/")[1]] = {int(sample): int(n) for sample, n in raw.items()}
            except (ValueError, AttributeError, TypeError) as error:
                raise RunError(f"{store.uri}/{entry.key} is damaged; restore it from a copy") from error
    return plans


def _make_plan(
    store: Store,
    name: str,
    order: Order,
    lengths: BlockLengths,
    sigma: float,
    pilots: Mapping[int, tuple[int, Mapping[int, int]]],
) -> dict[int, int]:
    """Store the plan of an order, unless it stands, and return the one that does.

    `pilots` holds the label and the selection's votes of every sample. A sample that another order with the same
    settings has planned keeps its draws.
    """
    planned = {sample: n for sample, n in planned_draws(store, order).items() if sample in pilots}
    fresh = {sample: pilot for sample, pilot in pilots.items() if sample not in planned}
    counts = {}
    for sample, (label, votes) in fresh.items():
        top = top_class(votes)
        planned[sample] = 0
        if not order.skip_wrong or top == label:
            counts[sample] = votes[top]
    assert order.max_acr_loss is not None
    draws = plan_draws(
        list(counts.values()),
        n0=order.n0,
        n=order.n,
        alpha=order.total_alpha,
        sigma=sigma,
        length=lengths.estimation,
        max_acr_loss=order.max_acr_loss,
    )
    planned.update(zip(counts, draws, strict=True))
    store_plan(store, name, planned)
    return read_plans(store)[name]


def planned_draws(store: Store, order: Order) -> dict[int, int]:
    """What the orders with an order's settings have planned: sample -> its estimation draws, the earliest's."""
    orders, planned = read_orders(store), dict[int, int]()
    for other, plan in read_plans(store).items():
        if orders[other].settings == order.settings:
            planned = plan | planned
    return planned


def store_plan(store: Store, name: str, plan: Mapping[int, int]) -> None:
    """Store an order's plan, unless it has one."""
    text = json.dumps({str(sample): plan[sample] for sample in sorted(plan)})
    store.put_if_absent(f"orders/{name}/plan.json", text.encode())


def plan_draws(
    n_A: Sequence[int], *, n0: int, n: int, alpha: float, sigma: float, length: int, max_acr_loss: float
) -> list[int]:
    """Estimation draws per sample, multiples of `length` up to n, from pilots of n0 draws with n_A for the top class.

    With E_i(N) the radius that N draws are expected to certify under the pilot's posterior (Jeffreys' prior), the draws
    maximise sum_i E_i(N_i) - price * N_i, at the highest price that keeps sum_i E_i(N_i) at 1 - max_acr_loss of
    sum_i E_i(n) or above. None (0) is a choice: such a sample abstains.
    """
    if not len(n_A):
        return []
    steps = np.geomspace(1, n / length, _CANDIDATES)
    candidates = np.unique(np.round(steps).astype(np.int64)) * length
    levels = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    counts, inverse = np.unique(np.asarray(n_A), return_inverse=True)
    p_UQ = betaincinv(counts[:, None] + 0.5, n0 - counts[:, None] + 0.5, levels)
    gain_UN = np.zeros((len(counts), 1 + len(candidates)))
    for column, draws in enumerate(candidates, start=1):
        reached = certified_radius(np.round(p_UQ * draws).astype(np.int64), int(draws), alpha, sigma)
        gain_UN[:, column] = reached.mean(axis=1)
    gain_SN, costs = gain_UN[inverse], np.concatenate([[0], candidates])
    wanted = (1 - max_acr_loss) * gain_SN[:, -1].sum()

    def chosen(price: float) -> NDArray[np.int64]:
        return (gain_SN - price * costs).argmax(axis=1)

    rows, draws = np.arange(len(gain_SN)), chosen(0.0)
    highest = math.log(max(float(gain_SN.max()), 1e-300) / length)  # at which nothing is worth a block
    low, high = highest - 40.0, highest
    for _ in range(60):
        middle = (low + high) / 2
        if gain_SN[rows, chosen(math.exp(middle))].sum() >= wanted:
            low, draws = middle, chosen(math.exp(middle))
        else:
            high = middle
    return costs[draws].tolist()
