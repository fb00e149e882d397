"""Orders: which blocks they need, and which samples an order has no fresh claim on."""

import json

import numpy as np
import pytest
from scipy.stats import norm

from pipeline.block import Block
from pipeline.certify import certified_radius
from pipeline.errors import UserError
from pipeline.sampling import (
    Order,
    Sampler,
    blocks_of,
    order_of,
    place_order,
    plan_draws,
    post_hoc_samples,
    read_orders,
    read_plans,
)
from pipeline.spec import BlockLengths, load_spec
from pipeline.storage.store import FolderStore

LENGTHS = BlockLengths(selection=10, estimation=100)


def order(samples, n=200, **changes):
    return Order(samples=list(samples), n0=10, n=n, **{"alpha": 0.001, **changes})


def test_blocks_cover_every_draw_once():
    blocks = list(blocks_of(order([3, 5], n=300), LENGTHS))
    assert len(set(blocks)) == len(blocks) == 2 * (1 + 3)
    for sample in (3, 5):
        draws = [
            j
            for b in blocks
            if b.sample == sample and b.stage == "estimation"
            for j in range(b.draw_start, b.draw_stop)
        ]
        assert draws == list(range(300))


def test_growing_needs_only_what_is_missing(tmp_path):
    def missing_blocks(order, lengths, standing):
        return Sampler(FolderStore(str(tmp_path)), "001", order, lengths, 1.0, standing, lambda blocks: 1 / 0).start()

    standing = set(blocks_of(order([0], n=200), LENGTHS))
    assert missing_blocks(order([0], n=200), LENGTHS, standing) == []
    assert missing_blocks(order([0], n=300), LENGTHS, standing) == [Block(0, "estimation", 200, 300)]
    assert {block.sample for block in missing_blocks(order([0, 1]), LENGTHS, standing)} == {1}


def test_orders_are_numbered_and_equal_ones_are_one(tmp_path):
    store = FolderStore(str(tmp_path))
    assert [place_order(store, one) for one in (order([0]), order([0, 1]), order([0]))] == ["001", "002", "001"]
    assert list(read_orders(store)) == ["001", "002"]


def test_post_hoc_is_said_of_second_looks_only(tmp_path):
    store = FolderStore(str(tmp_path))
    names = [
        place_order(store, one)
        for one in (
            order([0, 1]),
            order([0, 1, 2]),
            order([1, 2, 3], n=400),
            order([0, 3], alpha=0.01),
            order([9], n=400),
        )
    ]
    orders = read_orders(store)
    assert [post_hoc_samples(orders, name, {}) for name in names] == [set(), set(), {1, 2}, {0, 3}, set()]


def test_order_of_a_spec(raw_spec):
    found = order_of(load_spec(raw_spec), range(2))
    assert (found.samples, found.n0, found.n, found.alpha) == ([0, 1], 50, 200, 0.001)


PROBABILITY = {0: 0.999, 1: 0.9, 2: 0.55, 3: 0.2, 4: 0.97}  # of class 0, the label of all


def votes_of(block):
    """What a block's draws say, the same whoever casts them."""
    rng = np.random.default_rng([block.sample, block.stage == "estimation", block.draw_start])
    right = int(rng.binomial(block.draws, PROBABILITY[block.sample]))
    return block, 0, {k: count for k, count in ((0, right), (1, block.draws - right)) if count}


def drive(store, asked, standing, rng, stop_after=None):
    """Commit blocks in a random order as the sampler wants them; perhaps stop in the midst."""
    name = place_order(store, asked)
    sampler = Sampler(store, name, asked, LENGTHS, 0.5, set(standing), lambda blocks: map(votes_of, blocks))
    waiting, given = sampler.start(), 0
    while waiting and given != stop_after:
        block = waiting.pop(int(rng.integers(len(waiting))))
        assert block not in standing, "given out twice"
        standing.add(block)
        waiting += sampler.take([votes_of(block)])
        given += 1
    return sampler


ADAPTIVE = {
    "skip": {"skip_wrong": True},
    "planned": {"mode": "planned", "max_acr_loss": 0.01, "n0": 100},
    "planned, skip": {"mode": "planned", "max_acr_loss": 0.01, "n0": 100, "skip_wrong": True},
    "grid": {"mode": "grid", "radii": [0.0, 0.25, 0.5, 0.75]},
    "grid, skip": {"mode": "grid", "radii": [0.0, 0.25, 0.5, 0.75], "skip_wrong": True},
}


@pytest.mark.parametrize("changes", ADAPTIVE.values(), ids=ADAPTIVE.keys())
def test_decisions_depend_on_committed_votes_alone(tmp_path, changes):
    """In any order of arrival, with any interruption, the same blocks are drawn; and far fewer than all."""
    asked = Order(**{"samples": list(PROBABILITY), "n0": 10, "n": 10_000, "alpha": 0.001, **changes})
    found = []
    for seed, stops in ((0, []), (1, [3]), (2, [7, 60, 120]), (3, [1, 1, 1])):
        store, standing, rng = FolderStore(str(tmp_path / str(seed))), set(), np.random.default_rng(seed)
        for stop in stops:
            drive(store, asked, standing, rng, stop)
        assert not drive(store, asked, standing, rng).open
        before = len(standing)
        drive(store, asked, standing, rng)
        assert len(standing) == before
        found.append(standing)
    assert all(blocks == found[0] for blocks in found)
    everything = set(blocks_of(asked, LENGTHS))
    assert found[0] < everything
    if asked.skip_wrong:
        assert {block.stage for block in found[0] if block.sample == 3} == {"selection"}


def test_a_plan_is_made_once_and_growing_keeps_it(tmp_path):
    store, rng, standing = FolderStore(str(tmp_path)), np.random.default_rng(0), set()
    small = Order(samples=[0, 1], n0=100, n=10_000, alpha=0.001, mode="planned", max_acr_loss=0.01)
    drive(store, small, standing, rng)
    grown = small.model_copy(update={"samples": [0, 1, 2, 4]})
    drive(store, grown, standing, rng)
    plans = read_plans(store)
    assert {sample: plans["002"][sample] for sample in (0, 1)} == plans["001"]
    assert post_hoc_samples(read_orders(store), "002", plans) == set()
    for sample, n in plans["002"].items():
        assert {b.draw_stop for b in standing if b.sample == sample and b.stage == "estimation"} == {
            *range(100, n + 1, 100)
        }
    store.replace("orders/002/plan.json", json.dumps({**plans["002"], 1: 300}).encode())
    assert post_hoc_samples(read_orders(store), "002", read_plans(store)) == {1}


def test_a_plan_saves_draws_at_the_loss_that_it_was_allowed():
    """On a population of known p_A: expected ACR of the plan against n of each, exactly, over the binomial law."""
    rng, n0, n, alpha, sigma = np.random.default_rng(4), 1000, 100_000, 0.001, 0.5
    p = np.concatenate([rng.beta(8, 1, 150), np.full(50, 1.0)])
    pilots = rng.binomial(n0, p)
    losses = []
    for allowed in (0.005, 0.02, 0.1):
        draws = np.array(plan_draws(pilots, n0=n0, n=n, alpha=alpha, sigma=sigma, length=1000, max_acr_loss=allowed))
        assert (draws % 1000 == 0).all()
        assert draws.max() <= n
        reached, best = np.zeros(len(p)), certified_radius(np.round(p * n).astype(int), n, alpha, sigma)
        some = draws > 0
        reached[some] = certified_radius(np.round(p[some] * draws[some]).astype(int), draws[some], alpha, sigma)
        losses.append((1 - reached.sum() / best.sum(), draws.sum() / (n * len(p))))
        assert losses[-1][0] <= 1.5 * allowed
    shares = [share for _, share in losses]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.5 * shares[0] < 0.5


def test_a_planned_bound_errs_at_most_alpha_times():
    """The draws follow the pilot, and the bound is of fresh ones: at its level whatever the plan made of the pilot."""
    rng, paths, alpha, p, sigma = np.random.default_rng(6), 20_000, 0.05, 0.84, 1.0
    pilots = rng.binomial(100, p, paths)
    n = np.array(plan_draws(pilots, n0=100, n=2000, alpha=alpha, sigma=sigma, length=100, max_acr_loss=0.05))
    assert len(set(n.tolist())) > 3
    drawn = n > 0
    radii = certified_radius(rng.binomial(n[drawn], p), n[drawn], alpha, sigma)
    assert alpha / 3 < (radii > norm.ppf(p)).mean() <= 1.1 * alpha


def test_looks_of_a_split_alpha_are_one_claim(tmp_path):
    store, split = FolderStore(str(tmp_path)), {200: 0.0005, 400: 0.0005}
    names = [
        place_order(store, order([0, 1], n=n, alpha=alpha)) for n, alpha in ((200, split), (400, split), (400, 0.001))
    ]
    orders = read_orders(store)
    assert [post_hoc_samples(orders, name, {}) for name in names] == [set(), set(), {0, 1}]
    assert orders["001"].alpha == split
    assert orders["001"].total_alpha == 0.001


@pytest.mark.parametrize(
    ("sampling", "certificate", "message"),
    [
        ({"mode": "grid", "radii": [0.0]}, "multiclass", "does not go with sampling.mode = 'grid'"),
        ({"mode": "planned"}, "predict", "does not go with sampling.mode = 'planned'"),
        ({"skip_wrong": True}, "predict", "skip_wrong = true does not go"),
    ],
)
def test_what_does_not_go_together_is_refused(raw_spec, sampling, certificate, message):
    raw_spec["smoothing"]["n0"] = 50
    with pytest.raises(UserError, match=message):
        order_of(load_spec(raw_spec | {"sampling": sampling}), [0], certificate)
