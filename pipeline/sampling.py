"""Orders: what is asked of a run, which blocks it needs next, and what may be claimed from it.

    RUN/orders/<order>.json    each order, numbered in the sequence in which they were placed, before its first draw

A confidence bound holds for one look. The first order over a sample is its claim; a later order with other settings
over the same sample is marked post hoc. New samples are no second look.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from pydantic import Field

from pipeline.certify import Certificate
from pipeline.spec import STAGES, Block, BlockLengths, RunError, RunSpec, Section
from pipeline.store import Store


class Order(Section):
    """What is asked of a run. Two orders with equal `settings` make one claim, on the samples of both."""

    samples: list[int]
    n0: int = Field(ge=0)  # 0 for PREDICT, which selects nothing
    n: int = Field(ge=1)
    alpha: float = Field(gt=0, lt=0.5)
    mode: Literal["fixed"] = "fixed"
    certificate: Certificate = "top"

    @property
    def settings(self) -> tuple[Any, ...]:
        return (self.n0, self.n, self.alpha, self.mode, self.certificate)


def order_of(spec: RunSpec, samples: Iterable[int], certificate: Certificate = "top") -> Order:
    smoothing = spec.smoothing
    return Order(
        samples=list(samples),
        n0=0 if certificate == "predict" else smoothing.n0,
        n=smoothing.n,
        alpha=smoothing.alpha,
        mode=spec.sampling.mode,
        certificate=certificate,
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


def post_hoc_samples(orders: dict[str, Order], name: str) -> set[int]:
    """The samples of an order that an earlier order with other settings holds already."""
    order, later = orders[name], set()
    seen: dict[int, tuple[Any, ...]] = {}
    for earlier, other in orders.items():
        if earlier == name:
            break
        for sample in other.samples:
            seen.setdefault(sample, other.settings)
    for sample in order.samples:
        if seen.get(sample, order.settings) != order.settings:
            later.add(sample)
    return later


def blocks_of(order: Order, lengths: BlockLengths) -> Iterator[Block]:
    """All blocks of an order in fixed mode: sample by sample, selection first."""
    for sample in order.samples:
        for stage in STAGES:
            length, draws = lengths.of(stage), order.n0 if stage == "selection" else order.n
            for start in range(0, draws, length):
                yield Block(sample, stage, start, start + length)


def missing_blocks(order: Order, lengths: BlockLengths, committed: set[Block]) -> list[Block]:
    """The blocks that an order still needs: a pure function of the committed ones."""
    return [block for block in blocks_of(order, lengths) if block not in committed]
