"""Orders and sampling: which blocks an order needs, and for which samples it is a second look."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from diffsmooth.pipeline.block import Block
from diffsmooth.pipeline.certify.bounds import certified_radius
from diffsmooth.pipeline.certify.certificates import certify
from diffsmooth.pipeline.certify.orders import (
    Order,
    OrderKeys,
    broken_links,
    order_of,
    place_order,
    post_hoc_samples,
    read_orders,
)
from diffsmooth.pipeline.certify.planning import plan_draws, read_plan, read_plans, settle_plan
from diffsmooth.pipeline.certify.sampling import Sampler
from diffsmooth.pipeline.errors import UserError
from diffsmooth.pipeline.spec import BlockLengths, load_spec
from diffsmooth.pipeline.storage.store import FolderStore
from diffsmooth.pipeline.votes.blocks import Votes

LENGTHS = BlockLengths(selection=10, estimation=100)


def store_of(folder):
    """A folder with a run.json, which the first order continues."""
    store = FolderStore(str(folder))
    store.put_if_absent("run.json", b"{}")
    return store


def order(samples, n=200, **changes):
    return Order(samples=list(samples), n0=10, n=n, **{"alpha": 0.001, **changes})


def test_blocks_cover_every_draw_once():
    blocks = list(order([3, 5], n=300).blocks(LENGTHS))
    assert len(set(blocks)) == len(blocks) == 2 * (1 + 3)
    for sample in (3, 5):
        draws = [
            j
            for b in blocks
            if b.sample == sample and b.stage == "estimation"
            for j in range(b.draw_start, b.draw_stop)
        ]
        assert draws == list(range(300))


def test_growing_needs_only_what_is_missing():
    def missing_blocks(order, lengths, committed):
        return Sampler(order, lengths, 1.0, committed=committed, read=lambda blocks: 1 / 0).start()

    committed = set(order([0], n=200).blocks(LENGTHS))
    assert missing_blocks(order([0], n=200), LENGTHS, committed) == []
    assert missing_blocks(order([0], n=300), LENGTHS, committed) == [Block(0, "estimation", 200, 300)]
    assert {block.sample for block in missing_blocks(order([0, 1]), LENGTHS, committed)} == {1}


def test_orders_are_numbered_and_equal_ones_are_one(tmp_path):
    store = store_of(tmp_path)
    assert [place_order(store, one) for one in (order([0]), order([0, 1]), order([0]))] == ["001", "002", "001"]
    assert list(read_orders(store)) == ["001", "002"]


def test_only_second_looks_are_post_hoc(tmp_path):
    store = store_of(tmp_path)
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


def test_an_interrupted_order_keeps_its_place(tmp_path):
    """A planned order that was interrupted before its plan is still the first look, before and after it is resumed."""
    store = store_of(tmp_path)
    planned = order([0, 1], mode="planned", max_acr_loss=0.01)
    names = [place_order(store, one) for one in (planned, order([0, 1]))]
    for plans in ({}, {"001": {0: 100, 1: 200}}):
        assert [post_hoc_samples(read_orders(store), name, plans) for name in names] == [set(), {0, 1}]


def test_skipping_is_another_claim_only_for_a_plan():
    planned = order([0], mode="planned", max_acr_loss=0.01)
    assert planned.claim != planned.changed(skip_wrong=True).claim
    assert order([0]).claim == order([0], skip_wrong=True).claim


def test_an_order_is_placed_after_a_gap(tmp_path):
    store = store_of(tmp_path)
    for one in (order([0]), order([0, 1])):
        place_order(store, one)
    (tmp_path / "orders" / "001.json").unlink()
    assert place_order(store, order([0, 1, 2])) == "003"
    assert list(broken_links(store, read_orders(store))) == ["order 001 is missing, but order 002 exists"]


def test_orders_are_a_chain_from_run_json(tmp_path):
    store = store_of(tmp_path)
    for one in (order([0]), order([0, 1]), order([0, 1, 2])):
        place_order(store, one)
    assert list(broken_links(store, read_orders(store))) == []
    for key, words in (
        ("run.json", "run.json was changed after order 001"),
        ("orders/002.json", "order 002 was changed"),
    ):
        before = store.read(key)
        store.replace(key, before + b" ")
        assert [words in line for line in broken_links(store, read_orders(store))] == [True]
        store.replace(key, before)


def test_another_data_set_is_refused(tmp_path):
    store = store_of(tmp_path)
    place_order(store, order([0], data_id="a" * 64))
    place_order(store, order([0, 1]))  # an order of an earlier version has no data_id
    with pytest.raises(UserError, match="the data set differs from that of order 001"):
        place_order(store, order([0, 2], data_id="b" * 64))


def test_order_of_a_spec(raw_spec):
    found = order_of(load_spec(raw_spec), range(2))
    assert (found.samples, found.n0, found.n, found.alpha) == ([0, 1], 50, 200, 0.001)


PROBABILITY = {0: 0.999, 1: 0.9, 2: 0.55, 3: 0.2, 4: 0.97}  # of class 0, the label of all


def votes_of(block):
    """The votes of a block: the same for every process that casts it."""
    rng = np.random.default_rng([block.sample, block.stage == "estimation", block.draw_start])
    right = int(rng.binomial(block.draws, PROBABILITY[block.sample]))
    return Votes(block, 0, {k: count for k, count in ((0, right), (1, block.draws - right)) if count})


def drive(store, asked, committed, rng, stop_after=None):
    """Commit blocks in a random order as the sampler hands them out; perhaps stop half-way."""
    name = place_order(store, asked)
    sampler = Sampler(
        asked,
        LENGTHS,
        0.5,
        committed=set(committed),
        read=lambda blocks: map(votes_of, blocks),
        plan=read_plan(store, name) if asked.mode == "planned" else None,
        settle_plan=lambda pilots: settle_plan(store, name, asked, LENGTHS, 0.5, pilots),
    )
    waiting, given = sampler.start(), 0
    while waiting and given != stop_after:
        block = waiting.pop(int(rng.integers(len(waiting))))
        assert block not in committed, "given out twice"
        committed.add(block)
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
def test_decisions_depend_only_on_committed_votes(tmp_path, changes):
    """The same blocks are drawn in any order of arrival and with any interruption, and far fewer than all."""
    asked = Order(**{"samples": list(PROBABILITY), "n0": 10, "n": 10_000, "alpha": 0.001, **changes})
    found = []
    for seed, stops in ((0, []), (1, [3]), (2, [7, 60, 120]), (3, [1, 1, 1])):
        store, committed, rng = store_of(tmp_path / str(seed)), set(), np.random.default_rng(seed)
        for stop in stops:
            drive(store, asked, committed, rng, stop)
        assert not drive(store, asked, committed, rng).open
        before = len(committed)
        drive(store, asked, committed, rng)
        assert len(committed) == before
        found.append(committed)
    assert all(blocks == found[0] for blocks in found)
    everything = set(asked.blocks(LENGTHS))
    assert found[0] < everything
    if asked.skip_wrong:
        assert {block.stage for block in found[0] if block.sample == 3} == {"selection"}


def table_of(blocks):
    rows = [(*votes_of(one).block, 0, k, count) for one in blocks for k, count in votes_of(one).counts.items()]
    return pd.DataFrame(rows, columns=["sample", "stage", "draw_start", "draw_stop", "label", "class", "votes"])


@pytest.mark.parametrize("earlier", [{"n0": 50, "n": 100}, {"n0": 300, "n": 100}, {"n0": 10, "n": 10_000}], ids=str)
@pytest.mark.parametrize("changes", ADAPTIVE.values(), ids=ADAPTIVE.keys())
def test_draws_of_an_earlier_order_change_no_certificate(tmp_path, changes, earlier):
    """The earlier order has looked at more selection draws, or drawn all of the estimation."""
    asked = Order(**{"samples": list(PROBABILITY), "n0": 20, "n": 10_000, "alpha": 0.001, **changes})
    found = []
    for name, before in (("001", []), ("002", [Order(samples=asked.samples, alpha=0.001, **earlier)])):
        store, committed, rng = store_of(tmp_path / name), set(), np.random.default_rng(0)
        for one in (*before, asked):
            sampler = drive(store, one, committed, rng)
        assert not sampler.open
        plan = read_plan(store, name) if asked.mode == "planned" else None
        rows = certify(table_of(committed), asked, sigma=0.5, num_classes=2, block=LENGTHS, plan=plan)
        found.append(rows[["sample", "status", "prediction", "p_A_lower", "radius", "correct"]])
    assert not (found[0]["status"] == "incomplete").any()
    pd.testing.assert_frame_equal(*found)


def test_a_plan_is_made_once_and_growing_keeps_it(tmp_path):
    store, rng, committed = store_of(tmp_path), np.random.default_rng(0), set()
    small = Order(samples=[0, 1], n0=100, n=10_000, alpha=0.001, mode="planned", max_acr_loss=0.01)
    drive(store, small, committed, rng)
    grown = small.model_copy(update={"samples": [0, 1, 2, 4]})
    drive(store, grown, committed, rng)
    plans = read_plans(store)
    assert {sample: plans["002"][sample] for sample in (0, 1)} == plans["001"]
    assert post_hoc_samples(read_orders(store), "002", plans) == set()
    for sample, n in plans["002"].items():
        assert {b.draw_stop for b in committed if b.sample == sample and b.stage == "estimation"} == {
            *range(100, n + 1, 100)
        }
    store.replace(OrderKeys("002").plan, json.dumps({**plans["002"], 1: 300}).encode())
    assert post_hoc_samples(read_orders(store), "002", read_plans(store)) == {1}


def test_a_plan_saves_draws_within_the_allowed_loss():
    """On a population of known p_A, the expected ACR of the plan against that of n draws for each sample."""
    rng, n0, n, alpha, sigma = np.random.default_rng(4), 1000, 100_000, 0.001, 0.5
    p = np.concatenate([rng.beta(8, 1, 150), np.full(50, 1.0)])
    pilots = rng.binomial(n0, p)
    losses = []
    for allowed in (0.005, 0.02, 0.1):
        asked = Order(samples=[0], n0=n0, n=n, alpha=alpha, mode="planned", max_acr_loss=allowed)
        draws = np.array(plan_draws(pilots, asked, sigma=sigma, length=1000))
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
    """The plan depends on the pilot, but the bound uses fresh draws, so it keeps its level."""
    rng, paths, alpha, p, sigma = np.random.default_rng(6), 20_000, 0.05, 0.84, 1.0
    pilots = rng.binomial(100, p, paths)
    asked = Order(samples=[0], n0=100, n=2000, alpha=alpha, mode="planned", max_acr_loss=0.05)
    n = np.array(plan_draws(pilots, asked, sigma=sigma, length=100))
    assert len(set(n.tolist())) > 3
    drawn = n > 0
    radii = certified_radius(rng.binomial(n[drawn], p), n[drawn], alpha, sigma)
    assert alpha / 3 < (radii > norm.ppf(p)).mean() <= 1.1 * alpha


def test_looks_of_a_split_alpha_are_one_claim(tmp_path):
    store, split = store_of(tmp_path), {200: 0.0005, 400: 0.0005}
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
        ({"mode": "grid", "radii": [0.0]}, "multiclass", "not available in sampling.mode = 'grid'"),
        ({"mode": "planned"}, "predict", "not available in sampling.mode = 'planned'"),
        ({"skip_wrong": True}, "predict", "skip_wrong = true cannot be combined"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(raw_spec, sampling, certificate, message):
    raw_spec["smoothing"]["n0"] = 50
    with pytest.raises(UserError, match=message):
        order_of(load_spec(raw_spec | {"sampling": sampling}), [0], certificate)
