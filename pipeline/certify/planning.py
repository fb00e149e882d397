"""Planned mode: how many estimation draws each sample gets, decided from its selection draws.

    RUN/orders/<order>/plan.json  sample -> estimation draws, put if absent once all pilots are committed

The selection draws also serve as a pilot: they predict the average certified radius (ACR) that n draws of each sample
would give. The plan is the cheapest one whose predicted ACR is at most the fraction `max_acr_loss` below that. The
bound uses only the n_i fresh estimation draws, never the pilot, so it holds at the full alpha.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, RootModel
from scipy.special import betaincinv

from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.certify.certificates import top_class
from diffsmooth.pipeline.certify.orders import Draws, Order, OrderKeys, read_orders
from diffsmooth.pipeline.records import LARGEST
from diffsmooth.pipeline.spec import BlockLengths
from diffsmooth.pipeline.storage.store import Store, read_record

_QUANTILES = 15  # of a pilot's posterior
_CANDIDATES = 24  # numbers of draws that a plan chooses from, besides none

Plan = Mapping[int, int]  # sample -> estimation draws


class _PlanFile(RootModel[dict[Annotated[int, Field(ge=0, le=LARGEST)], Draws]]):
    """plan.json."""

    model_config = ConfigDict(frozen=True)


class Pilot(NamedTuple):
    """A sample's label and its selection votes."""

    label: int
    votes: Mapping[int, int]


def read_plans(store: Store) -> dict[str, Plan]:
    """The stored plans by order. Raises: RunError for one that is damaged."""
    return {
        name: plan for name, order in read_orders(store).items() if order.mode == "planned"
        if (plan := read_plan(store, name)) is not None
    }  # fmt: skip


def read_plan(store: Store, name: str) -> Plan | None:
    """The plan of an order, None if it has none yet. Raises: RunError if it is damaged."""
    try:
        return read_record(store, OrderKeys(name).plan, _PlanFile).root
    except FileNotFoundError:
        return None


def store_plan(store: Store, name: str, plan: Plan) -> Plan:
    """Store the plan of an order unless it has one; returns the stored one."""
    text = json.dumps({str(sample): plan[sample] for sample in sorted(plan)})
    store.put_if_absent(OrderKeys(name).plan, text.encode())
    stored = read_plan(store, name)
    assert stored is not None
    return stored


def planned_before(store: Store, order: Order) -> dict[int, int]:
    """What the orders with the same claim have planned: sample -> estimation draws, the earliest plan's."""
    planned: dict[int, int] = {}
    orders = read_orders(store)
    for name, plan in read_plans(store).items():
        if orders[name].claim == order.claim:
            planned = {**plan, **planned}
    return planned


def settle_plan(
    store: Store, name: str, order: Order, lengths: BlockLengths, sigma: float, pilots: Mapping[int, Pilot]
) -> Plan:
    """Make and store the plan of an order, and return the stored one. `pilots` holds every sample of the order."""
    return store_plan(store, name, make_plan(order, lengths, sigma, pilots, planned_before(store, order)))


def make_plan(
    order: Order, lengths: BlockLengths, sigma: float, pilots: Mapping[int, Pilot], planned: Plan
) -> dict[int, int]:
    """The plan that follows from the pilots; a sample that is already `planned` under the same claim keeps its
    draws."""
    plan = {sample: n for sample, n in planned.items() if sample in pilots}
    counts = {}
    for sample, pilot in pilots.items():
        if sample in plan:
            continue
        top = top_class(pilot.votes)
        plan[sample] = 0
        if not order.skip_wrong or top == pilot.label:
            counts[sample] = pilot.votes[top]
    draws = plan_draws(list(counts.values()), order, sigma=sigma, length=lengths.estimation)
    plan.update(zip(counts, draws, strict=True))
    return plan


def plan_draws(n_A: Sequence[int], order: Order, *, sigma: float, length: int) -> list[int]:
    """Estimation draws per sample: multiples of `length` up to n, from pilots of n0 draws with n_A for the top class.

    With E_i(N) the radius that N draws are expected to certify under the pilot's posterior (Jeffreys' prior), the draws
    maximise sum_i E_i(N_i) - price * N_i, at the highest price that keeps sum_i E_i(N_i) at or above 1 - max_acr_loss
    times sum_i E_i(n). No draws (0) is a choice: such a sample abstains.
    """
    if not len(n_A):
        return []
    assert order.max_acr_loss is not None
    n0, n = order.n0, order.n
    steps = np.geomspace(1, n / length, _CANDIDATES)
    candidates = np.unique(np.round(steps).astype(np.int64)) * length
    levels = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    counts, inverse = np.unique(np.asarray(n_A), return_inverse=True)
    p_UQ = betaincinv(counts[:, None] + 0.5, n0 - counts[:, None] + 0.5, levels)
    gain_UN = np.zeros((len(counts), 1 + len(candidates)))
    for column, draws in enumerate(candidates, start=1):
        reached = certified_radius(np.round(p_UQ * draws).astype(np.int64), int(draws), order.total_alpha, sigma)
        gain_UN[:, column] = reached.mean(axis=1)
    gain_SN, costs = gain_UN[inverse], np.concatenate([[0], candidates])
    return costs[_cheapest(gain_SN, costs, (1 - order.max_acr_loss) * gain_SN[:, -1].sum())].tolist()


def _cheapest(gain_SN: NDArray[np.float64], costs: NDArray[np.int64], wanted: float) -> NDArray[np.int64]:
    """The column of each row at the highest price per draw that keeps the sum of gains at `wanted`, by bisection."""

    def chosen(price: float) -> NDArray[np.int64]:
        return (gain_SN - price * costs).argmax(axis=1)

    rows, columns = np.arange(len(gain_SN)), chosen(0.0)
    high = math.log(max(float(gain_SN.max()), 1e-300) / costs[1])  # at this price no block is worth its draws
    low = high - 40.0
    for _ in range(60):
        middle = (low + high) / 2
        if gain_SN[rows, chosen(math.exp(middle))].sum() >= wanted:
            low, columns = middle, chosen(math.exp(middle))
        else:
            high = middle
    return columns
